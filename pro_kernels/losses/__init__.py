"""Ranking and preference losses on (S_i, m_i): each registered by itself.

Every loss is a function of the summed completion log-probs S and the numbers of scored tokens m of
the n candidates of B prompts, and returns ``(loss, metrics)``:

    loss, metrics = LOSSES["pro"](logps, lengths, rewards=rewards)

Arguments that all of them take:

    logps      (B, n) floating point, S_i; gradients go to it and to prompt_weights
    lengths    (B, n) integer or float, m_i; 0 = not scored
    rewards    (B, n) or None; candidates are stable-sorted by it, best first. None = the columns
               are already best to worst
    ref_logps  (B, n) or None, the reference model's S_i, a constant; losses without a reference
               model ignore it
    mask       (B, n) bool or None, candidates that exist
    prompt_weights  (B,) or None: the loss is Σ w_b L_b / Σ w_b over the prompts with a candidate

Options that all of them take:

    sft_weight     adds so much of the negative log-likelihood of the best candidate. PRO, CPO,
                   ORPO, RRHF and SLiC have such a term, the default of the others is 0
    sft_on         "best", or "all": the mean over all candidates (PRO has sft_index instead)
    sft_reduction  "mean" over the tokens of a candidate, "sum", or "tokens": over the batch
    reference_free of those with a reference model: its log-probs are 0, and are not needed

What holds for all of them:

- A candidate with mask False or length 0 leaves the ranking. A prompt with one candidate left has
  ranking term 0 (its SFT term, where the loss has one, stays); a prompt with none does not count
  in the mean over prompts. Whatever stands in absent places, NaN included, is never read.
- Pairwise losses (those with ``pairs``) average over all pairs (i better than j) of a prompt, or
  best-versus-rest with ``pairs="best"``; pairs of equal reward are left out. With n = 2 each is the
  published formula.
- Arithmetic is fp32, or fp64 for fp64 ``logps``. Metrics are detached fp32 with TRL's names;
  "sft_loss" is the SFT term as it stands in the loss, weight included.
- Wrong shapes, dtypes, devices and option values raise ValueError or TypeError. Checks that read
  values (finite rewards, …) run for CPU tensors only: no device sync.

A loss of your own is one function, in any file: see ``register``.
"""

from __future__ import annotations

import importlib
import pkgutil

from .ranked import Ranked, differences, logistic, pair_mean, pair_sum
from .registry import LOSSES, Loss, get_loss, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _name in sorted(LOSSES):  # as a refusal lists them
    LOSSES[_name] = LOSSES.pop(_name)

__all__ = [
    "LOSSES",
    "Loss",
    "Ranked",
    "differences",
    "get_loss",
    "logistic",
    "pair_mean",
    "pair_sum",
    "register",
]
