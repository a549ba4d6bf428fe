"""pro_kernels, and the step of pro_trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from bench.engine.losses import SFT
from bench.engine.step import BETA, DPO_NOTE, TrainingStep, Workload, check_pairs
from bench.engine.timing import Refused, Step, backward_step
from bench.engine.truth import Inputs, case_loss
from bench.providers.base import Provider
from pro_kernels import backends
from pro_kernels.backends.protocol import Candidates
from pro_kernels.fused.planner import make_plan
from pro_kernels.options import RankingOptions

# Budgets that a tier is looked for in: powers of two.
_BUDGETS = tuple(1 << k for k in range(10, 40))


def providers(device: torch.device) -> list[Provider]:
    """Of the loss, each backend that is usable here and each tier; and of a step."""
    auto = backends.resolve("auto", device, torch.float32)
    found = [
        Provider(f"ours-{name}", f"pro_kernels ({name})", partial(ours, backend=name))
        for name in backends.ORDER
        if _times_well(name, device)
    ]
    for name, what, more in (
        ("T2", "tier T2", {"tier": "T2"}),
        ("T3", "tier T3, least memory", {"tier": "T3"}),
        ("layout", "layout made before", {"with_layout": True}),
        ("trained-head", "head trained", {"train_head": True}),
    ):
        build = partial(ours, backend=auto, **more)
        found.append(Provider(f"ours-{name}", f"pro_kernels ({auto}), {what}", build))
    for name, label, more in (
        ("padded", "pro_trainer, padded", {}),
        ("lists", "pro_trainer, lists", {}),
        ("lists-checkpointed", "pro_trainer, lists, gradient checkpointing",
         {"checkpointed": True}),
        ("dpo-padded", "DPO: pro_trainer, padded", {"loss_type": "dpo"}),
        ("dpo-lists", "DPO: pro_trainer, lists", {"loss_type": "dpo"}),
    ):  # fmt: skip
        build = partial(step, form="lists" if "lists" in name else "padded", **more)
        loss_type = more.get("loss_type", "pro")
        found.append(Provider(f"ours-{name}", label, build, suite="step", loss_type=loss_type))
    return found


def _times_well(name: str, device: torch.device) -> bool:
    """Usable here, and not through an interpreter, whose time says nothing."""
    interpreted = name == "triton" and device.type != "cuda"
    return not interpreted and backends.refusal(name, device, torch.float32) is None


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
    logps = inputs.logps
    call = ranking_call(backends.get(backend), logps.detach(), inputs.rewards)

    def run() -> Tensor:
        terms, _, gradient = call()
        logps.grad = gradient.view(logps.shape)
        return terms.sum() / inputs.case.B

    return Step(run, (logps,))


def ranking_call(module: Any, logps: Tensor, rewards: Tensor) -> Callable[[], Any]:
    """A call of a backend's ranking kernel on log-probs (B, n, T), all scored, best first."""
    (B, n, T), device = logps.shape, logps.device
    candidates = Candidates(
        torch.arange(B * n + 1, device=device) * T,
        torch.full((B * n,), T, device=device),
        torch.arange(B * n, device=device).view(B, n),
        rewards,
        torch.zeros(B, dtype=torch.int64, device=device),
        torch.full((B,), 1 / B, device=device),
    )
    return partial(module.ranking, logps.reshape(-1), candidates, RankingOptions())


def step(
    work: Workload, form: str, loss_type: str = "pro", checkpointed: bool = False
) -> TrainingStep:
    """pro_trainer's step: the official loss, or DPO's given the reference log-probs."""
    from pro_trainer.batch.collate import PROCollator
    from pro_trainer.train.objective import batch_loss
    from pro_trainer.train.options import LossOptions

    options, reference, detail = LossOptions(compat="official"), None, ""
    if loss_type == "dpo":
        check_pairs(work)
        options, reference = LossOptions(loss_type="dpo", beta=BETA), work.reference_scores
        detail = DPO_NOTE
    opened = pk.OpenModel(work.model)
    collator = PROCollator(work.pad, form=form, official=loss_type == "pro")
    batch = work.on_device(collator(work.features))
    return TrainingStep(
        lambda model: batch_loss(opened.rebind(model), batch, options, reference).loss,
        work,
        checkpointed,
        lambda: collator(work.features),
        detail,
        around=partial(pk.distinct_rows, work.model) if form == "lists" else contextlib.nullcontext,
    )
