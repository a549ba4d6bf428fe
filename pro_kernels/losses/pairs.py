"""Losses that are means over the pairs of a prompt, of candidates that a reference model knows.

A pair is i better than j; pairs of equal reward are left out, unless a loss says otherwise, and
``pairs="best"`` takes the best candidate with each other one. d_i = S_i − S_ref,i, h_i = β d_i and
Δ = h_i − h_j.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pro_kernels.option_types import Beta, LabelSmoothing, LengthNormalize, Limits, Pairs
from pro_kernels.ranking import later_pairs
from pro_kernels.validate import check_device, check_same_shape, check_tensor

from .ranked import Ranked, Result, differences, logistic, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def dpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelSmoothing = 0.0,
    alpha: Annotated[float, Limits(), "Weight of the difference in length (R-DPO)."] = 0.0,
    pairs: Pairs = "all",
) -> Result:
    """Direct Preference Optimization.

    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arXiv 2305.18290; label smoothing ε as in conservative DPO:

        −(1−ε) log σ(x) − ε log σ(−x),   x = Δ + α (m_i − m_j)

    α > 0 keeps candidates from winning by length alone: R-DPO, "Disentangling Length from Quality
    in Direct Preference Optimization", arXiv 2403.19159, equation 9. The paper's DPO has α = 0.
    """
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    if alpha:
        margins = margins + alpha * differences(ranked.lengths)
    return ranked.over_pairs(logistic(margins, label_smoothing), implicit, pairs)


@register(needs=["ref_logps"])
def f_dpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        "Divergence from the reference model.",
    ] = "reverse_kl",
    alpha: Annotated[
        float | None, Limits(above=0, at_most=1), "Of the alpha divergence; None: 0.5."
    ] = None,
    pairs: Pairs = "all",
) -> Result:
    """f-DPO: DPO under another divergence from the reference model.

    "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", arXiv 2309.16240. u_i = exp(d_i):

        −log σ( β (f'(u_i) − f'(u_j)) )

        f'(u) = log u                 reverse_kl (DPO)
                1 − 1/u               forward_kl
                log(2u / (1+u))       js_divergence
                (1 − u^−α) / α        alpha_divergence (TRL's coefficient is 1 − α)

    Exponents are cut at 80, as TRL does it, so that u^−α stays finite in fp32. Constants of f'
    cancel.
    """
    if alpha is not None and divergence != "alpha_divergence":
        raise ValueError(f"alpha must be None with divergence={divergence!r}, got {alpha}")
    implicit = beta * _slope(ranked.log_ratios(), divergence, 0.5 if alpha is None else alpha)
    return ranked.over_pairs(logistic(differences(implicit)), implicit, pairs)


def _slope(log_u: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(u), up to a constant."""
    if divergence == "reverse_kl":
        return log_u
    if divergence == "js_divergence":
        return logsigmoid(log_u)
    alpha = 1.0 if divergence == "forward_kl" else alpha
    return -torch.exp((-alpha * log_u).clamp(max=80)) / alpha


@register(needs=["ref_logps"])
def dpo_ties(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, Limits(above=0), "How readily candidates tie (log 3 in the paper)."
    ] = 1.0986122886681098,
    pairs: Pairs = "all",
) -> Result:
    """DPO with ties, by the Rao–Kupper model.

    "On Extending Direct Preference Optimization to Accommodate Ties", arXiv 2409.17431:

        −log σ(Δ − α)                                            i better
        −log[ (e^{2α} − 1) / ((1 + e^{α+Δ}) (1 + e^{α−Δ})) ]     i, j tied

    Candidates of equal reward are tied. Without rewards there are no ties.
    """
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    wins = ranked.better(pairs)
    taken = later_pairs(ranked.valid)
    if pairs == "best":
        taken = taken & ranked.first[:, None]
    # Both factors times e^(-2 alpha), which is infinite for no alpha.
    tie = softplus(-alpha - margins) + softplus(margins - alpha) - math.log(-math.expm1(-2 * alpha))
    losses = pair_mean(torch.where(wins, softplus(alpha - margins), tie), taken)
    return ranked.result(losses, implicit, wins)


@register(needs=["ref_logps"])
def sigmoid_norm(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """DPO on log-ratios of a token: TRL's "sigmoid_norm".

    "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", arXiv 2411.15124, equation 6
    (length-normalized DPO):

        −log σ( β (d_i/m_i − d_j/m_j) )
    """
    implicit = beta * ranked.log_ratios() / ranked.lengths
    return ranked.over_pairs(logistic(differences(implicit)), implicit, pairs)


@register(needs=["ref_logps"])
def robust(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Limits(at_least=0, at_most=0.49), "Share of labels taken to be wrong."
    ] = 0.1,
    pairs: Pairs = "all",
) -> Result:
    """Robust DPO: an estimate of DPO's loss that label noise does not bias.

    "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv 2403.00409. ε is the
    share of labels that are wrong:

        ( −(1−ε) log σ(Δ) + ε log σ(−Δ) ) / (1 − 2ε)
    """
    implicit, e = beta * ranked.log_ratios(), label_smoothing
    margins = differences(implicit)
    losses = (e * logsigmoid(-margins) - (1 - e) * logsigmoid(margins)) / (1 - 2 * e)
    return ranked.over_pairs(losses, implicit, pairs)


@register(needs=["ref_logps"])
def discopop(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    tau: Annotated[float, Limits(above=0, at_most=1), "Temperature of the modulation."] = 0.05,
    pairs: Pairs = "all",
) -> Result:
    """DiscoPOP: the log-ratio modulated loss, found by a language model.

    "Discovering Preference Optimization Algorithms with and for Large Language Models",
    arXiv 2406.08414, equation 5. m = σ(Δ/τ):

        −(1−m) log σ(Δ) + m exp(−Δ)
    """
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    # As one exponent: for a very negative margin, exp(-margin) alone is infinite.
    exponential = torch.exp(logsigmoid(margins / tau) - margins)
    losses = exponential - torch.sigmoid(-margins / tau) * logsigmoid(margins)
    return ranked.over_pairs(losses, implicit, pairs)


@register(needs=["ref_logps"])
def ipo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    length_normalize: LengthNormalize = True,
    pairs: Pairs = "all",
) -> Result:
    """Identity Preference Optimization.

    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arXiv 2310.12036 (β is the paper's τ):

        ( d_i − d_j − 1/(2β) )²

    The paper sums over tokens; TRL divides each d_i by its number of scored tokens. The default
    here is TRL's; length_normalize=False is the paper's.
    """
    ratios = ranked.log_ratios()
    if length_normalize:
        ratios = ratios / ranked.lengths
    losses = (differences(ratios) - 1 / (2 * beta)).square()
    return ranked.over_pairs(losses, beta * ratios, pairs)


@register(needs=["ref_logps"])
def sppo_hard(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """SPPO with hard labels: self-play preference optimization.

    "Self-Play Preference Optimization for Language Model Alignment", arXiv 2405.00675, equation 4.7
    with win probabilities 1 and 0 (β is 1/η of the paper):

        (d_i − 1/(2β))² + (d_j + 1/(2β))²
    """
    ratios, target = ranked.log_ratios(), 1 / (2 * beta)
    losses = (ratios - target).square()[:, :, None] + (ratios + target).square()[:, None, :]
    return ranked.over_pairs(losses, beta * ratios, pairs)


@register(needs=["ref_logps"])
def apo_zero(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """APO-zero: anchored preference optimization, for candidates better than the model.

    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
    Alignment", arXiv 2408.06266, equation 7:

        (1 − σ(h_i)) + σ(h_j)
    """
    implicit = beta * ranked.log_ratios()
    losses = torch.sigmoid(-implicit)[:, :, None] + torch.sigmoid(implicit)[:, None, :]
    return ranked.over_pairs(losses, implicit, pairs)


@register(needs=["ref_logps"])
def apo_down(ranked: Ranked, *, beta: Beta = 0.1, pairs: Pairs = "all") -> Result:
    """APO-down, for candidates worse than the model: equation 8 of arXiv 2408.06266.

    σ(h_i) + 1 − σ(h_i − h_j)
    """
    implicit = beta * ranked.log_ratios()
    losses = torch.sigmoid(implicit)[:, :, None] + torch.sigmoid(-differences(implicit))
    return ranked.over_pairs(losses, implicit, pairs)


@register(needs=["ref_logps"])
def bco(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    delta: Annotated[float | None, Limits(), "Reward shift; None: the mean reward so far."] = None,
    pairs: Pairs = "all",
    running: Tensor | None = None,  # (2,) float64
) -> Result:
    """BCO: binary classifier optimization.

    "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656:

        −log σ(h_i − δ) − log σ(−(h_j − δ))

    δ is a constant of the gradient: the running mean of h over all batches, where ``running`` keeps
    it (the trainer does), as sum and number of all h so far, to which is added where gradients are
    enabled; the mean of h over this batch, where nothing does; or a number. delta=0 is TRL's
    "bco_pair".
    """
    implicit = beta * ranked.log_ratios()
    so_far = torch.stack([implicit.detach().sum(), ranked.valid.sum()]).double()
    if running is not None:
        check_same_shape("running", check_tensor("running", running), (2,), "(2,)")
        if running.dtype != torch.float64:
            raise TypeError(f"running must be float64, got {running.dtype}")
        check_device("running", running, "logps", implicit)
        if torch.is_grad_enabled():
            running += so_far
        so_far = running
    shift = (so_far[0] / so_far[1].clamp(min=1)).to(implicit) if delta is None else delta
    losses = -logsigmoid(implicit - shift)[:, :, None] - logsigmoid(shift - implicit)[:, None, :]
    return ranked.over_pairs(losses, implicit, pairs)


@register(needs=["ref_logps", "rewards"], uses_gaps=True)
def rpo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    eta: Annotated[float, Limits(above=0), "Factor on reward differences."] = 1.0,
    divergence: Annotated[
        Literal["forward", "backward"], "KL of the rewards' probability to the model's, or back."
    ] = "forward",
) -> Result:
    """RPO: reward-aware preference optimization.

    "Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
    arXiv 2502.00203. p = σ(η (r_i − r_j)), q = σ(Δ):

        KL(p ‖ q)         divergence="forward" (NeMo's rpo_bwd_kl)
        KL(q ‖ p)         divergence="backward" (NeMo's rpo_fwd_kl)

    KL of two Bernoulli distributions. Pairs of equal reward count: their p is 1/2.
    """
    assert ranked.rewards is not None
    implicit = beta * ranked.log_ratios()
    margins = differences(implicit)
    p, q = eta * differences(ranked.rewards).to(margins.dtype), margins
    if divergence == "backward":
        p, q = q, p
    losses = _share(p, q) + _share(-p, -q)
    return ranked.result(pair_mean(losses, later_pairs(ranked.valid)), implicit)


def _share(x: Tensor, y: Tensor) -> Tensor:
    """σ(x) (log σ(x) − log σ(y))."""
    return logsigmoid(x).exp() * (logsigmoid(x) - logsigmoid(y))
