"""The trust report's batches, and what is asked of each.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``N`` scored positions, ``H`` hidden,
``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What is asked of a batch -> the entrance's name and the tiers it is run in (none from logits):
# the PRO loss with the head trained, with it frozen, without gradients, and from logits; log-probs
# per token under a random upstream gradient; the loss in the meaning of the authors' code.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("hidden", ("T1", "T2", "T3", "T3 part kept")),
    "frozen": ("hidden", ("T1f",)),
    "score": ("hidden", ("T0",)),
    "logits": ("logits", ()),
    "tokens": ("tokens from hidden", ("T1", "T3")),
    "token logits": ("tokens from logits", ()),
    "official": ("official, hidden", ("T1", "T2", "T3")),
    "official logits": ("official, logits", ()),
}


@dataclass(frozen=True)
class Case:
    """One batch."""

    name: str  # as in the report
    B: int  # prompts
    n: int  # candidates
    T: int  # positions a candidate
    H: int = 64
    V: int = 512
    masked: float = 0.4  # share not scored: prompt before, padding after, ragged
    peak: float = 0.0  # largest absolute logit; 0 leaves logits at unit variance
    ties: bool = False  # the two best candidates of every prompt have equal rewards
    gap: float | None = None  # one reward gap for all prompts (n = 2), as Liger's SimPO needs it
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = False
    sft_reduction: str | None = "sum"  # None: the default; peers' formulations have "sum"
    empty: bool = False  # no scored token in a candidate, in all but one of a prompt, in a prompt
    holes: bool = False  # single positions within completions are not scored either
    compiled: bool = False  # peers that compile for a shape run here only: it takes them seconds
    threads: bool = False  # run on all threads of PyTorch, the others on one

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that make sense: the authors' code gives NaN without tokens, 0 for n = 1."""
        authors = not self.empty and self.n > 1
        return tuple(kind for kind in KINDS if authors or not kind.startswith("official"))


# Batches of more than about 700 scored tokens can take tier T2, which wants chunks of 512; the
# others are smaller, for the report must end within three minutes.
CASES = (
    Case("plain", 4, 4, 48, masked=0.0),
    Case("masked, ragged, ties", 4, 4, 60, masked=0.2, ties=True, threads=True),
    Case("logits of ±50", 4, 4, 60, masked=0.2, peak=50.0),
    Case("odd vocabulary", 2, 4, 40, H=48, V=2053),
    Case("softcap", 2, 3, 40, V=509, softcap=5.0),
    Case("softcap, logit scale, bias", 4, 4, 60, V=509, masked=0.2, softcap=5.0, logit_scale=0.6,
         bias=True),
    Case("single-token completions", 8, 4, 1, V=509, masked=0.0),
    Case("n = 1", 3, 1, 20, V=509),
    Case("n = 2", 6, 2, 40, gap=0.5, compiled=True),
    Case("n = 3", 2, 3, 20, V=509),
    Case("n = 8", 2, 8, 20, V=509),
    Case("n = 16", 2, 16, 20, V=509),
    Case("candidates without tokens", 4, 4, 20, V=509, empty=True),
)  # fmt: skip


@dataclass
class Problem:
    """One batch rounded to a dtype, and what is asked of it."""

    case: Case
    kind: str  # one of ``KINDS``
    dtype: torch.dtype  # of the leaves
    # "logits" (B, n, T, V); or "hidden" (B, n, T, H), "weight" (V, H) and perhaps "bias" (V,).
    leaves: dict[str, Tensor]
    targets: Tensor  # (B, n, T), -100 where nothing is scored
    rewards: Tensor  # (B, n) fp32, multiples of 1/64, so that their gaps are exact
    upstream: Tensor  # (B, n, T) fp32, the gradient that token log-probs get

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.targets.device

    @property
    def from_logits(self) -> bool:
        """Whether logits are the input."""
        return "logits" in self.leaves

    @property
    def official(self) -> bool:
        """Whether the meaning is that of the authors' code."""
        return self.kind.startswith("official")

    @property
    def tokens_only(self) -> bool:
        """Whether log-probs per token are asked for, and no loss."""
        return self.kind.startswith("token")

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the leaves that want a gradient."""
        frozen = {"frozen": {"weight", "bias"}, "score": set(self.leaves)}.get(self.kind, set())
        return tuple(name for name in self.leaves if name not in frozen)

    @property
    def best_first(self) -> tuple[Tensor, Tensor]:
        """Index (B, 1), (B, n) that puts candidates best first, as the authors' code has them."""
        columns = self.rewards.argsort(dim=1, descending=True, stable=True)
        return torch.arange(len(columns), device=self.device)[:, None], columns

    def fresh(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """New leaves in a dtype, which ask for a gradient where one is wanted."""
        return {
            name: x.to(dtype, copy=True).requires_grad_(name in self.trained)
            for name, x in self.leaves.items()
        }


def make_problem(
    case: Case, kind: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Problem:
    """The batch of a case; the same seed gives the same values, rounded, in every dtype and kind.

    For the authors' meaning, which sorts nothing, candidates stand best first.
    """
    g = torch.Generator().manual_seed(seed)
    targets = _targets(case, g)
    rewards = _rewards(case, g)
    if kind.startswith("official"):
        rewards = rewards.sort(dim=1, descending=True, stable=True).values
    hidden = torch.randn(case.B, case.n, case.T, case.H, generator=g, dtype=torch.float64)
    weight = torch.randn(case.V, case.H, generator=g, dtype=torch.float64) * case.H**-0.5
    if case.peak:
        weight *= case.peak / (hidden @ weight.t()).abs().max()
    leaves = {"hidden": hidden, "weight": weight}
    if case.bias:
        leaves["bias"] = torch.randn(case.V, generator=g, dtype=torch.float64)
    leaves = {name: x.to(device, dtype) for name, x in leaves.items()}
    if kind.endswith("logits"):
        wide = {name: x.double() for name, x in leaves.items()}
        logits = torch.nn.functional.linear(wide["hidden"], wide["weight"], wide.get("bias"))
        leaves = {"logits": logits.to(dtype)}
    upstream = torch.randn(targets.shape, generator=g)
    return Problem(
        case, kind, dtype, leaves, targets.to(device), rewards.to(device), upstream.to(device)
    )


def _targets(case: Case, g: torch.Generator) -> Tensor:
    """(B, n, T): prompt, completion, padding; the first and the last column are targets too."""
    shape = case.B, case.n, case.T
    targets = torch.randint(0, case.V, shape, generator=g)
    targets[..., ::7], targets[..., 3::7] = 0, case.V - 1
    if case.masked:
        spread = min(case.masked, 1 - case.masked)
        share = 1 - case.masked + spread * (2 * torch.rand(shape[:2], generator=g) - 1)
        length = (share * case.T).round().long().clamp(1, case.T)[..., None]
        start = (torch.rand(shape[:2], generator=g)[..., None] * (case.T - length + 1)).long()
        at = torch.arange(case.T)
        targets[(at < start) | (at >= start + length)] = -100
    if case.holes:
        targets[torch.rand(shape, generator=g) < case.masked] = -100
    if case.empty:
        targets[0, 1] = targets[1, 0] = targets[2, 1:] = targets[3] = -100
    return targets


def _rewards(case: Case, g: torch.Generator) -> Tensor:
    """(B, n) in [0, 1], so that the authors' eps is far below exp(score * gap); in no order."""
    rewards = torch.rand(case.B, case.n, generator=g).mul(64).round() / 64
    if case.gap is not None:
        rewards[:, 1] = rewards[:, 0] - case.gap
    if case.ties:
        best = rewards.argmax(1, keepdim=True)
        rewards.scatter_(1, (best + 1) % case.n, rewards.gather(1, best))
    return rewards
