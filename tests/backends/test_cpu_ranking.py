"""The ranking kernel of the C++ backend against ``backends/torch.py`` in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import check_infinite_scores, check_sums_stand_for_tokens
from pro_kernels import backends
from pro_kernels.backends import cpu
from pro_kernels.options import RankingOptions

if cpu.unusable(torch.device("cpu")) is not None:
    pytest.skip(cpu.unusable(torch.device("cpu")), allow_module_level=True)

reference = backends.get("torch")
EPS = 2.0**-24


def _batch(counts: list[int], lengths: list[int], seed: int, scale: float, gap: float, ties: bool):
    """Ragged prompts: candidates laid out in shuffled order, some sequences in no prompt."""
    g = torch.Generator().manual_seed(seed)
    n = max([*counts, 1])
    total = sum(counts) + 2  # two sequences that no prompt ranks
    tokens = torch.tensor([lengths[i % len(lengths)] for i in range(total)])
    offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    logps = -torch.rand(int(offsets[-1]), generator=g) * scale
    perm = torch.randperm(total, generator=g)
    order = torch.full((len(counts), n), -1)
    sft = torch.full((len(counts),), -1)
    first = 0
    for b, count in enumerate(counts):
        order[b, :count] = perm[first : first + count]
        first += count
        sft[b] = int(torch.randint(-1, max(count, 1), (1,), generator=g))
    rewards = torch.randn(len(counts), n, generator=g) * gap
    if ties:
        rewards = rewards.round()
    rewards = rewards.sort(1, descending=True).values
    weights = torch.rand(len(counts), generator=g)
    # Unscored tokens hold 0 and do not count.
    dead = torch.rand(len(logps), generator=g) < 0.3
    logps[dead] = 0
    live = torch.nn.functional.pad((~dead).long().cumsum(0), (1, 0))
    scored = live[offsets[1:]] - live[offsets[:-1]]
    return logps, offsets, scored, order, rewards, sft, weights


def _check(batch, options: RankingOptions, with_rewards: bool):
    logps, offsets, lengths, order, rewards, sft, weights = batch
    rewards = rewards if with_rewards else None
    got = cpu.ranking(logps, offsets, lengths, order, rewards, sft, weights, options=options)
    want = reference.ranking(
        logps.double(),
        offsets,
        lengths,
        order,
        rewards,
        sft,
        weights.double(),
        options=options,
    )
    for name, a, b in zip(("terms", "sums", "row weights"), got, want, strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all(), name
        # Inside all is double: what remains is the rounding of the result.
        error = (a.double() - b).abs()
        assert (error <= EPS * b.abs() + 1e-9).all(), f"{name}: {error.max():.2e}"
    return got


OPTIONS = st.builds(
    RankingOptions,
    length_normalize=st.booleans(),
    tau=st.sampled_from([1.0, 0.3, 5.0]),
    skip_ties=st.booleans(),
    eps=st.sampled_from([0.0, 1e-10, 1e-3]),
    sft_weight=st.sampled_from([0.0, 0.05, 1.0]),
    sft_mean=st.booleans(),
    top_k=st.sampled_from([None, 1, 2, 100]),
    single_sft=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 30.0]),
    gap=st.sampled_from([0.1, 2.0]),
    ties=st.booleans(),
    with_rewards=st.booleans(),
    options=OPTIONS,
)
def test_ragged_batches_against_fp64(
    counts, lengths, seed, scale, gap, ties, with_rewards, options
):
    _check(_batch(counts, lengths, seed, scale, gap, ties), options, with_rewards)


@pytest.mark.parametrize("with_rewards", [True, False], ids=["rewards", "order only"])
@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_scores_of_any_size_stay_finite(with_rewards, eps):
    """Sums of +-1e4 and reward gaps of 1e3: exponents of 1e7."""
    logps = torch.tensor([-1e4, -3.0, -2e4, 0.0, -7e3, -1e4, 0.0, -5.0])
    batch = (
        logps,
        torch.arange(9),
        torch.ones(8, dtype=torch.int64),
        torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]]),
        torch.tensor([[1e3, 400.0, -200.0, -1e3], [5e2, 5e2, 0.0, -1e3]]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 0.5]),
    )
    _check(batch, RankingOptions(eps=eps), with_rewards)


def test_forms_agree_when_temperatures_are_equal():
    """n = 2 and a reward gap of 1 is the order-only form with tau = 1."""
    batch = _batch([2, 2, 2], [5, 9], 0, 3.0, 1.0, False)
    batch[4][:] = torch.tensor([2.0, 1.0])
    options = RankingOptions()
    # tau_22 differs (0 against 1), but the last candidate heads no term.
    for a, b in zip(_check(batch, options, True), _check(batch, options, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_many_prompts_and_candidates_on_any_number_of_threads():
    counts = [int(c) for c in torch.randint(0, 65, (300,))]
    batch = _batch(counts, [3, 50, 0, 17], 1, 2.0, 1.0, True)
    for with_rewards in (True, False):
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(_check(batch, RankingOptions(), with_rewards))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_sequences_sum_exactly():
    logps = -torch.rand(1_000_003)
    offsets = torch.tensor([0, 1_000_000, 1_000_000, 1_000_003])
    lengths, order = offsets.diff(), torch.tensor([[0, 2, 1]])
    args = lengths, order, None, torch.tensor([0]), torch.ones(1)
    _, sums, weights = cpu.ranking(logps, offsets, *args, options=RankingOptions())
    torch.testing.assert_close(sums.double()[0], logps[:1_000_000].double().sum(), rtol=EPS, atol=0)
    assert sums[1] == 0
    assert (weights[:1_000_000] == weights[0]).all() and (weights[1_000_000:] == weights[-1]).all()


def test_everything_is_written(poison):
    batch = _batch([3, 0, 1], [4, 0, 2], 3, 1.0, 1.0, False)
    for with_rewards in (True, False):
        terms, sums, weights = _check(batch, RankingOptions(), with_rewards)
        assert terms.isfinite().all() and sums.isfinite().all() and weights.isfinite().all()
    empty = torch.empty(0, dtype=torch.int64)
    terms, sums, weights = cpu.ranking(
        torch.empty(0),
        torch.zeros(1, dtype=torch.int64),
        empty,
        torch.empty(0, 4, dtype=torch.int64),
        None,
        empty,
        torch.empty(0),
        options=RankingOptions(),
    )
    assert terms.shape == (0, 4) and sums.shape == (0,) and weights.shape == (0,)


def test_infinite_scores():
    check_infinite_scores(cpu.ranking)


def test_sums_stand_for_tokens():
    check_sums_stand_for_tokens(cpu.ranking)
    check_sums_stand_for_tokens(backends.get("torch").ranking)
