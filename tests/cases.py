"""The hard cases of the fused path, built once, and the rule by which results are judged.

The rule: against fp64, an error no larger than that of plain PyTorch in the same dtype plus
a tiny floor. Log-probs: the largest and the mean error over all tokens. Gradients: in norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import pro_kernels as pk
from pro_kernels import backends
from pro_kernels.fused import matmul
from pro_kernels.options import LogitOptions, RankingOptions

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["fp32", "bf16", "fp16"]
FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def usable_backends(dtype: torch.dtype = torch.float32) -> list[str]:
    """Backends that serve CPU tensors here (Triton through its interpreter)."""
    return [name for name in backends.ORDER if backends.refusal(name, CPU, dtype) is None]


def cpu_isas() -> list[str]:
    """Instruction sets that the C++ backend has and this machine runs."""
    found = []
    if "cpu" in usable_backends():
        backend = backends.get("cpu")
        for name in ("avx512bf16", "avx512", "avx2", "neon", "generic"):
            try:
                backend.set_isa(name)
            except ValueError:
                continue
            finally:
                backend.set_isa(None)
            found.append(name)
    return found


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
        hidden = torch.randn(self.B, self.n, self.T, self.H, generator=g, dtype=torch.float64)
        weight = torch.randn(self.V, self.H, generator=g, dtype=torch.float64)
        weight = weight * self.scale / self.H**0.5
        bias = torch.randn(self.V, generator=g, dtype=torch.float64) if self.bias else None
        targets = torch.randint(0, self.V, (self.B, self.n, self.T), generator=g)
        targets[..., 0] = 0  # the first and the last column of the vocabulary are targets
        targets[..., -1] = self.V - 1
        drop = torch.rand(self.B, self.n, self.T, generator=g) < self.masked
        targets = targets.masked_fill(drop, -100)
        rewards = torch.randn(self.B, self.n, generator=g)
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

    output: pk.PROOutput
    grads: dict[str, Tensor]


def run(
    function,
    case: Case,
    dtype: torch.dtype,
    upstream: float = 1.7,
    freeze: tuple[str, ...] = (),
    **options,
) -> Result:
    """Call a linear PRO loss on a case in ``dtype`` and differentiate it."""
    hidden, weight, bias, targets, rewards = case.tensors()
    options = {**case.options, **options}
    if "rewards" in options:
        rewards = options.pop("rewards")
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        k: v.to(dtype).requires_grad_(k not in freeze) for k, v in leaves.items() if v is not None
    }
    out = function(
        leaves["hidden"], leaves["weight"], targets, rewards, bias=leaves.get("bias"), **options
    )
    if out.loss.requires_grad:
        (upstream * out.loss).backward()
    grads = {k: v.grad for k, v in leaves.items() if v.grad is not None}
    return Result(out, grads)


def truth(case: Case, dtype: torch.dtype, **options) -> Result:
    """The reference in fp64 on the inputs as ``dtype`` rounds them."""

    def rounded(hidden, weight, targets, rewards, *, bias, **kw):
        return pk.reference.linear_pro_loss(hidden, weight, targets, rewards, bias=bias, **kw)

    hidden, weight, bias, targets, rewards = case.tensors()
    exact = Case(**{**case.__dict__})
    exact.tensors = lambda: (  # type: ignore[method-assign]
        hidden.to(dtype).double(),
        weight.to(dtype).double(),
        None if bias is None else bias.to(dtype).double(),
        targets,
        rewards,
    )
    return run(rounded, exact, torch.float64, **options)


def fp32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors take the GPU's route: 16-bit matmuls that leave their fp32 sums unrounded."""

    def mm_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == torch.float32
        return torch.addmm(out, a.float(), b.float(), beta=float(accumulate), out=out)

    monkeypatch.setattr(matmul, "_upcasts", lambda *_: False)
    monkeypatch.setattr(matmul, "leaves_sums", lambda dtype, _: dtype.itemsize == 2)
    monkeypatch.setattr(matmul, "mm_fp32", mm_fp32)


def allowance(what: str, dtype: torch.dtype, device: str) -> float:
    """How many times plain PyTorch's error a gradient may have, by the roundings to 16 bits.

    Plain PyTorch rounds the gradient of the logits and the result. With fp32 matmuls so do we, and
    with fp32 sums for dHidden and dbias; dW then has one rounding more, of w X (independent, of the
    same size: sqrt(3/2)). Native matmuls without fp32 sums round dZ0 W too, and plain PyTorch's
    share may be down to one of three: sqrt(3).
    """
    if dtype.itemsize > 2 or matmul.upcasts(dtype, device):
        return 1.0
    if matmul.leaves_sums(dtype, device):
        return 1.5**0.5 if "weight" in what else 1.0
    return 3**0.5


def assert_no_worse(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    what: str,
    norm: bool,
    device: str = "cpu",
    known: float = 0.0,
) -> None:
    """Error of ``ours`` at most that of ``plain``, both computed in ``dtype``, plus its floor.

    The floor is relative to the exact values; ``known`` is an error that the test can account for.
    """
    floor = FLOOR[dtype]
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


def check_sums_stand_for_tokens(ranking) -> None:
    """Without prompts the sums alone are made; with them they rank as the tokens did."""
    lengths = torch.tensor([4, 1, 0, 7, 2, 3])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logps = -torch.rand(17, generator=torch.Generator().manual_seed(1))
    none = torch.empty(0, dtype=torch.int64)
    nobody = (none.view(0, 1), None, none, torch.empty(0))
    prompts = (
        *(torch.tensor([[3, 0, 1], [5, 4, -1]]), torch.tensor([[2.0, 1.0, 0.5], [1.0, 0.0, 0.0]])),
        *(torch.zeros(2, dtype=torch.int64), torch.tensor([0.75, 0.25])),
    )
    for options in (RankingOptions(sft_mean=True), RankingOptions(length_normalize=False)):
        terms, sums, weights = ranking(logps, offsets, lengths, *prompts, options=options)
        empty, alone, unused = ranking(logps, offsets, lengths, *nobody, options=options)
        assert empty.shape == (0, 1) and torch.equal(alone, sums) and not unused.any()
        found = ranking(alone, torch.arange(7), lengths, *prompts, options=options)
        torch.testing.assert_close(found[0], terms)
        assert torch.equal(found[1], sums) and found[2][2] == 0
        torch.testing.assert_close(found[2].repeat_interleave(lengths), weights)


def check_infinite_scores(ranking) -> None:
    """A score of -inf at a negative temperature makes its terms infinite and no other row NaN.

    In the last prompt a term of scores of -inf alone is NaN, and so are the rows of its candidates,
    but not the one above. ``ranking`` is a backend's function; the torch backend says what comes
    out.
    """
    inf = torch.inf
    prompts = [-1.0, -2.0, -inf], [-1.0, -2.0, -3.0], [-1.0, -inf, -2.0], [0.0, -inf, -inf]
    logps = torch.tensor(prompts).flatten()
    arguments = (
        *(logps, torch.arange(13), torch.ones(12, dtype=torch.int64), torch.arange(12).view(4, 3)),
        torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0]]),
        *(torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.5)),
    )
    for options in (RankingOptions(), RankingOptions(eps=1e-10)):
        found = ranking(*arguments, options=options)
        expected = backends.get("torch").ranking(*arguments, options=options)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)
        assert found[0].isposinf().any() and found[2][:9].isnan().sum() == 2
        assert found[2][3:6].isfinite().all() and found[2][9].isfinite()
