"""``pro-kernels check``: the fused path against the reference on this machine.

One batch, made, run and judged as those of the trust report are: from hidden states with everything
retained, the same under a budget of nothing (recomputed), and from logits; by each usable backend
in each dtype. No allowance is made here: an error is at most plain PyTorch's and the floor.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pro_kernels import backends
from pro_kernels.selfcheck.trust.cases import Case
from pro_kernels.selfcheck.trust.evaluate import Options
from pro_kernels.selfcheck.trust.measure import Row, devices, measure
from pro_kernels.selfcheck.trust.report import table

# As many positions as an interpreted backend is given.
_BATCH = Case(
    "short", 4, 4, 8, V=2003, masked=0.2, ties=True, sft_reduction=None, empty=True, holes=True,
    threads=True,
)  # fmt: skip
_DTYPES = torch.float32, torch.bfloat16, torch.float16
_ENTRANCES: dict[str, dict[str, Options]] = {
    "train": {"hidden": {}, "hidden, no budget": {"budget": 1}},
    "logits": {"logits": {}},
}


def run(json_path: Path | None = None) -> int:
    """Print the table, write it as JSON where asked; exit code 1 when a row failed."""
    found = measure(None, [_BATCH], _DTYPES, lambda x: _ENTRANCES.get(x.kind, {}), progress=False)
    rows = [_named(r) for r in found.rows]
    head = ["backend", "device", "dtype", "from", "quantity", "error", "plain PyTorch", ""]
    print(table(head, [_cells(**row) for row in rows]) + "\n")
    for device in devices():
        for name in backends.ORDER:
            if reason := backends.refusal(name, device, torch.float32):
                print(f"{name} on {device.type}: not checked: {reason}")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    passed = sum(row["passed"] for row in rows)
    print(f"\n{passed} of {len(rows)} comparisons passed")
    return 0 if passed == len(rows) else 1


def _named(row: Row) -> dict:
    """What JSON has of a row; errors are relative, those of log-probs to the largest."""
    names = ("backend", "device", "dtype", "entrance", "quantity")
    named = {"path" if x == "entrance" else x: getattr(row, x) for x in names}
    named |= {"error": row.error / row.scale, "plain": row.plain / row.scale}
    named["passed"] = row.passed and not row.by_allowance
    return named | ({"note": row.note} if row.note else {})


def _cells(error: float, plain: float, passed: bool, note: str = "", **names: str) -> list[str]:
    """The same as a line of the table."""
    verdict = "ok" if passed else f"FAILED {note}".strip()
    return [*names.values(), f"{error:.2e}", f"{plain:.2e}", verdict]
