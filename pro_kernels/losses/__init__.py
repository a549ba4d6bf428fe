"""Ranking and preference losses on (S_i, m_i): one file a loss, one table.

Every loss is a function of the summed completion log-probs S and the numbers of scored tokens m of
the n candidates of B prompts, and returns ``(loss, metrics)``:

    loss, metrics = LOSSES["pro"](logps, lengths, rewards=rewards)

Arguments that all of them take:

    logps      (B, n) floating point, S_i, the only differentiable input
    lengths    (B, n) integer or float, m_i; 0 = not scored
    rewards    (B, n) or None; candidates are stable-sorted by it, best first. None = the columns
               are already best to worst
    ref_logps  (B, n) or None, the reference model's S_i, a constant; losses without a reference
               model ignore it
    mask       (B, n) bool or None, candidates that exist

What holds for all of them:

- A candidate with mask False or length 0 leaves the ranking. A prompt with one candidate left has
  ranking term 0 (its SFT term, where the loss has one, stays); a prompt with none does not count
  in the mean over prompts. Whatever stands in absent places, NaN included, is never read.
- Pairwise losses (dpo, ipo, simpo, cpo, orpo, slic) average over all pairs (i better than j) of a
  prompt, or best-versus-rest with ``pairs="best"``; pairs of equal reward are left out. With n = 2
  each is the published formula.
- Arithmetic is fp32, or fp64 for fp64 ``logps``. Metrics are detached fp32 with TRL's names;
  "sft_loss" is the SFT term as it stands in the loss, weight included.
- Wrong shapes, dtypes, devices and option values raise ValueError or TypeError. Checks that read
  values (finite rewards, …) run for CPU tensors only: no device sync.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pro_kernels.options import gap_fault

from .cpo import cpo
from .dpo import dpo
from .dpo_pl import dpo_pl
from .ipo import ipo
from .lipo_lambda import MAX_EXPONENT, lipo_lambda
from .listnet import listnet
from .orpo import orpo
from .plackett_luce import plackett_luce
from .pro import pro
from .rrhf import rrhf
from .s_dpo import s_dpo
from .simpo import simpo
from .slic import slic

LossFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]

LOSSES: dict[str, LossFn] = {
    "pro": pro,
    "plackett_luce": plackett_luce,
    "dpo_pl": dpo_pl,
    "s_dpo": s_dpo,
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "rrhf": rrhf,
    "slic": slic,
    "listnet": listnet,
    "lipo_lambda": lipo_lambda,
}

__all__ = ["LOSSES", "MAX_EXPONENT", "LossFn", "gap_fault", "get_loss"]


def get_loss(name: str) -> LossFn:
    """The loss of that name; ValueError listing the names if there is none."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
    return LOSSES[name]
