"""One problem by one library (ours, or the reference), the ways into ours, and errors."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from pro_kernels import api, reference
from pro_kernels.fused import planner
from pro_kernels.options import SettingError
from pro_kernels.selfcheck.trust.cases import KINDS, Problem

Quantities = dict[str, Tensor]
Options = dict[str, int]  # of a call: its budget, or none

# Any upstream gradient is served; this one is exact in 16 bits.
UPSTREAM = 0.75
# Relative change below which the authors' formulation means the same: less than an fp32 error.
_SAME_MEANING = 1e-6
# Bytes in which a tier is looked for.
_BUDGETS = (1, *(int(2 ** (k / 8)) for k in range(80, 270)))


def evaluate(
    problem: Problem,
    library: ModuleType,  # api or reference: both have the same functions
    dtype: torch.dtype,
    compat: str | None = None,
    **options: str | int,
) -> Quantities:
    """Log-probs, loss and gradients of a problem whose leaves are cast to a dtype.

    Log-probs are (B, n, T) where they are asked for by themselves or scored, else the (B, n) sums
    that the loss returns. ``options`` are the backend and, from hidden states, the budget.
    """
    case, leaves = problem.case, problem.fresh(dtype)
    prefix, names = ("", ("logits",)) if problem.from_logits else ("linear_", ("hidden", "weight"))
    args = *(leaves[name] for name in names), problem.targets
    head: dict[str, Tensor | str | float | None]
    head = {"softcap": case.softcap, "logit_scale": case.logit_scale, **options}
    if "bias" in leaves:
        head["bias"] = leaves["bias"]
    found: Quantities = {}
    objective = torch.zeros(())
    if problem.tokens_only or problem.kind == "score":
        logps = getattr(library, f"{prefix}token_logps")(*args, **head)
        found["log-probs"] = logps.detach()
        objective = (logps * problem.upstream.to(logps.dtype)).sum()
    if not problem.tokens_only:
        compat = "official" if problem.official else compat
        loss = getattr(library, f"{prefix}pro_loss")
        out = loss(*args, problem.rewards, compat=compat, sft_reduction=case.sft_reduction, **head)
        found.setdefault("log-probs", out.logps)
        found["loss"] = out.loss.detach()
        objective = UPSTREAM * out.loss
    if objective.requires_grad:
        objective.backward()
    # A loss that is constant, as the authors' is for one candidate, has a gradient of 0.
    return found | {
        f"gradient of {k}": torch.zeros_like(x) if x.grad is None else x.grad
        for k, x in leaves.items()
        if x.requires_grad
    }


def by_tier(problem: Problem) -> dict[str, Options]:
    """Each entrance of ``KINDS`` and what leads there; none for tiers that want more rows."""
    entrance, tiers = KINDS[problem.kind]
    budgets = {f"{entrance}, {tier}": tier_budget(problem, tier) for tier in tiers}
    found = {name: {"budget": x} for name, x in budgets.items() if x is not None}
    return found if tiers else {entrance: {}}


def ours(problem: Problem, backend: str, options: Options) -> Quantities | str:
    """What the backend gives, or the error it raised; what a setting may not be is raised."""
    try:
        return evaluate(problem, api, problem.dtype, None, backend=backend, **options)
    except SettingError:
        raise
    except Exception as error:
        return describe(error)


def official_only(problem: Problem) -> dict[str, Quantities | str]:
    """Where there is no bench/: the official meaning by the reference, or why it is not beside."""
    return {"official formulation (reference)": _official(problem)}


def _official(problem: Problem) -> Quantities | str:
    if problem.official:
        return "it is what ours is held to here"
    if problem.tokens_only:
        return "it has no entrance for log-probs per token"
    if problem.case.empty:
        return "it gives NaN for candidates without tokens"
    if problem.case.n == 1:
        return "a single candidate counts 0 there, and is SFT here"
    at = problem.best_first
    moved = {k: x[at] for k, x in problem.leaves.items() if k in ("hidden", "logits")}
    ordered = replace(
        problem,
        leaves=problem.leaves | moved,
        targets=problem.targets[at],
        rewards=problem.rewards[at],
        upstream=problem.upstream[at],
    )
    theirs, here = (
        evaluate(ordered, reference, torch.float64, compat) for compat in ("official", None)
    )
    if any(error_of(k, theirs[k], here[k]) > _SAME_MEANING for k in here):
        return "its eps = 1e-10 inside the log counts here"
    found = evaluate(ordered, reference, problem.dtype, "official")
    back = at[0], at[1].argsort(1)
    per_candidate = ("log-probs", "gradient of hidden", "gradient of logits")
    return {k: x[back] if k in per_candidate else x for k, x in found.items()}


def error_of(quantity: str, got: Tensor, exact: Tensor) -> float:
    """Of log-probs the largest absolute error; of the rest in norm, relative to a truth not 0."""
    error = got.double() - exact
    if quantity == "log-probs":
        return float(error.abs().max())
    return float(error.norm()) / (float(exact.norm()) or 1.0)


def tier_budget(problem: Problem, tier: str) -> int | None:
    """The smallest budget that leads to a tier; None: no budget does."""
    live = problem.targets != -100
    rows, tokens = int(live.sum()), tuple(live.sum((1, 2)).tolist())
    for budget in _BUDGETS:
        plan = planner.make_plan(
            rows,
            (problem.case.V, problem.case.H, problem.dtype),
            problem.device,
            need_hidden="hidden" in problem.trained,
            need_weight="weight" in problem.trained,
            budget=budget,
            prompt_tokens=None if problem.tokens_only else tokens,
            hidden_rows=live.numel(),
        )
        if _takes(plan, tier, rows):
            return budget
    return None


def _takes(plan: planner.Plan, tier: str, rows: int) -> bool:
    """Whether a plan is the tier, in several chunks where there are rows for them."""
    if tier == "T3":
        return plan.tier == "T3" and plan.retained == 0
    if tier == "T3 part kept":
        return plan.tier == "T3" and 0 < plan.retained < rows
    return plan.tier == tier and plan.chunk >= min(64, rows)


def describe(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
