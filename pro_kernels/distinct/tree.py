"""The distinct tokens of some sequences: a tree in which a common prefix stands once.

Sequences are sorted, so that those with a common prefix are neighbours and what two neighbours have
in common says where the tree branches (the radix tree of suffix arrays). No loop goes over tokens.

Legend: ``R`` sequences, ``N`` their tokens, ``S`` distinct tokens, ``K`` segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# A common piece shorter than this is copied into its branches: an attention call costs more than
# some tokens. Copies are at most this share of all tokens.
SHORTEST, COPIED = 8, 0.02


@dataclass(frozen=True)
class TokenTree:
    """Segments end to end in one row, each right before its descendants; all on the CPU.

    A segment is a run of tokens that the same sequences share. A sequence is a segment and its
    ancestors.

    Attributes:
        input_ids: (S,) int64.
        position_ids: (S,) int64, each token's index in its sequences.
        segments: (K, 4) int64: first token, end, end of the descendants, position of the first.
        places: (N,) int64, where each token of the sequences stands, one sequence after another.
        lengths: (R,) int64, tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> TokenTree:
        """The tree of token ids.

        Raises:
            TypeError: a sequence that is not one of integers.
            ValueError: no token at all, or a negative one.
        """
        arrays = [np.asarray(ids) for ids in sequences]
        for ids in arrays:
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError(
                    "sequences must hold token ids, one list of integers each, got an array of "
                    f"shape {ids.shape} and dtype {ids.dtype}"
                )
        arrays = [ids.astype(np.int64) for ids in arrays]
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        return cls.from_packed(np.concatenate([*arrays, np.zeros(0, np.int64)]), lengths)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenTree:
        """The tree of a padded batch, (R, T) both; ``attention_mask`` is 0 on padding.

        Padding stands on the left or on the right. Waits for the device that the tensors are on.

        Raises:
            ValueError: shapes that differ, padding between tokens, no token at all, or a negative
                one.
        """
        ids = input_ids.cpu().numpy()
        if ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (R, T), got {tuple(ids.shape)}")
        if attention_mask is None:
            return cls.from_packed(ids.reshape(-1), np.full(len(ids), ids.shape[1], dtype=np.int64))
        mask = attention_mask.cpu().numpy() != 0
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {ids.shape}, got {mask.shape}"
            )
        starts = mask[:, :1].sum() + (mask[:, 1:] & ~mask[:, :-1]).sum()
        lengths = mask.sum(1)
        if starts != (lengths > 0).sum():
            raise ValueError("attention_mask has padding between the tokens of a row")
        return cls.from_packed(ids[mask], lengths)

    @classmethod
    def from_packed(cls, ids: np.ndarray, lengths: np.ndarray) -> TokenTree:
        """The tree of sequences end to end: (N,) and (R,), both int64.

        Raises:
            ValueError: no token at all, or a negative one.
        """
        if not ids.size or ids.min() < 0:
            least = f"the least of which is {ids.min()}" if ids.size else "of which there are none"
            raise ValueError(f"input_ids must be token ids (>= 0), {least}")
        starts = np.cumsum(lengths) - lengths
        nodes = _branches(ids, starts, lengths)
        nodes.copy_short()
        fields = (*nodes.laid_out(ids, starts), lengths)
        return cls(*map(torch.from_numpy, fields))

    @property
    def num_tokens(self) -> int:
        """S."""
        return len(self.input_ids)

    def as_mask(self) -> Tensor:
        """(1, 1, K, 4), in the place of the attention mask of a model that runs distinct rows.

        Beside ``input_ids`` and ``position_ids``, each with a dimension of 1 before.
        """
        return self.segments[None, None]

    def index(self, shape: Sequence[int], attention_mask: Tensor | None) -> Tensor:
        """(R * T,) int64: the place of each token of the padded batch, S on padding."""
        if attention_mask is None:
            return self.places
        index = torch.full((shape[0] * shape[1],), self.num_tokens)
        index[attention_mask.cpu().flatten() != 0] = self.places
        return index

    def shifted(self, by: int) -> TokenTree:
        """The same at positions that lie further on."""
        return replace(self, position_ids=self.position_ids + by)

    def check_positions(
        self, position_ids: Tensor | None, attention_mask: Tensor | None, relative: bool
    ) -> None:
        """Whether tokens of a padded batch, (R, T) both, stand at the tree's positions.

        Without ``position_ids`` each stands at its column. ``relative``: rows may as a whole stand
        further on.

        Raises:
            ValueError: they do not.
        """
        if position_ids is None:
            if attention_mask is None:
                return
            position_ids = torch.arange(attention_mask.shape[1]).expand(attention_mask.shape)
        if position_ids.dim() != 2:
            raise ValueError(f"its position_ids have {position_ids.dim()} dimensions")
        real = slice(None) if attention_mask is None else attention_mask.cpu().flatten() != 0
        found = position_ids.cpu().expand(len(self.lengths), -1).flatten()[real]
        off = found - self.position_ids[self.places]
        if relative:
            firsts = (self.lengths.cumsum(0) - self.lengths)[self.lengths > 0]
            off = off - torch.repeat_interleave(off[firsts], self.lengths[self.lengths > 0])
        if off.any():
            raise ValueError("its position_ids are not those of its rows, one after another")


class _Nodes:
    """The tree as lists by node; node 0 is the root, with no tokens."""

    def __init__(self) -> None:
        self.depth = [0]  # tokens of a sequence that ends here
        self.parent = [-1]
        self.row = [-1]  # a sequence that goes through it
        self.children: list[list[int]] = [[]]  # in the order of their tokens
        self.of_row: list[int] = []  # where each sequence ends

    def add(self, depth: int, parent: int, row: int) -> int:
        self.depth.append(depth)
        self.parent.append(parent)
        self.row.append(row)
        self.children.append([])
        self.children[parent].append(len(self.parent) - 1)
        return len(self.parent) - 1

    def edge(self, node: int) -> int:
        """Tokens of the node's own."""
        return self.depth[node] - self.depth[self.parent[node]]

    def copy_short(self) -> None:
        """Dissolve short inner nodes into their children, the cheapest first."""
        ends = set(self.of_row)

        def copies(node: int) -> int:
            return self.edge(node) * (len(self.children[node]) - 1 + (node in ends))

        nodes = range(1, len(self.parent))
        short = [n for n in nodes if self.children[n] and self.edge(n) < SHORTEST]
        allowed = COPIED * sum(map(self.edge, nodes))
        for node in sorted(short, key=copies):
            if self.edge(node) >= SHORTEST:  # with a copy of its parent's
                continue
            allowed -= copies(node)
            if allowed < 0:
                return
            parent = self.parent[node]
            siblings, at = self.children[parent], self.children[parent].index(node)
            kept = [node] if node in ends else []
            siblings[at : at + 1] = kept + self.children[node]
            for child in self.children[node]:
                self.parent[child] = parent
            self.children[node] = []

    def laid_out(self, ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, ...]:
        """The first four fields of ``TokenTree``."""
        order, waiting = [], self.children[0][::-1]
        while waiting:
            order.append(waiting.pop())
            waiting += self.children[order[-1]][::-1]
        edges = np.array([self.edge(node) for node in order])
        begins = np.array([self.depth[self.parent[node]] for node in order])
        end = np.cumsum(edges)
        first = end - edges
        at = dict(zip(order, first.tolist(), strict=True))
        last = dict(zip(order, end.tolist(), strict=True))
        for node in reversed(order):
            parent = self.parent[node]
            last[parent] = max(last.get(parent, 0), last[node])
        from_row = starts[[self.row[node] for node in order]] + begins
        paths: list[tuple[int, int]] = []
        for node in self.of_row:
            path = []
            while node:
                path.append((at[node], self.edge(node)))
                node = self.parent[node]
            paths += reversed(path)
        spans = np.array(paths).T
        segments = np.stack([first, end, [last[node] for node in order], begins], 1)
        return ids[runs(from_row, edges)], runs(begins, edges), segments, runs(*spans)


def _branches(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> _Nodes:
    """The radix tree of the sequences ``ids[starts : starts + lengths]``."""
    data = ids.astype(">u4").tobytes()  # big-endian: bytes compare as numbers do
    keys = [
        data[4 * s : 4 * (s + n)] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [0, *_common_prefixes(ids, starts[order], lengths[order])]
    nodes = _Nodes()
    nodes.of_row = [0] * len(order)
    stack = [0]
    for row, shared in zip(order, common, strict=True):
        below = 0
        while nodes.depth[stack[-1]] > shared:
            below = stack.pop()
        if nodes.depth[stack[-1]] < shared:  # ``below`` branches here
            nodes.children[stack[-1]].remove(below)
            stack.append(nodes.add(shared, stack[-1], row))
            nodes.parent[below] = stack[-1]
            nodes.children[stack[-1]].append(below)
        if lengths[row] > shared:
            stack.append(nodes.add(int(lengths[row]), stack[-1], row))
        nodes.of_row[row] = stack[-1]
    return nodes


def _common_prefixes(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
    """How many first tokens each sequence shares with the one before it, from the second on."""
    compared = np.minimum(lengths[1:], lengths[:-1])
    differ = np.flatnonzero(ids[runs(starts[1:], compared)] != ids[runs(starts[:-1], compared)])
    begins = np.cumsum(compared) - compared
    found = np.append(differ, ids.size)[np.searchsorted(differ, begins)]
    return np.minimum(found - begins, compared).tolist()


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``starts[i], starts[i] + 1, ...`` of each length, one run after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


def paths(segments: list[list[int]]) -> Iterator[list[int]]:
    """Of each segment its ancestors, from the root on, and itself, by number; one list, changed."""
    path: list[int] = []
    for k, (first, *_) in enumerate(segments):
        while path and segments[path[-1]][2] <= first:
            path.pop()
        path.append(k)
        yield path
