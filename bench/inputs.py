"""One case's tensors, and the truth that every provider is held to.

Data are random: hidden states and head such that logits have unit variance, rewards within [0, 1]
and best first, with the same gaps for every prompt. So scores are near -log V, the official code's
eps = 1e-10 is far below every exp, and all formulations mean the same loss.

Legend: ``N`` scored tokens, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case
from bench.losses import ranking_loss

# Multiplications up to which the truth is computed in fp64; above it logits are fp32.
_FP64_WORK = 1e11
_SAMPLE = 32


@dataclass
class Inputs:
    """Tensors of a case: hidden and weight, or logits; targets; rewards."""

    case: Case
    hidden: Tensor | None  # (B, n, T, H)
    weight: Tensor | None  # (V, H)
    logits: Tensor | None  # (B, n, T, V)
    targets: Tensor  # (B, n, T)
    rewards: Tensor  # (B, n)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.targets.device

    @property
    def rows(self) -> Tensor:
        """(N,) flat positions that are scored."""
        return (self.targets.reshape(-1) != -100).nonzero()[:, 0]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Inputs that want a gradient."""
        tensors = (self.hidden, self.weight, self.logits)
        return tuple(x for x in tensors if x is not None and x.requires_grad)

    def scored_hidden(self) -> Tensor:
        """(N, H) hidden states of the scored positions, detached."""
        assert self.hidden is not None
        return self.hidden.detach().reshape(-1, self.case.H)[self.rows]


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of a case; the same seed gives the same tensors."""
    g = torch.Generator().manual_seed(seed)
    shape = (case.B, case.n, case.T)
    targets = _make_targets(case, g).to(device)
    gaps = 0.2 + torch.rand(case.n, generator=g)
    gaps[-1] = 0
    levels = gaps.flip(0).cumsum(0).flip(0)
    rewards = levels / levels[0].clamp_min(1) * 0.8 + 0.2 * torch.rand(case.B, 1, generator=g)

    def leaf(*size: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(*size, generator=g).mul_(scale).to(device, case.torch_dtype)
        return x.requires_grad_(grad)

    if case.kind == "logits":
        return Inputs(case, None, None, leaf(*shape, case.V), targets, rewards.to(device))
    hidden = leaf(*shape, case.H)
    weight = leaf(case.V, case.H, scale=case.H**-0.5, grad=case.kind != "frozen")
    return Inputs(case, hidden, weight, None, targets, rewards.to(device))


def _make_targets(case: Case, g: torch.Generator) -> Tensor:
    """Prompt, completion, padding: lengths vary by up to a quarter, their sum is exact."""
    mean = case.scored_each
    spread = min(mean - 1, case.T - mean, mean // 4)
    targets = torch.full((case.B * case.n, case.T), -100)
    delta = 0
    for s in range(case.B * case.n):
        delta = -delta if s % 2 else int(torch.randint(0, spread + 1, (), generator=g))
        if s == case.B * case.n - 1 and s % 2 == 0:
            delta = 0
        length = mean + delta
        start = int(torch.randint(0, case.T - length + 1, (), generator=g))
        targets[s, start : start + length] = torch.randint(0, case.V, (length,), generator=g)
    return targets.view(case.B, case.n, case.T)


@dataclass
class Truth:
    """The loss in fp64, and samples of the gradients: rows of dHidden or dLogits, rows of dW."""

    loss: float
    row_ids: Tensor
    row_grads: Tensor
    unscored: Tensor
    column_ids: Tensor | None
    column_grads: Tensor | None

    def loss_error(self, loss: float) -> float:
        """Relative difference of a loss."""
        return abs(loss - self.loss) / abs(self.loss)

    def grad_error(self, leaves: tuple[Tensor, ...]) -> float | None:
        """Largest relative error, in norm, of the sampled gradients (None: nothing to compare)."""
        errors = []
        for leaf in leaves:
            if leaf.grad is None:
                return float("inf")
            if leaf.dim() == 4:
                grad = leaf.grad.reshape(-1, leaf.shape[-1])
                errors.append(_row_error(grad[self.row_ids].double(), self.row_grads))
                if self.unscored.numel():
                    stray = grad[self.unscored].double().norm() / self.row_grads.norm()
                    errors.append(float(stray))
            elif self.column_grads is not None:
                exact = self.column_grads
                errors.append(float((leaf.grad[self.column_ids] - exact).norm() / exact.norm()))
        return max(errors, default=None)


def _row_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square over rows of each row's relative error in norm.

    Row by row, because the SFT term's rows are a hundred times larger than those of the other
    candidates: in one norm over all rows a wrong ranking term would not show.
    """
    return float(((got - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


@torch.no_grad()
def make_truth(inputs: Inputs) -> Truth:
    """Loss and sampled gradients in fp64 (logits in fp32 where fp64 would take minutes)."""
    case, rows = inputs.case, inputs.rows
    wide = torch.float64 if case.scored * case.V * max(case.H, 1) <= _FP64_WORK else torch.float32
    targets = inputs.targets.reshape(-1)[rows]
    if inputs.logits is not None:
        x, weight = inputs.logits.reshape(-1, case.V)[rows], None
    else:
        assert inputs.weight is not None
        x, weight = inputs.scored_hidden().to(wide), inputs.weight.to(wide)
    lse = torch.empty(len(rows), dtype=torch.float64, device=x.device)
    logps = torch.empty_like(lse)
    for i in range(0, len(rows), 512):
        at = slice(i, i + 512)
        logits = x[at].to(wide) if weight is None else x[at] @ weight.t()
        lse[at] = logits.logsumexp(1).double()
        logps[at] = logits.gather(1, targets[at, None])[:, 0].double() - lse[at]
    loss, g = _upstream(inputs, logps, rows)

    generator = torch.Generator().manual_seed(1)
    pick = torch.randperm(len(rows), generator=generator)[:_SAMPLE].to(x.device)
    unscored = (inputs.targets.reshape(-1) == -100).nonzero()[:_SAMPLE, 0]
    logits = x[pick].double() if weight is None else (x[pick] @ weight.t()).double()
    dz = -(logits - lse[pick, None]).exp()
    dz[torch.arange(len(pick), device=x.device), targets[pick]] += 1
    dz *= g[pick, None]
    if weight is None:
        return Truth(loss, rows[pick], dz, unscored, None, None)
    others = torch.randint(0, case.V, (_SAMPLE,), generator=generator).to(x.device)
    columns = torch.cat([targets[pick], others]).unique()
    p = ((x @ weight[columns].t()).double() - lse[:, None]).exp()
    dz_columns = g[:, None] * ((targets[:, None] == columns).double() - p)
    row_grads = (dz.to(wide) @ weight).double()
    return Truth(loss, rows[pick], row_grads, unscored, columns, dz_columns.t() @ x.double())


def _upstream(inputs: Inputs, logps: Tensor, rows: Tensor) -> tuple[float, Tensor]:
    """The loss, and its derivative by each scored token's log-prob."""
    case = inputs.case
    with torch.enable_grad():
        flat = torch.zeros(case.tokens, dtype=torch.float64, device=logps.device)
        flat[rows] = logps
        flat.requires_grad_()
        lengths = (inputs.targets != -100).sum(-1)
        sums = flat.view(case.B, case.n, case.T).sum(-1)
        loss = ranking_loss(sums, lengths, inputs.rewards.double())
        loss.backward()
    assert flat.grad is not None
    return float(loss), flat.grad[rows]
