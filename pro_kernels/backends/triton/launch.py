"""Launchers: check strides, allocate outputs, pick a configuration, launch.

Contract and legend: ``backends/protocol.py``. Nothing here waits for the device or looks at its
data.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import namedtuple
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends.protocol import Candidates, Rows, Statistics
from pro_kernels.backends.triton import configs, gather_scatter, prompts, scoring
from pro_kernels.backends.triton import rows as row_kernels
from pro_kernels.options import LogitOptions, RankingOptions, setting


def logp(rows: Rows, entropy: bool = False) -> Statistics:
    """Read-only statistics of each row."""
    logps, lse = _per_row(rows.logits, 2)
    extra = torch.empty_like(lse) if entropy else None
    vectors = rows.targets, rows.exact, logps, lse, extra
    _launch_rows("logp", (_read(rows.logits),), vectors, rows.options)
    return logps, lse, extra


def residual_(rows: Rows) -> tuple[Tensor, Tensor]:
    """The first two of them, and the gradient over the logits."""
    matrices = (_written("logits", rows.logits),)
    logps, lse = _per_row(rows.logits, 2)
    _launch_rows("residual", matrices, (rows.targets, rows.exact, logps, lse), rows.options)
    return logps, lse


def logits_grad(
    rows: Rows,
    lse: Tensor,
    weights: Tensor | None,
    *,
    first_column: int = 0,
    out: Tensor | None = None,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient for these columns; rows with a negative target become 0."""
    logits = rows.logits
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    matrices = _read(logits), _written("out", out)
    vectors = (lse, rows.targets, weights, rows.exact, *(entropy or (None, None)))
    _launch_rows("logits_grad", matrices, vectors, rows.options, first_column)
    return out


def ranking(
    logps: Tensor, candidates: Candidates, options: RankingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranking loss and its closed-form gradient: ``(terms, sums, row_weights)``."""
    batch, n = candidates.order.shape
    sequences = candidates.lengths.shape[0]
    terms = logps.new_empty((batch, n), dtype=torch.float32)
    sums = logps.new_empty((sequences,), dtype=torch.float32)
    # Zeros: the kernel writes only to sequences that are in ``order``.
    row_weights = logps.new_zeros((logps.shape[0],), dtype=torch.float32)
    if n == 0:
        return terms, sums.zero_(), row_weights
    config = configs.ranking_config(n)
    _launch(
        prompts.ranking_kernel,
        logps.device,
        (batch + -(-sequences // config.block_n),),
        vectors=(logps, *candidates, sums),
        numbers=((terms, row_weights), sequences, n, _ranking_numbers(options)),
        CONFIG=config,
        num_warps=config.num_warps,
    )
    return terms, sums, row_weights


def gather_rows(source: Tensor, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weights * source[rows]`` (N, H), computed in fp32 and rounded once to ``dtype``."""
    count, hidden = rows.shape[0], source.shape[1]
    out = source.new_empty((count, hidden), dtype=dtype)
    kernel, vectors = gather_scatter.gather_kernel, (rows, weights, out)
    _launch_side(kernel, (count,), (_read(source),), vectors, (hidden,))
    return out


def scatter_rows(side: Tensor, weights: Tensor, rows: Tensor, out: Tensor, shared: bool) -> None:
    """``out[rows] += weights * side``: fp32 sums in the order of ``rows``, rounded once to out.

    Without ``shared`` all rows are distinct and what ``out`` holds in them is overwritten.
    """
    by_row = None
    if shared:
        rows, by_row = torch.sort(rows, stable=True)
    count, hidden = side.shape
    grid = (count, -(-hidden // configs.SIDE_BLOCK))
    matrices, vectors = (_read(side), _written("out", out, "H")), (weights, rows, by_row)
    _launch_side(gather_scatter.scatter_kernel, grid, matrices, vectors, (count, hidden))


def target_logits(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The raw logit of each row's target as an fp32 dot product, (N,) fp32."""
    (out,) = _per_row(x, 1)
    matrices, vectors = (_read(x), _read(weight)), (bias, targets, out)
    kernel, grid = gather_scatter.target_logits_kernel, (x.shape[0],)
    _launch_side(kernel, grid, matrices, vectors, weight.shape)
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
    exact = _target_logits(x, weight, bias, targets) if target_logits is None else target_logits
    logps, lse = _per_row(x, 2)
    (count, hidden), vocab, matrices = x.shape, weight.shape[0], (_read(x), _read(weight))
    sizes = [hidden, *(size for side, stride in matrices for size in (stride, side.data_ptr()))]
    aligned = all(size % 16 == 0 for size in sizes)  # as Triton sees it
    family = configs.target_of(x.device.type, x.device.index).family
    config = configs.score_config(family, x.element_size(), aligned)
    tiles = -(-vocab // config.block_v)
    tops, totals = x.new_empty((2, count, tiles), dtype=torch.float32)
    numbers = _logit_numbers(options)
    _launch(
        scoring.score_kernel,
        x.device,
        (-(-count // config.block_n) * tiles,),
        matrices,
        (bias, targets, exact, tops, totals),
        (count, vocab, hidden, tiles, numbers),
        CONFIG=config,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _launch(
        scoring.merge_kernel,
        x.device,
        (count,),
        vectors=(tops, totals, targets, exact, logps, lse),
        numbers=(tiles, numbers),
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
    family = configs.target_of(device.type, device.index).family
    return hidden <= configs.SCORE_UP_TO_HIDDEN.get((family, dtype.itemsize), 0)


def _named(options: type, *derived: str) -> Any:
    return namedtuple(options.__name__, [*(f.name for f in fields(options)), *derived])


# Options as the kernels take them: the fields of their dataclasses, by name, as fp32 run-time
# numbers. No value of a float has Triton compile anew (a schedule of ``sft_weight`` must not); an
# integer in a tuple would, at 1 and at multiples of 16.
_LogitNumbers = _named(LogitOptions)
_RankingNumbers = _named(RankingOptions, "log_eps")


@functools.cache  # a model's own: few in a process
def _logit_numbers(options: LogitOptions) -> tuple:
    """None where a field has its default, which does nothing: no code is compiled for it.

    Beside a softcap all are numbers: code for it alone would be one more binary, and spills.
    """
    idle = () if options.softcap is not None else [f.default for f in fields(options)]
    values = [getattr(options, f.name) for f in fields(options)]
    return _LogitNumbers(*(None if value in idle else float(value) for value in values))


def _ranking_numbers(options: RankingOptions) -> tuple:
    """A flag is 0 or 1, no limit is infinity; ``log_eps`` takes a logarithm better than fp32's."""
    values = (getattr(options, name) for name in _RankingNumbers._fields[:-1])
    numbers = (math.inf if value is None else float(value) for value in values)
    log_eps = math.log(options.eps) if options.eps > 0 else -math.inf
    return _RankingNumbers(*numbers, log_eps)


_ROW_KERNELS = {name: getattr(row_kernels, f"{name}_kernel") for name in configs.KERNELS}


def _launch_rows(
    name: str, matrices: tuple, vectors: tuple, options: LogitOptions, *numbers: int
) -> None:
    logits = matrices[0][0]
    device, (count, columns) = logits.device, logits.shape
    programs, keywords = configs.row_plan(
        *(name, device.type, device.index, columns, logits.element_size()),
        options.softcap is not None,
    )
    grid = (min(count, programs),)
    rest = (*numbers, count, columns, _logit_numbers(options))
    _launch(_ROW_KERNELS[name], device, grid, matrices, vectors, rest, **keywords)


def _launch_side(
    kernel: Any, grid: tuple[int, ...], matrices: tuple, vectors: tuple, numbers: tuple[int, ...]
) -> None:
    device = matrices[0][0].device
    _launch(kernel, device, grid, matrices, vectors, numbers, BLOCK=configs.SIDE_BLOCK)


def _launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, ...],
    matrices: tuple[tuple[Tensor, int], ...] = (),  # each with its row stride
    vectors: tuple[Tensor | None, ...] = (),  # made contiguous
    numbers: tuple = (),
    **constants: Any,
) -> None:
    """Launch, unless the grid is empty; a kernel takes its arguments in this order."""
    if 0 not in grid:
        flat = [None if x is None else x.contiguous() for x in vectors]
        with _on_device(device):
            kernel[grid](*matrices, *flat, *numbers, **constants)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, whatever the tensors are on.
    if device.type == "cpu":
        return _HERE
    module = getattr(torch, device.type)
    return _HERE if module.current_device() == device.index else module.device(device)


_HERE = contextlib.nullcontext()


def _per_row(x: Tensor, count: int) -> list[Tensor]:
    # Not views of one tensor: an op's outputs may not alias each other.
    return [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(count)]


def _read(x: Tensor) -> tuple[Tensor, int]:
    """A matrix to read, copied unless its rows have unit stride, and its row stride."""
    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    return x, x.stride(0)


def _written(name: str, x: Tensor, along: str = "V") -> tuple[Tensor, int]:
    """A matrix to write, whose rows must have unit stride, and its row stride."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(
            f"{name} must have unit stride along {along} to be written, got shape "
            f"{tuple(x.shape)} with strides {tuple(x.stride())}"
        )
    return x, x.stride(0)
