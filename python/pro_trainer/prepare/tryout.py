"""What servers take: each is tried out before any work, for they differ.

One that refuses or ignores ``n`` is asked for one sample at a time. One that refuses ``stop`` is
not told of it; samples are cut here in any case. One that refuses ``seed`` gives other samples at
every run, which is said.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pro_trainer.data.records import RankedList
from pro_trainer.prepare.answers import ClientOptions, Failure, ServerError
from pro_trainer.prepare.client import Client, Request
from pro_trainer.prepare.options import SamplingOptions
from pro_trainer.prepare.served import Answer, Api, Servers, read_answer

_DISPENSABLE = ("n", "stop", "seed")  # fields that a server may refuse
_TRY_OUT_SECONDS = 20.0


def try_out(
    urls: Sequence[str],
    models: Sequence[str],
    api: Api,
    fields: Mapping[str, Any],
    sampling: SamplingOptions,
    options: ClientOptions,
) -> tuple[Servers, list[str]]:
    """Ask each server for two short samples, and find out what all of them take.

    Args:
        urls: base URLs; /v1 is appended to one without a path.
        models: their names; none: the one that the servers have.
        api: which of the two APIs.
        fields: further fields of every request.
        sampling: how samples will be asked for.
        options: how servers are asked.

    Returns:
        What was found, and sentences about what is not as it was asked for.

    Raises:
        ServerError: none answers.
        ValueError: a bad URL, no model named where servers have none or several; a request as the
            options make it is refused.
    """
    urls = [url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1" for url in urls]
    quick = replace(options, patience=min(options.patience, _TRY_OUT_SECONDS))
    notes: dict[str, None] = {}
    found: list[str] = list(models)
    left_out: dict[str, None] = {}
    absent: list[ServerError] = []
    for url in urls:
        with Client([url], quick) as client:
            try:
                found = found or [_only_model(client)]
                for model in found:
                    servers = Servers((url,), (model,), api, fields)
                    refused, same = _tried(client, servers, sampling)
                    left_out |= refused
                    if same:
                        notes[f"{url} gave the same sample twice: it may not sample at all"] = None
            except ServerError as error:
                if error.for_all:
                    raise
                absent.append(error)
                notes[f"left out until it answers: {error}"] = None
    if len(absent) == len(urls):
        raise absent[0]
    if "seed" in left_out:
        notes["a server takes no seeds: other runs will have other samples"] = None
    return Servers(tuple(urls), tuple(found), api, fields, tuple(left_out)), list(notes)


def _only_model(client: Client) -> str:
    """The name of the model that a server has."""
    try:
        (answer,) = client.ask([("/models", None)])
    except ServerError as error:
        text = f"{error}: where server_model names the model, this is not asked"
        raise ServerError(text, error.for_all) from None
    names: list[str] = []
    with contextlib.suppress(TypeError, KeyError):  # a Failure, or no list of models
        names = [str(model["id"]) for model in answer["data"]]
    if len(names) != 1:
        shown = ", ".join(map(repr, names[:8])) or "none"
        raise ValueError(f"server_model: name one, for the server lists {len(names)}: {shown}")
    return names[0]


def _tried(
    client: Client, servers: Servers, options: SamplingOptions
) -> tuple[dict[str, None], bool]:
    """Those of the dispensable fields that a server does not take, and if two samples are the same.

    Raises:
        ValueError: it refuses the request without them, too.
    """
    prompt = RankedList(("Name an animal, a city and a number.",), ())
    left_out: dict[str, None] = {}

    def ask(seed: int) -> tuple[Request, Answer | Failure]:
        trial = replace(servers, left_out=tuple(left_out))
        heat = options.temperatures[0]
        request = trial.request(prompt, *trial.models, options, n=2, seed=seed, temperature=heat)
        return request, *client.ask([request], read_answer)

    while True:
        request, answer = ask(seed=1)
        if isinstance(answer, Answer):
            break
        rest = [name for name in _DISPENSABLE if name in request[1]]
        if not rest or not answer.reason.startswith("HTTP 4"):
            raise ValueError(
                f"server {servers.urls[0]} refuses a request: {answer.reason} {answer.detail}"
            )
        named = re.split("['\"`]", answer.detail)
        left_out[next((name for name in rest if name in named), rest[0])] = None
    choices = answer.choices
    if len(choices) != 2:
        left_out["n"] = None
        _, second = ask(seed=2)
        choices = choices + (second.choices if isinstance(second, Answer) else [])
    return left_out, len(choices) > 1 and len({choice.text for choice in choices}) == 1
