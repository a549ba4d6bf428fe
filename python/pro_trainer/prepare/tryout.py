"""What servers take: each is tried out before any work, for they differ.

One that refuses or ignores ``n`` is asked for one sample at a time. One that refuses ``stop`` is
not told of it; samples are cut here in any case. One that refuses ``seed`` gives other samples at
every run, which is said.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pro_trainer.data.records import RankedList
from pro_trainer.prepare.answers import Failure, ServerError
from pro_trainer.prepare.client import Client, Request
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.served import Answer, Servers, read_answer

_DISPENSABLE = ("n", "stop", "seed")  # fields that a server may refuse
_PROMPT = RankedList(("Name an animal, a city and a number.",), ())
_PATIENCE = 20.0  # seconds


def hasty(options: Any) -> Any:
    """The same ``ServerOptions`` for a server that is tried out: whether it is there shows soon."""
    return replace(options, server_patience=min(options.server_patience, _PATIENCE))


def try_out(options: PrepareArguments) -> tuple[Servers, list[str]]:
    """Ask each server for two short samples, and find out what all of them take.

    Returns:
        What was found, and sentences about what is not as it was asked for.

    Raises:
        ServerError: none answers.
        ValueError: no model named where servers have none or several; a request as the options
            make it is refused.
    """
    urls = [x if urlsplit(x).path.strip("/") else f"{x.rstrip('/')}/v1" for x in options.server]
    models = tuple(options.server_model)
    notes: dict[str, None] = {}
    left_out: dict[str, None] = {}
    absent: list[ServerError] = []
    for url in urls:
        with Client([url], hasty(options)) as client:
            try:
                models = models or (_only_model(client),)
                for model in models:
                    refused, same = _tried(client, Servers((url,), (model,), options))
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
    return Servers(tuple(urls), models, options, tuple(left_out)), list(notes)


def models_of(client: Client) -> list[str]:
    """Names of the models that a server lists, if any; ServerError as of ``Client.ask``."""
    (answer,) = client.ask([("/models", None)])
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (TypeError, KeyError):  # a Failure, or no list of models
        return []


def _only_model(client: Client) -> str:
    """The name of the model that a server has."""
    try:
        names = models_of(client)
    except ServerError as error:
        text = f"{error}: where server_model names the model, this is not asked"
        raise ServerError(text, error.for_all) from None
    if len(names) != 1:
        shown = ", ".join(map(repr, names[:8])) or "none"
        raise ValueError(f"server_model: name one, for the server lists {len(names)}: {shown}")
    return names[0]


def _tried(client: Client, servers: Servers) -> tuple[dict[str, None], bool]:
    """The dispensable fields that a server does not take, and whether two samples are the same."""
    left_out: dict[str, None] = {}
    heat = servers.options.temperature[0]

    def ask(seed: int) -> tuple[Request, Answer | Failure]:
        trial = replace(servers, left_out=tuple(left_out))
        request = trial.request(_PROMPT, *trial.models, n=2, seed=seed, temperature=heat)
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
