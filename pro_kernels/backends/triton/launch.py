"""Launchers: check strides, allocate outputs, pick a configuration, launch.

Contract: ``backends/torch.py``. Nothing here waits for the device or looks at its data.
Legend: ``N`` rows, ``V`` columns, ``H`` hidden, ``R`` rows of the hidden states, ``S`` sequences,
``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends.triton import configs, elementwise, prompts, rows, scoring, sides
from pro_kernels.options import LogitOptions, RankingOptions, setting


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
    args = (
        _flat(targets),
        _flat(target_logits),
        logps,
        lse,
        extra,
        logits.stride(0),
        count,
        columns,
    )
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
    args = (_flat(targets), _flat(target_logits), logps, lse, logits.stride(0), count, columns)
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
    entropy: tuple[Tensor, Tensor] | None = None,  # (N,) fp32 each: entropy, its weights
) -> Tensor:
    """``weights * d logp / d raw`` for these columns; rows with a negative target become 0.

    With ``entropy``, plus the second weights times ``d entropy / d raw``.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _require_unit_stride("out", out)
    source = _unit_stride(logits)
    value, by = entropy or (None, None)
    _launch_rows(
        "logits_grad",
        rows.logits_grad_kernel,
        source,
        *(_flat(lse), _flat(targets), _flat(weights), _flat(target_logits)),
        *(_flat(value), _flat(by), out),
        *(source.stride(0), out.stride(0), *source.shape, first_column),
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
    with _on_device(logps.device):
        prompts.ranking_kernel[(batch + -(-sequences // config.block_n),)](
            *(_flat(t) for t in tensors),
            *(terms, sums, row_weights, batch, sequences, n),
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


def gather_rows(
    source: Tensor,  # (R, H)
    rows: Tensor,  # (N,) int64
    weights: Tensor | None,  # (N,) fp32; None = 1
    dtype: torch.dtype,
) -> Tensor:
    """``weights * source[rows]`` (N, H), computed in fp32 and rounded once to ``dtype``."""
    source = _unit_stride(source)
    count, hidden = rows.shape[0], source.shape[1]
    out = source.new_empty((count, hidden), dtype=dtype)
    if out.numel() == 0:
        return out
    with _on_device(source.device):
        sides.gather_kernel[(count,)](
            *(source, _flat(rows), _flat(weights), out, source.stride(0), hidden),
            BLOCK=configs.SIDE_BLOCK,
        )
    return out


def scatter_rows(
    side: Tensor,  # (N, H)
    weights: Tensor,  # (N,) fp32
    rows: Tensor,  # (N,) int64
    out: Tensor,  # (R, H), zeros on entry, or sums of earlier calls where rows are shared
    shared: bool,
) -> None:
    """``out[rows] += weights * side``: fp32 sums in the order of ``rows``, rounded once to out.

    Without ``shared`` all rows are distinct and what ``out`` holds in them is overwritten.
    """
    _require_unit_stride("out", out, "H")
    side = _unit_stride(side)
    if side.numel() == 0:
        return
    by_row = None
    if shared:
        rows, by_row = torch.sort(rows, stable=True)
    count, hidden = side.shape
    with _on_device(side.device):
        sides.scatter_kernel[(count, -(-hidden // configs.SIDE_BLOCK))](
            *(side, _flat(weights), _flat(rows), by_row, out),
            *(side.stride(0), out.stride(0), count, hidden),
            BLOCK=configs.SIDE_BLOCK,
        )


def target_logits(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64; negative = 0
) -> Tensor:
    """The raw logit of each row's target as an fp32 dot product, (N,) fp32."""
    x, weight = _unit_stride(x), _unit_stride(weight)
    out = x.new_empty(x.shape[0], dtype=torch.float32)
    if out.numel() == 0:
        return out
    with _on_device(x.device):
        sides.target_logits_kernel[(x.shape[0],)](
            *(x, weight, _flat(bias), _flat(targets), out),
            *(x.stride(0), weight.stride(0), *weight.shape),
            BLOCK=configs.SIDE_BLOCK,
        )
    return out


def score(
    x: Tensor,  # (N, H)
    weight: Tensor,  # (V, H), of the dtype of x
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64; negative = row not scored
    *,
    target_logits: Tensor | None = None,  # (N,) fp32, raw; None: computed here
    options: LogitOptions,
) -> tuple[Tensor, Tensor]:
    """``(logp, lse)``, each (N,) fp32, of ``x weight^T + bias`` without writing a logit."""
    x, weight, targets = _unit_stride(x), _unit_stride(weight), targets.contiguous()
    (count, hidden), vocab = x.shape, weight.shape[0]
    exact = _target_logits(x, weight, bias, targets) if target_logits is None else target_logits
    logps, lse = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    if count == 0:
        return logps, lse
    with _on_device(x.device):
        target = configs.target_of(x.device.type, x.device.index)
        operands = (hidden, x.stride(0), weight.stride(0), x.data_ptr(), weight.data_ptr())
        aligned = all(number % 16 == 0 for number in operands)  # as Triton sees it
        config = configs.score_config(target.family, x.element_size(), aligned)
        tiles = -(-vocab // config.block_v)
        tops, totals = x.new_empty((2, count, tiles), dtype=torch.float32)
        exact = exact.contiguous()
        transform = _transform_of(options)
        numbers = (tiles, float(options.logit_scale), float(options.softcap or 1.0))
        scoring.score_kernel[(-(-count // config.block_n) * tiles,)](
            *(x, weight, _flat(bias), targets, exact, tops, totals),
            *(x.stride(0), weight.stride(0), count, vocab, hidden, *numbers),
            TRANSFORM=transform,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_H=config.block_h,
            GROUP=config.group,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        scoring.merge_kernel[(count,)](
            *(tops, totals, targets, exact, logps, lse, *numbers),
            TRANSFORM=transform,
            BLOCK=configs.MERGE_BLOCK,
        )
    return logps, lse


_target_logits = target_logits  # ``score`` has an argument of that name


def scores_fused(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``score`` was measured to beat a matmul and ``logp`` at these shapes.

    ``PRO_KERNELS_SCORE=fused|matmul|auto`` overrides the measurement.

    Raises:
        ValueError: another value of ``PRO_KERNELS_SCORE``.
    """
    choice = setting("PRO_KERNELS_SCORE", ("fused", "matmul", "auto"), "auto")
    if choice != "auto":
        return choice == "fused"
    with _on_device(device):
        family = configs.target_of(device.type, device.index).family
    return hidden <= configs.SCORE_UP_TO_HIDDEN.get((family, dtype.itemsize), 0)


def _transform_of(options: LogitOptions) -> int:
    """The kernels' TRANSFORM for these options."""
    if options.softcap is not None:
        return _SOFTCAP
    return _IDENTITY if options.logit_scale == 1.0 else _SCALE


_IDENTITY, _SCALE, _SOFTCAP = (
    x.value for x in (elementwise.IDENTITY, elementwise.SCALE, elementwise.SOFTCAP)
)


def _launch_rows(name: str, kernel: Any, logits: Tensor, *args: Any, options: LogitOptions) -> None:
    count, columns = logits.shape
    if count == 0:
        return
    device, softcap = logits.device, options.softcap
    with _on_device(device):
        programs, keywords = configs.row_plan(
            name, device.type, device.index, columns, logits.element_size(), softcap is not None
        )
        kernel[(min(count, programs),)](
            logits,
            *args,
            float(options.logit_scale),
            1.0 if softcap is None else float(softcap),
            TRANSFORM=_transform_of(options),
            **keywords,
        )


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the tensors are on.
    if device.type == "cpu":
        return _HERE
    module = getattr(torch, device.type)
    return _HERE if module.current_device() == device.index else module.device(device)


_HERE = contextlib.nullcontext()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _require_unit_stride(name: str, x: Tensor, along: str = "V") -> None:
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(
            f"{name} must have unit stride along {along} to be written, got shape "
            f"{tuple(x.shape)} with strides {tuple(x.stride())}"
        )
