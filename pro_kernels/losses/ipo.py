"""Identity Preference Optimization.

"A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv 2310.12036
(β is the paper's τ). d_i = S_i − S_ref,i:

    L = mean over pairs (i better than j) of ( d_i − d_j − 1/(2β) )²

The paper sums over tokens; TRL divides each d_i by its number of scored tokens. The default here
is TRL's; length_normalize=False is the paper's. Pairs of equal reward are left out.
"""

from __future__ import annotations

from pro_kernels.option_types import Beta, LengthNormalize, Pairs

from .ranked import Ranked, Result, differences, pair_mean
from .registry import register


@register(needs=["ref_logps"])
def ipo(
    ranked: Ranked,
    *,
    beta: Beta = 0.1,
    length_normalize: LengthNormalize = True,
    pairs: Pairs = "all",
) -> Result:
    """IPO over all pairs, or best-versus-rest with pairs="best"."""
    ratios = ranked.log_ratios()
    if length_normalize:
        ratios = ratios / ranked.lengths
    losses = (differences(ratios) - 1 / (2 * beta)).square()
    selected = ranked.better(pairs)
    return ranked.result(pair_mean(losses, selected), beta * ratios, selected)
