"""What every backend has to compute: batches with the hard cases, and the bounds of errors.

Truth is ``backends/torch.py`` in fp64 on the same inputs. An error may be no larger than that of
``backends/torch.py`` in the same dtype plus a tiny floor (the rule of cases.py), and in each entry
no larger than the roundings that a backend is allowed (subjects.py): ``U`` of the dtype for what is
stored, ``EPS`` for what fp32 has to hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import FLOOR, transformed
from pro_kernels import backends
from pro_kernels.backends import protocol
from pro_kernels.options import LogitOptions

reference = backends.get("torch")
EPS = 2.0**-24
U = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative rounding
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}
PLAIN, SCALED = LogitOptions(), LogitOptions(logit_scale=-0.35)
CAPPED = LogitOptions(softcap=3.0, logit_scale=0.7)
OPTIONS = {"plain": PLAIN, "scaled": SCALED, "capped": CAPPED}


@dataclass
class Rows:
    """Rows of logits and all that the functions of a backend take with them."""

    logits: Tensor
    targets: Tensor
    weights: Tensor  # upstream gradients of the log-probs
    by: Tensor  # and of the entropies
    exact: Tensor | None = None
    options: LogitOptions = PLAIN

    def __getitem__(self, rows) -> Rows:
        """Some of them."""
        exact = None if self.exact is None else self.exact[rows]
        of = (x[rows] for x in (self.logits, self.targets, self.weights, self.by))
        return Rows(*of, exact, self.options)

    @property
    def given(self) -> protocol.Rows:
        return protocol.Rows(self.logits, self.targets, self.options, self.exact)

    @property
    def dead(self) -> Tensor:
        return self.targets < 0

    def double(self) -> Rows:
        exact = None if self.exact is None else self.exact.double()
        w = (self.weights.double(), self.by.double())
        return Rows(self.logits.double(), self.targets, *w, exact, self.options)

    def raw(self) -> Tensor:
        """The logits in fp64, with the exact ones of the targets in their place."""
        wide = self.double()
        return reference._put_target(
            wide.logits.clone(), self.targets.clamp_min(0)[:, None], ~self.dead, wide.exact
        )


def rows_of(n: int, v: int, dtype: torch.dtype, scale: float = 4.0, masked: float = 0.2) -> Rows:
    """Random ones; both ends of the vocabulary are targets, and about ``masked`` is not scored."""
    logits = (torch.randn(n, v) * scale).to(dtype)
    targets = torch.randint(0, v, (n,))
    targets[:1], targets[-1:] = 0, v - 1
    if masked:
        targets = torch.where(torch.rand(n) < masked, -100, targets)
        targets[n // 2] = -100
    return Rows(logits, targets, *torch.randn(2, n))


def with_exact(rows: Rows, shift: float = 0.0) -> Rows:
    """Target logits that differ from the stored ones, as exact dot products do."""
    stored = rows.logits.float().gather(1, rows.targets.clamp_min(0)[:, None])[:, 0]
    return replace(rows, exact=stored + shift + 0.01 * torch.rand(len(stored)))


STATS = ("logp", "lse", "entropy")
GRADS = ("gradient of logp", "gradient of logp and entropy", "residual")
NAMES = (*STATS, "logp of residual_", "lse of residual_", *GRADS)


def everything(backend, rows: Rows) -> list[Tensor]:
    """What a backend makes of rows, as ``NAMES`` has it: statistics, then gradients."""
    *stats, entropy = backend.logp(rows.given, entropy=True)
    at = (rows.given, stats[1], rows.weights)
    one = backend.logits_grad(*at)
    both = backend.logits_grad(*at, entropy=(entropy, rows.by))
    raw = rows.logits.clone()
    again = backend.residual_(rows.given._replace(logits=raw))
    return [*stats, entropy, *again, one, both, raw]


def check(subject, rows: Rows, found: list[Tensor] | None = None) -> list[Tensor]:
    """All of it, or what was ``found``, against fp64; returns it."""
    found, wide = found or everything(subject, rows), rows.double()
    truth = reference.logp(wide.given, entropy=True)
    plain = everything(reference, rows)
    for name, got, want, other in zip(
        NAMES, found[:5], (*truth, *truth[:2]), plain[:5], strict=False
    ):
        assert got.dtype == torch.float32, name
        at = f"{name}, V = {rows.logits.shape[1]}"
        within(got, want, stats_bound(subject, rows, want, name), at)
        no_worse(got, other, want, torch.float32, at)
    assert (found[0] <= 0).all()
    lse, entropy = found[1:3]
    given = [(lse, rows.weights, None), (lse, rows.weights, (entropy, rows.by))]
    for name, got, other, (lse, w, e) in zip(
        GRADS, found[5:], plain[5:], (*given, (truth[1], None, None)), strict=True
    ):
        check_gradient(subject, got, rows, lse, w, e, other, name)
    return found


def size_of(rows: Rows) -> Tensor:
    """How large each row's logits are, after scale and softcap: roundings of them cost that."""
    z, _ = transformed(rows.raw(), rows.options)
    return torch.where(z.isfinite(), z.abs(), 0.0).amax(1)


def stats_bound(subject, rows: Rows, want: Tensor, name: str) -> Tensor:
    constant, relative, *_ = subject.roundings(rows.logits.shape[1])
    size = size_of(rows)
    bound = EPS * (constant + relative * want.abs())
    if rows.options != PLAIN:
        bound = bound + 8 * EPS * size
    if name == "entropy":  # a difference of two means of the size of log V
        bound = bound * (2 + 2 * size.clamp_max(20))
    return bound


def check_gradient(
    subject, got, rows: Rows, lse, weights, entropy=None, plain=None, name="", first: int = 0
) -> None:
    """``lse`` and ``entropy`` as the backend was given them, or the true ones."""
    *_, constant, per_nat = subject.roundings(rows.logits.shape[1])
    wide, lse = rows.double(), lse.double()
    w = None if weights is None else weights.double()
    e = None if entropy is None else tuple(x.double() for x in entropy)
    want = reference.logits_grad(wide.given, lse, w, first_column=first, entropy=e)
    raw = rows.raw() if first == 0 else wide.logits
    z, slope = transformed(raw, rows.options)
    log_p = (z - lse[:, None]).nan_to_num(0, 0, -1e4)
    relative = constant + per_nat * log_p.abs().clamp_max(120)
    if rows.options != PLAIN:
        reach = (raw * rows.options.logit_scale).nan_to_num(0, 0, 0).abs()
        relative = relative + 8 + 8 * reach.clamp_max(1e5)
    by_entropy = 0.0
    terms = torch.ones_like(lse)[:, None] if w is None else w.abs()[:, None]
    size = terms.clone()
    if e is not None:
        by_entropy = e[1].abs()[:, None]
        terms = terms + by_entropy * (1 + log_p.abs().clamp_max(110) + e[0].abs()[:, None])
    low = 0.0 if rows.logits.dtype == torch.float32 else 4e-6  # a shorter exp, below what is stored
    bound = (EPS * relative + low) * log_p.exp() * terms * slope.abs()
    hit = torch.arange(raw.shape[1])[None] + first == rows.targets[:, None]
    at_target = 12 * EPS + (0 if rows.options == PLAIN else 4 * EPS * size_of(rows)[:, None])
    bound += hit * at_target * (size + by_entropy) * abs(rows.options.logit_scale)
    bound += U[rows.logits.dtype] * want.abs()
    bound += 2 * TINY[rows.logits.dtype] * size.clamp_min(1) + 2 * TINY[torch.float32] * terms
    if subject.name == "torch" and rows.options.softcap:  # dz/draw by 1 - tanh^2
        bound += 4 * EPS * log_p.exp() * terms
    name = f"{name}, V = {raw.shape[1]}"
    assert not got[rows.dead].any(), name
    within(got, want, bound, name)
    if plain is not None:
        error, allowed = ((x.double() - want).norm() for x in (got, plain))
        assert error <= allowed + FLOOR[got.dtype] * want.norm() + 1e-6, name


def within(got: Tensor, want: Tensor, bound: Tensor, name: str) -> None:
    """Each entry: equal, NaN and infinities included, or nearer than the bound."""
    got = got.double()
    error = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, (got - want).abs())
    over = (error - bound).nan_to_num(torch.inf)
    if over.numel() and over.max() > 0:
        at = over.argmax()
        pair = f"{got.flatten()[at]} for {want.flatten()[at]}"
        raise AssertionError(f"{name}: {pair}, allowed {bound.flatten()[at]:.3e}")


def no_worse(got: Tensor, plain: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    """The largest and the mean error at most plain PyTorch's plus the floor."""
    some = want.isfinite()
    got, plain, want = (x.double()[some] for x in (got, plain, want))
    if not want.numel():
        return
    floor = FLOOR[dtype] * want.abs().amax() + 1e-6
    errors = (got - want).abs(), (plain - want).abs()
    for measure in (torch.amax, torch.mean):
        ours, allowed = (measure(x) for x in errors)
        assert ours <= allowed + floor, f"{name}: error {ours:.3e}, plain PyTorch {allowed:.3e}"
