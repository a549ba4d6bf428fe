"""Ranking metrics against plain loops over the pairs of each list."""

from __future__ import annotations

import itertools
import math

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


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def pad(lists: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(score, reward) pairs as tensors; what stands in absent places is made to mislead."""
    n = max(map(len, lists))
    scores, rewards = torch.full((len(lists), n), 1e3), torch.full((len(lists), n), 1e3)
    mask = torch.zeros(len(lists), n, dtype=torch.bool)
    for i, candidates in enumerate(lists):
        for j, (score, reward) in enumerate(candidates):
            scores[i, j], rewards[i, j], mask[i, j] = score, reward, True
    return scores, rewards, mask


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


def naive_metrics(lists: list[list[tuple[float, float]]]) -> dict[str, float]:
    right: list[bool] = []
    per_list: dict[str, list[float]] = {
        name: []
        for name in (
            "top1_accuracy", "kendall_tau", "ndcg", "rewards/chosen", "rewards/rejected",
            "rewards/margins", "rewards/accuracies", "best_margin", "best_accuracy",
        )
    }  # fmt: skip
    for candidates in lists:
        tau = naive_tau(candidates)
        if not math.isnan(tau):
            per_list["kendall_tau"].append(tau)
        pairs = [(a, b) for a in candidates for b in candidates if a[1] > b[1]]
        right += [a[0] > b[0] for a, b in pairs]
        if not pairs:
            continue
        top = max(r for _, r in candidates)
        best = [s for s, r in candidates if r == top]
        rest = [s for s, r in candidates if r < top]
        highest = max(s for s, _ in candidates)
        per_list["top1_accuracy"].append(all(r == top for s, r in candidates if s == highest))
        per_list["ndcg"].append(naive_ndcg(candidates))
        per_list["rewards/chosen"].append(mean([a[0] for a, _ in pairs]))
        per_list["rewards/rejected"].append(mean([b[0] for _, b in pairs]))
        per_list["rewards/margins"].append(mean([a[0] - b[0] for a, b in pairs]))
        per_list["rewards/accuracies"].append(mean([a[0] > b[0] for a, b in pairs]))
        per_list["best_margin"].append(mean(best) - mean(rest))
        per_list["best_accuracy"].append(mean([b > r for b in best for r in rest]))
    return {
        "pairwise_accuracy": mean(right),
        **{name: mean(values) for name, values in per_list.items()},
        "pairs": len(right),
        "prompts": len(lists),
    }


@settings(max_examples=150, deadline=None)
@given(LISTS)
def test_metrics_equal_loops_over_the_pairs(lists: list[list[tuple[float, float]]]) -> None:
    expected = naive_metrics(lists)
    got = ranking.ranking_metrics(*pad(lists))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name


@settings(max_examples=50, deadline=None)
@given(LISTS)
def test_breakdown_by_size_is_the_metrics_of_those_lists(
    lists: list[list[tuple[float, float]]],
) -> None:
    rows = ranking.metrics_by_candidates(ranking.list_statistics(*pad(lists)))
    assert [row["candidates"] for row in rows] == sorted({len(x) for x in lists})
    for row in rows:
        same_size = [x for x in lists if len(x) == row["candidates"]]
        expected = {"candidates": row["candidates"], **naive_metrics(same_size)}
        assert row == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=80, deadline=None)
@given(LISTS, st.integers(1, 5))
def test_gaps_divide_the_pairs_in_order(
    lists: list[list[tuple[float, float]]], quantiles: int
) -> None:
    pairs = sorted((a[1] - b[1], a[0] > b[0]) for x in lists for a in x for b in x if a[1] > b[1])
    rows = ranking.accuracy_by_reward_gap(*pad(lists), quantiles=quantiles)
    assert len(rows) <= quantiles
    assert sum(row["pairs"] for row in rows) == len(pairs)
    for row in rows:
        inside = [right for gap, right in pairs if row["gap_from"] <= gap <= row["gap_to"]]
        assert len(inside) == row["pairs"]  # equal gaps are never divided
        assert row["pairwise_accuracy"] == pytest.approx(mean(inside))
    for one, other in itertools.pairwise(rows):
        assert one["gap_to"] < other["gap_from"]


def test_gaps_without_ties_are_quarters() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, rewards = torch.randn(2, 50, 4, generator=generator).double()
    rows = ranking.accuracy_by_reward_gap(scores, rewards, torch.ones(50, 4, dtype=torch.bool))
    assert [row["pairs"] for row in rows] == [75, 75, 75, 75]


def test_score_by_rank_takes_off_the_mean_of_each_list() -> None:
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


def test_a_perfect_and_a_reversed_order() -> None:
    rewards = torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    perfect = ranking.ranking_metrics(rewards * 0.1, rewards, mask)
    for name in ("pairwise_accuracy", "top1_accuracy", "kendall_tau", "ndcg", "best_accuracy"):
        assert perfect[name] == pytest.approx(1), name
    reversed_ = ranking.ranking_metrics(-rewards, rewards, mask)
    assert reversed_["kendall_tau"] == pytest.approx(-1)
    assert reversed_["pairwise_accuracy"] == reversed_["top1_accuracy"] == 0
    # gains 5, 3, 2, 0 at places 4, 3, 2, 1
    dcg = 5 / math.log2(5) + 3 / 2 + 2 / math.log2(3)
    assert reversed_["ndcg"] == pytest.approx(dcg / (5 + 3 / math.log2(3) + 2 / 2))


def test_names_shared_with_the_losses_mean_the_same() -> None:
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


def test_constant_scores_earn_nothing_from_the_order_of_storage() -> None:
    rewards = torch.tensor([[2.0, 1.0, 0.0]])
    got = ranking.ranking_metrics(torch.zeros(1, 3), rewards, torch.ones(1, 3, dtype=torch.bool))
    assert got["pairwise_accuracy"] == got["top1_accuracy"] == got["best_accuracy"] == 0
    assert math.isnan(got["kendall_tau"])
    assert got["ndcg"] < 1


def test_scores_of_minus_infinity_rank_last() -> None:
    scores = torch.tensor([[-1.0, -torch.inf], [-torch.inf, -1.0]])
    got = ranking.ranking_metrics(
        scores, torch.tensor([[1.0, 0.0]] * 2), torch.ones(2, 2, dtype=torch.bool)
    )
    assert got["pairwise_accuracy"] == got["top1_accuracy"] == 0.5


def test_many_lists_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    scores, rewards = torch.randint(0, 4, (2, 37, 5), generator=generator).float()
    mask = torch.rand(37, 5, generator=generator) < 0.8
    whole = ranking.list_statistics(scores, rewards, mask)
    gaps = ranking.accuracy_by_reward_gap(scores, rewards, mask)
    ranks = ranking.score_by_rank(scores, rewards, mask)
    monkeypatch.setattr(ranking, "_COMPARISONS_AT_ONCE", 100)
    for one, other in zip(whole, ranking.list_statistics(scores, rewards, mask), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert ranking.accuracy_by_reward_gap(scores, rewards, mask) == gaps
    for one, other in zip(ranks, ranking.score_by_rank(scores, rewards, mask), strict=True):
        assert one == pytest.approx(other, nan_ok=True)


@pytest.mark.parametrize("lists", [0, 2])
def test_without_candidates_nothing_is_defined(lists: int) -> None:
    empty = torch.zeros(lists, 3)
    got = ranking.ranking_metrics(empty, empty, empty.bool())
    assert got["prompts"] == lists and got["pairs"] == 0
    assert math.isnan(got["pairwise_accuracy"]) and math.isnan(got["ndcg"])
    assert ranking.accuracy_by_reward_gap(empty, empty, empty.bool()) == []
    assert ranking.score_by_rank(empty, empty, empty.bool()) == []


@pytest.mark.parametrize(
    ("scores", "rewards", "mask", "message"),
    [
        (torch.zeros(2), torch.zeros(2), torch.ones(2).bool(), r"must all be \(L, n\), got \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 3).bool(), r"\(2, 3\), \(2, 2\) and"),
        (torch.zeros(2, 0), torch.zeros(2, 0), torch.ones(2, 0) > 0, r"places .* got shape \(2, 0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), "mask must be bool, got torch.f"),
        (
            torch.tensor([[1.0, 2.0], [1.0, torch.nan]]),
            torch.zeros(2, 2),
            torch.ones(2, 2).bool(),
            "scores of 1 of 2 lists are not numbers, first in list 1",
        ),
        (
            torch.zeros(1, 2),
            torch.tensor([[1.0, torch.inf]]),
            torch.ones(1, 2).bool(),
            "rewards of 1 of 1 lists are not numbers, first in list 0",
        ),
    ],
)
def test_bad_input(scores: Tensor, rewards: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking.ranking_metrics(scores, rewards, mask)


def test_nan_in_an_absent_place_is_no_score() -> None:
    scores = torch.tensor([[2.0, 1.0, torch.nan]])
    rewards = torch.tensor([[1.0, 0.0, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    got = ranking.ranking_metrics(scores, rewards, mask)
    assert all(math.isfinite(value) for value in got.values())
    assert got["pairwise_accuracy"] == got["ndcg"] == 1


def test_quantiles_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="quantiles must be at least 1, got 0"):
        ranking.accuracy_by_reward_gap(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2) > 0, 0
        )
