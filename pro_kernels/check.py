"""``pro-kernels check``: the fused path against the reference on this machine.

For each usable backend and dtype, one batch with masked tokens, ragged candidates and ties, by each
path: from hidden states with everything retained, the same under a budget of nothing (recomputed),
and from logits. The truth is the reference in fp64 on the same rounded inputs; beside our error
stands that of plain PyTorch in the same dtype. The rule: ours is no larger, up to a floor of a few
roundings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pro_kernels import backends, reference
from pro_kernels.functional import linear_pro_loss, pro_loss

FLOOR = {torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
_QUANTITIES = ("log-probs", "loss", "gradient of hidden", "gradient of weight")
_PATHS = ("hidden", "hidden, no budget", "logits")


@dataclass(frozen=True)
class Row:
    """One quantity of one backend and dtype.

    Attributes:
        backend: name of the backend.
        device: where it ran.
        dtype: of hidden states and weight, or of the logits.
        path: what the loss starts from.
        quantity: what was compared.
        error: relative error of the fused path against fp64 (largest for log-probs, else in norm).
        plain: the same of plain PyTorch in that dtype.
        passed: whether the rule holds.
    """

    backend: str
    device: str
    dtype: str
    path: str
    quantity: str
    error: float
    plain: float
    passed: bool


def check(seed: int = 0) -> list[Row]:
    """Run every usable backend and dtype on this machine's devices."""
    rows = []
    for device in devices():
        for dtype in FLOOR:
            inputs = _inputs(device, dtype, seed)
            usable = [b for b in backends.ORDER if backends.refusal(b, device, dtype) is None]
            for path in _PATHS:
                truth, plain = (_run(path, inputs, dtype, None, wide=w) for w in (True, False))
                for name in usable:
                    ours = _run(path, inputs, dtype, name)
                    rows += _compare(name, device, dtype, path, ours, plain, truth)
    return rows


def refusals() -> list[str]:
    """A line for each backend and device that was not checked, with the reason."""
    found = []
    for device in devices():
        for name in backends.ORDER:
            reason = backends.refusal(name, device, torch.float32)
            if reason is not None:
                found.append(f"{name} on {device.type}: not checked: {reason}")
    return found


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| backend | device | dtype | from | quantity | error | plain PyTorch | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.backend} | {r.device} | {r.dtype} | {r.path} | {r.quantity} | {r.error:.2e} | "
        f"{r.plain:.2e} | {'ok' if r.passed else 'FAILED'} |"
        for r in rows
    ]
    return "\n".join(lines)


def run(json_path: Path | None = None) -> int:
    """Print the table, write it as JSON where asked; exit code 1 when a row failed."""
    rows = check()
    print(table(rows))
    print("\n" + "\n".join(refusals()))
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


def _run(
    path: str,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str | None,  # None: the reference
    wide: bool = False,  # in fp64, on what ``dtype`` rounds
) -> list[Tensor]:
    """Log-probs, loss and gradients of one path."""
    kind = torch.float64 if wide else dtype
    hidden, weight = inputs["hidden"], inputs["weight"]
    names = {"hidden": hidden, "weight": weight}
    if path == "logits":
        names = {"logits": (hidden @ weight.t()).to(dtype)}
    leaves = [x.to(kind, copy=True).requires_grad_() for x in names.values()]
    args = (*leaves, inputs["targets"], inputs["rewards"].to(hidden.device))
    if backend is None:
        function = reference.pro_loss if path == "logits" else reference.linear_pro_loss
        out = function(*args)
    elif path == "logits":
        out = pro_loss(*args, backend=backend)
    else:
        out = linear_pro_loss(*args, backend=backend, budget=1 if "no budget" in path else None)
    grads = torch.autograd.grad(0.7 * out.loss, leaves)
    return [out.logps, out.loss.detach().reshape(1), *grads]


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, and the GPU where there is one."""
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [torch.device(name) for name in names]


def label(dtype: torch.dtype) -> str:
    """``float32`` and the like."""
    return str(dtype).removeprefix("torch.")


def _compare(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    path: str,
    ours: list[Tensor],
    plain: list[Tensor],
    truth: list[Tensor],
) -> list[Row]:
    rows = []
    for quantity, a, b, exact in zip(_QUANTITIES, ours, plain, truth, strict=False):
        order = torch.inf if quantity == "log-probs" else 2
        scale = torch.linalg.vector_norm(exact, order)
        error, limit = (
            (torch.linalg.vector_norm(x.double() - exact, order) / scale).item() for x in (a, b)
        )
        passed = error <= limit + FLOOR[dtype]  # False for NaN
        rows.append(Row(name, device.type, label(dtype), path, quantity, error, limit, passed))
    return rows
