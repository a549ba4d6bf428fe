"""What the public functions share: layout, tier and backend of a call, and the ranking step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pro_kernels import autograd, checks, shards
from pro_kernels.backends import resolve
from pro_kernels.layout import Layout, check_targets, shift_targets
from pro_kernels.options import LogitOptions
from pro_kernels.planner import check_budget, default_budget, make_plan
from pro_kernels.pro import RankedCandidates
from pro_kernels.shards import Shard


def rank(
    logps: Tensor,
    layout: Layout,
    ranked: RankedCandidates,
    backend: str,
    final_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its terms ``(n,)`` over prompts, sequence sums ``(S,)`` and row weights ``(N,)``."""
    backend = resolve(backend, logps.device, logps.dtype, layout.shape[1])
    return autograd.Ranking.apply(
        logps,
        layout.offsets,
        layout.lengths,
        *ranked.tensors,
        ranked.options,
        final_dtype,
        backend,
    )


def head_call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    compute: torch.dtype,
    logits_dtype: torch.dtype,
    options: LogitOptions,
    backend: str,
    budget: int | None,
    *,
    scalar_loss: bool,
    grad_filter: float | None,
    entropy: bool = False,
    shard: Shard | None = None,
) -> autograd.HeadCall:
    """Choose backend and tier, and bundle all that is not a tensor."""
    checks.check_device("layout", layout.targets, "hidden", hidden)
    grads = torch.is_grad_enabled()
    wide = logits_dtype != compute
    may_chunk = scalar_loss and not wide and weight.requires_grad and shard is None
    vocab = weight.shape[0] if shard is None else shard.most  # all ranks take the same chunks
    fixed = vocab * weight.shape[1] * compute.itemsize if weight.dtype != compute else 0
    if layout.shared_rows and hidden.requires_grad and hidden.itemsize < 4:
        fixed += 4 * hidden.numel()  # dHidden is summed in fp32
    plan = make_plan(
        layout.num_tokens,
        weight.shape[1],
        vocab,
        compute,
        hidden.device,
        need_hidden=grads and hidden.requires_grad,
        need_weight=grads and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        budget=budget if shard is None else shard.budget,
        prompt_tokens=layout.prompt_tokens if may_chunk else None,
        fixed=fixed,
        hidden_rows=layout.num_rows,
        wide_logits=wide,
        filtered=grad_filter is not None,
        grad_size=weight.itemsize if weight.requires_grad else 0,
        entropy=entropy,
    )
    candidates = layout.shape[1] if scalar_loss else None
    backend = resolve(backend, hidden.device, logits_dtype, candidates)
    filtered = grad_filter if plan.need_hidden or plan.need_weight else None
    return autograd.HeadCall(
        compute, logits_dtype, options, backend, plan, layout.shared_rows, filtered, shard
    )


def head_here(
    weight: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup | None]:
    """What this rank needs of the head, as plain tensors, and the process group of ``group``.

    Before anything else is checked, so that no rank raises while others wait to gather.
    """
    if group is not None:
        if torch.compiler.is_compiling():
            raise ValueError("process_group cannot be compiled; call it outside of torch.compile")
        group = shards.group_of(group)
    weight = shards.part_here("weight", weight, group)
    return weight, shards.part_here("bias", bias, group), group


def shard_of(
    group: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    budget: int | None,
    **options: Any,
) -> Shard | None:
    """This rank's part of a head that is split over ``group``, after all ranks agreed.

    None without a group. A wrong argument of one rank is raised by all: none waits for another.
    """
    if group is None:
        return None
    for name in ("grad_filter", "return_entropy"):
        if options.get(name):
            raise ValueError(f"{name} cannot be had with a process_group, got {options[name]}")
    facts: dict[str, Any] = {}
    rows, named, error = 0, 0, None
    try:
        compute = checks.check_head(hidden, weight, bias)
        logits = checks.check_logits_dtype(options.get("logits_dtype"), compute)
        resolve(backend, hidden.device, logits, None)
        rows = weight.shape[0]
        named = default_budget(hidden.device) if budget is None else check_budget(budget)
        grads = torch.is_grad_enabled()
        facts = {
            "the shape of hidden": tuple(hidden.shape),
            "the width of weight": weight.shape[1],
            "dtypes": f"{hidden.dtype}, {weight.dtype}, {compute}",
            "bias": bias is not None,
            "what needs a gradient": tuple(
                grads and x is not None and x.requires_grad for x in (hidden, weight, bias)
            ),
            **{name: repr(value) for name, value in options.items()},
        }
    except (TypeError, ValueError) as wrong:
        error = wrong
    device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
    return shards.agree(group, rows, named, facts, error, device)


def layout_of(targets: Tensor, ignore_index: int, vocab: int) -> Layout:
    """Compact, or of fixed sizes while compiling (nothing may depend on data then)."""
    if torch.compiler.is_compiling():
        return Layout.dense(targets, ignore_index)
    return Layout.from_padded(targets, ignore_index=ignore_index, vocab_size=vocab)


def pro_layout(
    hidden: Tensor,
    targets: Tensor | None,
    layout: Layout | None,
    ignore_index: int,
    shift: bool,
    vocab: int,
) -> Layout:
    """The layout given, or one made from targets; both checked against ``hidden``."""
    if layout is not None:
        if targets is not None:
            raise ValueError("targets must be None when layout is given (it holds them)")
        if shift:
            raise ValueError("shift must be False when layout is given (shift when making it)")
        rows = hidden.numel() // hidden.shape[-1]
        if rows != layout.num_rows:
            raise ValueError(
                f"hidden must have {layout.num_rows} rows as the layout says, got {rows} in shape "
                f"{tuple(hidden.shape)}"
            )
        return layout
    if targets is None:
        raise TypeError("targets must be an integer tensor when no layout is given, got None")
    check_targets(targets)
    if hidden.dim() != 4 or hidden.shape[1] == 0:
        raise ValueError(
            f"hidden must have shape (B, n, T, H) without a layout, got {tuple(hidden.shape)}"
        )
    checks.check_same_shape("targets", targets, tuple(hidden.shape[:-1]), "(B, n, T)")
    checks.check_device("targets", targets, "hidden", hidden)
    if shift:
        targets = shift_targets(targets, ignore_index)
    return layout_of(targets, ignore_index, vocab)
