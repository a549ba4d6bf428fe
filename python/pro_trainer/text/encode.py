"""Ranked lists -> token ids, with the end of the prompt found by ids.

The prompt is tokenised alone, and whole with each completion; where the whole begins with the
prompt's ids, the completion is the rest: what the model would see as one text. Where tokens merge
across the boundary the completion is tokenised apart, and counted. Special tokens of the front
(BOS) stand before the prompt, none after it. A conversation goes through the chat template, with
its generation prompt, and the template alone ends its turns; a plain completion ends with EOS.

Length rule: a prompt keeps ``max_prompt_length`` tokens, its last (or first) ones and its BOS, the
same for all its candidates; a completion keeps the first ``max_length - len(prompt)``. One that is
cut has no EOS. What a list becomes depends on neither other lists nor other candidates.

Legend: ``n`` candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from typing import TYPE_CHECKING

from pro_trainer.data.fields import DataError, Text
from pro_trainer.data.formats import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.train.config import ListOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = "tokens merge across it, so the completion is tokenised apart"
RENDERED = "the chat template renders it differently before a reply, so it ends where they agree"
_LISTS_AT_ONCE = 64  # fast tokenizers take texts in batches, on all cores


@dataclass(frozen=True)
class TokenizedList:
    """A ranked list as token ids, already cut to length.

    Attributes:
        prompts: 1 (shared by all) or n lists of at least one id.
        completions: n lists of at least one id.
        rewards: n numbers; None: the completions stand best first.
        sft_index: the completion that carries the SFT term; None: the best.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float] | None
    sft_index: int | None

    @property
    def length(self) -> int:
        """Ids of all prompts and completions."""
        return sum(map(len, self.prompts)) + sum(map(len, self.completions))


def tokenize_lists(
    lists: Iterable[RankedList],
    tokenizer: PreTrainedTokenizerBase,
    options: ListOptions,
    report: DataReport,
    append_eos: bool = True,
) -> Iterator[TokenizedList]:
    """Tokenise a stream of lists that ``report`` has counted, counting on.

    A list goes, counted, where it does not fit and ``too_long="drop"``, or where completions are
    equal as ids or have none.

    Args:
        lists: as ``read_lists`` gives them.
        tokenizer: of the model; needs a chat template for conversations.
        options: the length rule, and what happens to a bad record.
        report: the lists' own.
        append_eos: end each plain completion with EOS, unless it is cut.

    Raises:
        ValueError: no EOS token to append, or special tokens that fill ``max_prompt_length``.
        DataError: a conversation without a chat template, or one that the template refuses (unless
            ``on_bad_line="skip"``); an empty prompt with neither BOS nor EOS to stand for it.
    """
    return _Tokenization(tokenizer, options, report, append_eos).stream(lists)


@dataclass(frozen=True)
class _Pieces:
    """A list's texts: ``whole[i]`` is its prompt followed by ``completions[i]``."""

    ranked: RankedList
    prompts: list[str]
    whole: list[str]
    completions: list[str]
    plain: bool


class _Tokenization:
    """The tokenizer's special tokens and the options, looked up once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: ListOptions,
        report: DataReport,
        append_eos: bool,
    ) -> None:
        name, eos = type(tokenizer).__name__, tokenizer.eos_token_id
        if append_eos and eos is None:
            raise ValueError(
                f"{name} has no EOS token to end a completion with; set tokenizer.eos_token, or "
                "append_eos=False"
            )
        self.tokenizer, self.options, self.report = tokenizer, options, report
        self.end = [eos] if append_eos else []
        self.front = _front(tokenizer)
        if len(self.front) > options.prompt_limit():
            raise ValueError(
                f"max_prompt_length={options.prompt_limit()} has no room for the "
                f"{len(self.front)} special tokens that {name} puts before a text"
            )

    def stream(self, lists: Iterable[RankedList]) -> Iterator[TokenizedList]:
        """Tokenise in batches of lists."""
        lists = iter(lists)
        while batch := list(islice(lists, _LISTS_AT_ONCE)):
            pieces = [found for ranked in batch if (found := self._pieces(ranked)) is not None]
            ids = self._ids([text for p in pieces for text in (*p.prompts, *p.whole)])
            split = [self._split(p, ids) for p in pieces]
            self._tokenize_merged(pieces, split)
            for p, (prompts, completions) in zip(pieces, split, strict=True):
                tokens = self._fit(p, prompts, completions)
                if tokens is not None:
                    yield tokens

    def _pieces(self, ranked: RankedList) -> _Pieces | None:
        """The texts to tokenise; None, counted, where the chat template refuses them."""
        prompts = list(ranked.prompts)
        if isinstance(prompts[0], str):
            each = prompts * len(ranked.completions) if len(prompts) == 1 else prompts
            whole = [p + c for p, c in zip(each, ranked.completions, strict=True)]
            return _Pieces(ranked, prompts, whole, list(ranked.completions), plain=True)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{ranked.where}: a conversation needs a chat template, which "
                f"{type(self.tokenizer).__name__} lacks: set tokenizer.chat_template (a jinja "
                "template), or give prompts and completions as strings"
            )
        from jinja2 import TemplateError

        try:
            return self._rendered(ranked)
        except TemplateError as error:
            message = f"{ranked.where}: the chat template refuses the conversation: {error}"
            if self.options.on_bad_line != "skip":
                raise DataError(message) from None
            self.report.uncount_as_bad(ranked, message)
            return None

    def _rendered(self, ranked: RankedList) -> _Pieces:
        prompts = [self._render(p, add_generation_prompt=True) for p in ranked.prompts]
        n = len(ranked.completions)
        owners = [0] * n if len(prompts) == 1 else range(n)
        whole = [
            self._render((*ranked.prompts[owner], *completion))
            for owner, completion in zip(owners, ranked.completions, strict=True)
        ]
        for owner, text in zip(owners, whole, strict=True):
            if not text.startswith(prompts[owner]):
                prompts[owner] = commonprefix([prompts[owner], text])
                self.report.boundary[RENDERED] += 1
        completions = [
            text[len(prompts[owner]) :] for owner, text in zip(owners, whole, strict=True)
        ]
        return _Pieces(ranked, prompts, whole, completions, plain=False)

    def _render(self, messages: Text, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        if not texts:
            return iter(())
        return iter(
            self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            ).input_ids
        )

    def _split(
        self, pieces: _Pieces, ids: Iterator[list[int]]
    ) -> tuple[list[list[int]], list[list[int] | None]]:
        """Ids of prompts and of completions; None for a completion to be tokenised apart."""
        prompts = list(islice(ids, len(pieces.prompts)))
        completions = []
        for i, whole in enumerate(islice(ids, len(pieces.whole))):
            prompt = prompts[i if len(prompts) > 1 else 0]
            begins = whole[: len(prompt)] == prompt
            completions.append(whole[len(prompt) :] if begins else None)
        return prompts, completions

    def _tokenize_merged(
        self, pieces: Sequence[_Pieces], split: list[tuple[list, list[list[int] | None]]]
    ) -> None:
        """Fill in the completions that have to be tokenised apart, all in one call."""
        missing = [
            (completions, i, p.completions[i])
            for p, (_, completions) in zip(pieces, split, strict=True)
            for i, ids in enumerate(completions)
            if ids is None
        ]
        if missing:
            self.report.boundary[MERGED] += len(missing)
        found = self._ids([text for _, _, text in missing])
        for (completions, i, _), ids in zip(missing, found, strict=True):
            completions[i] = ids

    def _fit(
        self, pieces: _Pieces, prompts: list[list[int]], completions: list[list[int]]
    ) -> TokenizedList | None:
        """The list by the length rule; None, counted, where it is dropped."""
        ranked, options = pieces.ranked, self.options
        if not all(completions):
            return self._drop(ranked, "a completion has no tokens")
        fitted = [self._fit_prompt(pieces, prompt) for prompt in prompts]
        ends = [ids + self.end for ids in completions] if pieces.plain else completions
        rooms = [options.max_length - len(kept) for kept, _ in fitted]
        rooms = rooms * len(ends) if len(rooms) == 1 else rooms
        prompts_cut = sum(length > len(kept) for kept, length in fitted)
        cut = sum(len(end) > room for end, room in zip(ends, rooms, strict=True))
        if (prompts_cut or cut) and options.too_long == "drop":
            return self._drop(ranked, f"longer than max_length={options.max_length}")
        kept = [kept for kept, _ in fitted]
        kept_ends = [end[:room] for end, room in zip(ends, rooms, strict=True)]
        if not _distinct(kept, kept_ends):
            if _distinct(kept, ends):
                return self._drop(ranked, "completions equal once cut to max_length")
            return self._drop(ranked, "completions equal as token ids")
        self.report.prompts_cut += prompts_cut
        self.report.completions_cut += cut
        for _, length in fitted:
            self.report.prompt_lengths.add(length)
        for end in ends:
            self.report.completion_lengths.add(len(end))
        rewards = None if ranked.rewards is None else list(ranked.rewards)
        return TokenizedList(kept, kept_ends, rewards, ranked.sft_index)

    def _fit_prompt(self, pieces: _Pieces, ids: list[int]) -> tuple[list[int], int]:
        """What is kept of a prompt, and how long it was."""
        front, bos = self.front, self.tokenizer.bos_token_id
        if not pieces.plain:  # a template writes its BOS into the text
            front = [bos] if bos is not None and ids[:1] == [bos] else []
            ids = ids[len(front) :]
        if not ids and not front:  # something must predict the first completion token
            start = self.tokenizer.eos_token_id if bos is None else bos
            if start is None:
                raise DataError(
                    f"{pieces.ranked.where}: the prompt is empty, and "
                    f"{type(self.tokenizer).__name__} has neither a BOS nor an EOS token to begin "
                    "with"
                )
            front = [start]
        room = self.options.prompt_limit() - len(front)
        keep_end = self.options.truncation_mode == "keep_end"
        kept = ids[max(0, len(ids) - room) :] if keep_end else ids[:room]
        return front + kept, len(front) + len(ids)

    def _drop(self, ranked: RankedList, why: str) -> None:
        self.report.uncount(ranked, why)


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
