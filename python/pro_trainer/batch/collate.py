"""From tokenised lists to batches: ids, positions, segments and the ``Layout``, all on the CPU.

Token ids decide where a completion begins, so the boundary is exact; position t predicts token
t + 1, and the last prompt token predicts the first completion token. What is scored, and for which
token, is said in padded coordinates (``sequences``) and is the same in every form of a batch; only
the rows it is read from differ.

Legend: ``B`` prompts, ``n`` candidates, ``T`` tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import pro_kernels as pk
from pro_trainer.batch.cost import SharingCost
from pro_trainer.batch.rows import FORMS, RowMap, Sequences, read_sequences


@dataclass(frozen=True)
class Preferences:
    """What the loss needs to know about a batch beside its tokens; it stays on the host.

    Attributes:
        rewards: (B, n) float64, 0 where a candidate is absent; n - 1, ..., 0 without rewards.
        candidate_mask: (B, n) bool, whether the candidate is there.
        sft_index: (B,) int64, the candidate that carries the SFT term.
        by_order: whether the lists have no rewards, only their order.
        num_positions: tokens that the decoder runs on, padding not counted.
        idle: whether the batch only keeps a rank without lists in step, and counts for nothing.
        ref_logps: (B, n) float32, the reference model's log-probs where the lists hold them.
    """

    rewards: Tensor
    candidate_mask: Tensor
    sft_index: Tensor
    by_order: bool
    num_positions: int
    idle: bool = False
    ref_logps: Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """B."""
        return self.rewards.shape[0]

    @property
    def num_counted(self) -> int:
        """Lists that the loss is a mean over."""
        return 0 if self.idle else self.num_prompts

    def to(self, *_: Any, **__: Any) -> Preferences:
        """Itself: the loss reads these numbers on the host."""
        return self


class PROCollator:
    """Makes batches of tokenised lists; a ``data_collator`` for transformers' Trainer.

    Args:
        pad_token_id: fills up rows; padding is never attended to. With ``official`` it is also the
            label after the last token of a padded row.
        form: how sequences are laid out (``sequences``). Under ``"auto"`` a batch shares prefixes
            where ``cost`` says that it pays.
        unshared: the form under ``"auto"`` of a batch that does not share.
        cost: the model's cost, needed by ``"auto"``.
        official: score as the official code does: the position of a last token too, with the
            padding id as its label, where that sequence is shorter than T.
        ranks_only: the loss takes only the order from rewards, so lists with and without them mix.
        idle: the list that is run for a batch of none, which a rank gets that no list is left for.

    Raises:
        ValueError: an unknown form; ``"auto"`` without ``cost``; ``pad_token_id`` not an id.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        form: Literal["padded", "packed", "shared", "auto"] = "padded",
        unshared: Literal["padded", "packed"] = "padded",
        cost: SharingCost | None = None,
        official: bool = False,
        ranks_only: bool = False,
        idle: Mapping[str, Any] | None = None,
    ) -> None:
        if form not in (*FORMS, "auto"):
            raise ValueError(f"form must be padded, packed, shared or auto, got {form!r}")
        if unshared not in ("padded", "packed"):
            raise ValueError(f"unshared must be padded or packed, got {unshared!r}")
        if form == "auto" and cost is None:
            raise ValueError("form='auto' needs the cost model: cost=SharingCost.from_model(model)")
        if not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"pad_token_id must be a token id (>= 0), got {pad_token_id!r}")
        self.pad_token_id = pad_token_id
        self.form = form
        self.unshared = unshared
        self.cost = cost
        self.official = official
        self.ranks_only = ranks_only
        self.idle = idle

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some tokenised lists.

        A feature has ``prompts`` (token ids of one prompt, or of one for each completion),
        ``completions`` (token ids of n >= 1), ``rewards`` (n numbers, or None: best first),
        ``sft_index`` (or None) and, where they were computed, ``ref_logps`` (n numbers).

        Returns:
            ``input_ids`` (rows, length) int64; ``attention_mask`` (padded) or ``position_ids``
            (packed, shared) of the same shape, int64; ``segments`` (shared) int32: 0 on the shared
            prefix, i >= 1 on candidate i, -1 on padding; ``layout``, the scored rows of the
            flattened (rows * length, H) hidden states; ``preferences``.

        Raises:
            ValueError: no features (and no ``idle``); lists with and without rewards in one batch;
                an empty prompt or completion; numbers of prompts, completions and rewards that do
                not match.
        """
        idle = not features and self.idle is not None
        if idle:
            features = [self.idle]
        rewards, candidate_mask, by_order = _rewards(features, self.ranks_only)
        sequences = read_sequences(features)
        row_map = FORMS[self._form(sequences)](sequences)
        rows = row_map.rows(sequences)
        batch, num_positions = self._inputs(sequences, row_map, rows)
        batch["layout"] = self._layout(sequences, row_map, rows)
        batch["preferences"] = Preferences(
            rewards,
            candidate_mask,
            _sft_index(features),
            by_order,
            num_positions,
            idle,
            _ref_logps(features),
        )
        return batch

    def _form(self, sequences: Sequences) -> str:
        """The form of this batch."""
        if self.form != "auto" or self.cost is None:
            return self.form
        packed = self.unshared == "packed"
        return "shared" if self.cost.pays_for(sequences.shapes(), packed) else self.unshared

    def _inputs(
        self, sequences: Sequences, row_map: RowMap, rows: np.ndarray
    ) -> tuple[dict[str, Any], int]:
        """The decoder's tensors, and how many of their positions are not padding."""

        def spread(values: np.ndarray | int, empty: int, dtype: type = np.int64) -> np.ndarray:
            # Candidates write what they share once each, all of them the same.
            spread = np.full(row_map.shape, empty, dtype=dtype)
            spread.reshape(-1)[rows] = values
            return spread

        filled = spread(1, 0)
        arrays = {"input_ids": spread(sequences.ids, self.pad_token_id)}
        if row_map.form == "padded":
            arrays["attention_mask"] = filled
        else:
            arrays["position_ids"] = spread(sequences.position, 0)
        if row_map.form == "shared":
            own = sequences.position >= row_map.cut[sequences.sequence]
            segment = np.where(own, (1 + sequences.number)[sequences.sequence], 0)
            arrays["segments"] = spread(segment, -1, np.int32)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors, int(np.count_nonzero(filled))

    def _layout(self, sequences: Sequences, row_map: RowMap, rows: np.ndarray) -> pk.Layout:
        """The scored tokens, each read from the row of the position before it."""
        s, t = sequences.sequence, sequences.position
        lengths = sequences.lengths
        last = t == (lengths - 1)[s]
        scored = (t >= (sequences.prompt_lengths - 1)[s]) & ~last
        if self.official:
            scored |= last & (lengths < lengths.max())[s]
        following = np.append(sequences.ids[1:], self.pad_token_id)
        targets = np.where(last, self.pad_token_id, following)[scored]
        offsets = np.append(0, np.cumsum(scored))[sequences.starts]
        return pk.Layout.from_rows(
            torch.from_numpy(rows[scored]),
            torch.from_numpy(targets),
            torch.from_numpy(offsets),
            sequences.counts.tolist(),
            num_rows=row_map.shape[0] * row_map.shape[1],
            shared_rows=row_map.form == "shared",
        )


def _rewards(
    features: Sequence[Mapping[str, Any]], ranks_only: bool
) -> tuple[Tensor, Tensor, bool]:
    """Rewards (B, n) float64, candidate mask (B, n) bool, and whether there is only an order."""
    kinds = {feature.get("rewards") is None for feature in features}
    if len(kinds) != 1 and not (kinds and ranks_only):
        raise ValueError(
            "a batch needs lists that all have rewards or all have none, got "
            + ("no lists" if not kinds else "both")
        )
    by_order = kinds == {True} and not ranks_only
    counts = [len(feature["completions"]) for feature in features]
    rewards = torch.zeros(len(counts), max(counts), dtype=torch.float64)
    mask = torch.zeros(rewards.shape, dtype=torch.bool)
    for row, (feature, n) in enumerate(zip(features, counts, strict=True)):
        values = feature.get("rewards")
        values = range(n - 1, -1, -1) if values is None else values
        if len(values) != n:
            raise ValueError(f"list {row} of the batch: {n} completions and {len(values)} rewards")
        rewards[row, :n] = torch.as_tensor(list(values), dtype=torch.float64)
        mask[row, :n] = True
    return rewards, mask, by_order


def _ref_logps(features: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """(B, n) float32, 0 where a candidate is absent; None where the lists hold none."""
    if any(feature.get("ref_logps") is None for feature in features):
        return None
    rows = [torch.tensor(feature["ref_logps"]) for feature in features]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _sft_index(features: Sequence[Mapping[str, Any]]) -> Tensor:
    """(B,) int64, the best where a list names none."""
    chosen = []
    for row, feature in enumerate(features):
        n, rewards = len(feature["completions"]), feature.get("rewards")
        index = feature.get("sft_index")
        if index is None:
            index = 0 if rewards is None else int(np.argmax(rewards))
        if not 0 <= index < n:
            raise ValueError(
                f"list {row} of the batch: sft_index must lie in [0, {n}), got {index}"
            )
        chosen.append(index)
    return torch.tensor(chosen)
