"""The sequences of a batch in padded coordinates, and the three forms a batch can have.

Everything is first said in padded coordinates, (sequence s, position t): which token stands there.
A form is then one map from (s, t) to a row of the flattened hidden states:

    padded   one row of input_ids for each sequence, filled up on the right
    packed   all sequences end to end in one row
    shared   one row for each prompt: the tokens that all its candidates' prompts begin with, once,
             then the rest of each candidate, one behind the other

No loop goes over tokens, so that a batch takes milliseconds.

Legend: ``B`` prompts, ``S`` sequences present, ``K`` tokens of all sequences, ``T`` tokens of the
longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """All sequences of a batch, end to end; those of a prompt are consecutive.

    Attributes:
        ids: (K,) int64, the tokens.
        sequence: (K,) int64, the sequence s of each token.
        position: (K,) int64, its position t in the sequence.
        starts: (S + 1,) int64, where each sequence begins among the K tokens.
        prompt_lengths: (S,) int64, tokens before the completion.
        shared_lengths: (S,) int64, first tokens that all prompts of the list have in common.
        counts: (B,) int64, candidates of each prompt.
    """

    ids: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    shared_lengths: np.ndarray
    counts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(S,) tokens of each sequence."""
        return np.diff(self.starts)

    @property
    def firsts(self) -> np.ndarray:
        """(B,) the first sequence of each prompt."""
        return np.cumsum(self.counts) - self.counts

    @property
    def number(self) -> np.ndarray:
        """(S,) which candidate of its prompt a sequence is, from 0."""
        return np.arange(len(self.lengths)) - np.repeat(self.firsts, self.counts)

    def shapes(self) -> list[tuple[int, list[int]]]:
        """Of each prompt, the tokens shared and those of each candidate's own."""
        own = (self.lengths - self.shared_lengths).tolist()
        return [
            (shared, own[first : first + n])
            for shared, first, n in zip(
                self.shared_lengths[self.firsts].tolist(),
                self.firsts.tolist(),
                self.counts.tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True)
class RowMap:
    """Token (s, t) is row ``shared_at[s] + t`` for ``t < cut[s]``, else ``own_at[s] + t - cut[s]``.

    Attributes:
        form: padded, packed or shared.
        shape: (rows, length) of ``input_ids``.
        cut: (S,) int64.
        shared_at: (S,) int64.
        own_at: (S,) int64.
    """

    form: str
    shape: tuple[int, int]
    cut: np.ndarray
    shared_at: np.ndarray
    own_at: np.ndarray

    def rows(self, sequences: Sequences) -> np.ndarray:
        """(K,) int64, the row of each token in the flattened hidden states."""
        s, t = sequences.sequence, sequences.position
        return np.where(t < self.cut[s], self.shared_at[s], (self.own_at - self.cut)[s]) + t


def padded(sequences: Sequences) -> RowMap:
    """One row of ``input_ids`` for each sequence."""
    count, length = len(sequences.lengths), int(sequences.lengths.max())
    none = np.zeros(count, dtype=np.int64)
    return RowMap("padded", (count, length), none, none, np.arange(count) * length)


def packed(sequences: Sequences) -> RowMap:
    """One row of ``input_ids`` in all."""
    none = np.zeros(len(sequences.lengths), dtype=np.int64)
    return RowMap("packed", (1, len(sequences.ids)), none, none, sequences.starts[:-1])


def shared(sequences: Sequences) -> RowMap:
    """One row of ``input_ids`` for each prompt."""
    cut, counts, firsts = sequences.shared_lengths, sequences.counts, sequences.firsts
    own = sequences.lengths - cut
    length = int((cut[firsts] + np.add.reduceat(own, firsts)).max())
    shared_at = np.repeat(np.arange(len(counts)) * length, counts)
    before = np.cumsum(own) - own  # own tokens of all sequences before, of whichever prompt
    own_at = shared_at + cut + before - np.repeat(before[firsts], counts)
    return RowMap("shared", (len(counts), length), cut, shared_at, own_at)


FORMS = {"padded": padded, "packed": packed, "shared": shared}


def read_sequences(features: SequenceOf[Mapping[str, Any]]) -> Sequences:
    """The sequences of some tokenised lists.

    Raises:
        ValueError: an empty prompt or completion, or one that is not token ids; a number of
            prompts other than 1 and n.
    """
    parts, lengths, prompt_lengths, shared_lengths, counts = [], [], [], [], []
    for number, feature in enumerate(features):
        prompts = [_ids(ids, "prompt", number) for ids in feature["prompts"]]
        completions = [_ids(ids, "completion", number) for ids in feature["completions"]]
        n = len(completions)
        if len(prompts) not in (1, n) or n == 0:
            raise ValueError(
                f"list {number} of the batch: {n} completions need 1 prompt or {n}, "
                f"got {len(prompts)}; and at least 1 completion"
            )
        for i, completion in enumerate(completions):
            prompt = prompts[i if len(prompts) > 1 else 0]
            parts += [prompt, completion]
            lengths.append(len(prompt) + len(completion))
            prompt_lengths.append(len(prompt))
        shared_lengths += [_common_prefix(prompts)] * n
        counts.append(n)
    starts = np.append(0, np.cumsum(lengths))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return Sequences(
        ids=np.concatenate(parts),
        sequence=sequence,
        position=np.arange(starts[-1]) - starts[sequence],
        starts=starts,
        prompt_lengths=np.asarray(prompt_lengths),
        shared_lengths=np.asarray(shared_lengths),
        counts=np.asarray(counts),
    )


def _ids(ids: Any, what: str, number: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"list {number} of the batch: a {what} must be one or more token ids, got {ids!r}"
        )
    return array.astype(np.int64, copy=False)


def _common_prefix(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with."""
    common = min(map(len, prompts))
    for prompt in prompts[1:]:
        different = np.flatnonzero(prompts[0][:common] != prompt[:common])
        common = int(different[0]) if different.size else common
    return common
