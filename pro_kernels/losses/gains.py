"""Losses made of a ranking metric's gains and discounts.

G are the gains of the rewards, G_i = 2^{r_i} − 1 by default. Without rewards r falls evenly from 1
(best) to 0 (worst). s_i = S_i / m_i (S where length_normalize is False).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pro_kernels.option_types import Beta, Gain, LengthNormalize, Limits
from pro_kernels.validate import readable

from .ranked import Ranked, Result, differences, pair_sum
from .registry import register

MAX_EXPONENT = 64  # 2^r and its products stay finite in fp32
SINKHORN_STEPS = 30


def too_large(rewards: Sequence[float], *, gain: str, **_: Any) -> str | None:
    """Why the gain of these rewards cannot be, or None."""
    if gain != "exp2" or max(rewards) <= MAX_EXPONENT:
        return None
    return (
        f"too large for the gain 2^reward, which takes {MAX_EXPONENT} at most: scale them to "
        "[0, 1], or give gain='linear' or 'rank'"
    )


def not_a_gain(rewards: Sequence[float], *, gain: str, **_: Any) -> str | None:
    """The same where gains are summed, and so must not be negative."""
    if min(rewards) < 0 and gain != "rank":
        return "below 0, and so is their gain: add a number to all, or give gain='rank'"
    return too_large(rewards, gain=gain)


def by_gaps(*, gain: str, **_: Any) -> bool:
    """Whether such gains take more than an order from rewards."""
    return gain != "rank"


def gains(ranked: Ranked, gain: str, fault: Any = too_large) -> Tensor:
    """Of each candidate, (B, n); without rewards as with gain="rank".

    Raises:
        ValueError: rewards that ``fault`` refuses; for CPU tensors.
    """
    if ranked.rewards is None or gain == "rank":
        scores = ranked.logps
        places = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
        labels = 1 - places / (ranked.counts - 1).clamp(min=1)[:, None]
        labels = torch.where(ranked.valid, labels, 0.0)
    else:
        labels = ranked.rewards
    if readable(labels) and labels.numel():
        ends = [labels.min().item(), labels.max().item()]
        if found := fault(ends, gain=gain):
            raise ValueError(f"rewards {ends[0]:g} to {ends[1]:g} are {found}")
    if gain == "linear":
        return labels
    return torch.exp2(labels.double().clamp(max=MAX_EXPONENT)) - 1


def ndcg_shares(ranked: Ranked, gain: str) -> Tensor:
    """What each candidate adds to the NDCG at the first place, (B, n); 0 where all gains are 0."""
    found = gains(ranked, gain, not_a_gain).to(ranked.logps.dtype)
    ideal = (found * discounts(found)).sum(1, keepdim=True)  # they stand in rank order
    return found / torch.where(ideal > 0, ideal, 1.0)


def discounts(like: Tensor) -> Tensor:
    """1 / log2(1 + i) of the places i = 1 … n: (n,)."""
    places = torch.arange(1, like.shape[1] + 1, device=like.device, dtype=like.dtype)
    return 1 / torch.log2(1 + places)


@register(uses_gaps=by_gaps, reward_fault=not_a_gain)
def approx_ndcg(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the smooth ranks."] = 0.1,
    gain: Gain = "exp2",
    length_normalize: LengthNormalize = True,
) -> Result:
    """ApproxNDCG: 1 − NDCG with a smooth rank.

    "A General Approximation Framework for Direct Optimization of Information Retrieval Measures"
    (Qin, Liu and Li, Information Retrieval 13, 2010); T is 1/α of the paper:

        rank_i = 1 + Σ_{j≠i} σ((s_j − s_i) / T)
        L = 1 − Σ_i G_i / log2(1 + rank_i) / max DCG
    """
    scores = ranked.scores(length_normalize)
    shares = ndcg_shares(ranked, gain)
    others = ranked.valid[:, None, :] & ~torch.eye(
        scores.shape[1], dtype=torch.bool, device=scores.device
    )
    ahead = torch.where(others, torch.sigmoid(-differences(scores) / temperature), 0.0).sum(2)
    losses = 1 - (shares / torch.log2(2 + ahead)).sum(1)
    return ranked.result(torch.where(shares.any(1), losses, 0.0), scores)


@register(uses_gaps=by_gaps, reward_fault=not_a_gain)
def neural_ndcg(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the smooth sort."] = 1.0,
    gain: Gain = "exp2",
    length_normalize: LengthNormalize = True,
) -> Result:
    """NeuralNDCG: 1 − NDCG with a smooth sort.

    "NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation of Sorting",
    arXiv 2102.07831. Of n candidates:

        P_k = softmax_i( ((n + 1 − 2k) s_i − Σ_j |s_i − s_j|) / τ ),   k = 1 … n   (NeuralSort)
        L = 1 − Σ_k (sinkhorn(P) G)_k / log2(1 + k) / max DCG

    Sinkhorn scaling divides columns and rows by their sums, 30 times as in the paper.
    """
    scores, valid = ranked.scores(length_normalize), ranked.valid
    shares = ndcg_shares(ranked, gain)
    both = valid[:, :, None] & valid[:, None, :]
    apart = torch.where(both, differences(scores).abs(), 0.0).sum(2)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    slopes = (ranked.counts[:, None] + 1 - 2 * places).to(scores.dtype)
    near = scores - scores[:, :1].detach()  # P does not change, and the product rounds less
    log_p = (slopes[:, :, None] * near[:, None, :] - apart[:, None, :]) / temperature
    # An absent candidate is at its own place, so that every row and column has an entry.
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device) & ~valid[:, None]
    log_p = log_p.masked_fill(~both, -math.inf).masked_fill(itself, 0.0).log_softmax(2)
    for _ in range(SINKHORN_STEPS):
        log_p = log_p.log_softmax(1).log_softmax(2)
    sorted_share = (log_p.exp() * shares[:, None, :]).sum(2)
    losses = 1 - (sorted_share * discounts(shares)).sum(1)
    return ranked.result(torch.where(shares.any(1), losses, 0.0), scores)


@register(needs=["ref_logps"], uses_gaps=by_gaps, reward_fault=too_large)
def lipo_lambda(ranked: Ranked, *, beta: Beta = 0.05, gain: Gain = "exp2") -> Result:
    """LiPO-λ: pairwise logistic loss with LambdaLoss weights, h_i = β (S_i − S_ref,i) for scores.

    "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv 2402.01878. rank_i is
    the place of candidate i when sorted by h:

        Σ over pairs (i better than j) of |G_i − G_j| · |1/D_i − 1/D_j| · log(1 + exp(h_j − h_i))
        D_i = log(1 + rank_i)

    The weights are constants of the gradient. The paper's r lie in [0, 1]; gain="linear" takes
    G = r, for rewards too large for 2^r.
    """
    implicit = beta * ranked.log_ratios()
    gaps = differences(gains(ranked, gain)).abs().to(implicit.dtype)
    weights = differences(1 / torch.log1p(_ranks(implicit.detach(), ranked.valid))).abs()
    losses = gaps * weights * softplus(-differences(implicit))
    return ranked.result(pair_sum(losses, ranked.better()), implicit)


def _ranks(scores: Tensor, valid: Tensor) -> Tensor:  # (B, n) from 1
    order = scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) + 1).to(scores.dtype)
