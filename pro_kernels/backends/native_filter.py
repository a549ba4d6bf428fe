"""The functions of ``fused/column_groups.py`` behind the C ABI (csrc/cpu/filter.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pro_kernels.backends import native


@dataclass(frozen=True)
class Filtered:
    """Arguments and results are those of ``column_groups``.

    Attributes:
        call: runs a function of the library, as of ``native.Kernels``.
    """

    call: Callable[..., None]

    def row_sum(self, weight: Tensor) -> Tensor:
        """The sum of the rows."""
        centre = weight.new_empty(weight.shape[1], dtype=torch.float32)
        self._run("centre", None, None, weight, columns=weight.shape[0], centre=centre)
        return centre

    def squared_distances(self, weight: Tensor, centre: Tensor) -> Tensor:
        """Of each row from the centre."""
        squares = weight.new_empty(weight.shape[0], dtype=torch.float32)
        centre = centre.float()
        self._run("distances", None, None, weight, columns=len(weight), centre=centre, sums=squares)
        return squares

    def count_large(self, dz: Tensor, threshold: float) -> Tensor:
        """How many entries of each row are larger."""
        need = dz.new_empty(dz.shape[0], dtype=torch.int64)
        self._run("count", dz, threshold=threshold, need=need)
        return need

    def sums(self, dz: Tensor, order: Tensor, size: int) -> Tensor:
        """Sums of the entries of each group of rows."""
        out = dz.new_empty((-(-dz.shape[0] // size), dz.shape[1]), dtype=torch.float32)
        self._run("sums", dz, order=order, group_rows=size, sums=out)
        return out

    def compact_(self, dz: Tensor, groups: Any, weights: Tensor, move: bool = True) -> Tensor:
        """Move what is kept to the front of each row, and tell what leaves."""
        lost = dz.new_empty((3, dz.shape[0]), dtype=torch.float32)
        self._run("compact", dz, groups, weights=weights, lost=lost, move=int(move))
        return lost

    def hidden_grad(
        self, dz: Tensor, groups: Any, weight: Tensor, centre: Tensor, stand_ins: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        """``dz weight``, to which the centre is added in fp32."""
        more: dict[str, Any] = {"centre": centre.float(), "stand_ins": stand_ins}
        more["columns"] = weight.shape[0]
        self._run("hidden_grad", dz, groups, weight, out, **more)

    def weight_grad(
        self, dz: Tensor, groups: Any, x: Tensor, out: Tensor, accumulate: bool
    ) -> None:
        """``dz^T x``."""
        more = {"columns": out.shape[0], "accumulate": int(accumulate)}
        self._run("weight_grad", dz, groups, x, out, **more)

    def _run(
        self,
        name: str,
        dz: Tensor | None,
        groups: Any = None,
        operand: Tensor | None = None,
        out: Tensor | None = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {}
        if dz is not None:
            names = "entries", "dtype", "rows", "columns", "stride"
            given |= zip(names, native.matrix(dz), strict=True)
        if groups is not None:
            others |= {"order": groups.order, "starts": groups.starts, "kept": groups.columns}
            given["group_rows"] = groups.size
        if operand is not None:
            operand = native.unit_stride(operand)
            given |= {"operand_dtype": native.CODES[operand.dtype], "hidden": operand.shape[1]}
            given["operand_stride"] = operand.stride(0)
            others["operand"] = operand
        if out is not None:
            given |= {"out_dtype": native.CODES[out.dtype], "out_stride": out.stride(0)}
            others["out"] = out
        for key, value in others.items():  # held by the caller, or by ``others``
            given[key] = value.data_ptr() if isinstance(value, Tensor) else value
        like = dz if dz is not None else operand
        self.call(f"filter_{name}", like, native.ColumnFilter(**given))
