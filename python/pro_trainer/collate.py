"""From ranked lists to batches: token ids, padding, rewards and the ``Layout``, all on the CPU.

Prompt and completion are tokenised apart and their ids joined, so the boundary between them is
exact. Position t predicts token t + 1: the last prompt token predicts the first completion token.

Length rule: the prompt keeps its last ``max_prompt_length`` tokens (and its BOS, where the
tokenizer sets one), the same for all its candidates. A completion, with EOS at its end, keeps the
first ``max_length - len(prompt)`` tokens; one that is cut has no EOS. What a list becomes depends
on neither its batch nor its other candidates.

Legend: ``B`` prompts, ``n`` candidates, ``T`` tokens, ``S`` sequences present (``B * n`` or fewer).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pro_kernels as pk
from pro_trainer.config import EvalConfig
from pro_trainer.data import DataError, DataReport, RankedList

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenizedList:
    """A ranked list as token ids, already cut to length."""

    prompt: list[int]
    completions: list[list[int]]
    rewards: tuple[float, ...] | None


@dataclass(frozen=True)
class Batch:
    """Padded sequences of B prompts and what the loss needs to know about them.

    Attributes:
        input_ids: (S, T) int64; those of a prompt are consecutive, absent candidates have no row.
        attention_mask: (S, T) int64, 1 on tokens and 0 on padding (which is on the right).
        layout: the scored rows of the flattened (S * T, H) hidden states.
        rewards: (B, n) float32, 0 where a candidate is absent; descending ranks without rewards.
        candidate_mask: (B, n) bool, whether the candidate is there.
        by_order: whether the lists have no rewards, only their order.
    """

    input_ids: Tensor
    attention_mask: Tensor
    layout: pk.Layout
    rewards: Tensor
    candidate_mask: Tensor
    by_order: bool

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``, but for rewards and mask, which the loss reads."""
        names = ("input_ids", "attention_mask", "layout")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def tokenize(
    ranked: RankedList, tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> tuple[TokenizedList, int, int]:
    """Token ids by the length rule, and how many prompts (0 or 1) and completions were cut.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise ValueError(f"{type(tokenizer).__name__} has no EOS token, which ends a completion")
    prompt = _ids(tokenizer, ranked.prompt)
    start = [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []
    if not prompt and not start:
        start = [eos if bos is None else bos]  # something must predict the first completion token
    room = max_prompt_length - len(start)
    prompt_cut = len(prompt) > room
    prompt = start + prompt[max(0, len(prompt) - room) :]
    ends = [_ids(tokenizer, completion) + [eos] for completion in ranked.completions]
    room = max_length - len(prompt)
    cut = sum(len(end) > room for end in ends)
    return TokenizedList(prompt, [e[:room] for e in ends], ranked.rewards), int(prompt_cut), cut


def tokenize_lists(
    lists: Iterable[RankedList],
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    report: DataReport,
) -> Iterator[TokenizedList]:
    """Tokenise a stream of lists, counting cut ones (dropped under ``too_long="drop"``)."""
    for ranked in lists:
        tokens, prompt_cut, cut = tokenize(
            ranked, tokenizer, config.max_length, config.prompt_limit()
        )
        if (prompt_cut or cut) and config.too_long == "drop":
            report.uncount(ranked, f"longer than max_length={config.max_length}")
            continue
        if cut and not _distinct(tokens):
            report.uncount(ranked, "completions equal once cut to max_length")
            continue
        report.prompts_cut += prompt_cut
        report.completions_cut += cut
        yield tokens


def collate(lists: Sequence[TokenizedList], pad_id: int) -> Batch:
    """Pad lists, all with rewards or all without, to one batch and build its layout.

    Raises:
        ValueError: an empty batch, or one that mixes lists with and without rewards.
    """
    kinds = {tokens.rewards is None for tokens in lists}
    if len(kinds) != 1:
        raise ValueError(
            "a batch needs lists that all have rewards or all have none, got "
            + ("no lists" if not kinds else "both")
        )
    counts = [len(tokens.completions) for tokens in lists]
    sequences = [(tokens.prompt, end) for tokens in lists for end in tokens.completions]
    length = max(len(prompt) + len(end) for prompt, end in sequences)
    input_ids = torch.full((len(sequences), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (prompt, end) in enumerate(sequences):
        first, last = len(prompt), len(prompt) + len(end)
        input_ids[row, :last] = torch.tensor(prompt + end)
        attention_mask[row, :last] = 1
        targets[row, first - 1 : last - 1] = torch.tensor(end)
    rewards = torch.zeros(len(lists), max(counts))
    candidate_mask = torch.zeros(len(lists), max(counts), dtype=torch.bool)
    for row, (tokens, n) in enumerate(zip(lists, counts, strict=True)):
        values = range(n - 1, -1, -1) if tokens.rewards is None else tokens.rewards
        rewards[row, :n] = torch.tensor(list(values), dtype=torch.float32)
        candidate_mask[row, :n] = True
    layout = pk.Layout.from_packed(
        targets.flatten(), torch.arange(len(sequences) + 1) * length, counts
    )
    return Batch(input_ids, attention_mask, layout, rewards, candidate_mask, kinds.pop())


def batches(
    lists: Sequence[TokenizedList],
    config: EvalConfig,
    pad_id: int,
    shuffle_seed: int | None = None,
) -> Iterator[Batch]:
    """One pass over the lists; a batch holds one kind (rewards or order), the last may be short."""
    order = list(range(len(lists)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    waiting: dict[bool, list[TokenizedList]] = {False: [], True: []}
    for i in order:
        queue = waiting[lists[i].rewards is None]
        queue.append(lists[i])
        if len(queue) == config.batch_size:
            yield collate(queue, pad_id)
            queue.clear()
    for queue in waiting.values():
        if queue:
            yield collate(queue, pad_id)


def num_batches(lists: Sequence[TokenizedList], batch_size: int) -> int:
    """How many batches one pass gives."""
    by_order = sum(tokens.rewards is None for tokens in lists)
    return -(-by_order // batch_size) + -(-(len(lists) - by_order) // batch_size)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up the rows; padding is never attended to or scored, so any id will do."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def split_held_out(
    lists: Sequence[TokenizedList], fraction: float, seed: int
) -> tuple[list[TokenizedList], list[TokenizedList]]:
    """Training and held-out lists; lists with the same prompt are never on both sides.

    Raises:
        DataError: too few different prompts to hold any out.
    """
    prompts = sorted({tuple(tokens.prompt) for tokens in lists})
    random.Random(seed).shuffle(prompts)
    if fraction > 0 and len(prompts) < 2:
        raise DataError(
            f"eval_fraction={fraction} needs at least 2 different prompts, got {len(prompts)}; "
            "give --eval_data or --eval_fraction 0"
        )
    held = set(prompts[: max(1, round(fraction * len(prompts)))] if fraction > 0 else [])
    train = [tokens for tokens in lists if tuple(tokens.prompt) not in held]
    return train, [tokens for tokens in lists if tuple(tokens.prompt) in held]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _distinct(tokens: TokenizedList) -> bool:
    return len({tuple(end) for end in tokens.completions}) == len(tokens.completions)
