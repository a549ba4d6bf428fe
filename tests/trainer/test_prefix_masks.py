"""Masks of prefix-shared rows: the rule, and the form each attention and model takes it in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pro_trainer.batch.masks import attention_masks, block_mask, dense_mask, mask_mod


def long_rows() -> tuple[Tensor, Tensor]:
    """Segments and positions of rows longer than FlexAttention's blocks of 128, one padded."""
    segments = torch.full((2, 700), -1, dtype=torch.int32)
    positions = torch.zeros(2, 700, dtype=torch.int64)
    for row, (prefix, own) in enumerate([(140, [260, 300]), (30, [150, 10, 200])]):
        pieces = [(0, 0, prefix)] + [(i, prefix, m) for i, m in enumerate(own, 1)]
        segments[row, : prefix + sum(own)] = torch.cat([torch.full((m,), i) for i, _, m in pieces])
        positions[row, : prefix + sum(own)] = torch.cat([torch.arange(m) + p for _, p, m in pieces])
    return segments, positions


def test_the_mask_is_the_rule():
    """Against the rule spelled out on one row: a prompt of 2, candidates of 2 and 3, padding."""
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 2, -1]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0]])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 1, 0],
        ]
    ).bool()
    mask = dense_mask(segments, positions)
    assert mask.shape == (1, 1, 8, 8)
    assert mask[0, 0, :7].equal(expected)
    assert mask[0, 0, 7, 7]  # padding sees itself: no row without a key
    within = dense_mask(segments, positions, window=3)[0, 0]
    distance = positions[0, :, None] - positions[0, None, :]
    assert within[:7].equal(expected & (distance[:7] < 3)) and within[7, 7]
    assert not within[6, 0] and not within[6, 1] and within[6, 4]  # by position, not by index


@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_is_given_the_same_mask(window):
    segments, positions = long_rows()
    expected = dense_mask(segments, positions, window)
    rows, length = segments.shape
    mod = mask_mod(segments, positions, window)
    grid = torch.meshgrid(*map(torch.arange, (rows, length, length)), indexing="ij")
    assert mod(grid[0], torch.tensor(0), grid[1], grid[2]).equal(expected[:, 0])
    blocks = block_mask(segments, positions, window)
    assert blocks.shape == (rows, 1, length, length)
    # Of the blocks of 128 x 128, those without a pair are left out and all others are there.
    filled = torch.nn.functional.max_pool2d(expected.float(), 128, ceil_mode=True).bool()
    assert blocks.to_dense().bool().equal(filled) and not filled.all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_attends_as_the_dense_mask():
    """Forward only: FlexAttention has no backward on a CPU; uncompiled, it is slow but exact."""
    from torch.nn.attention.flex_attention import flex_attention

    segments, positions = long_rows()
    q, k, v = torch.randn(3, *segments.shape[:1], 1, segments.shape[1], 16)
    got = flex_attention(q, k, v, block_mask=block_mask(segments, positions, 40))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(segments, positions, 40)
    )
    torch.testing.assert_close(got, expected)


def config(**options: Any) -> Any:
    defaults = {"_attn_implementation": "sdpa", "sliding_window": None}
    return SimpleNamespace(**{**defaults, **options})


def test_each_model_takes_the_mask_in_its_own_form():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0]])

    def masks(**options: Any) -> Any:
        return attention_masks(segments, positions, config(**options), torch.float32)

    full, near = dense_mask(segments, positions), dense_mask(segments, positions, 2)
    assert masks().equal(full) and masks(sliding_window=2).equal(near)
    assert masks(sliding_window=6).equal(full)  # as long as the row
    added = masks(_attn_implementation="eager", sliding_window=2)
    assert added.dtype == torch.float32 and (added == 0).equal(near)
    assert (added[~near] == torch.finfo(torch.float32).min).all()
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    both = masks(layer_types=types, sliding_window=2)
    assert both.keys() == set(types)
    assert both["full_attention"].equal(full) and both["sliding_attention"].equal(near)
    assert masks(layer_types=["full_attention"] * 3, sliding_window=2).equal(full)
    assert masks(layer_types=["sliding_attention"] * 3, sliding_window=2).equal(near)
    # Two types with the same mask: built once, and the mask itself.
    assert masks(layer_types=types, sliding_window=99).equal(full)
    flex = masks(_attn_implementation="flex_attention")
    assert type(flex).__name__ == "BlockMask"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask of its own"):
        masks(_attn_implementation="flash_attention_2")
