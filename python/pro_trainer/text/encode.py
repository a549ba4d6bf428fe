"""Ranked lists, prompts and texts to score -> token ids: the only place where ids are made.

Where a completion begins is found by ids: the prompt is tokenised alone, and whole with each
completion; where the whole begins with the prompt's ids, the completion is the rest: what the model
would see as one text. Where tokens merge across the boundary the completion is tokenised apart, and
counted.

Special tokens: one BOS at the front of the prompt, be it the string, the template or the tokenizer
that puts it there. One EOS at the end of a completion, appended or its own. A chat template ends
its turns itself; white space that it writes behind the end token is left out, since a model that
stops there never writes it.

Legend: ``n`` candidates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import TYPE_CHECKING

from pro_trainer.data.fields import DataError, Message, Text
from pro_trainer.data.lists import select
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.text.cut import cut_prompt
from pro_trainer.text.options import ListOptions
from pro_trainer.text.template import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = "completions tokenised apart, for tokens merge across the prompt's end"
RENDERED = (
    "prompts that end before what the chat template writes for generation, which no reply follows"
)
_LISTS_AT_ONCE = 64  # fast tokenizers take texts in batches, on all cores
_TAIL = 8  # tokens in which white space behind an end token is looked for


@dataclass(frozen=True)
class TokenizedList:
    """A ranked list as token ids, already cut to length.

    Attributes:
        prompts: 1 (shared by all) or n lists of at least one id.
        completions: n lists of at least one id.
        rewards: n numbers; None: the completions stand best first.
        sft_index: the completion that carries the SFT term; None: the best.
        desirable: n bools; None: the best is.
        weight: of the list in the mean over lists.
        cut: what was cut off, as a sentence; None: nothing.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float] | None
    sft_index: int | None
    desirable: list[bool] | None = None
    weight: float = 1.0
    cut: str | None = None

    @property
    def length(self) -> int:
        """Ids of all prompts and completions."""
        return sum(map(len, self.prompts)) + sum(map(len, self.completions))


@dataclass(frozen=True)
class _Pieces:
    """A list's texts: ``whole[i]`` is its prompt followed by ``completions[i]``."""

    ranked: RankedList
    prompts: list[str]
    whole: list[str]
    completions: list[str]
    beyond: list[str] | None  # what the template ends a prompt with that no reply begins with

    @property
    def chat(self) -> bool:
        """Whether the chat template wrote them."""
        return self.beyond is not None


class Encoder:
    """Makes the ids of one tokenizer.

    Args:
        tokenizer: of the model.
        options: the length rule, the template, what happens to a bad record.
        report: counts what becomes of the texts.

    Raises:
        ValueError: ``chat_template="on"`` and a tokenizer without one, no EOS token to append, or
            special tokens that fill the room for the prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: ListOptions | None = None,
        report: DataReport | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options or ListOptions(append_eos=False)
        self.report = report or DataReport()
        self.writer = Writer(tokenizer, self.options, self.report)
        name, eos = type(tokenizer).__name__, tokenizer.eos_token_id
        self.append_eos = self.options.append_eos is not False
        if self.append_eos and eos is None:
            raise ValueError(
                f"{name} has no EOS token to end a completion with; set tokenizer.eos_token, or "
                "append_eos=False"
            )
        self.front = _front(tokenizer)
        if len(self.front) > (room := self.options.prompt_room(self.options.max_length)):
            raise ValueError(
                f"a prompt may have {room} tokens, which has no room for the {len(self.front)} "
                f"special tokens that {name} puts before a text; raise max_length or "
                "max_prompt_length"
            )

    # ---- single texts

    def prompt(
        self, prompt: Text | RankedList, room: int | None = None
    ) -> tuple[list[int], str | None]:
        """Ids to continue from, at most ``room``, and what was cut off.

        ``prompt``: a text, or the (first) prompt of a list, written as the list would be.

        Raises:
            ValueError: messages without a chat template or that it refuses, an empty prompt and no
                token to start with, or a template that does not fit ``room``.
        """
        ranked = _as_list(prompt)
        chat = self.writer.under_template(ranked)
        source = self._source(ranked.prompts[0], chat)
        return self._within(room, source, chat, lambda s: self._prompt_ids(s, ranked, chat))

    def text(
        self, prompt: Text | RankedList, completion: Text, room: int | None = None
    ) -> tuple[list[int], str | None]:
        """Ids of prompt and completion as a reward model reads them, with its own special tokens.

        ``prompt``: as in ``prompt``; what a list's completions hold decides for all of them.

        Raises:
            TypeError: a string as prompt and messages as completion.
            ValueError: as ``prompt``.
        """
        ranked = _as_list(prompt, completion)
        source, literal = ranked.prompts[0], bool(self.options.split_special_tokens)
        if isinstance(source, str) and not isinstance(completion, str):
            raise TypeError("a prompt that is a string needs a completion that is one")
        chat = self.writer.under_template(ranked)

        def ids_of(source: Text) -> list[int]:
            if chat:
                return self._one_bos(self.writer.ids([self._whole(ranked, source, completion)])[0])
            whole = [source + completion]
            return self._one_bos(self.writer.tokenize(whole, literal=literal, special=True)[0])

        return self._within(room, self._source(source, chat), chat, ids_of)

    def _within(
        self, room: int | None, source: Text, chat: bool, ids_of: Callable[[Text], list[int]]
    ) -> tuple[list[int], str | None]:
        with _refusals("the prompt"):
            ids = ids_of(source)
        if room is None or len(ids) <= room:
            return ids, None
        cut = cut_prompt(source, ids, room, ids_of, self.writer, chat, self.front)
        if cut is None:
            raise ValueError(
                f"the chat template alone takes more than the {room} tokens that there are"
            )
        return cut

    # ---- lists

    def lists(self, lists: Iterable[RankedList]) -> Iterator[TokenizedList]:
        """Tokenise a stream of lists that the report has counted, counting on.

        A list goes, counted, where it does not fit and ``too_long="drop"``, or where completions
        are equal as ids or have none.

        Raises:
            DataError: a conversation without a chat template, or one that the template refuses
                (unless ``on_bad_line="skip"``); an empty prompt with neither BOS nor EOS to stand
                for it.
        """
        lists = iter(lists)
        while batch := list(islice(lists, _LISTS_AT_ONCE)):
            pieces = [found for ranked in batch if (found := self._pieces(ranked)) is not None]
            for found in self._tokenized(pieces):
                if (tokens := self._fit(*found)) is not None:
                    yield tokens

    def _pieces(self, ranked: RankedList) -> _Pieces | None:
        """The texts to tokenise; None, counted, where the chat template refuses them."""
        owners = ranked.prompts * (1 if len(ranked.prompts) > 1 else len(ranked.completions))
        texts = list(zip(owners, ranked.completions, strict=True))
        if not self.writer.under_template(ranked):
            whole = [prompt + completion for prompt, completion in texts]
            return _Pieces(ranked, list(ranked.prompts), whole, list(ranked.completions), None)
        try:
            with _refusals(ranked.where):
                turns = [self.writer.turns(prompt) for prompt in ranked.prompts]
                prompts = [self._written(ranked, x, generation=True) for x in turns]
                whole = [self._whole(ranked, *text) for text in texts]
        except DataError as error:
            if self.options.on_bad_line != "skip":
                raise
            self.report.uncount_as_bad(ranked, str(error))
            return None
        places = [0] * len(whole) if len(prompts) == 1 else range(len(whole))
        beyond = [""] * len(prompts)
        for place, text in zip(places, whole, strict=True):
            if not text.startswith(prompts[place]):
                common = commonprefix([prompts[place], text])
                beyond[place] = prompts[place][len(common) :] + beyond[place]
                prompts[place] = common
                self.report.notes[RENDERED] += 1
        completions = [t[len(prompts[i]) :] for i, t in zip(places, whole, strict=True)]
        return _Pieces(ranked, prompts, whole, completions, beyond)

    def _source(self, prompt: Text, chat: bool) -> Text:
        """What is written of a prompt: messages under the template, else the string."""
        return self.writer.turns(prompt) if chat else prompt

    def _written(self, ranked: RankedList, turns: Sequence[Message], generation: bool) -> str:
        """Turns under the template; ``generation``: with the beginning of the reply."""
        strings = isinstance(ranked.prompts[0], str)
        how = {"generation": generation, "from_strings": strings}
        return self.writer.write(turns, ranked.template, **how)

    def _whole(self, ranked: RankedList, prompt: Text, completion: Text) -> str:
        """Prompt and completion under the template."""
        turns = (*self.writer.turns(prompt), *self.writer.reply(completion))
        return self._written(ranked, turns, generation=False)

    def _prompt_ids(
        self, source: Text, ranked: RankedList, chat: bool, beyond: str = ""
    ) -> list[int]:
        text = self._written(ranked, source, generation=True) if chat else source
        ids = self.writer.ids([text.removesuffix(beyond)], chat)[0]
        return self._with_front(ids, ranked, chat)

    def _tokenized(
        self, pieces: Sequence[_Pieces]
    ) -> Iterator[tuple[_Pieces, list[list[int]], list[list[int]]]]:
        """With the ids of prompts and of completions."""
        texts: dict[bool, list[str]] = {True: [], False: []}
        for p in pieces:
            texts[p.chat] += [*p.prompts, *p.whole]
        ids = {chat: iter(self.writer.ids(found, chat)) for chat, found in texts.items()}
        for p in pieces:
            prompts = list(islice(ids[p.chat], len(p.prompts)))
            whole = list(islice(ids[p.chat], len(p.whole)))
            owners = prompts * len(whole) if len(prompts) == 1 else prompts
            completions = [x[len(own) :] for own, x in zip(owners, whole, strict=True)]
            merged = [i for i, own in enumerate(owners) if whole[i][: len(own)] != own]
            apart = self.writer.ids([p.completions[i] for i in merged], p.chat)
            for i, found in zip(merged, apart, strict=True):
                completions[i] = found
                self.report.notes[MERGED] += 1
            yield p, prompts, completions

    # ---- special tokens

    def _with_front(self, ids: list[int], ranked: RankedList, chat: bool) -> list[int]:
        """A prompt with what stands before it: never empty, and never two BOS."""
        if not chat and ids[: len(self.front)] != self.front:
            ids = self.front + ids
        if not ids:  # something must predict the first completion token
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            if bos is None and eos is None:
                raise DataError(
                    f"{ranked.where}: the prompt is empty, and {type(self.tokenizer).__name__} has "
                    "neither a BOS nor an EOS token to begin with"
                )
            ids = [eos if bos is None else bos]
        return self._one_bos(ids)

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def _with_end(self, ids: list[int], chat: bool) -> list[int]:
        """A completion with one EOS at its end."""
        eos, control = self.tokenizer.eos_token_id, self.writer.control_ids
        last = next((i for i in range(1, min(_TAIL, len(ids)) + 1) if ids[-i] in control), 1)
        if last > 1 and not self.tokenizer.decode(ids[1 - last :]).strip():
            ids = ids[: 1 - last]
        while eos is not None and ids[-2:] == [eos, eos]:
            ids = ids[:-1]
        if self.append_eos and not chat and ids[-1] != eos:
            return [*ids, eos]
        return ids

    # ---- length

    def _fit(
        self, p: _Pieces, prompts: list[list[int]], completions: list[list[int]]
    ) -> TokenizedList | None:
        """The list by the length rule; None, counted, where it is dropped."""
        ranked, options = p.ranked, self.options
        if not all(completions):
            return self._drop(ranked, "a completion has no tokens")
        ends = [self._with_end(ids, p.chat) for ids in completions]
        if len(prompts) == 1 and len(kept := _first_of_each(ranked, ends)) < len(ends):
            if len(kept) < 2:
                return self._drop(ranked, "completions equal as token ids")
            gone = self.report.dropped_completions
            gone["equals a better one as token ids"] += len(ends) - len(kept)
            fewer = select(ranked, kept)
            self.report.count(ranked, -1)
            self.report.count(fewer)
            ranked, ends = fewer, [ends[i] for i in kept]
        whole_prompts = [self._with_front(ids, ranked, p.chat) for ids in prompts]
        kept, said = [], []
        for i, ids in enumerate(whole_prompts):
            own = ends if len(prompts) == 1 else [ends[i]]
            room = options.prompt_room(max(map(len, own)))
            if len(ids) > room:
                how = {"chat": p.chat, "beyond": p.beyond[i] if p.beyond else ""}
                ids_of = functools.partial(self._prompt_ids, ranked=ranked, **how)
                source = self._source(ranked.prompts[i], p.chat)
                shorter = cut_prompt(source, ids, room, ids_of, self.writer, p.chat, self.front)
                if shorter is None:
                    return self._drop(ranked, "the chat template alone does not fit max_length")
                ids, lost = shorter
                said.append(f"the prompt lost {lost}")
            kept.append(ids)
        rooms = [options.max_length - len(ids) for ids in kept]
        rooms = rooms * len(ends) if len(rooms) == 1 else rooms
        cut = sum(len(end) > room for end, room in zip(ends, rooms, strict=True))
        if (said or cut) and options.too_long == "drop":
            return self._drop(ranked, f"longer than max_length={options.max_length}")
        kept_ends = [end[:room] for end, room in zip(ends, rooms, strict=True)]
        if not _distinct(kept, kept_ends):
            if _distinct(whole_prompts, ends):
                return self._drop(ranked, "completions equal once cut to max_length")
            return self._drop(ranked, "completions equal as token ids")
        self.report.prompts_cut += len(said)
        self.report.completions_cut += cut
        self.report.prompt_lengths.update(map(len, whole_prompts))
        self.report.completion_lengths.update(map(len, ends))
        if cut:
            said.append(f"{cut} of {len(ends)} completions lost their end")
        return TokenizedList(
            kept,
            kept_ends,
            ranked.rewards and list(ranked.rewards),
            ranked.sft_index,
            ranked.desirable and list(ranked.desirable),
            ranked.weight,
            "; ".join(said) or None,
        )

    def _drop(self, ranked: RankedList, why: str) -> None:
        self.report.uncount(ranked, why)


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What a chat template raises, as a DataError."""
    from jinja2 import TemplateError

    try:
        yield
    except DataError:
        raise
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from None


def _as_list(prompt: Text | RankedList, completion: Text | None = None) -> RankedList:
    """A list of this prompt, and of this completion where it is no list."""
    if isinstance(prompt, RankedList):
        return prompt
    return RankedList((prompt,), () if completion is None else (completion,), where="a prompt")


def _first_of_each(ranked: RankedList, ends: Sequence[list[int]]) -> list[int]:
    """Indices of the best of each group of completions with equal ids."""
    first: dict[tuple[int, ...], int] = {}
    for i in ranked.best_first():
        first.setdefault(tuple(ends[i]), i)
    return sorted(first.values())


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens a tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start]
    raise ValueError(
        f"{type(tokenizer).__name__} tokenises 'a' as {ids} with its special tokens and as {bare} "
        "without: cannot tell which of them stand at the front"
    )


def _distinct(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> bool:
    owners = prompts if len(prompts) > 1 else prompts * len(completions)
    keys = {(tuple(p), tuple(c)) for p, c in zip(owners, completions, strict=True)}
    return len(keys) == len(completions)
