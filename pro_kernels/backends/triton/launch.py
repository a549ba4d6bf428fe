"""Launchers: check strides, allocate outputs, pick a configuration, launch.

Contract: ``backends/torch.py``. Nothing here waits for the device or looks at its data.
Legend: ``N`` rows, ``V`` columns, ``S`` sequences, ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends.triton import configs, elementwise, prompts, rows
from pro_kernels.options import LogitOptions, RankingOptions


def logp(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,)
    *,
    target_logits: Tensor | None = None,  # (N,) fp32, raw
    options: LogitOptions,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read-only statistics of each row: ``(logp, lse, entropy or None)``, each ``(N,)`` fp32."""
    logits = _unit_stride(logits)
    count, columns = logits.shape
    # Three tensors, not views of one: an op's outputs may not alias each other.
    logps, lse = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    extra = torch.empty_like(lse) if entropy else None
    args = (_flat(targets), _flat(target_logits), logps, lse, extra, logits.stride(0), columns)
    _launch_rows("logp", rows.logp_kernel, logits, *args, options=options)
    return logps, lse, extra


def residual_(
    logits: Tensor,  # (N, V), overwritten
    targets: Tensor,  # (N,)
    *,
    target_logits: Tensor | None = None,
    options: LogitOptions,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` with ``d logp / d raw`` (unweighted); return ``(logp, lse)``."""
    _require_unit_stride("logits", logits)
    count, columns = logits.shape
    logps, lse = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    args = (_flat(targets), _flat(target_logits), logps, lse, logits.stride(0), columns)
    _launch_rows("residual", rows.residual_kernel, logits, *args, options=options)
    return logps, lse


def logits_grad(
    logits: Tensor,  # (N, V): columns first_column ... first_column + V of the vocabulary
    lse: Tensor,  # (N,) fp32, over the whole vocabulary
    targets: Tensor,  # (N,), in terms of the whole vocabulary
    weights: Tensor | None,  # (N,) fp32; None = 1
    *,
    target_logits: Tensor | None = None,
    first_column: int = 0,
    options: LogitOptions,
    out: Tensor | None = None,  # may be ``logits`` itself
) -> Tensor:
    """``weights * d logp / d raw`` for these columns; rows with a negative target become 0."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _require_unit_stride("out", out)
    source = _unit_stride(logits)
    _launch_rows(
        "logits_grad",
        rows.logits_grad_kernel,
        source,
        *(_flat(lse), _flat(targets), _flat(weights), _flat(target_logits), out),
        *(source.stride(0), out.stride(0), source.shape[1], first_column),
        options=options,
    )
    return out


def ranking(
    logps: Tensor,  # (N,) fp32
    offsets: Tensor,  # (S + 1,) int64
    lengths: Tensor,  # (S,) int64
    order: Tensor,  # (B, n) int64
    rewards: Tensor | None,  # (B, n) fp32
    sft_rank: Tensor,  # (B,) int64
    prompt_weights: Tensor,  # (B,) fp32
    *,
    options: RankingOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranking loss and its closed-form gradient: ``(terms, sums, row_weights)``."""
    batch, n = order.shape
    sequences = lengths.shape[0]
    terms = logps.new_empty((batch, n), dtype=torch.float32)
    sums = logps.new_empty((sequences,), dtype=torch.float32)
    # Zeros: the kernel writes only to sequences that are in ``order``.
    row_weights = logps.new_zeros((logps.shape[0],), dtype=torch.float32)
    if batch + sequences == 0 or n == 0:
        return terms, sums.zero_(), row_weights
    config = configs.ranking_config(n)
    tensors = (logps, offsets, lengths, order, rewards, sft_rank, prompt_weights)
    with _on_device(logps):
        prompts.ranking_kernel[(batch + sequences,)](
            *(_flat(t) for t in tensors),
            *(terms, sums, row_weights, batch, n),
            n if options.top_k is None else min(options.top_k, n),
            *(int(options.length_normalize), int(options.skip_ties), int(options.sft_mean)),
            float(options.tau),
            math.log(options.eps) if options.eps > 0 else -math.inf,
            float(options.sft_weight),
            float(options.sft_weight) if options.single_sft else 0.0,
            BLOCK_K=config.block_k,
            BLOCK_N=config.block_n,
            BLOCK_T=config.block_t,
            num_warps=config.num_warps,
        )
    return terms, sums, row_weights


def _transform_of(options: LogitOptions) -> int:
    """The kernels' TRANSFORM for these options."""
    if options.softcap is not None:
        return elementwise.SOFTCAP.value
    return elementwise.IDENTITY.value if options.logit_scale == 1.0 else elementwise.SCALE.value


def _launch_rows(name: str, kernel: Any, logits: Tensor, *args: Any, options: LogitOptions) -> None:
    count, columns = logits.shape
    if count == 0:
        return
    with _on_device(logits):
        target = configs.target_of(logits.device.type, logits.device.index)
        config = configs.row_config(name, target, columns)
        softcap = options.softcap is not None
        lanes, group = config.tile(logits.element_size(), target.warp_size, softcap)
        kernel[(count,)](
            logits,
            *args,
            float(options.logit_scale),
            float(options.softcap) if options.softcap is not None else 1.0,
            TRANSFORM=_transform_of(options),
            LANES=lanes,
            GROUP=group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the tensors are on.
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _require_unit_stride(name: str, x: Tensor) -> None:
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(
            f"{name} must have unit stride along V to be written, got shape {tuple(x.shape)} with "
            f"strides {tuple(x.stride())}"
        )
