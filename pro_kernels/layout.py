"""Which rows of the hidden states are scored, for which token, in which sequence and prompt.

Every batch form reduces to one ``Layout``: padded ``(B, n, T)``, packed (``cu_seqlens``), and
row-sharing (the n first completion tokens all read the prompt's last row). Only the rows it names
ever reach the head matmul. Build it where the batch is built, on the CPU: then nothing on the
training device is inspected and nothing waits. Made from device tensors it waits for the device.

Legend: ``R`` rows of the flattened hidden states, ``N`` scored tokens, ``S`` sequences, ``B``
prompts.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pro_kernels.options import IGNORE_INDEX
from pro_kernels.validate import check_candidate_mask, check_targets

# So few targets Python goes through faster than a dozen small operations do.
_HOST_TOKENS = 256


@dataclass(frozen=True)
class Layout:
    """Scored tokens, grouped by sequence, sequences grouped by prompt.

    Attributes:
        rows: (N,) int64, row of each token in the flattened hidden states; may repeat. None: token
            i is row i and unscored tokens are still in ``targets`` (the dense form).
        targets: (N,) int64, the token each row predicts.
        offsets: (S + 1,) int64, sequence s is tokens ``offsets[s]:offsets[s + 1]``.
        lengths: (S,) int64, scored tokens m of each sequence.
        sequences: (B, n) int64, the sequence of candidate i of prompt b, -1 where there is none.
        num_rows: R.
        prompt_tokens: tokens of each prompt, on the host, in order; chunks are aligned to them.
        candidate_tokens: scored tokens of each candidate of each prompt, on the host, so that
            rewards can be checked without waiting for a device; None in the dense form. Sequences
            are numbered in this order.
        vocab_size: all targets are known to lie below it; None: they were not looked at.
        shared_rows: whether a row is read by more than one token.
    """

    rows: Tensor | None
    targets: Tensor
    offsets: Tensor
    lengths: Tensor
    sequences: Tensor
    num_rows: int
    prompt_tokens: tuple[int, ...]
    shared_rows: bool = False
    candidate_tokens: tuple[tuple[int, ...], ...] | None = None
    vocab_size: int | None = None

    @property
    def num_tokens(self) -> int:
        """N, the scored tokens (all tokens in the dense form)."""
        return self.targets.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n): prompts and the most candidates of any prompt."""
        return self.sequences.shape[0], self.sequences.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.targets.device

    def checked_for(self, vocab: int) -> bool:
        """Whether all targets are known to lie in [0, vocab)."""
        return self.vocab_size is not None and self.vocab_size <= vocab

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The same layout with its tensors on ``device``."""
        return self._with_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """The same layout in pinned memory (called by ``DataLoader(pin_memory=True)``)."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Layout:
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        changed: dict[str, Any] = {name: change(x) for name, x in tensors.items()}
        return replace(self, **changed)

    def candidate_sums(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """S and m of each candidate, (B, n), of the log-probs (N,) of the tokens; 0 of absent ones.

        In index order within a candidate, so that they are the same each time.
        """
        sums = torch.segment_reduce(logps, "sum", offsets=self.offsets, initial=0, unsafe=True)
        at, exists = self.sequences.clamp_min(0), self.sequences >= 0
        return torch.where(exists, sums[at], 0.0), torch.where(exists, self.lengths[at], 0)

    def present(self, candidate_mask: Tensor | None) -> Layout:
        """Less the tokens of candidates outside the mask (B, n).

        Where the host does not know which these are, they stay as tokens of no candidate, and
        ``blanked`` clears their hidden states.
        """
        if candidate_mask is None:
            return self
        check_candidate_mask(candidate_mask, self.shape)
        tokens = self.candidate_tokens
        if tokens is None or candidate_mask.device.type != "cpu" or torch.compiler.is_compiling():
            absent = ~candidate_mask.to(self.device, non_blocking=True)
            sequences = self.sequences.masked_fill(absent, -1)
            return replace(self, sequences=sequences, candidate_tokens=None)
        mask = zip(tokens, candidate_mask.tolist(), strict=True)
        there = [x for prompt, row in mask for x in row[: len(prompt)]]
        before = list(itertools.chain(*tokens))
        lengths = [m * x for m, x in zip(before, there, strict=True)]
        if lengths == before:
            return self
        ends = [0, *itertools.accumulate(lengths)]
        made = [torch.tensor(x, device="cpu") for x in (there, before, ends, lengths)]
        made[1] = torch.repeat_interleave(made[0], made[1]).nonzero()[:, 0]
        kept, offsets, counts = (x.to(self.device, non_blocking=True) for x in made[1:])
        return replace(
            self,
            rows=kept if self.rows is None else self.rows[kept],
            targets=self.targets[kept],
            offsets=offsets,
            lengths=counts,
            **_known(lengths, map(len, tokens)),
        )

    def blanked(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, H), 0 where no candidate has a token; NaN times 0 would not be."""
        there = hidden.new_ones(self.sequences.numel())
        there = by_token(there, self.offsets, self.sequences, self.num_tokens)
        if self.rows is not None:
            read = there.new_zeros(self.num_rows)
            there = read.scatter_reduce(0, self.rows, there, "amax")
        return torch.where(there[:, None] > 0, hidden, 0)

    def by_position(self, values: Tensor) -> Tensor:
        """Values (..., N) of the scored rows as (..., R), 0 elsewhere."""
        if self.rows is None:
            return values
        whole = values.new_zeros((*values.shape[:-1], self.num_rows))
        return whole.index_copy(-1, self.rows, values)

    @classmethod
    def from_padded(
        cls,
        targets: Tensor,  # (B, n, T) or (B, T) integer
        *,
        ignore_index: int = IGNORE_INDEX,
        shift: bool = False,
        vocab_size: int | None = None,
    ) -> Layout:
        """Layout of a padded batch; hidden states are ``(B, n, T, H)`` or ``(B*n*T, H)``.

        ``targets[..., t]`` is what position t predicts, ``ignore_index`` where nothing is scored.
        With ``shift=True`` they are unshifted labels (``labels[..., t]`` is the token at t, as in
        transformers) and are shifted here. A ``(B, T)`` batch is B prompts of one candidate.

        Raises:
            TypeError: targets are not an integer tensor.
            ValueError: wrong number of dimensions; a target outside ``[0, vocab_size)``.
        """
        check_targets(targets)
        if targets.dim() not in (2, 3):
            raise ValueError(
                f"targets must have shape (B, n, T) or (B, T), got {tuple(targets.shape)}"
            )
        if targets.dim() == 2:
            targets = targets[:, None]
        b, n, t = targets.shape
        if n == 0:
            raise ValueError(f"targets must hold a candidate (n >= 1), got {tuple(targets.shape)}")
        if shift:
            targets = shift_targets(targets, ignore_index)
        if targets.device.type == "cpu" and targets.numel() <= _HOST_TOKENS:
            return cls._padded_on_host(targets, ignore_index, vocab_size)
        flat = targets.reshape(-1)
        offsets, sequences = _even(b, n, t, flat.device)
        found = _compact(None, flat, offsets, [n] * b, ignore_index, vocab_size)
        return cls(**found, sequences=sequences, num_rows=flat.numel())

    @classmethod
    def from_packed(
        cls,
        targets: Tensor,  # (R,) integer
        cu_seqlens: Tensor,  # (S + 1,) integer
        num_candidates: int | Sequence[int],
        *,
        ignore_index: int = IGNORE_INDEX,
        shift: bool = False,
        vocab_size: int | None = None,
    ) -> Layout:
        """Layout of sequences laid end to end; hidden states are ``(R, H)``.

        Sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``. ``num_candidates`` says how many
        consecutive sequences belong to each prompt (one number: the same for all). With ``shift``
        the targets are unshifted labels, shifted inside each sequence.
        """
        check_targets(targets)
        if targets.dim() != 1:
            raise ValueError(f"targets must have shape (R,), got {tuple(targets.shape)}")
        rows = torch.arange(targets.numel(), device=targets.device)
        how: dict[str, Any] = {"ignore_index": ignore_index, "shift": shift}
        how |= {"vocab_size": vocab_size, "num_rows": targets.numel(), "shared_rows": False}
        return cls.from_rows(rows, targets, cu_seqlens, num_candidates, **how)

    @classmethod
    def from_rows(
        cls,
        rows: Tensor,  # (N,) integer
        targets: Tensor,  # (N,) integer
        cu_seqlens: Tensor,  # (S + 1,) integer
        num_candidates: int | Sequence[int],
        *,
        num_rows: int,
        ignore_index: int = IGNORE_INDEX,
        shift: bool = False,
        vocab_size: int | None = None,
        shared_rows: bool = True,
    ) -> Layout:
        """The general form: token i is predicted by row ``rows[i]`` of ``(num_rows, H)``.

        Rows may repeat, as in a prefix-shared batch, where the first token of each of the n
        completions is predicted by the one last row of the prompt.

        Raises:
            TypeError: an index tensor that is not of integer type.
            ValueError: shapes that do not match, ``cu_seqlens`` that is not a partition,
                ``num_candidates`` that does not add up, a row or target out of range.
        """
        check_targets(targets)
        check_targets(rows, "rows")
        check_targets(cu_seqlens, "cu_seqlens")
        if rows.shape != targets.shape or targets.dim() != 1:
            raise ValueError(
                f"rows and targets must both have shape (N,), got {tuple(rows.shape)} and "
                f"{tuple(targets.shape)}"
            )
        ends = cu_seqlens.tolist()
        if not ends or ends[0] != 0 or ends[-1] != len(targets) or sorted(ends) != ends:
            raise ValueError(
                f"cu_seqlens must rise from 0 to {len(targets)} (the number of tokens), got {ends}"
            )
        counts = _counts(num_candidates, len(ends) - 1)
        if rows.numel() and not (0 <= int(rows.min()) and int(rows.max()) < num_rows):
            raise ValueError(
                f"rows must lie in [0, {num_rows}), got {int(rows.min())} ... {int(rows.max())}"
            )
        offsets = cu_seqlens.long().to(targets.device)
        if shift:
            targets = shift_targets(targets, ignore_index)
            targets[offsets[1:][offsets.diff() > 0] - 1] = ignore_index
        found = _compact(rows.long(), targets, offsets, counts, ignore_index, vocab_size)
        n, numbers = max([1, *counts]), iter(range(len(ends) - 1))
        of_prompts = [[*itertools.islice(numbers, count), *[-1] * (n - count)] for count in counts]
        sequences = torch.tensor(of_prompts, dtype=torch.int64).view(len(counts), n)
        return cls(
            **found,
            sequences=sequences.to(targets.device),
            num_rows=num_rows,
            shared_rows=shared_rows,
        )

    @classmethod
    def of_targets(cls, targets: Tensor, ignore_index: int, vocab: int | None) -> Layout:
        """Compact, or of fixed sizes while compiling (nothing may depend on data then)."""
        if torch.compiler.is_compiling():
            return cls.dense(targets, ignore_index)
        return cls.from_padded(targets, ignore_index=ignore_index, vocab_size=vocab)

    @classmethod
    def dense(cls, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Layout:
        """Layout of ``(B, n, T)`` targets whose every size is known without looking at them.

        The form for ``torch.compile`` when no compact layout is at hand, and for logits: unscored
        tokens stay in the token list. The head ops drop them inside, for which a GPU waits.
        """
        b, n, t = targets.shape
        offsets, sequences = _even(b, n, t, targets.device)
        return cls(
            rows=None,
            targets=mark_unscored(targets, ignore_index).reshape(-1),
            offsets=offsets,
            lengths=(targets != ignore_index).sum(-1).reshape(-1),
            sequences=sequences,
            num_rows=b * n * t,
            prompt_tokens=(n * t,) * b,
        )

    @classmethod
    def of_sums(cls, lengths: Tensor) -> Layout:
        """Layout of sums over tokens that were made elsewhere: each candidate is one token.

        ``lengths`` (B, n): how many tokens each is the sum of. No row is predicted from.
        """
        b, n = lengths.shape
        offsets, sequences = _even(b, n, 1, lengths.device)
        nothing = torch.full_like(offsets[1:], IGNORE_INDEX)
        return cls(None, nothing, offsets, lengths.reshape(-1), sequences, 0, (n,) * b)

    @classmethod
    def _padded_on_host(cls, targets: Tensor, ignore_index: int, vocab_size: int | None) -> Layout:
        """``from_padded`` of a few tokens in Python, all tensors as parts of one."""
        b, n, t = targets.shape
        values = targets.reshape(-1).tolist()
        rows = [i for i, value in enumerate(values) if value != ignore_index]
        scored = [values[i] for i in rows]
        limit = vocab_size or 2**62
        if scored and (min(scored) < 0 or max(scored) >= limit):
            at = next(i for i in rows if not 0 <= values[i] < limit)
            raise_bad_target(targets, at, vocab_size, ignore_index)
        lengths = [t - values[i * t : (i + 1) * t].count(ignore_index) for i in range(b * n)]
        offsets = [0, *itertools.accumulate(lengths)]
        parts = rows, scored, offsets, lengths, range(b * n)
        # ``torch.tensor`` would take three times as long as all the rest.
        whole = torch.frombuffer(array("q", itertools.chain(*parts)), dtype=torch.int64)
        kept, found, ends, counts, numbers = whole.split([len(part) for part in parts])
        known = _known(lengths, [n] * b)
        known |= {"num_rows": b * n * t, "vocab_size": vocab_size}
        return cls(kept, found, ends, counts, numbers.view(b, n), **known)


def _even(b: int, n: int, t: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and sequences where each of n candidates of b prompts has t tokens."""
    numbers = torch.arange(b * n + 1, device=device)
    return numbers * t, numbers[:-1].view(b, n)


def _known(lengths: list[int], counts: Iterable[int]) -> dict[str, Any]:
    """What a layout says on the host, of the tokens of all candidates and those of each prompt."""
    firsts = [0, *itertools.accumulate(counts)]
    per_prompt = tuple(tuple(lengths[a:b]) for a, b in itertools.pairwise(firsts))
    return {"prompt_tokens": tuple(map(sum, per_prompt)), "candidate_tokens": per_prompt}


def _compact(
    rows: Tensor | None,  # None: token i is row i
    targets: Tensor,
    offsets: Tensor,
    counts: list[int],
    ignore_index: int,
    vocab_size: int | None,
) -> dict[str, Any]:
    """What a layout says of the scored tokens. One device-to-host copy, none for CPU tensors."""
    targets = targets.long()
    if counts and offsets.shape[0] == 1:  # an empty sequence, nobody's, so that indexing works
        offsets = offsets.repeat(2)
    scored_of = _scored_on_cpu if targets.device.type == "cpu" else _scored
    kept, scored, new_offsets, host = scored_of(targets, offsets, ignore_index, vocab_size)
    return {
        "rows": kept if rows is None else rows[kept],
        "targets": scored,
        "offsets": new_offsets,
        "lengths": new_offsets.diff(),
        "vocab_size": vocab_size,
        **_known([b - a for a, b in itertools.pairwise(host)], counts),
    }


def _scored(
    targets: Tensor, offsets: Tensor, ignore_index: int, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Where tokens are scored, their targets and offsets, and these on the host: one copy."""
    live = targets != ignore_index
    before = torch.nn.functional.pad(live.cumsum(0), (1, 0))
    new_offsets = before[offsets]
    bad = live & _outside(targets, vocab_size)
    host = torch.cat([new_offsets, bad.sum()[None]]).tolist()
    if host.pop():
        raise_bad_target(targets, int(bad.nonzero()[0]), vocab_size, ignore_index)
    kept = torch.nonzero_static(live, size=host[-1])[:, 0]
    return kept, targets[kept], new_offsets, host


def _scored_on_cpu(
    targets: Tensor, offsets: Tensor, ignore_index: int, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The same by fewer operations, as nothing is lost by looking at a result."""
    live = targets != ignore_index
    kept = live.nonzero().view(-1)
    scored = targets.index_select(0, kept)
    if scored.numel():
        low, high = map(int, scored.aminmax())
        if low < 0 or (vocab_size and high >= vocab_size):
            bad = live & _outside(targets, vocab_size)
            raise_bad_target(targets, int(bad.nonzero()[0]), vocab_size, ignore_index)
    new_offsets = torch.searchsorted(kept, offsets)
    return kept, scored, new_offsets, new_offsets.tolist()


def _outside(targets: Tensor, vocab_size: int | None) -> Tensor:
    return (targets < 0) | (targets >= (vocab_size or 2**62))


def by_token(values: Tensor, offsets: Tensor, sequences: Tensor, tokens: int) -> Tensor:
    """``(N,)`` from a value of each candidate, ``(B n,)``; ``offsets`` cover all tokens."""
    count = offsets.shape[0] - 1
    # Absent candidates write to one slot past the end: no boolean index, hence no device sync.
    slot = torch.where(sequences >= 0, sequences, count).flatten()
    per_sequence = values.new_zeros(count + 1).scatter_(0, slot, values)[:-1]
    return torch.repeat_interleave(per_sequence, offsets.diff(), output_size=tokens)


def shift_targets(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Targets from unshifted labels: position t predicts ``labels[..., t + 1]``."""
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    return targets


def mark_unscored(targets: Tensor, ignore_index: int) -> Tensor:
    """int64 targets with IGNORE_INDEX where not scored; other negative ones stay to be found."""
    return torch.where(targets == ignore_index, IGNORE_INDEX, targets.long().clamp_min(-1))


def raise_bad_target(targets: Tensor, at: int, vocab_size: int | None, ignore_index: int) -> None:
    """Raise the ValueError for target number ``at`` (flattened), showing it."""
    limit = "V" if vocab_size is None else str(vocab_size)
    raise ValueError(
        f"targets must lie in [0, {limit}) or be ignore_index={ignore_index}, got "
        f"{int(targets.flatten()[at])} at flat position {at}"
    )


def _counts(num_candidates: int | Sequence[int], sequences: int) -> list[int]:
    if isinstance(num_candidates, int):
        if num_candidates < 1 or sequences % num_candidates:
            raise ValueError(
                f"num_candidates={num_candidates} does not divide the {sequences} sequences"
            )
        return [num_candidates] * (sequences // num_candidates)
    counts = [int(c) for c in num_candidates]
    if any(c < 0 for c in counts) or sum(counts) != sequences:
        raise ValueError(
            f"num_candidates must be >= 0 and add up to the {sequences} sequences, got {counts}"
        )
    return counts
