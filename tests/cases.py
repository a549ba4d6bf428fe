"""The hard cases of the fused path, built once, and the rule by which results are judged.

The rule: against fp64, an error no larger than that of plain PyTorch in the same dtype plus
a tiny floor. Log-probs: the largest and the mean error over all tokens. Gradients: in norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import pro_kernels as pk
from pro_kernels import backends
from pro_kernels.fused import matmul
from pro_kernels.options import LogitOptions
from pro_kernels.selfcheck.trust.measure import FLOOR, allowance

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["fp32", "bf16", "fp16"]


def usable_backends(dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that serve CPU tensors here (Triton through its interpreter)."""
    return [name for name in backends.ORDER if backends.refusal(name, CPU, dtype) is None]


def transformed(raw: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor]:
    """Logits after scale and softcap, and their derivative with respect to the raw ones."""
    slope = torch.full_like(raw, options.logit_scale)
    return options.transform(raw, slope=slope), slope


@dataclass
class Case:
    """One batch: fp64 inputs from which every dtype is made."""

    name: str
    B: int = 2
    n: int = 3
    T: int = 6
    H: int = 16
    V: int = 37
    masked: float = 0.5
    scale: float = 1.0
    options: dict = field(default_factory=dict)
    bias: bool = False
    ties: bool = False
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """hidden, weight, bias (fp64), targets, rewards."""
        g = torch.Generator().manual_seed(self.seed)
        on = {"generator": g, "device": CPU}  # the same whatever the default device is
        hidden = torch.randn(self.B, self.n, self.T, self.H, dtype=torch.float64, **on)
        weight = torch.randn(self.V, self.H, dtype=torch.float64, **on)
        weight = weight * self.scale / self.H**0.5
        bias = torch.randn(self.V, dtype=torch.float64, **on) if self.bias else None
        targets = torch.randint(0, self.V, (self.B, self.n, self.T), **on)
        targets[..., 0] = 0  # the first and the last column of the vocabulary are targets
        targets[..., -1] = self.V - 1
        drop = torch.rand(self.B, self.n, self.T, **on) < self.masked
        targets = targets.masked_fill(drop, -100)
        rewards = torch.randn(self.B, self.n, **on)
        if self.ties and self.n > 2:
            rewards[:, 1] = rewards[:, 0]
        return hidden, weight, bias, targets, rewards


CASES = [
    Case("plain"),
    Case("nothing masked", masked=0.0),
    Case("all masked", masked=1.0),
    Case("one candidate", n=1, B=3),
    Case("two candidates", n=2, masked=0.8),
    Case("sixteen candidates", n=16, T=3, B=1, masked=0.3),
    Case("mostly masked", masked=0.9, n=5),
    Case("single tokens", T=1, n=4, masked=0.2),
    Case("ties", ties=True),
    Case("ties skipped", ties=True, options={"ties": "skip"}),
    Case("order only", options={"rewards": None}),
    Case("fixed temperature", options={"temperature": 2.0}),
    Case("eps", options={"eps": 1e-3}),
    Case("sum scores, mean sft", options={"length_normalize": False, "sft_reduction": "mean"}),
    Case("top 2 terms", n=5, options={"top_k": 2}),
    Case("reward scale", options={"reward_scale": 3.0, "sft_weight": 0.5}),
    Case("bias", bias=True),
    Case("softcap and scale", options={"softcap": 3.0, "logit_scale": 0.5}),
    Case("bias, softcap", bias=True, options={"softcap": 5.0}),
    Case("logits of 50", scale=25.0),
    Case("logits of 1e4", scale=5000.0),
    Case("one column", V=1),
    Case("odd vocabulary", V=1009, T=4),
    Case("wide vocabulary", V=4099, T=3, B=1),
]
CASE_IDS = [c.name for c in CASES]


@dataclass
class Result:
    """Output and gradients of one run."""

    output: Any  # of the function
    grads: dict[str, Tensor]


def run(
    function,
    case: Case,
    dtype: torch.dtype | tuple[torch.dtype, torch.dtype],  # of all, or of hidden and of the head
    upstream=1.7,
    freeze: tuple[str, ...] = (),
    kind: torch.dtype | None = None,
    **options,
) -> Result:
    """Call a function of hidden states on a case as ``dtype`` rounds it, and differentiate it.

    On the default device; ``upstream``: of the loss, or of each output that is not None; ``kind``:
    the dtype to run in, if another.
    """
    here = torch.get_default_device()
    hidden, weight, bias, targets, rewards = case.tensors()
    options = {**case.options, **options}
    own, head = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    leaves = {
        k: v.to(here, to).to(kind or to).requires_grad_(k not in freeze)
        for k, v, to in (("hidden", hidden, own), ("weight", weight, head), ("bias", bias, head))
        if v is not None
    }
    targets = None if targets is None else targets.to(here)
    args = [leaves["hidden"], leaves["weight"], targets]
    if "pro_loss" in function.__name__:
        rewards = options.pop("rewards", rewards)
        args.append(None if rewards is None else rewards.to(here))
    out = function(*args, bias=leaves.get("bias"), **options)
    if hasattr(out, "loss"):
        loss = upstream * out.loss
    else:
        pairs = zip(upstream, out if isinstance(out, tuple) else (out,), strict=False)
        loss = sum((u.to(here) * x).sum() for u, x in pairs if u is not None)
    if loss.requires_grad:
        loss.backward()
    return Result(out, {k: v.grad for k, v in leaves.items() if v.grad is not None})


def truth(case: Case, dtype: torch.dtype, **options) -> Result:
    """The reference in fp64 on the inputs as ``dtype`` rounds them."""
    return run(pk.reference.linear_pro_loss, case, dtype, kind=torch.float64, **options)


def upstreams(case: Case) -> Tensor:
    """Random gradients of the log-probs and of the entropies of a case."""
    g = torch.Generator().manual_seed(9)
    shape = (2, case.B, case.n, case.T)
    return torch.randn(*shape, generator=g, dtype=torch.float64, device=CPU)


def compare(
    case: Case,
    dtype: torch.dtype,
    function: str = "linear_pro_loss",
    known: dict[str, float] | None = None,
    upstream=1.7,
    freeze: tuple[str, ...] = (),
    shared: dict | None = None,
    **options,
) -> Result:
    """Hold outputs and gradients of a function to the rule; ``options`` are those of ours alone.

    ``known``: gradient -> an error that the test can account for; ``shared``: the reference's
    options.
    """
    plain_function, same = getattr(pk.reference, function), {"upstream": upstream, "freeze": freeze}
    same |= shared or {}
    exact = run(plain_function, case, dtype, kind=torch.float64, **same)
    plain = run(plain_function, case, dtype, **same)
    ours = run(getattr(pk, function), case, dtype, **same, **options)
    if function == "linear_pro_loss":
        assert torch.equal(ours.output.lengths, exact.output.lengths)
        values = {name: False for name in ("logps", "scores")}
        values |= {name: True for name in ("loss", "sft_loss", "rank_losses")}
        outputs = [r.output._asdict() for r in (ours, plain, exact)]
    else:
        outputs = [r.output if isinstance(r.output, tuple) else (r.output,) for r in
                   (ours, plain, exact)]  # fmt: skip
        values = dict.fromkeys(range(len(outputs[0])), False)
    for name, norm in values.items():
        args = (x[name].detach().reshape(-1) for x in outputs)
        assert_no_worse(*args, dtype, f"output {name}", norm=norm)
    assert exact.grads.keys() <= ours.grads.keys()
    for name, grad in ours.grads.items():
        if name not in exact.grads:  # nothing depends on it
            assert not grad.any()
            continue
        args = (r.grads[name] for r in (ours, plain, exact))
        off = (known or {}).get(name, 0.0)
        assert_no_worse(*args, dtype, f"gradient of {name}", norm=True, known=off)
    return ours


def fp32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors take the GPU's route: 16-bit matmuls that leave their fp32 sums unrounded."""

    def mm_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == torch.float32
        return torch.addmm(out, a.float(), b.float(), beta=float(accumulate), out=out)

    monkeypatch.setattr(matmul, "_upcasts", lambda *_: False)
    monkeypatch.setattr(matmul, "leaves_sums", lambda dtype, _: dtype.itemsize == 2)
    monkeypatch.setattr(matmul, "mm_fp32", mm_fp32)


def same_compiled(function, leaves: tuple[Tensor, ...], *rest, backend="aot_eager", **how) -> None:
    """One graph; its results and the gradients of the first are those of the function itself."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, **how)
    found = [f(*leaves, *rest) for f in (function, compiled)]
    found = [x if isinstance(x, tuple) else (x,) for x in found]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(x[0], leaves) for x in found]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def assert_no_worse(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    what: str,
    norm: bool,
    known: float = 0.0,
) -> None:
    """Error of ``ours`` at most that of ``plain``, both computed in ``dtype``, plus its floor.

    The floor is relative to the exact values; ``known`` is an error that the test can account for.
    """
    floor, device = FLOOR[dtype], ours.device.type
    ours, plain, exact = ours.double(), plain.double(), exact.double()
    assert ours.isfinite().all(), f"{what} is not finite"
    scale = exact.norm() if norm else exact.abs().amax() if exact.numel() else exact.new_zeros(())
    for measure in ["norm"] if norm else ["amax", "mean"]:
        if not exact.numel():
            continue
        a, b = (
            (getattr((x - exact).abs(), measure)() if measure != "norm" else (x - exact).norm())
            for x in (ours, plain)
        )
        factor = allowance(what, dtype, device) if norm else 1.0
        assert a <= factor * b + floor * scale + known + 1e-6, (
            f"{what}: {measure} error {a:.3e}, plain PyTorch {b:.3e}, floor {floor * scale:.1e}"
        )
