"""Ranking metrics against plain loops over the pairs of each list."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pro_kernels as pk
from pro_trainer.evaluate import metrics as ranking

# Few different values, so that ties in scores, in rewards and in both are common.
VALUES = st.integers(-3, 3).map(lambda k: k / 4)
LISTS = st.lists(
    st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6), min_size=1, max_size=5
)


def near(values: dict[str, float]):
    return pytest.approx(values, abs=1e-12, nan_ok=True)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def pad(lists: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(score, reward) pairs as tensors; what stands in absent places is made to mislead."""
    n = max(map(len, lists))
    absent = itertools.cycle([(1e3, 1e3), (math.nan, math.nan)])
    rows = [x + list(itertools.islice(absent, n - len(x))) for x in lists]
    mask = torch.arange(n) < torch.tensor([len(x) for x in lists])[:, None]
    return *torch.tensor(rows).unbind(-1), mask


def naive_tau(candidates: list[tuple[float, float]]) -> float:
    difference = untied_rewards = untied_scores = 0
    for (s, r), (t, q) in itertools.combinations(candidates, 2):
        sign = ((s > t) - (s < t)) * ((r > q) - (r < q))
        difference += sign
        untied_rewards += r != q
        untied_scores += s != t
    bottom = untied_rewards * untied_scores
    return difference / math.sqrt(bottom) if bottom else math.nan


def naive_ndcg(candidates: list[tuple[float, float]]) -> float:
    """Mean over all orders that the scores allow: the orders of equal scores are all as likely."""
    least = min(r for _, r in candidates)

    def dcg(order: tuple[tuple[float, float], ...]) -> float:
        return math.fsum(
            (r - least) / math.log2(place + 1) for place, (_, r) in enumerate(order, 1)
        )

    orders = [
        order
        for order in itertools.permutations(candidates)
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
    ]
    ideal = dcg(tuple(sorted(candidates, key=lambda c: -c[1])))
    return mean([dcg(order) for order in orders]) / ideal


def naive_of_list(candidates: list[tuple[float, float]]) -> dict[str, float]:
    """The metrics of a list with pairs, tau aside."""
    pairs = [(a[0], b[0]) for a in candidates for b in candidates if a[1] > b[1]]
    top = max(r for _, r in candidates)
    best = [s for s, r in candidates if r == top]
    rest = [s for s, r in candidates if r < top]
    highest = max(s for s, _ in candidates)
    return {
        "top1_accuracy": all(r == top for s, r in candidates if s == highest),
        "ndcg": naive_ndcg(candidates),
        "rewards/chosen": mean([a for a, _ in pairs]),
        "rewards/rejected": mean([b for _, b in pairs]),
        "rewards/margins": mean([a - b for a, b in pairs]),
        "rewards/accuracies": mean([a > b for a, b in pairs]),
        "best_margin": mean(best) - mean(rest),
        "best_accuracy": mean([b > r for b in best for r in rest]),
    }


def naive_pairs(lists: list[list[tuple[float, float]]]) -> list[tuple[float, bool]]:
    """Gap in reward of each pair, by size, and whether the scores have it right."""
    return sorted((a[1] - b[1], a[0] > b[0]) for x in lists for a in x for b in x if a[1] > b[1])


def naive_metrics(lists: list[list[tuple[float, float]]]) -> dict[str, float]:
    right = [is_right for _, is_right in naive_pairs(lists)]
    ranked = [naive_of_list(x) for x in lists if len({r for _, r in x}) > 1]
    names = naive_of_list([(1.0, 1.0), (0.0, 0.0)])
    taus = [tau for tau in map(naive_tau, lists) if not math.isnan(tau)]
    return {
        "pairwise_accuracy": mean(right),
        "kendall_tau": mean(taus),
        **{name: mean([one[name] for one in ranked]) for name in names},
        "pairs": len(right),
        "prompts": len(lists),
    }


@settings(max_examples=100, deadline=None)
@given(LISTS, st.integers(1, 5), st.sampled_from([1, 1 << 22]))
def test_metrics_equal_loops_over_the_pairs(lists, quantiles, at_once):
    """Also where lists are taken one by one."""
    with mock.patch.object(ranking, "_COMPARISONS_AT_ONCE", at_once):
        check_metrics(lists, quantiles)


def check_metrics(lists, quantiles):
    statistics = ranking.list_statistics(*pad(lists))
    assert ranking.ranking_metrics(*pad(lists)) == near(naive_metrics(lists))
    rows = ranking.metrics_by_candidates(statistics)
    assert [row["candidates"] for row in rows] == sorted({len(x) for x in lists})
    for row in rows:
        same_size = [x for x in lists if len(x) == row["candidates"]]
        assert row == near({"candidates": row["candidates"], **naive_metrics(same_size)})

    pairs = naive_pairs(lists)
    rows = ranking.accuracy_by_reward_gap(*pad(lists), quantiles=quantiles)
    assert len(rows) <= quantiles and sum(row["pairs"] for row in rows) == len(pairs)
    for row in rows:
        inside = [right for gap, right in pairs if row["gap_from"] <= gap <= row["gap_to"]]
        assert len(inside) == row["pairs"]  # equal gaps are never divided
        assert row["pairwise_accuracy"] == pytest.approx(mean(inside))
    for one, other in itertools.pairwise(rows):
        assert one["gap_to"] < other["gap_from"]


def test_gaps_without_ties_are_quarters():
    generator = torch.Generator().manual_seed(0)
    scores, rewards = torch.randn(2, 50, 4, generator=generator).double()
    rows = ranking.accuracy_by_reward_gap(scores, rewards, torch.ones(50, 4, dtype=torch.bool))
    assert [row["pairs"] for row in rows] == [75, 75, 75, 75]


@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_score_by_rank_takes_off_the_mean_of_each_list(at_once, monkeypatch):
    monkeypatch.setattr(ranking, "_COMPARISONS_AT_ONCE", at_once)
    lists = [
        [(-10.0, 1.0), (-12.0, 0.0)],
        [(5.0, 0.0), (9.0, 3.0)],
        [(1.0, 2.0), (1.0, 2.0), (4.0, 0.5)],
    ]
    rows = ranking.score_by_rank(*pad(lists))
    assert [(r["candidates"], r["rank"], r["count"]) for r in rows] == [
        (2, 1, 2),
        (2, 2, 2),
        (3, 1, 2),  # two candidates share the best rank
        (3, 3, 1),
    ]
    assert [r["score"] for r in rows] == pytest.approx([1.5, -1.5, -1.0, 2.0])
    # standard deviation of (1, 2) is 1 / sqrt(2); of the mean of two: 1 / 2
    assert rows[0]["standard_error"] == pytest.approx(0.5)
    assert rows[2]["standard_error"] == 0
    assert math.isnan(rows[3]["standard_error"])


FOUR, ACCURACIES = [3.0, 1.0, 0.0, -2.0], ("pairwise_accuracy", "top1_accuracy", "best_accuracy")
# Gains 5, 3, 2, 0 at places 4, 3, 2, 1.
REVERSED_NDCG = (5 / math.log2(5) + 3 / 2 + 2 / math.log2(3)) / (5 + 3 / math.log2(3) + 2 / 2)


@pytest.mark.parametrize(
    ("lists", "accuracy", "tau", "ndcg"),
    [
        ([[(reward * 0.1, reward) for reward in FOUR]], 1, 1, 1),
        ([[(-reward, reward) for reward in FOUR]], 0, -1, REVERSED_NDCG),
        # A score of minus infinity ranks last.
        ([[(-1.0, 1.0), (-math.inf, 0.0)], [(-math.inf, 1.0), (-1.0, 0.0)]], 0.5, 0, None),
    ],
)
def test_metrics_of_orders_that_are_known(lists, accuracy, tau, ndcg):
    got = ranking.ranking_metrics(*pad(lists))
    assert [got[name] for name in (*ACCURACIES, "kendall_tau")] == [accuracy] * 3 + [tau]
    assert ndcg is None or got["ndcg"] == pytest.approx(ndcg)


def test_names_shared_with_the_losses_mean_the_same():
    generator = torch.Generator().manual_seed(2)
    logps, rewards = torch.randn(2, 40, 5, generator=generator)
    lengths = torch.randint(1, 9, (40, 5), generator=generator)
    mask = torch.arange(5) < torch.randint(2, 6, (40, 1), generator=generator)
    rewards[:20] = rewards[:20].round()  # ties
    _, metrics = pk.losses.get_loss("pro")(
        logps, lengths, rewards=rewards, mask=mask, equal_rewards="keep"
    )
    ours = ranking.ranking_metrics(logps / lengths, rewards, mask)
    shared = [name for name in ours if name.startswith("rewards/")]
    assert len(shared) == 4
    for name in shared:
        assert ours[name] == pytest.approx(metrics[name].item(), abs=1e-6), name


@pytest.mark.parametrize("lists", [0, 2])
def test_without_candidates_nothing_is_defined(lists: int):
    empty = torch.zeros(lists, 3)
    got = ranking.ranking_metrics(empty, empty, empty.bool())
    assert got["prompts"] == lists and got["pairs"] == 0
    assert math.isnan(got["pairwise_accuracy"]) and math.isnan(got["ndcg"])
    assert ranking.accuracy_by_reward_gap(empty, empty, empty.bool()) == []
    assert ranking.score_by_rank(empty, empty, empty.bool()) == []


ZEROS, ONES = torch.zeros(2, 3), torch.ones(2, 3).bool()
NAN_LAST = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, torch.nan]])
INF_FIRST = torch.tensor([[1.0, 2.0, torch.inf], [1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("scores", "rewards", "mask", "message"),
    [
        (ZEROS[0], ZEROS[0], ONES[0], r"must all be \(L, n\), got \(3,\)"),
        (ZEROS, ZEROS[:, :2], ONES, r"\(2, 3\), \(2, 2\) and"),
        (ZEROS[:, :0], ZEROS[:, :0], ONES[:, :0], r"places .* got shape \(2, 0"),
        (ZEROS, ZEROS, ONES.float(), "mask must be bool, got torch.f"),
        (NAN_LAST, ZEROS, ONES, "scores of 1 of 2 lists are not numbers, first in list 1"),
        (ZEROS, INF_FIRST, ONES, "rewards of 1 of 2 lists are not numbers, first in list 0"),
    ],
)
def test_bad_input(scores, rewards, mask, message):
    with pytest.raises(ValueError, match=message):
        ranking.ranking_metrics(scores, rewards, mask)
    with pytest.raises(ValueError, match="quantiles must be at least 1, got 0"):
        ranking.accuracy_by_reward_gap(ZEROS, ZEROS, ONES, 0)
