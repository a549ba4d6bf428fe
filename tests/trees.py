"""Trees, attention over them in one dense softmax, and faults to be found."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

import pro_kernels as pk


def random_tree(seed: int, longest: int = 40) -> pk.TokenTree:
    chance = random.Random(seed)
    words = chance.choice([1, 2, 3])
    rows = [
        [chance.randrange(words) for _ in range(chance.randint(1, longest))]
        for _ in range(chance.randint(1, 6))
    ]
    return pk.TokenTree.from_sequences(rows)


def padded(rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    """Two columns wider than the longest of them."""
    width = max(map(len, rows)) + 2
    shape = len(rows), width
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def dense_mask(tree: pk.TokenTree, window: int | None) -> Tensor:
    """(S, S), from each token's path: which keys stand on the way from the root to the query."""
    size = tree.num_tokens
    mask = torch.zeros(size, size, dtype=torch.bool)
    ends = tree.lengths.cumsum(0).tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        path = tree.places[start:stop]
        for i, query in enumerate(path.tolist()):
            mask[query, path[max(0, i + 1 - (window or size)) : i + 1]] = True
    return mask


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """(1, S, h, e)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def moved(tree: pk.TokenTree) -> pk.TokenTree:
    """A fault: positions of all but first segments one too high."""
    first, end, _, position = tree.segments.T
    more = torch.repeat_interleave((position > 0).long(), end - first)
    return dataclasses.replace(tree, position_ids=tree.position_ids + more)


def leaking(tree: pk.TokenTree) -> pk.TokenTree:
    """A fault: a branch attends to the one before it as well."""
    segments = tree.segments.clone()
    leaves = (segments[:, 1] == segments[:, 2]).nonzero()[:, 0]
    segments[leaves[0], 2] = segments[leaves[1], 1]
    return dataclasses.replace(tree, segments=segments)
