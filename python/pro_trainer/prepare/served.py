"""Candidates from OpenAI-compatible servers: vLLM, SGLang, TGI, llama.cpp, ``transformers serve``.

What a request asks for depends on its list and the options alone, never on the server that answers
or on the order of the answers. What is no sample is counted and never written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from pro_trainer.data.fields import as_list, as_string
from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import turns
from pro_trainer.prepare.answers import Failure, ServerError
from pro_trainer.prepare.client import Client, Request
from pro_trainer.prepare.draws import Samples, as_replies, list_seed, up_to
from pro_trainer.prepare.options import PrepareArguments

_WHOLE = ("stop", "eos", "eos_token", "stop_sequence", None)  # ends of a whole answer
_BAD_ENDS = ("content_filter", "tool_calls", "function_call", "abort", "error")


class _Choice(NamedTuple):
    text: str
    end: str | None


class Answer(NamedTuple):
    """Samples, and how many tokens they are."""

    choices: list[_Choice]
    tokens: int


@dataclass(frozen=True)
class Servers:
    """Servers of one kind, and what they were found to take.

    Attributes:
        urls: with the path of the API, as ``http://host:8000/v1``.
        models: names of the models that are asked.
        options: what they are asked for.
        left_out: of ``n``, ``stop`` and ``seed``, those that a server does not take.
    """

    urls: tuple[str, ...]
    models: tuple[str, ...]
    options: PrepareArguments
    left_out: tuple[str, ...] = ()

    def request(self, ranked: RankedList, model: str, **more: Any) -> Request:
        """A request for samples of a list's prompt; ``more``: n, seed, temperature.

        Raises:
            ValueError: messages, tools or template options for a server that completes texts.
        """
        prompt, options = ranked.prompts[0], self.options
        body = {"model": model, "max_tokens": options.max_new_tokens, "top_p": options.top_p}
        body |= {"stop": list(options.stop)} if options.stop else {}
        body |= more
        for name in self.left_out:
            body.pop(name, None)
        fields = options.further_fields()
        if options.server_api == "completions":
            check_text(ranked)
            return "/completions", body | {"prompt": prompt, **fields}
        messages = turns(prompt) if isinstance(prompt, str) else prompt
        template = dict(ranked.template)
        body |= {"tools": template.pop("tools")} if "tools" in template else {}
        body |= {"chat_template_kwargs": template} if template else {}
        return "/chat/completions", body | {"messages": messages, **fields}


def check_text(ranked: RankedList) -> None:
    """Raise ValueError where the prompt of a list is more than a text that can be completed."""
    if not isinstance(ranked.prompts[0], str) or ranked.template:
        raise ValueError(
            f"{ranked.where}: messages, tools and chat_template_kwargs need server_api chat, it is "
            "completions"
        )


class Served:
    """A model behind servers, which samples the lists of the data in their order.

    Attributes:
        name: in ``sources``.
        tokens: that servers said they made.
    """

    def __init__(self, name: str, model: str, servers: Servers, client: Client) -> None:
        self.name, self.model, self.servers, self.client = name, model, servers, client
        self.options = servers.options
        self.tokens = 0
        self.plan = _plan(self.options, together="n" not in servers.left_out)

    def begin(self, lists: Iterable[RankedList], first_index: int) -> None:
        """Ask for samples of these lists, ``first_index`` being the first one's place."""
        self._answers = self.client.ask(self._requests(lists, first_index), read_answer)

    def samples(self, lists: Sequence[RankedList], first_index: int) -> list[Samples]:
        """Of the next lists, and counts of those that are none.

        Raises:
            ServerError: as of ``Client.ask``; an answer with fewer samples than the servers gave
                when they were tried out.
        """
        return [self._next(ranked) for ranked in lists]

    def _next(self, ranked: RankedList) -> Samples:
        texts: dict[int, str] = {}
        counts: Counter[str] = Counter()
        answers = islice(self._answers, len(self.plan))
        for (_, places), answer in zip(self.plan, answers, strict=True):
            if isinstance(answer, Failure):
                counts[f"failed: {answer.reason}"] += len(places)
                continue
            if len(answer.choices) != len(places):
                raise ServerError(
                    f"a server gave {len(answer.choices)} samples where {len(places)} were asked "
                    "for: servers that share the work must all take n, or none"
                )
            self.tokens += answer.tokens
            for place, choice in zip(places, answer.choices, strict=True):
                if (text := self._usable(choice, counts)) is not None:
                    texts[place] = text
        found = [texts[place] for place in sorted(texts)]
        if self.options.server_api == "chat":
            found = as_replies(ranked, found)
        return found, counts

    def _requests(self, lists: Iterable[RankedList], first_index: int) -> Iterator[Request]:
        for index, ranked in enumerate(lists, first_index):
            seed = list_seed(self.options.seed, self.name, index)  # of 31 bits, which all take
            for temperature, places in self.plan:
                how = {"n": len(places), "seed": seed % 2**31, "temperature": temperature}
                yield self.servers.request(ranked, self.model, **how)
                seed += len(places)  # vLLM gives the samples of one request seeds in a row

    def _usable(self, choice: _Choice, counts: Counter[str]) -> str | None:
        """The text up to a stop string; None, counted, where it is not to be used."""
        text = up_to(self.options.stop, choice.text)
        stopped, keep_cut = text != choice.text, self.options.cut_samples == "keep"
        if choice.end == "length" and not stopped:
            counts["cut" if keep_cut else "failed: cut by length"] += 1
            if keep_cut:
                return text
        elif choice.end in _WHOLE or stopped:
            return text
        else:
            known = choice.end in _BAD_ENDS
            counts[f"failed: ended by {choice.end if known else 'something unknown'}"] += 1
        counts["made"] += 1
        return None


def _plan(options: PrepareArguments, together: bool) -> list[tuple[float, list[int]]]:
    """Requests for one list: a temperature, and which of its samples they give."""
    places, step = range(options.num_samples), len(options.temperature)
    plan = [(heat, list(places[i::step])) for i, heat in enumerate(options.temperature)]
    if not together:
        plan = [(heat, [place]) for heat, of_it in plan for place in of_it]
    return plan


def read_answer(answer: Any) -> Answer:
    """The samples of an answer, in the order of their index. ValueError: it is malformed."""
    if not isinstance(answer, Mapping):
        raise ValueError("not an object")
    choices = as_list(answer.get("choices"), "choices")
    if not choices or not all(isinstance(choice, Mapping) for choice in choices):
        raise ValueError("choices must hold objects")
    if all(isinstance(choice.get("index"), int) for choice in choices):
        choices.sort(key=lambda choice: choice["index"])
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else 0
    return Answer(list(map(_choice, choices)), tokens if isinstance(tokens, int) else 0)


def _choice(choice: Mapping[str, Any]) -> _Choice:
    text = choice.get("text")
    if "message" in choice:
        message = choice["message"]
        if not isinstance(message, Mapping) or message.get("role", "assistant") != "assistant":
            raise ValueError("message must be one of the assistant")
        text = message.get("content")
        text = "" if text is None else text  # calls of tools, a refusal, thoughts that were cut
    end = choice.get("finish_reason")
    return _Choice(as_string(text, "text"), end if end is None else as_string(end, "finish_reason"))
