"""The ranking loss, on every backend, against ``backends/torch.py`` in fp64."""

from __future__ import annotations

import pytest
import torch
from contract import EPS, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contract_rows import equal

from pro_kernels.backends.protocol import Candidates
from pro_kernels.options import RankingOptions
from subjects import every_subject

pytestmark = [
    every_subject(),
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, inside Triton's interpreter
]
with_or_without_rewards = pytest.mark.parametrize(
    "with_rewards", [True, False], ids=["rewards", "order only"]
)


def prompts_of(counts, lengths, seed=0, scale=2.0, gap=1.0, ties=True):
    """Ragged prompts: candidates laid out in shuffled order, some sequences in no prompt."""
    g = torch.Generator().manual_seed(seed)
    n = max([*counts, 1])
    total = sum(counts) + 2  # two sequences that no prompt ranks
    tokens = torch.tensor([lengths[i % len(lengths)] for i in range(total)], device="cpu")
    offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    logps = -torch.rand(int(offsets[-1]), generator=g, device="cpu") * scale
    perm = torch.randperm(total, generator=g, device="cpu")
    order = torch.full((len(counts), n), -1, device="cpu")
    sft = torch.full((len(counts),), -1, device="cpu")
    first = 0
    for b, count in enumerate(counts):
        order[b, :count] = perm[first : first + count]
        first += count
        sft[b] = int(torch.randint(-1, max(count, 1), (1,), generator=g, device="cpu"))
    rewards = torch.randn(len(counts), n, generator=g, device="cpu") * gap
    if ties:
        rewards = rewards.round()
    rewards = rewards.sort(1, descending=True).values
    weights = torch.rand(len(counts), generator=g, device="cpu")
    # Unscored tokens hold 0 and do not count.
    dead = torch.rand(len(logps), generator=g, device="cpu") < 0.3
    logps[dead] = 0
    live = torch.nn.functional.pad((~dead).long().cumsum(0), (1, 0))
    scored = live[offsets[1:]] - live[offsets[:-1]]
    here = torch.empty(0).device
    return [x.to(here) for x in (logps, offsets, scored, order, rewards, sft, weights)]


def rank(subject, batch, options=None, with_rewards=True):
    logps, *candidates = batch
    candidates = Candidates(*candidates)
    if not with_rewards:
        candidates = candidates._replace(rewards=None)
    return subject.ranking(logps, candidates, options or RankingOptions())


def check(subject, batch, options=None, with_rewards=True):
    """All of it against fp64, as exact as what a backend computes in: C++ in double throughout."""
    options = options or RankingOptions()
    logps, *rest, weights = batch
    found = rank(subject, batch, options, with_rewards)
    truth = rank(reference, [logps.double(), *rest, weights.double()], options, with_rewards)
    if subject.name == "cpu":
        floors = (1e-9,) * 3
    elif subject.name == "cuda":
        # Sums and exponents are double; exponentials and what follows them are float, and a weight
        # is a difference of parts as large as the temperatures.
        rewards, n = batch[4], batch[3].shape[1]
        wide = float(rewards.max() - rewards.min()) if with_rewards and rewards.numel() else 0
        parts = n * (wide or options.tau) + abs(options.sft_weight) * n**2
        floors = (16 * EPS, 0.0, 8 * EPS * parts)
    else:  # single precision: no worse than PyTorch's
        plain = rank(reference, batch, options, with_rewards)
        floors = [
            2 * (p - t).abs().max() + 16 * EPS * t.abs().max().clamp_min(1e-3) if t.numel() else 0
            for p, t in zip(plain, truth, strict=True)
        ]
    for name, a, b, floor in zip(("terms", "sums", "weights"), found, truth, floors, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape and a.isfinite().all(), name
        error = (a.double() - b).abs()
        assert (error <= EPS * b.abs() + floor).all(), f"{name}: {error.max():.2e}"
    return found


OPTIONS = st.builds(
    RankingOptions,
    length_normalize=st.booleans(),
    tau=st.sampled_from([1.0, 0.3, 5.0]),
    skip_ties=st.booleans(),
    eps=st.sampled_from([0.0, 1e-10, 1e-3, 0.5]),
    sft_weight=st.sampled_from([0.0, 0.05, 1.0, -0.2]),
    sft_mean=st.booleans(),
    top_k=st.sampled_from([None, 1, 2, 100]),
    single_sft=st.booleans(),
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=5),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 30.0]),
    gap=st.sampled_from([0.1, 2.0]),
    ties=st.booleans(),
    with_rewards=st.booleans(),
    options=OPTIONS,
)
def test_ragged_batches(subject, counts, lengths, seed, scale, gap, ties, with_rewards, options):
    check(subject, prompts_of(counts, lengths, seed, scale, gap, ties), options, with_rewards)


@with_or_without_rewards
def test_many_candidates(subject, with_rewards):
    """About the blocks in which lists are walked, up to the longest that every kernel takes."""
    for n in (33, 129) if subject.interpreted else (64, 65, 1024):
        batch = prompts_of([n, n // 2, 1], [3, 50, 0, 17], 1)
        check(subject, batch, None, with_rewards)
        if n < 129:
            options = RankingOptions(top_k=3, skip_ties=True, eps=1e-3)
            check(subject, batch, options, with_rewards)


@pytest.mark.parametrize("eps", [0.0, 1e-10])
@with_or_without_rewards
def test_scores_of_any_size(subject, with_rewards, eps):
    """Sums of 1e4 and reward gaps of 1e3: exponents of 1e7, and no digits are lost to them."""
    for sign in (1, -1):  # +1e4 cannot be a log-prob, but must not overflow either
        batch = (
            sign * torch.tensor([-1e4, -3.0, -2e4, 0.0, -7e3, -1e4, 0.0, -5.0]),
            torch.arange(9),
            torch.ones(8, dtype=torch.int64),
            torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]]),
            torch.tensor([[1e3, 400.0, -200.0, -1e3], [5e2, 5e2, 0.0, -1e3]]),
            torch.tensor([0, 0]),
            torch.tensor([1.0, 0.5]),
        )
        for options in (RankingOptions(eps=eps), RankingOptions(eps=eps, skip_ties=True, top_k=2)):
            check(subject, batch, options, with_rewards)


def test_same_bits_on_any_number_of_threads_and_in_any_order(subject):
    few = subject.interpreted
    counts = [16, 3] if few else [5, 70, 2, *torch.randint(0, 65, (300,)).tolist()]
    batch = prompts_of(counts, [3, 50, 0, 17], 1)
    for with_rewards in (True, False):
        found = check(subject, batch, None, with_rewards)
        for repeat in subject.repeats:
            with repeat():
                assert equal(rank(subject, batch, None, with_rewards), found)


def test_long_sequences_and_tokens_of_no_sequence(subject):
    """Sums are exact to a rounding, over several blocks of tokens."""
    length = 3000 if subject.interpreted else 1_000_000
    none = 0 if subject.name == "torch" else 5  # which needs a sequence for each token
    ends = none, none + length, none + length, none + length + 7
    logps = -torch.rand(ends[-1] + none)
    offsets = torch.tensor(ends)
    args = offsets.diff(), torch.tensor([[0, 2, 1]]), None, torch.tensor([0]), torch.ones(1)
    _, sums, weights = rank(subject, (logps, offsets, *args))
    rtol = {"cpu": EPS, "cuda": EPS, "torch": 1e-4}.get(subject.name, 1e-6)
    assert not weights[: ends[0]].any() and not weights[ends[3] :].any()
    for total, a, b in zip(sums.double(), ends, ends[1:], strict=False):
        want = logps[a:b].double().sum()
        torch.testing.assert_close(total, want, rtol=rtol, atol=0)
        assert a == b or (weights[a] != 0 and (weights[a:b] == weights[a]).all())


def test_a_nan_stays_in_its_prompt(subject):
    batch = prompts_of([4, 4, 4], [3], 2)
    logps, offsets, _, order, *_ = batch
    clean = rank(subject, batch)
    logps[offsets[order[0, 1]]] = torch.nan
    terms, sums, weights = rank(subject, batch)
    assert terms[0].isnan().any() and sums.isnan().sum() == 1
    assert torch.equal(terms[1:], clean[0][1:])
    for s in order[1:].flatten():
        own = slice(offsets[s], offsets[s + 1])
        assert torch.equal(weights[own], clean[2][own])


def test_nothing_to_rank(subject):
    none = torch.empty(0, dtype=torch.int64)
    plain = subject.name == "torch"  # which needs a candidate, and a sequence for each token
    for n in (4,) if plain else (0, 4):
        for tokens in (0,) if plain else (0, 3):
            ends, order = torch.zeros(1, dtype=torch.int64), none.new_empty(0, n)
            batch = (torch.ones(tokens), ends, none, order, None, none, torch.empty(0))
            terms, sums, weights = rank(subject, batch)
            assert terms.shape == (0, n) and sums.shape == (0,) and weights.tolist() == [0] * tokens


def test_sums_stand_for_tokens(subject):
    """Without prompts the sums alone are made; with them they rank as the tokens did."""
    lengths = torch.tensor([4, 1, 0, 7, 2, 3])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logps = -torch.rand(17)
    none = torch.empty(0, dtype=torch.int64)
    nobody = (none.view(0, 1), None, none, torch.empty(0))
    prompts = (
        *(torch.tensor([[3, 0, 1], [5, 4, -1]]), torch.tensor([[2.0, 1.0, 0.5], [1.0, 0.0, 0.0]])),
        *(torch.zeros(2, dtype=torch.int64), torch.tensor([0.75, 0.25])),
    )
    for options in (RankingOptions(sft_mean=True), RankingOptions(length_normalize=False)):
        terms, sums, weights = rank(subject, (logps, offsets, lengths, *prompts), options)
        empty, alone, unused = rank(subject, (logps, offsets, lengths, *nobody), options)
        assert empty.shape == (0, 1) and torch.equal(alone, sums) and not unused.any()
        found = rank(subject, (alone, torch.arange(7), lengths, *prompts), options)
        torch.testing.assert_close(found[0], terms)
        assert torch.equal(found[1], sums) and found[2][2] == 0
        torch.testing.assert_close(found[2].repeat_interleave(lengths), weights)


def test_infinite_scores(subject):
    """A score of -inf at a negative temperature makes its terms infinite and no other row NaN.

    In the last prompt a term of scores of -inf alone is NaN, and so are the rows of its candidates,
    but not the one above.
    """
    inf = torch.inf
    prompts = [-1.0, -2.0, -inf], [-1.0, -2.0, -3.0], [-1.0, -inf, -2.0], [0.0, -inf, -inf]
    batch = (
        *(torch.tensor(prompts).flatten(), torch.arange(13), torch.ones(12, dtype=torch.int64)),
        torch.arange(12).view(4, 3),
        torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0]]),
        *(torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.5)),
    )
    for options in (RankingOptions(), RankingOptions(eps=1e-10)):
        found = rank(subject, batch, options)
        for got, want in zip(found, rank(reference, batch, options), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)
        assert found[0].isposinf().any() and found[2][:9].isnan().sum() == 2
        assert found[2][3:6].isfinite().all() and found[2][9].isfinite()
