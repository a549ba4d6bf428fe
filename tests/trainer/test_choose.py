"""Which candidates of a long list are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pro_trainer.data.choose import choose

ORDER = [5, 4, 3, 2, 1, 0]


def test_an_order_is_thinned_evenly():
    assert choose(ORDER, None, None) == choose(ORDER, None, 6) == choose(ORDER, None, 9) == ORDER
    assert choose(ORDER, None, 2) == [5, 0]
    assert choose(ORDER, None, 3) == [5, 3, 0]
    assert choose(ORDER, None, 5) == [5, 4, 3, 1, 0]


def test_the_candidate_to_keep_takes_the_place_of_the_nearest():
    assert choose(ORDER, None, 3, keep=4) == [5, 4, 0]
    assert choose(ORDER, None, 3, keep=3) == [5, 3, 0]
    assert choose(ORDER, None, 2, keep=1) == [5, 1]  # nothing between: nearest of best and worst
    assert choose(ORDER, None, 2, keep=5) == [5, 0]


@pytest.mark.parametrize(
    ("rewards", "limit", "kept"),
    [
        ([9, 9, 9, 5, 1], 3, [9, 5, 1]),  # different ones first
        ([9, 9, 9, 9, 1], 3, [9, 9, 1]),  # ties where there is nothing else
        ([9, 8.9, 8.8, 5, 1], 3, [9, 5, 1]),  # spread over the range, and not over the ranks
        ([9, 8.9, 8.8, 5, 1], 4, [9, 8.8, 5, 1]),
        ([1e8 + 1, 1e8, 0], 2, [1e8 + 1, 0]),
    ],
)
def test_rewards_that_differ_go_first_and_are_spread(rewards, limit, kept):
    assert [rewards[i] for i in choose(range(len(rewards)), rewards, limit)] == kept


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.integers(2, 12))
def test_as_many_different_rewards_as_there_can_be(values, limit):
    rewards = [float(v) for v in values]
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    kept = choose(order, rewards, limit)
    assert len(kept) == len(set(kept)) == min(limit, len(rewards))
    assert kept == [i for i in order if i in kept]
    found = {rewards[i] for i in kept}
    assert len(found) == min(limit, len(set(rewards)))
    assert {max(rewards), min(rewards)} <= found


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"select": "top"}, [5, 4, 3]),
        ({"select": "top", "bottom": 1}, [5, 4, 0]),
        ({"select": "top", "bottom": 2}, [5, 1, 0]),
        ({"select": "top", "keep": 1}, [5, 4, 1]),
        ({"select": "diverse"}, [5, 2, 0]),  # 3 and 4 are like 5, 1 is like 2
        ({"select": "diverse", "bottom": 1}, [5, 2, 0]),
        ({"select": "diverse", "limit": 4}, [5, 3, 2, 0]),
    ],
)
def test_the_best_or_those_unlike(options, kept):
    texts = ["no 1 knows", "whatever they say!", "whatever they say", "the same, here too",
             "The  same, here.", "the same, here"]  # fmt: skip
    rewards = [float(i) for i in range(6)]
    options = {"limit": 3, **options}
    assert choose(ORDER, rewards, texts=texts, **options) == kept
