"""Losses that take all candidates of a prompt at once.

s_i = S_i / m_i, and with a reference model d_i = S_i − S_ref,i and h_i = β d_i.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pro_kernels.option_types import Beta, LengthNormalize, Limits, RewardTemperature, TopK
from pro_kernels.ranking import rank_terms
from pro_kernels.validate import check_device, check_float, check_mask, check_same_shape

from .ranked import Ranked, Result
from .registry import register


@register()
def plackett_luce(
    ranked: Ranked, *, length_normalize: LengthNormalize = True, top_k: TopK = None
) -> Result:
    """Plackett–Luce negative log-likelihood of the ranking (ListMLE).

    "Listwise Approach to Learning to Rank: Theory and Algorithm" (Xia et al., ICML 2008).
    Candidates 1..n best to worst (S for s where length_normalize is False):

        Σ_{k<n} [ log Σ_{i≥k} exp(s_i) − s_k ]

    Rewards only order the candidates; equal rewards keep their column order. top_k keeps the first
    terms only.
    """
    scores = ranked.scores(length_normalize)
    return ranked.result(rank_terms(scores, ranked.valid, top_k=top_k)[0].sum(1), scores)


@register(needs=["ref_logps"])
def dpo_pl(ranked: Ranked, *, beta: Beta = 0.1) -> Result:
    """DPO with the Plackett–Luce model over all n candidates: ``plackett_luce`` of h.

    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arXiv 2305.18290, appendix on the Plackett–Luce model. Equal to DPO for n = 2.
    """
    implicit = beta * ranked.log_ratios()
    return ranked.result(rank_terms(implicit, ranked.valid)[0].sum(1), implicit)


@register(needs=["ref_logps"])
def s_dpo(ranked: Ranked, *, beta: Beta = 1.0) -> Result:
    """Softmax-DPO: one preferred candidate against several negatives.

    "On Softmax Direct Preference Optimization for Recommendation", arXiv 2406.09215. Candidate 1 is
    the best:

        −log σ( −log Σ_{j>1} exp(h_j − h_1) ) = log( 1 + Σ_{j>1} exp(h_j − h_1) )

    Equal to DPO for n = 2. Candidates whose reward equals the best one's are no negatives.
    """
    implicit = beta * ranked.log_ratios()
    pairs = ranked.better("best")
    terms, _, _ = rank_terms(implicit, ranked.valid, left_out=~pairs, top_k=1)
    return ranked.result(terms.sum(1), implicit, pairs)


@register(needs=["rewards"], uses_gaps=True)
def listnet(
    ranked: Ranked,
    *,
    length_normalize: LengthNormalize = True,
    temperature: Annotated[float, Limits(above=0), "Temperature of the rewards."] = 1.0,
) -> Result:
    """ListNet: cross-entropy between the top-one distributions of rewards and scores.

    "Learning to Rank: From Pairwise Approach to Listwise Approach" (Cao et al., ICML 2007):

        −Σ_i softmax(r / T)_i · log softmax(s)_i

    S for s where length_normalize is False. Equal rewards need no special case.
    """
    scores = ranked.scores(length_normalize)
    losses = -(ranked.reward_softmax(temperature) * ranked.log_softmax(scores)).sum(1)
    return ranked.result(losses, scores)


@register(needs=["rewards"], uses_gaps=True)
def lire(
    ranked: Ranked,
    *,
    temperature: Annotated[float, Limits(above=0), "Temperature of the scores."] = 1.0,
    length_normalize: LengthNormalize = False,
) -> Result:
    """LIRE: listwise reward enhancement.

    "LIRE: listwise reward enhancement for preference alignment", arXiv 2405.13516:

        −Σ_i softmax(S / T)_i · r_i

    s for S where length_normalize is True. Rewards count as they are given, so a number added to
    all of them is added to −L.
    """
    assert ranked.rewards is not None
    scores = ranked.scores(length_normalize)
    shares = ranked.softmax(scores / temperature)
    # What all rewards share has no gradient, and would round that of their gaps.
    best = ranked.rewards[:, 0].to(scores.dtype)
    return ranked.result(-(shares * ranked.gaps()).sum(1) - best, scores)


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def infonca(ranked: Ranked, *, beta: Beta = 0.01, alpha: RewardTemperature = 0.01) -> Result:
    """InfoNCA: noise contrastive alignment, by a softmax over the candidates.

    "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369:

        −Σ_i softmax(r / α)_i · log softmax(h)_i

    With alpha=0 all weight is on the best candidate, and rewards only order: for n = 2 that is DPO.
    """
    implicit = beta * ranked.log_ratios()
    losses = -(ranked.reward_softmax(alpha) * ranked.log_softmax(implicit)).sum(1)
    return ranked.result(losses, implicit)


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def nca(ranked: Ranked, *, beta: Beta = 0.01, alpha: RewardTemperature = 0.01) -> Result:
    """NCA: noise contrastive alignment, candidate by candidate (arXiv 2402.05369, as InfoNCA).

        −Σ_i [ softmax(r / α)_i · log σ(h_i) + (1/n) · log σ(−h_i) ]

    With alpha=0 all weight is on the best candidate, and rewards only order: for n = 2 that is
    TRL's "nca_pair".
    """
    implicit = beta * ranked.log_ratios()
    noise = torch.where(ranked.valid, logsigmoid(-implicit), 0.0).sum(1)
    data = (ranked.reward_softmax(alpha) * logsigmoid(implicit)).sum(1)
    return ranked.result(-data - noise / ranked.counts.clamp(min=1), implicit)


@register(
    needs=lambda alpha, **_: ("ref_logps", "rewards") if alpha else ("ref_logps",),
    uses_gaps=lambda alpha, **_: alpha > 0,
)
def exo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: RewardTemperature = 0.0,
    label_smoothing: Annotated[
        float | None,
        Limits(above=0, at_most=0.5),
        "Share of labels taken to be wrong, of order alone; None: 0.001.",
    ] = None,
) -> Result:
    """EXO: efficient exact optimization, a reverse KL to the candidates' rewards.

    "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856.
    q = softmax(h):

        Σ_i q_i (log q_i − log p_i),   p = softmax(r / α)

    With alpha=0 rewards only order, and p is 1 − ε for the best candidate with ε (label_smoothing,
    for alpha=0 only) shared by the others: for n = 2 that is the paper's equation 16, TRL's
    "exo_pair".
    """
    if alpha > 0 and label_smoothing is not None:
        raise ValueError(
            f"label_smoothing must be None with alpha > 0, got {label_smoothing} and alpha={alpha}"
        )
    e = 1e-3 if label_smoothing is None else label_smoothing
    implicit = beta * ranked.log_ratios()
    log_q = ranked.log_softmax(implicit)
    if alpha > 0:
        log_p = ranked.log_softmax(ranked.gaps() / alpha)
    else:
        best, counts = ranked.best(), ranked.counts[:, None].to(log_q.dtype)
        chosen = best.to(log_q.dtype).sum(1, keepdim=True)
        wrong, right = e / (counts - chosen).clamp(min=1), (1 - e) / chosen.clamp(min=1)
        # Where no candidate is worse, the whole of p is shared by the best.
        right = torch.where(counts == chosen, 1 / counts.clamp(min=1), right)
        log_p = torch.where(best, right, wrong).log()
    losses = (ranked.softmax(implicit) * (log_q - log_p)).sum(1)
    return ranked.result(losses, implicit)


@register(needs=["ref_logps", "rewards"], uses_gaps=True)
def swepo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[float, Limits(at_least=0), "Weight of the deviation from the mean."] = 1.0,
) -> Result:
    """SWEPO: weighted contrast of the candidates above the mean reward with all of them.

    "SWEPO: Simultaneous Weighted Preference Optimization for Group Contrastive Alignment",
    arXiv 2412.04628. Δ_i = r_i − mean reward of the prompt:

        −log [ Σ_{Δ_i > 0} w_i exp(h_i) / Σ_i w_i exp(h_i) ],   w_i = exp(α |Δ_i|)

    A prompt of equal rewards has loss 0.
    """
    implicit, gaps = beta * ranked.log_ratios(), ranked.gaps()
    mean = gaps.sum(1, keepdim=True) / ranked.counts.clamp(min=1)[:, None]
    deviation = torch.where(ranked.valid, gaps - mean, 0.0)
    log_shares = ranked.log_softmax(implicit + alpha * deviation.abs())
    above = ranked.valid & (gaps > gaps.amin(1, keepdim=True)) & (deviation > 0)
    found = above.any(1, keepdim=True)
    chosen = log_shares.masked_fill(found & ~above, -math.inf).logsumexp(1)
    return ranked.result(torch.where(found[:, 0], -chosen, 0.0), implicit)


@register(needs=["ref_logps"])
def kto(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    desirable_weight: Annotated[float, Limits(at_least=0), "Weight of desirable candidates."] = 1.0,
    undesirable_weight: Annotated[
        float, Limits(at_least=0), "Weight of undesirable candidates."
    ] = 1.0,
    desirable: Tensor | None = None,  # (B, n) bool
    kl: Tensor | None = None,  # 0-dim
) -> Result:
    """KTO: Kahneman–Tversky optimization, from desirable and undesirable candidates.

    "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306:

        mean over candidates of  λ_D (1 − σ(h_i − z0))  desirable,
                                 λ_U (1 − σ(z0 − h_i))  undesirable

    ``desirable`` says which are, by original column (default: the best of each prompt). z0 =
    β max(0, KL) is a constant of the gradient. TRL's KTOTrainer estimates KL from completions of
    other prompts: give the mean of their S − S_ref as ``kl``. Without it KL of desirable candidates
    is the mean of S − S_ref over the undesirable ones of the batch, and the other way round.
    """
    good = ranked.best()
    if desirable is not None:
        check_same_shape("desirable", check_mask("desirable", desirable), ranked.shape, "(B, n)")
        check_device("desirable", desirable, "logps", ranked.logps)
        good = ranked.valid & desirable.gather(1, ranked.order)
    bad = ranked.valid & ~good
    ratios = ranked.log_ratios()
    if kl is not None:
        check_same_shape("kl", check_float("kl", kl), (), "()")
        z_good = z_bad = kl.detach().to(ratios.dtype)
    else:
        z_good, z_bad = (
            torch.where(others, ratios.detach(), 0.0).sum() / others.sum().clamp(min=1)
            for others in (bad, good)
        )
    implicit = beta * ratios
    of_good = desirable_weight * torch.sigmoid(beta * z_good.clamp(min=0) - implicit)
    of_bad = undesirable_weight * torch.sigmoid(implicit - beta * z_bad.clamp(min=0))
    losses = torch.where(good, of_good, torch.where(bad, of_bad, 0.0))
    return ranked.result(losses.sum(1) / ranked.counts.clamp(min=1), implicit)
