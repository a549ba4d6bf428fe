"""From tokenised lists to batches: token ids, the ``Layout`` and what the loss needs, on the CPU.

Token ids decide where a completion begins, so the boundary is exact; position t predicts token
t + 1, and the last prompt token predicts the first completion token. A batch is padded, or it is
the row of the lists' distinct tokens (``pro_kernels.TokenTree``); what is scored is the same.

Legend: ``B`` prompts, ``n`` candidates, ``R`` sequences, ``K`` tokens of all of them, ``T`` tokens
of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import pro_kernels as pk


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What is known of B ranked lists, on the host.

    Attributes:
        rewards: (B, n), 0 where a candidate is absent; n - 1, ..., 0 without rewards.
        mask: (B, n) bool, candidates that are there.
        sft_index: (B,) int64, the candidate that carries the SFT term.
        by_order: whether the lists have no rewards, only their order.
        weights: (B,) float64, of each list in the mean over lists; None: all weigh 1.
        desirable: (B, n) bool, for losses that take candidates one by one; None: the best are.
        ref_logps: (B, n) float32, the reference model's S, where it is known.
    """

    rewards: Tensor
    mask: Tensor
    sft_index: Tensor
    by_order: bool = False
    weights: Tensor | None = None
    desirable: Tensor | None = None
    ref_logps: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Preferences(Lists):
    """What the loss needs to know about a batch beside its tokens; rewards are float64.

    Attributes:
        num_positions: tokens that the decoder runs on, padding not counted.
        idle: whether the batch only keeps a rank without lists in step, and counts for nothing.
        kl_index: (B,) int64, the candidate that is another prompt's completion, scored for KTO's KL
            and outside the mask; None: there is none.
    """

    num_positions: int
    idle: bool = False
    kl_index: Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """B."""
        return self.rewards.shape[0]

    @property
    def total_weight(self) -> float:
        """Of the lists that the loss is a mean over."""
        if self.idle:
            return 0
        return self.num_prompts if self.weights is None else self.weights.sum().item()

    def to(self, *_: Any, **__: Any) -> Preferences:
        """Itself: the loss reads these numbers on the host."""
        return self


class PROCollator:
    """Makes batches of tokenised lists; a ``data_collator`` for transformers' Trainer.

    Args:
        pad_token_id: fills up padded rows. With ``official`` it is also the label after the last
            token of a padded row.
        form: "padded", one row for each sequence; or "lists", one row of the distinct tokens, for
            a model that runs distinct rows (``pro_kernels.distinct_rows``).
        official: score as the official code does: the position of a last token too, with the
            padding id as its label, where that sequence is shorter than T.
        ranks_only: the loss takes only the order from rewards, so lists with and without them mix.
        kl_length: None, or the most tokens of a sequence: then each prompt of a batch is run with
            the best completion of the list before it, too, for the KL estimate of KTO.
        idle: the list that is run for a batch of none, which a rank gets that no list is left for.

    Raises:
        ValueError: an unknown form; ``pad_token_id`` not an id.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        form: Literal["padded", "lists"] = "padded",
        official: bool = False,
        ranks_only: bool = False,
        kl_length: int | None = None,
        idle: Mapping[str, Any] | None = None,
    ) -> None:
        if form not in ("padded", "lists"):
            raise ValueError(f"form must be padded or lists, got {form!r}")
        if not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"pad_token_id must be a token id (>= 0), got {pad_token_id!r}")
        self.pad_token_id = pad_token_id
        self.form = form
        self.official = official
        self.ranks_only = ranks_only
        self.kl_length = kl_length
        self.idle = idle

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some tokenised lists.

        A feature has ``prompts`` (token ids of one prompt, or of one for each completion),
        ``completions`` (token ids of n >= 1), ``rewards`` (n numbers, or None: best first),
        ``sft_index`` (or None), and perhaps ``ref_logps`` (n numbers), ``weight`` (a number) and
        ``desirable`` (n bools, or None: the best is).

        Returns:
            ``input_ids`` int64, (R, T) or (1, S); padded, ``attention_mask`` of the same shape; as
            lists, ``position_ids`` of the same shape and ``tree``; ``layout``, the scored rows of
            the flattened hidden states; ``preferences``.

        Raises:
            ValueError: no features (and no ``idle``); lists with and without rewards in one batch;
                an empty prompt or completion; numbers of prompts, completions and rewards that do
                not match.
        """
        idle = not features and self.idle is not None
        if idle:
            features = [self.idle]
        rewards, mask, by_order = _rewards(features, self.ranks_only)
        desirable = _desirable(features, rewards, mask)
        kl_index, run = None, features
        if self.kl_length is not None and len(features) > 1:
            kl_index = mask.sum(1)
            run = _with_others(features, rewards, self.kl_length)
            rewards, mask, desirable = (
                None if x is None else torch.nn.functional.pad(x, (0, 1))
                for x in (rewards, mask, desirable)
            )
        sequences = read_sequences(run)
        batch, rows = self._inputs(sequences)
        size = batch["input_ids"].numel()
        batch["layout"] = self._layout(sequences, rows, size)
        batch["preferences"] = Preferences(
            rewards=rewards,
            mask=mask,
            sft_index=_sft_index(features),
            by_order=by_order,
            weights=_weights(features),
            desirable=desirable,
            ref_logps=_ref_logps(features),
            num_positions=size if self.form == "lists" else len(rows),
            idle=idle,
            kl_index=kl_index,
        )
        return batch

    def _inputs(self, sequences: Sequences) -> tuple[dict[str, Any], np.ndarray]:
        """The decoder's tensors, and each token's row of the flattened hidden states, (K,)."""
        if self.form == "lists":
            tree = pk.TokenTree.from_packed(sequences.ids, sequences.lengths)
            ids, positions = tree.input_ids[None], tree.position_ids[None]
            return {"input_ids": ids, "position_ids": positions, "tree": tree}, tree.places.numpy()
        return padded_rows(sequences, self.pad_token_id)

    def _layout(self, sequences: Sequences, rows: np.ndarray, size: int) -> pk.Layout:
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
            num_rows=size,
            shared_rows=self.form == "lists",
        )


@dataclass(frozen=True)
class Sequences:
    """All sequences of a batch, end to end; those of a prompt are consecutive.

    Attributes:
        ids: (K,) int64, the tokens.
        sequence: (K,) int64, the sequence of each token.
        position: (K,) int64, its position in the sequence.
        starts: (R + 1,) int64, where each sequence begins among the K tokens.
        prompt_lengths: (R,) int64, tokens before the completion.
        counts: (B,) int64, candidates of each prompt.
    """

    ids: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    counts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens of each sequence."""
        return np.diff(self.starts)


def read_sequences(features: Sequence[Mapping[str, Any]]) -> Sequences:
    """The sequences of some tokenised lists.

    Raises:
        ValueError: an empty prompt or completion, or one that is not token ids; a number of
            prompts other than 1 and n.
    """
    parts, lengths, prompt_lengths, counts = [], [], [], []
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
        counts.append(n)
    starts = np.append(0, np.cumsum(lengths))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return Sequences(
        ids=np.concatenate(parts),
        sequence=sequence,
        position=np.arange(starts[-1]) - starts[sequence],
        starts=starts,
        prompt_lengths=np.asarray(prompt_lengths),
        counts=np.asarray(counts),
    )


def padded_rows(sequences: Sequences, pad_token_id: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """``input_ids`` and ``attention_mask``, (R, T) int64, and where each token lies in R * T."""
    shape = len(sequences.lengths), int(sequences.lengths.max())
    rows = sequences.sequence * shape[1] + sequences.position
    input_ids, mask = np.full(shape, pad_token_id), np.zeros(shape, dtype=np.int64)
    input_ids.reshape(-1)[rows] = sequences.ids
    mask.reshape(-1)[rows] = 1
    arrays = {"input_ids": input_ids, "attention_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, rows


def _ids(ids: Any, what: str, number: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"list {number} of the batch: a {what} must be one or more token ids, got {ids!r}"
        )
    return array.astype(np.int64, copy=False)


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
    values = []
    for row, feature in enumerate(features):
        n, given = len(feature["completions"]), feature.get("rewards")
        values.append(list(range(n - 1, -1, -1) if given is None else given))
        if len(values[-1]) != n:
            raise ValueError(f"list {row} of the batch: {n} completions and {len(given)} rewards")
    counts = torch.tensor([len(row) for row in values])
    rewards = _padded([torch.tensor(row, dtype=torch.float64) for row in values])
    return rewards, torch.arange(rewards.shape[1]) < counts[:, None], by_order


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """(B, n), 0 where a candidate is absent."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def best_candidates(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, n) bool, those with the highest reward of their list."""
    ranked = rewards.masked_fill(~mask, -torch.inf)
    return mask & (ranked == ranked.amax(1, keepdim=True))


def _with_others(
    features: Sequence[Mapping[str, Any]], rewards: Tensor, length: int
) -> list[dict[str, Any]]:
    """Each list with one candidate more: the best of the list before, as far as it fits.

    TRL's ``KTOTrainer`` cycles the completions of a batch likewise.
    """
    found = []
    for row, feature in enumerate(features):
        prompts = list(feature["prompts"])
        others = features[row - 1]["completions"]
        other = others[int(rewards[row - 1, : len(others)].argmax())]
        prompts += prompts[:1] if len(prompts) > 1 else []
        completions = [*feature["completions"], other[: max(1, length - len(prompts[0]))]]
        found.append({**feature, "prompts": prompts, "completions": completions})
    return found


def _weights(features: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """(B,) float64; None where all are 1."""
    weights = [feature.get("weight", 1.0) for feature in features]
    return None if set(weights) == {1.0} else torch.tensor(weights, dtype=torch.float64)


def _desirable(
    features: Sequence[Mapping[str, Any]], rewards: Tensor, mask: Tensor
) -> Tensor | None:
    """(B, n) bool, the best where a list marks none; None where no list says which are."""
    marks = [feature.get("desirable") for feature in features]
    if all(given is None for given in marks):
        return None
    rows = []
    for row, (best, here, given) in enumerate(
        zip(best_candidates(rewards, mask), mask, marks, strict=True)
    ):
        n = int(here.sum())
        if given is not None and len(given) != n:
            raise ValueError(
                f"list {row} of the batch: {n} completions and {len(given)} marks of desirable ones"
            )
        rows.append(best if given is None else torch.tensor(given, dtype=torch.bool))
    return _padded(rows)


def _ref_logps(features: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """(B, n) float32; None where the lists hold none."""
    if any(feature.get("ref_logps") is None for feature in features):
        return None
    return _padded([torch.tensor(feature["ref_logps"]) for feature in features])


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
