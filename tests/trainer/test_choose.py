"""Which candidates of a long list are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import row

from pro_trainer.data.choose import choose

ORDER = [0, 1, 2, 3, 4, 5]
SIX = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
TEXTS = ["the same, here", "The  same, here.", "the same, here too", "whatever they say",
         "whatever they say!", "no 1 knows"]  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "limit", "kept", "options"),
    [
        # An order is thinned evenly.
        *(row(None, limit, ORDER) for limit in (None, 6, 9)),
        row(None, 2, [0, 5]),
        row(None, 3, [0, 2, 5]),
        row(None, 5, [0, 1, 2, 4, 5]),
        # The candidate to keep takes the place of the nearest.
        row(None, 3, [0, 1, 5], keep=1),
        row(None, 3, [0, 2, 5], keep=2),
        row(None, 2, [0, 4], keep=4),  # nothing between: nearest of best and worst
        row(None, 2, [0, 5], keep=0),
        # Rewards that differ go first, ties where there is nothing else.
        row([9, 9, 9, 5, 1], 3, [0, 3, 4]),
        row([9, 9, 9, 9, 1], 3, [0, 1, 4]),
        # They are spread over the range, and not over the ranks.
        row([9, 8.9, 8.8, 5, 1], 3, [0, 3, 4]),
        row([9, 8.9, 8.8, 5, 1], 4, [0, 2, 3, 4]),
        row([1e8 + 1, 1e8, 0], 2, [0, 2]),
        row(SIX, 3, [0, 1, 2], select="top"),
        row(SIX, 3, [0, 1, 5], select="top", bottom=1),
        row(SIX, 3, [0, 4, 5], select="top", bottom=2),
        row(SIX, 3, [0, 1, 4], select="top", keep=4),
        row(SIX, 3, [0, 3, 5], select="diverse"),  # 1 and 2 are like 0, 4 is like 3
        row(SIX, 3, [0, 3, 5], select="diverse", bottom=1),
        row(SIX, 4, [0, 2, 3, 5], select="diverse"),
    ],
)
def test_which_are_kept(rewards, limit, kept, options):
    order = range(len(rewards or ORDER))
    assert choose(order, rewards, limit, texts=TEXTS, **options) == kept


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
