"""``TokenTree``: every token of every sequence, once for all that begin alike."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pro_kernels as pk
from pro_kernels.distinct.tree import COPIED
from trees import padded


def distinct(rows: list[list[int]]) -> int:
    """Nodes of the trie of some rows."""
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


def check(tree: pk.TokenTree, rows: list[list[int]]) -> None:
    assert tree.input_ids[tree.places].tolist() == [token for row in rows for token in row]
    assert tree.position_ids[tree.places].tolist() == [i for row in rows for i in range(len(row))]
    assert tree.lengths.tolist() == [len(row) for row in rows]
    assert distinct(rows) <= tree.num_tokens <= distinct(rows) * (1 + COPIED)
    # A row is a segment and those around it, all of each.
    segments = tree.segments.tolist()
    assert [first for first, *_ in segments] == [0, *(end for _, end, *_ in segments)][:-1]
    assert all(first < end <= last for first, end, last, _ in segments)
    ends = tree.lengths.cumsum(0).tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        if start < stop:
            last = int(tree.places[stop - 1])
            around = [x for x in segments if x[0] <= last < x[2]]
            spans = [place for first, end, *_ in around for place in range(first, end)]
            assert tree.places[start:stop].tolist() == spans
            assert [x[3] for x in around] == np.cumsum(
                [0] + [b - a for a, b, *_ in around]
            ).tolist()[:-1]


ROWS = st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=8).filter(any)
LONG = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 25), st.integers(1, 2)), min_size=1)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_short_rows(rows):
    check(pk.TokenTree.from_sequences(rows), rows)


@settings(max_examples=200, deadline=None)
@given(LONG, st.integers(0, 3))
def test_rows_with_long_common_prefixes(shapes, more):
    rows = [[1] * a + [k] * b + [3] * more for a, b, k in shapes]
    if any(rows):
        check(pk.TokenTree.from_sequences(rows), rows)


@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch_has_the_tree_of_its_rows(left):
    rows = [[5, 0, 7] * 6 + [i] * i for i in range(1, 5)] + [[9]]  # padding is a token as well
    ids, mask = padded(rows, left).values()
    tree = pk.TokenTree.from_padded(ids, mask)
    check(tree, rows)
    index = tree.index(ids.shape, mask)
    assert (index == tree.num_tokens).sum() == (mask == 0).sum()
    assert torch.equal(tree.input_ids[index[index < tree.num_tokens]], ids[mask != 0])
    whole = pk.TokenTree.from_padded(ids)
    assert torch.equal(whole.index(ids.shape, None), whole.places)


def test_what_is_shared_and_what_is_copied():
    start = list(range(20))
    tree = pk.TokenTree.from_sequences([start, [*start, 1], start, [*start, 1]])
    assert tree.num_tokens == 21 and tree.segments.tolist() == [[0, 20, 21, 0], [20, 21, 21, 20]]
    rows = [[1, 2, *[k] * 200] for k in range(3, 6)]
    assert pk.TokenTree.from_sequences(rows).num_tokens == 606  # 602 differ; three segments
    tree = pk.TokenTree.from_sequences([[1, 2, k] for k in range(3, 6)])
    assert tree.num_tokens == 5  # there 4 copies would be too many


@pytest.mark.parametrize(
    ("ids", "mask", "wrong"),
    [
        ([[1, 2]], [[1, 1, 1]], r"attention_mask must have the shape of input_ids, \(1, 2\), got"),
        ([[1, 2, 3]], [[1, 0, 1]], "attention_mask has padding between the tokens of a row"),
        ([[1, 2]], [[0, 0]], r"token ids \(>= 0\), of which there are none"),
        ([[1, -100]], None, "the least of which is -100"),
        ([1, 2], None, r"input_ids must have shape \(R, T\), got \(2,\)"),
    ],
)
def test_what_cannot_be(ids, mask, wrong):
    with pytest.raises(ValueError, match=wrong):
        pk.TokenTree.from_padded(torch.tensor(ids), mask if mask is None else torch.tensor(mask))


@pytest.mark.parametrize("wrong", [[[1.5, 2]], [[[1, 2], [3, 4]]], [["a"]]], ids=str)
def test_sequences_that_are_none(wrong):
    with pytest.raises(TypeError, match="sequences must hold token ids, one list of integers each"):
        pk.TokenTree.from_sequences(wrong)


def test_no_loop_goes_over_tokens():
    """The time does not grow with the tokens as a loop over them would: a bound with much room."""
    numbers = np.random.default_rng(0)
    prompt = numbers.integers(0, 50000, 20000)
    rows = [np.concatenate([prompt, numbers.integers(0, 50000, 5000)]) for _ in range(40)]
    pk.TokenTree.from_sequences(rows[:2])
    start = time.perf_counter()
    tree = pk.TokenTree.from_sequences(rows)
    assert tree.num_tokens == 220000 and time.perf_counter() - start < 1.0  # a loop: 10^6 steps
