"""``pro-kernels check``: the fused path against the reference on this machine.

For each usable backend and dtype, one batch with masked tokens, ragged candidates and ties. The
truth is the reference in fp64 on the same rounded inputs; beside our error stands that of plain
PyTorch in the same dtype. The rule: ours is no larger, up to a floor of a few roundings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pro_kernels import backends, reference
from pro_kernels.functional import linear_pro_loss

_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
_COLUMNS = ("log-probs", "loss", "gradient of hidden", "gradient of weight")


@dataclass(frozen=True)
class Row:
    """One quantity of one backend and dtype.

    Attributes:
        backend: name of the backend.
        device: where it ran.
        dtype: of hidden states and weight.
        quantity: what was compared.
        error: relative error of the fused path against fp64 (largest for log-probs, else in norm).
        plain: the same of plain PyTorch in that dtype.
        passed: whether the rule holds.
    """

    backend: str
    device: str
    dtype: str
    quantity: str
    error: float
    plain: float
    passed: bool


def check(seed: int = 0) -> list[Row]:
    """Run every usable backend and dtype on this machine's devices."""
    rows = []
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in map(torch.device, devices):
        for dtype in _FLOOR:
            inputs = _inputs(device, dtype, seed)
            truth = _run(reference.linear_pro_loss, inputs, torch.float64)
            plain = _run(reference.linear_pro_loss, inputs, dtype)
            for name in backends.ORDER:
                if backends.refusal(name, device, dtype) is None:
                    ours = _run(linear_pro_loss, inputs, dtype, backend=name)
                    rows += _compare(name, device, dtype, ours, plain, truth)
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| backend | device | dtype | quantity | error | plain PyTorch | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.backend} | {r.device} | {r.dtype} | {r.quantity} | {r.error:.2e} | {r.plain:.2e} | "
        f"{'ok' if r.passed else 'FAILED'} |"
        for r in rows
    ]
    return "\n".join(lines)


def run(json_path: Path | None = None) -> int:
    """Print the table, write it as JSON where asked; exit code 1 when a row failed."""
    rows = check()
    print(table(rows))
    for name in backends.ORDER:
        reason = backends.refusal(name, torch.device("cpu"), torch.float32)
        if reason is not None:
            print(f"\n{name}: not checked on the CPU: {reason}")
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    failed = [r for r in rows if not r.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} comparisons passed")
    return 1 if failed else 0


def _inputs(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Hidden states and weight rounded to ``dtype``, as fp64; targets and rewards."""
    g = torch.Generator().manual_seed(seed)
    b, n, t, h, v = 2, 4, 12, 64, 2003
    hidden = torch.randn(b, n, t, h, generator=g)
    weight = torch.randn(v, h, generator=g) * h**-0.5
    targets = torch.randint(0, v, (b, n, t), generator=g)
    targets[torch.rand(b, n, t, generator=g) < 0.4] = -100
    targets[1, 3] = -100
    rewards = torch.randn(b, n, generator=g)
    rewards[0, 2] = rewards[0, 1]
    return {
        "hidden": hidden.to(device, dtype).double(),
        "weight": weight.to(device, dtype).double(),
        "targets": targets.to(device),
        "rewards": rewards,
    }


def _run(function, inputs: dict[str, Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    hidden = inputs["hidden"].to(dtype, copy=True).requires_grad_()
    weight = inputs["weight"].to(dtype, copy=True).requires_grad_()
    rewards = inputs["rewards"]
    if function is reference.linear_pro_loss:
        rewards = rewards.to(hidden.device)
    out = function(hidden, weight, inputs["targets"], rewards, **options)
    (0.7 * out.loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [out.logps, out.loss.detach().reshape(1), hidden.grad, weight.grad]


def _compare(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    ours: list[Tensor],
    plain: list[Tensor],
    truth: list[Tensor],
) -> list[Row]:
    rows = []
    for quantity, a, b, exact in zip(_COLUMNS, ours, plain, truth, strict=True):
        order = torch.inf if quantity == "log-probs" else 2
        scale = torch.linalg.vector_norm(exact, order)
        error, limit = (
            (torch.linalg.vector_norm(x.double() - exact, order) / scale).item() for x in (a, b)
        )
        passed = error <= limit + _FLOOR[dtype]  # False for NaN
        label = str(dtype).removeprefix("torch.")
        rows.append(Row(name, device.type, label, quantity, error, limit, passed))
    return rows
