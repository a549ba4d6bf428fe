"""One case's tensors, and the truth that every provider is held to.

Data are random, unless the case names a model: hidden states and head such that logits have unit
variance. Rewards are within [0, 1] and best first; made up, they have the same gaps for every
prompt. So scores are near -log V, the official code's eps = 1e-10 is far below every exp, and all
formulations mean the same loss.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``N`` scored tokens, ``H`` hidden, ``V``
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.engine import lists
from bench.engine.case import Case
from bench.engine.losses import loss_of_logps
from bench.engine.timing import Step

# Multiplications up to which the truth is computed in fp64; above it logits are fp32.
_FP64_WORK = {"cpu": 1e11, "cuda": 1e13}
_SAMPLE = 32


@dataclass
class Inputs:
    """Tensors of a case: hidden and weight, or logits, or log-probs; targets; rewards."""

    case: Case
    targets: Tensor  # (B, n, T)
    rewards: Tensor  # (B, n)
    hidden: Tensor | None = None  # (B, n, T, H)
    weight: Tensor | None = None  # (V, H)
    logits: Tensor | None = None  # (B, n, T, V)
    logps: Tensor | None = None  # (B, n, T) fp32

    @property
    def device(self) -> torch.device:
        return self.targets.device

    @property
    def rows(self) -> Tensor:
        """(N,) flat positions that are scored."""
        return (self.targets.reshape(-1) != -100).nonzero()[:, 0]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Inputs that want a gradient."""
        tensors = (self.hidden, self.weight, self.logits, self.logps)
        return tuple(x for x in tensors if x is not None and x.requires_grad)

    def scored_hidden(self) -> Tensor:
        """(N, H) hidden states of the scored positions, detached."""
        assert self.hidden is not None
        return self.hidden.detach().reshape(-1, self.case.H)[self.rows]


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Tensors of a case, made on the device; always the same ones there.

    Raises:
        Refused: the model or the data of the case is not there.
    """
    device = torch.device(device)
    g = torch.Generator().manual_seed(0)
    targets = _make_targets(case, g).to(device)
    rewards = _make_rewards(case, g)
    inputs = Inputs(case, targets, rewards.to(device))
    there = torch.Generator(device).manual_seed(0)

    def leaf(*size: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(*size, generator=there, device=device).mul_(scale)
        return x.to(case.torch_dtype).requires_grad_(grad)

    shape = targets.shape
    if case.kind == "ranking":
        inputs.logps = leaf(*shape).detach().abs().neg().sub_(1).requires_grad_()
    elif case.kind == "logits":
        inputs.logits = leaf(*shape, case.V)
    elif case.model:
        real = lists.hidden_states(case.data, case.model, case.B)
        hidden, weight, targets = (x.to(device) for x in real)
        inputs.hidden = hidden.to(case.torch_dtype).requires_grad_()
        inputs.weight = weight.to(case.torch_dtype).requires_grad_(case.kind != "frozen")
        inputs.targets = targets
    else:
        inputs.hidden = leaf(*shape, case.H)
        inputs.weight = leaf(case.V, case.H, scale=case.H**-0.5, grad=case.kind != "frozen")
    return inputs


def _make_targets(case: Case, g: torch.Generator) -> Tensor:
    """Prompt, completion, padding; made up, lengths vary by up to a quarter, their sum is exact."""
    size = (case.B, case.n)
    if case.data:
        found = lists.load()[case.data].head(case.B)
        lengths, starts = torch.tensor(found.completions), torch.tensor(found.prompts)[:, None]
    else:
        mean = case.scored_each
        spread = min(mean - 1, case.T - mean, mean // 4)
        longer = torch.randint(0, spread + 1, (case.B * case.n // 2,), generator=g)
        lengths = mean + torch.cat([longer, -longer, longer.new_zeros(case.B * case.n % 2)])
        lengths = lengths.view(size)
        starts = (torch.rand(size, generator=g) * (case.T - lengths + 1)).long()
    ids = torch.randint(0, max(1, case.V), (*size, case.T), generator=g)
    place = torch.arange(case.T) - starts[..., None]
    return torch.where((place >= 0) & (place < lengths[..., None]), ids, -100)


def _make_rewards(case: Case, g: torch.Generator) -> Tensor:
    if case.data:
        return torch.tensor(lists.load()[case.data].head(case.B).unit_rewards)
    gaps = 0.2 + torch.rand(case.n, generator=g)
    gaps[-1] = 0
    levels = gaps.flip(0).cumsum(0).flip(0)
    return levels / levels[0].clamp_min(1) * 0.8 + 0.2 * torch.rand(case.B, 1, generator=g)


@dataclass
class Truth:
    """The loss and the log-probs in fp64, and samples of the gradients: rows of both."""

    loss: float
    rows: Tensor  # (N,) flat positions that are scored
    logps: Tensor | None  # (N,); None where log-probs are the input
    row_ids: Tensor  # some of rows
    row_grads: Tensor  # of the input's gradient there (dlogps: one column)
    unscored: Tensor  # some positions whose gradient is 0
    column_ids: Tensor | None = None  # some of the vocabulary
    column_grads: Tensor | None = None  # the rows of dW there

    def errors(self, loss: float, step: Step) -> dict[str, float | None]:
        """Relative error of loss and gradients, largest error of a log-prob; None: not there."""
        names = ("logp_error", "input_grad_error", "weight_grad_error")
        found = dict.fromkeys(names) | {"loss_error": abs(loss - self.loss) / abs(self.loss)}
        if step.logps is not None and self.logps is not None:
            got = step.logps().detach().reshape(-1)[self.rows].double()
            found["logp_error"] = float((got - self.logps).abs().max())
        for leaf in step.leaves:
            name = "weight_grad_error" if leaf.dim() == 2 else "input_grad_error"
            found[name] = float("inf") if leaf.grad is None else self._grad_error(leaf)
        return found

    def _grad_error(self, leaf: Tensor) -> float:
        assert leaf.grad is not None
        if leaf.dim() == 2:
            got, exact = leaf.grad[self.column_ids].double(), self.column_grads
            assert exact is not None
            return float((got - exact).norm() / exact.norm())
        grad = leaf.grad if leaf.dim() == 4 else leaf.grad[..., None]
        grad = grad.reshape(-1, grad.shape[-1])
        stray = grad[self.unscored].double().norm() / self.row_grads.norm()
        return max(_row_error(grad[self.row_ids].double(), self.row_grads), float(stray))


def _row_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square over rows of each row's relative error in norm.

    Row by row, because the SFT term's rows are a hundred times larger than those of the other
    candidates: in one norm over all rows a wrong ranking term would not show.
    """
    return float(((got - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt())


@torch.no_grad()
def make_truth(inputs: Inputs) -> Truth:
    """Loss, log-probs and sampled gradients in fp64 (logits in fp32 where fp64 takes minutes)."""
    rows = inputs.rows
    generator = torch.Generator().manual_seed(1)
    pick = torch.randperm(len(rows), generator=generator)[:_SAMPLE].to(rows.device)
    unscored = (inputs.targets.reshape(-1) == -100).nonzero()[:_SAMPLE, 0]
    if inputs.logps is not None:
        loss, g = _upstream(inputs, inputs.logps.reshape(-1)[rows].double(), rows)
        return Truth(loss, rows, None, rows[pick], g[pick, None], unscored)
    x, weight, wide = _wide_inputs(inputs, rows)
    targets = inputs.targets.reshape(-1)[rows]
    lse = torch.empty(len(rows), dtype=torch.float64, device=x.device)
    logps = torch.empty_like(lse)
    for i in range(0, len(rows), 512):
        at = slice(i, i + 512)
        logits = _logits(x[at], weight, inputs.case.softcap)[0].to(wide)
        lse[at] = logits.logsumexp(1).double()
        logps[at] = logits.gather(1, targets[at, None])[:, 0].double() - lse[at]
    loss, g = _upstream(inputs, logps, rows)

    logits, slope = _logits(x[pick], weight, inputs.case.softcap)
    dz = -(logits.double() - lse[pick, None]).exp()
    dz[torch.arange(len(pick), device=x.device), targets[pick]] += 1
    dz *= g[pick, None] * slope
    if weight is None:
        return Truth(loss, rows, logps, rows[pick], dz, unscored)
    others = torch.randint(0, inputs.case.V, (_SAMPLE,), generator=generator).to(x.device)
    columns = torch.cat([targets[pick], others]).unique()
    logits, slope = _logits(x, weight[columns], inputs.case.softcap)
    p = (logits.double() - lse[:, None]).exp()
    dz_columns = g[:, None] * ((targets[:, None] == columns).double() - p) * slope
    row_grads, column_grads = (dz.to(wide) @ weight).double(), dz_columns.t() @ x.double()
    return Truth(loss, rows, logps, rows[pick], row_grads, unscored, columns, column_grads)


def _wide_inputs(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Scored hidden states and weight, or scored logits and None; and the dtype to compute in."""
    case = inputs.case
    work = case.scored * case.V * max(case.H, 1)
    wide = torch.float64 if work <= _FP64_WORK[rows.device.type] else torch.float32
    if inputs.logits is not None:
        return inputs.logits.reshape(-1, case.V)[rows], None, wide
    assert inputs.weight is not None
    return inputs.scored_hidden().to(wide), inputs.weight.to(wide), wide


def _logits(
    x: Tensor, weight: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """Logits, and their slope under the softcap."""
    logits = x if weight is None else x @ weight.t()
    if softcap is None:
        return logits, 1.0
    t = torch.tanh(logits / softcap)
    return softcap * t, (1 - t.square()).double()


def _upstream(inputs: Inputs, logps: Tensor, rows: Tensor) -> tuple[float, Tensor]:
    """The loss, and its derivative by each scored token's log-prob."""
    with torch.enable_grad():
        flat = torch.zeros(inputs.case.tokens, dtype=torch.float64, device=logps.device)
        flat[rows] = logps
        flat.requires_grad_()
        loss = case_loss(inputs, flat.view(inputs.targets.shape))
        loss.backward()
    assert flat.grad is not None
    return float(loss), flat.grad[rows]


def case_loss(inputs: Inputs, logps: Tensor) -> Tensor:
    """What the case asks for, from log-probs (B, n, T): PRO, or the mean cross-entropy."""
    live = inputs.targets != -100
    if inputs.case.kind == "ce":
        return -torch.where(live, logps, 0.0).sum() / inputs.case.scored
    return loss_of_logps(logps, inputs.targets, inputs.rewards.to(logps.dtype))
