"""The Triton ranking kernel under the interpreter, against the torch backend in fp64."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
pytest.importorskip("triton")

from cases import check_infinite_scores, check_sums_stand_for_tokens  # noqa: E402
from pro_kernels import backends  # noqa: E402
from pro_kernels.options import RankingOptions  # noqa: E402

triton_backend = backends.get("triton")
reference = backends.get("torch")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
U = 2.0**-24

pytestmark = [
    pytest.mark.skipif(
        triton_backend.unusable(DEVICE) is not None, reason=str(triton_backend.unusable(DEVICE))
    ),
    pytest.mark.usefixtures("poison"),
]

RANKING_OPTIONS = {
    "default": RankingOptions(),
    "official": RankingOptions(eps=1e-10, single_sft=False),
    "summed": RankingOptions(length_normalize=False, tau=0.3, sft_weight=1.5),
    "skip": RankingOptions(skip_ties=True, sft_mean=True),
    "top": RankingOptions(top_k=2, eps=0.5, sft_weight=-0.2),
}


def make_prompts(n: int, spread: float = 2.0, gap: float = 1.0, seed: int = 0):
    """Ragged prompts of up to n candidates: ties, one-token and long sequences, one not listed."""
    generator = torch.Generator().manual_seed(seed + 100 * n)
    prompts = 4
    lengths = torch.randint(1, 6, (prompts * n,), generator=generator)
    lengths[0], lengths[-1] = 1, 1100  # the long one spans two blocks of tokens
    offsets = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0))  # the last is not scored
    logps = -spread * torch.rand(int(offsets[-1]), generator=generator)
    logps[offsets[1:] - 1] = 0.0
    order = torch.full((prompts, n), -1)
    counts = [n, max(n - 1, 0), 1, n]
    for prompt, count in enumerate(counts):
        order[prompt, :count] = torch.randperm(n, generator=generator)[:count] + prompt * n
    rewards = gap * torch.randn(prompts, n, generator=generator).sort(1, descending=True)[0]
    if n > 2:
        rewards[0, 1] = rewards[0, 2]
    rewards[3] = rewards[3, 0]  # all equal
    sft_rank = torch.tensor([0, -1, 0, n - 1])
    weights = torch.rand(prompts, generator=generator) + 0.1
    tensors = (logps, offsets, lengths, order, rewards, sft_rank, weights)
    return [x.to(DEVICE) for x in tensors]


def check_ranking(inputs, options):
    """Against fp64: no worse than the torch backend in fp32, within a few roundings."""
    logps, *rest = inputs
    truth = reference.ranking(logps.double(), *rest, options=options)
    plain = reference.ranking(logps, *rest, options=options)
    found = triton_backend.ranking(logps, *rest, options=options)
    for got, same, want in zip(found, plain, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        error, allowed = (got - want).abs(), (same - want).abs().max()
        assert torch.isfinite(got).all()
        assert error.max() <= 2 * allowed + 16 * U * want.abs().max().clamp_min(1e-3)
    return found


@pytest.mark.parametrize("options", RANKING_OPTIONS.values(), ids=RANKING_OPTIONS)
@pytest.mark.parametrize("rewarded", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 16])
def test_ranking_against_fp64(n, rewarded, options):
    inputs = make_prompts(n)
    if not rewarded:
        inputs[4] = None
    _, _, row_weights = check_ranking(inputs, options)
    _, offsets, _, order = inputs[:4]
    listed = set(order.flatten().tolist())
    for sequence in set(range(4 * n)) - listed:
        assert (row_weights[offsets[sequence] : offsets[sequence + 1]] == 0).all()


@pytest.mark.parametrize("rewarded", [True, False])
@pytest.mark.parametrize("n", [33, 129])
def test_ranking_of_long_lists(n, rewarded):
    logps, offsets, lengths, order, rewards, sft_rank, weights = make_prompts(n)
    keep = slice(0, 1)  # one prompt of n
    inputs = [logps[: offsets[n]], offsets[: n + 1], lengths[:n], order[keep], rewards[keep]]
    inputs += [sft_rank[keep], weights[keep]]
    if not rewarded:
        inputs[4] = None
    check_ranking(inputs, RankingOptions(eps=1e-10))


@pytest.mark.parametrize("rewarded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranking_of_the_longest_list(rewarded):
    test_ranking_of_long_lists(triton_backend.MAX_CANDIDATES, rewarded)


@pytest.mark.parametrize("options", RANKING_OPTIONS.values(), ids=RANKING_OPTIONS)
def test_ranking_of_extreme_scores_and_rewards(options):
    inputs = make_prompts(6, spread=2e4, gap=1e3)
    check_ranking(inputs, options)
    inputs[0] = -inputs[0]  # scores of +1e4 cannot be log-probs, but must not overflow either
    check_ranking(inputs, options)


def test_infinite_scores():
    check_infinite_scores(triton_backend.ranking)


def test_sums_stand_for_tokens():
    check_sums_stand_for_tokens(triton_backend.ranking)


def test_ranking_nan_stays_in_its_prompt():
    inputs = make_prompts(4)
    clean = triton_backend.ranking(*inputs, options=RankingOptions())
    offsets, order = inputs[1], inputs[3]
    inputs[0][offsets[order[0, 1]]] = torch.nan
    terms, sums, row_weights = triton_backend.ranking(*inputs, options=RankingOptions())
    assert terms[0].isnan().any() and sums.isnan().sum() == 1
    assert torch.equal(terms[1:], clean[0][1:])
    assert torch.equal(row_weights[offsets[4] :], clean[2][offsets[4] :])


def test_ranking_repeats_bitwise():
    inputs = make_prompts(16)
    first = triton_backend.ranking(*inputs, options=RankingOptions())
    again = triton_backend.ranking(*inputs, options=RankingOptions())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_ranking_of_nothing():
    empty = torch.zeros(0, device=DEVICE)
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    order = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    terms, sums, row_weights = triton_backend.ranking(
        empty, offsets, index, order, None, index, empty, options=RankingOptions()
    )
    assert terms.shape == (0, 3) and sums.shape == (0,) and row_weights.shape == (0,)
