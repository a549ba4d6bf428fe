"""Peers and the official formulation on the batches of ``pro-kernels check --full``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.engine.case import DTYPES, Case
from bench.engine.timing import Refused, describe
from bench.engine.truth import Inputs
from bench.providers.base import Provider, all_providers
from pro_kernels.options import OFFICIAL_EPS
from pro_kernels.selfcheck.trust.cases import Problem
from pro_kernels.selfcheck.trust.evaluate import UPSTREAM

_OFFICIAL = "official"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KINDS = {"train": "linear", "tokens": "linear", "official": "linear"}
# Share of the authors' eps in a sum of exps above which their formulation means something else:
# less than an fp32 error may be.
_SAME_MEANING = 1e-6


def compare(problem: Problem) -> dict[str, dict[str, Tensor] | str]:
    """What each formulation gives for a problem, by its label, or why it gives nothing."""
    found: dict[str, dict[str, Tensor] | str] = {}
    if problem.dtype not in _DTYPE_NAMES:
        return found
    if problem.case.compiled and problem.kind == "train":
        torch._dynamo.reset()  # a function may be compiled eight times: not for every dtype here
    for provider in all_providers(problem.device).values():
        if _applies(provider, problem):
            try:
                _refuse(provider, problem)
                found[provider.label] = _quantities(provider, problem)
            except Exception as error:
                found[provider.label] = describe(error)
    return found


def _applies(provider: Provider, problem: Problem) -> bool:
    """Neither a floor, nor ours, nor plain PyTorch; beside the authors' meaning only their own."""
    known = provider.is_floor or provider.is_ours or provider.name.startswith("plain")
    other = problem.official and provider.name != _OFFICIAL
    return not (known or other or provider.name.endswith("-compiled"))


def _refuse(provider: Provider, problem: Problem) -> None:
    """Refuse what bench/ cannot ask of this provider, or what means something else there.

    Raises:
        Refused: with the reason.
    """
    case, authors = problem.case, provider.name == _OFFICIAL
    if case.bias or case.logit_scale != 1:
        raise Refused("asked for without bias and logit scale only")
    if problem.from_logits and case.softcap is not None:
        raise Refused("asked for without a softcap from logits")
    if provider.compiles and not case.compiled:
        raise Refused("compiles for a shape: run in the batch of n = 2 only")
    if problem.tokens_only or problem.official:
        return
    if case.empty:
        raise Refused("the ranking loss beside it divides by the number of tokens")
    if case.n == 1:
        raise Refused("a single candidate counts 0 in the ranking loss beside it, and is SFT here")
    if authors and _eps_share(problem) > _SAME_MEANING:
        raise Refused("the authors' eps = 1e-10 inside the log counts here")


def _eps_share(problem: Problem) -> float:
    """The largest share of eps in a prompt's and a rank's sum of exps (or above it)."""
    inputs, _ = _best_first(problem)
    logits, cap = inputs.logits, inputs.case.softcap
    if logits is None:
        logits = inputs.hidden.double() @ inputs.weight.double().t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    live = inputs.targets != -100
    index = inputs.targets.clamp(min=0)[..., None]
    logps = logits.detach().double().log_softmax(-1).gather(-1, index)[..., 0]
    scores = torch.where(live, logps, 0.0).sum(-1) / live.sum(-1)
    tau = inputs.rewards[:, :, None] - inputs.rewards[:, None]  # [b, k, i]
    tau.diagonal(dim1=1, dim2=2).copy_(tau.amax(2))
    terms = torch.where(torch.ones_like(tau[0]).triu() > 0, (scores[:, None] * tau).exp(), 0.0)
    return float(OFFICIAL_EPS / terms.sum(2)[:, :-1].min())


def _quantities(provider: Provider, problem: Problem) -> dict[str, Tensor]:
    """Log-probs, loss and gradients, candidates in the problem's columns."""
    inputs, at = _best_first(problem)
    back = at[0], at[1].argsort(1)
    step = provider.build(inputs)
    live, found = inputs.targets != -100, {}
    if problem.tokens_only:
        if step.logps is None:
            raise Refused("gives no log-probs")
        logps = torch.where(live, step.logps(), 0.0)
        (logps * problem.upstream[at]).sum().backward()
        found["log-probs"] = logps.detach()[back]
    else:
        found["loss"] = step.run()
        if step.logps is not None:
            with torch.no_grad():
                logps = torch.where(live, step.logps(), 0.0)
            found["log-probs"] = (logps if problem.kind == "score" else logps.sum(-1))[back]
    scale = 1.0 if problem.tokens_only else UPSTREAM
    for name in problem.trained:
        grad = getattr(inputs, name).grad.double() * scale
        found[f"gradient of {name}"] = grad if name == "weight" else grad[back]
    return found


def _best_first(problem: Problem) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    """The problem as bench/ has it, candidates best first: at these places [B, n] of ours."""
    case = problem.case
    at = problem.best_first
    kind = "logits" if problem.from_logits else _KINDS.get(problem.kind, problem.kind)
    shape = Case(
        case.name, case.H, case.V, case.B, case.n, case.T, case.masked,
        dtype=_DTYPE_NAMES[problem.dtype], kind=kind, softcap=case.softcap,
    )  # fmt: skip
    leaves = {
        name: (x.clone() if name == "weight" else x[at]).requires_grad_(name in problem.trained)
        for name, x in problem.leaves.items()
        if name != "bias"
    }
    return Inputs(shape, problem.targets[at], problem.rewards[at], **leaves), at
