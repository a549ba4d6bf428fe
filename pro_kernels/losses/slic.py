"""SLiC-HF: sequence likelihood calibration with human feedback.

"SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv 2305.10425:

    L = mean over pairs (i better than j) of max(0, δ − S_i + S_j) + λ · NLL(best)

λ is sft_weight. The best candidate stands for the paper's regularization target. Pairs of equal
reward are left out.
"""

from __future__ import annotations

from typing import Annotated

from pro_kernels.option_types import LengthNormalize, Limits, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(sft_weight=0.5, sft_reduction="sum")
def slic(
    ranked: Ranked,
    *,
    delta: Annotated[float, Limits(at_least=0), "Margin."] = 1.0,
    length_normalize: LengthNormalize = False,
    pairs: Pairs = "all",
) -> Result:
    """SLiC-HF over all pairs, or best-versus-rest with pairs="best"."""
    scores = ranked.scores(length_normalize)
    selected = ranked.better(pairs)
    losses = pair_mean((delta - differences(scores)).relu(), selected)
    return ranked.result(losses, scores, selected)
