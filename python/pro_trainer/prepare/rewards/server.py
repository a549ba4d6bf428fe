"""A reward model behind an HTTP server: vLLM's ``/score``, ``/classify`` and ``/pooling``.

``/score`` is given prompt and completion as two texts (a cross-encoder). The other two are given
the conversation, which the server puts into its model's chat template, or prompt and completion
joined as one text where strings are to stay strings (``chat_template=off``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import turns
from pro_trainer.prepare.answers import Failure, ServerError
from pro_trainer.prepare.client import Client
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.rewards.base import (
    PATHS,
    Score,
    Scored,
    Scorer,
    Spec,
    as_score,
    excerpt,
    readable,
)
from pro_trainer.prepare.tryout import hasty, models_of

_FIRST = RankedList(("Say hello.",), ("Hello!", "No."))


class Asked(Scorer):
    """A reward that is asked of a server; inside its context requests can be sent."""

    def __init__(self, spec: Spec, options: PrepareArguments) -> None:
        """Take the address. ValueError: a URL or a key that cannot be used."""
        super().__init__(spec)
        asked = replace(options, api_key_env=options.reward_api_key_env)
        self._written = f"reward {spec.part + '@' if spec.part else ''}{spec.target}"
        self._spec, self._options = spec, options
        self._model = {"model": spec.part} if spec.part else {}
        self._quick = hasty(asked)
        self._client = self._lasting = Client([spec.target], asked)
        self._trying = False

    def identity(self) -> dict[str, Any]:
        """The models that the server lists, where none is named; ServerError where none answers."""
        if self._spec.part:
            return {}
        base = self._spec.target.removesuffix(PATHS[self._spec.kind])
        with Client([base if base.endswith("/v1") else f"{base}/v1"], self._quick) as client:
            try:
                models = models_of(client)
            except ServerError as error:
                if not error.for_all:  # else it has no such list
                    raise ServerError(f"{self._written}: {error}") from error
                models = []
        return {f"the models of {self._written}": models} if models else {}

    def __enter__(self) -> Asked:
        """Start the client, and have a first text scored: what is wrong with all shows now."""
        with Client([self._spec.target], self._quick) as self._client:
            self._trying = True
            self.score([(_FIRST, completion) for completion in _FIRST.completions])
            self._trying = False
        self._client = self._lasting.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self._client.__exit__(*exception)
        self.failures.update(self._client.failures)

    def _ask(self, bodies: Iterable[dict[str, Any]]) -> list[Any]:
        """The answers in order; a ``Failure`` for a text refused, errors for all other failures."""
        try:
            answers = list(self._client.ask(("", self._model | body) for body in bodies))
        except ServerError as error:
            raise ServerError(f"{self._written}: {error}", error.for_all) from error
        for answer in answers:
            refused = isinstance(answer, Failure) and answer.reason.startswith("HTTP 4")
            if isinstance(answer, Failure) and (self._trying or not refused):
                raise ValueError(f"{self._written}: {answer.reason} ({answer.detail})")
        return answers


def by_list(texts: Sequence[Scored]) -> list[list[Scored]]:
    """The texts of each list, which stand together."""
    return [list(group) for _, group in groupby(texts, key=lambda text: id(text[0]))]


class Server(Asked):
    """Scores that a reward model behind a server gives."""

    def score(self, texts: Sequence[Scored]) -> list[Score]:
        """One request for each list of ``/score``, else one for each completion."""
        kind = self._spec.kind
        if kind == "score":
            asked = by_list(texts)
            bodies = [_pairs(group) for group in asked]
        else:
            asked = [[text] for text in texts]
            bodies = [self._conversation(*text) for text in texts]
        scores = []
        for group, answer in zip(asked, self._ask(bodies), strict=True):
            if isinstance(answer, Failure):
                scores += [Score(None, (f"refused by the server, {answer.reason}",))] * len(group)
                continue
            try:
                values = _values(answer, len(group), kind)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ValueError(
                    f"{self._written}: {excerpt(*group[0])}: an answer of vLLM's /{kind} "
                    f"with {len(group)} of one number each was expected, got {answer!r:.200} "
                    f"({error})"
                ) from error
            scores += [Score(value) for value in values]
        return scores

    def _conversation(self, ranked: RankedList, completion: Text) -> dict[str, Any]:
        prompt = ranked.prompts[0]
        if isinstance(prompt, str) and self._options.chat_template == "off":
            return {"input": prompt + str(completion)}
        messages = [*(turns(prompt) if isinstance(prompt, str) else prompt)]
        if isinstance(completion, str):
            completion = ({"role": "assistant", "content": completion.strip()},)
        body: dict[str, Any] = {"messages": [*messages, *completion]}
        if ranked.template:
            body["chat_template_kwargs"] = dict(ranked.template)
        return body


def _pairs(texts: Sequence[Scored]) -> dict[str, Any]:
    """The prompt of one list with each of its completions."""
    return {
        "text_1": readable(texts[0][0].prompts[0]),
        "text_2": [readable(completion) for _, completion in texts],
    }


def _values(answer: Any, count: int, kind: str) -> list[float]:
    """The numbers of an answer, in the order of what was sent."""
    items = sorted(answer["data"], key=lambda item: item["index"])
    if [item["index"] for item in items] != list(range(count)):
        raise ValueError(f"{len(items)} of {count}")
    return [as_score(_number(item, kind), "the score") for item in items]


def _number(item: dict[str, Any], kind: str) -> Any:
    """The one number of an item; of one for each token the last, which saw the whole text."""
    if kind == "score":
        return item["score"]
    value = item["probs" if kind == "classify" else "data"]
    if kind == "pooling" and isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    if isinstance(value, list):
        (value,) = value
    return value
