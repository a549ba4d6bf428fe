"""What we and plain PyTorch offer: floors, pro_kernels, plain fp32, the authors' formulation.

Each builder takes a case's ``Inputs`` and returns a ``Step``, or raises ``Refused``. Legend: as in
``cases``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pro_kernels as pk
from bench.inputs import Inputs, case_loss
from bench.losses import SFT, official_logps, official_loss, plain_logps
from bench.step import Refused, Step, backward_step
from pro_kernels import backends
from pro_kernels.fused.planner import make_plan
from pro_kernels.options import RankingOptions

# Budgets that a tier is looked for in: powers of two.
_BUDGETS = tuple(1 << k for k in range(10, 40))


def floor(inputs: Inputs, upcast: bool = False) -> Step:
    """The matmuls that no exact method avoids, on the scored rows; else the bytes moved."""
    case = inputs.case
    if upcast and (case.dtype == "fp32" or case.flops is None):
        raise Refused("the same as the floor here")
    if inputs.logps is not None:
        logps = inputs.logps.detach()
        return Step(logps.clone)
    if inputs.logits is not None:
        return _copy_floor(inputs)
    dtype = torch.float32 if upcast else case.torch_dtype
    assert inputs.weight is not None
    x, w = inputs.scored_hidden().to(dtype), inputs.weight.detach().to(dtype)

    def run() -> tuple[Tensor, ...]:
        logits = torch.mm(x, w.t())
        if case.kind == "score":
            return (logits,)
        d_hidden = torch.mm(logits, w)
        if case.kind == "frozen":
            return logits, d_hidden
        return logits, d_hidden, torch.mm(logits.t(), x)

    return Step(run)


def _copy_floor(inputs: Inputs) -> Step:
    """A gradient buffer made: scored rows read once and written, the others zeroed."""
    assert inputs.logits is not None
    logits = inputs.logits.detach().flatten(0, 1)
    live = (inputs.targets != -100).flatten(0, 1)
    starts = live.to(torch.int8).argmax(1).tolist()  # one completion a row, without holes
    ends = [a + m for a, m in zip(starts, live.sum(1).tolist(), strict=True)]

    def run() -> Tensor:
        out = torch.empty_like(logits)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[i, :start].zero_()
            out[i, start:end].copy_(logits[i, start:end])
            out[i, end:].zero_()
        return out

    return Step(run)


def ours(
    inputs: Inputs,
    backend: str,
    train_head: bool = False,
    tier: str | None = None,
    with_layout: bool = False,
) -> Step:
    """pro_kernels by one backend; in a tier of the planner, or with a layout made beforehand."""
    case = inputs.case
    if inputs.logps is not None:
        return _ranking_kernel(inputs, backend)
    if inputs.logits is not None:
        x, targets = inputs.logits, inputs.targets
        return backward_step(
            lambda: pk.pro_loss(x, targets, inputs.rewards, backend=backend, **SFT).loss,
            inputs.leaves,
            logps=lambda: pk.token_logps(x, targets, backend=backend),
        )
    hidden, weight, leaves = inputs.hidden, inputs.weight, inputs.leaves
    assert hidden is not None and weight is not None
    if train_head:
        weight = weight.detach().requires_grad_()
        leaves = (hidden, weight)
    options = {"backend": backend, "budget": case.budget, "softcap": case.softcap}
    if tier is not None:
        options["budget"] = _budget_of_tier(inputs, tier)
    targets, rows = inputs.targets, hidden
    if with_layout:
        layout = pk.Layout.from_padded(inputs.targets.cpu()).to(inputs.device)
        options["layout"], targets = layout, None

    def logps() -> Tensor:
        return pk.linear_token_logps(
            hidden, weight, inputs.targets, backend=backend, softcap=case.softcap
        )

    def loss() -> Tensor:
        if case.kind == "ce":
            return case_loss(inputs, logps())
        x = rows.flatten(0, 2) if with_layout else rows
        return pk.linear_pro_loss(x, weight, targets, inputs.rewards, **options, **SFT).loss

    return backward_step(loss, leaves, grad=case.kind != "score", logps=logps)


def _budget_of_tier(inputs: Inputs, tier: str) -> int:
    """The budget, a power of two, that leads to this tier: the largest, for T3 the smallest."""
    case = inputs.case
    if case.kind != "linear":
        raise Refused("tiers are compared with the head trained")
    tokens = (inputs.targets != -100).sum((1, 2)).tolist()
    for budget in _BUDGETS if tier == "T3" else reversed(_BUDGETS):
        plan = make_plan(
            case.scored, (case.V, case.H, case.torch_dtype), inputs.device, need_hidden=True,
            need_weight=True, budget=budget, prompt_tokens=tuple(tokens), hidden_rows=case.tokens,
        )  # fmt: skip
        if plan.tier == tier:
            return budget
    raise Refused(f"no budget leads to {tier} here: the batch is too small")


def _ranking_kernel(inputs: Inputs, backend: str) -> Step:
    """The ranking kernel: the loss and its gradient by the log-probs, in one call."""
    case, logps = inputs.case, inputs.logps
    assert logps is not None
    module, device, S = backends.get(backend), inputs.device, case.B * case.n
    arguments = (
        torch.arange(S + 1, device=device) * case.T,
        torch.full((S,), case.T, device=device),
        torch.arange(S, device=device).view(case.B, case.n),
        inputs.rewards,
        torch.zeros(case.B, dtype=torch.int64, device=device),
        torch.full((case.B,), 1 / case.B, device=device),
    )
    flat = logps.detach().reshape(-1)

    def run() -> Tensor:
        terms, _, gradient = module.ranking(flat, *arguments, options=RankingOptions())
        logps.grad = gradient.view(logps.shape)
        return terms.sum() / case.B

    return Step(run, (logps,))


def _capped(inputs: Inputs, logits: Tensor) -> Tensor:
    cap = inputs.case.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(inputs: Inputs, compiled: bool = False) -> Step:
    """fp32 log_softmax over every token, then the loss."""

    def logps() -> Tensor:
        if inputs.logps is not None:
            return inputs.logps
        logits = inputs.logits
        if logits is None:
            logits = _capped(inputs, inputs.hidden @ inputs.weight.t())
        return plain_logps(logits, inputs.targets)

    def loss() -> Tensor:
        return case_loss(inputs, logps())

    run = torch.compile(loss, dynamic=False) if compiled else loss
    return backward_step(run, inputs.leaves, grad=inputs.case.kind != "score", logps=logps)


def official(inputs: Inputs, compiled: bool = False) -> Step:
    """The authors' formulation (``losses.official_loss``)."""
    if inputs.logps is not None:
        raise Refused("makes its own log-probs")

    def candidates(
        hidden: Tensor | None, weight: Tensor | None, logits: Tensor | None
    ) -> Callable[[int], Tensor]:
        if logits is not None:
            return lambda i: logits[:, i]
        return lambda i: _capped(inputs, hidden[:, i] @ weight.t())

    def logps() -> Tensor:
        of = candidates(inputs.hidden, inputs.weight, inputs.logits)
        return torch.stack(official_logps(of, inputs.targets), 1)

    def function(hidden, weight, logits, targets, rewards) -> Tensor:  # noqa: ANN001
        of = candidates(hidden, weight, logits)
        if inputs.case.kind == "ce":
            return case_loss(inputs, torch.stack(official_logps(of, targets), 1))
        return official_loss(of, targets, rewards)

    call = torch.compile(function, dynamic=False) if compiled else function
    arguments = (inputs.hidden, inputs.weight, inputs.logits, inputs.targets, inputs.rewards)
    return backward_step(
        partial(call, *arguments), inputs.leaves, grad=inputs.case.kind != "score", logps=logps
    )
