"""What every step of a case must compute: loss and gradients by the plain procedure in fp32.

Of large batches the plain procedure takes too much memory: there it is our step on padded rows,
with gradient checkpointing, which the other cases hold against the plain one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bench.step import describe
from bench.training import pairs
from bench.training.workload import Workload

# Loss and gradient, relative. fp32, same weights and lists: what differs is the order of sums, and
# a DPO loss is made of differences of sums hundreds of times its size.
TOLERANCES = {
    ("pro", "fp32"): (1e-5, 1e-4),
    ("dpo", "fp32"): (1e-4, 1e-4),
    # Against fp32 on the same weights, as in bench.runner: rounding of the whole model.
    ("pro", "bf16"): (2e-2, 0.2),
    ("dpo", "bf16"): (2e-2, 0.2),
}


@dataclass(frozen=True)
class Truth:
    """Loss and every parameter's gradient, or why there are none."""

    loss: float = 0.0
    gradients: dict[str, Tensor] | None = None
    trouble: str = ""


def truths_of(work: Workload, loss_types: Iterable[str]) -> dict[str, Truth]:
    """The truth of each loss; one that fails (out of memory) must not end the run."""
    found = {}
    for name in sorted(set(loss_types)):
        try:
            found[name] = _truth(work, name)
        except Exception as error:
            found[name] = Truth(trouble=f"not compared: {describe(error)}")
        finally:
            work.clear()
    return found


def compare(row: dict, truth: Truth, work: Workload) -> None:
    """Put the distance from the true loss and gradients into a row; flag it if too large."""
    if truth.gradients is None:
        note(row, truth.trouble)
        return
    row["loss_error"] = abs(row["loss"] - truth.loss) / abs(truth.loss)
    row["grad_error"] = max(
        float((p.grad - truth.gradients[name]).norm() / truth.gradients[name].norm())
        for name, p in work.model.named_parameters()
    )
    most = TOLERANCES[row["loss_type"], row["shape"]["dtype"]]
    if not (row["loss_error"] <= most[0] and row["grad_error"] <= most[1]):
        flag_wrong(row, "WRONG RESULT: not comparable")


def drifts(row: dict, loss: float) -> bool:
    """Whether a later step's loss is another than the first's (NaN included)."""
    most = TOLERANCES[row["loss_type"], row["shape"]["dtype"]][0]
    return not abs(loss - row["loss"]) <= most * abs(row["loss"])


def flag_wrong(row: dict, why: str) -> None:
    """Take a row out of every comparison, with the reason."""
    row["wrong"] = True
    row["note"] = why


def note(row: dict, text: str) -> None:
    """Add to a row's note."""
    row["note"] = "; ".join(x for x in (row["note"], text) if x)


def _truth(work: Workload, loss_type: str) -> Truth:
    if work.case.is_large:
        from bench.training.providers import all_providers

        padded = all_providers()[{"pro": "ours-padded", "dpo": "ours-dpo-padded"}[loss_type]]
        step = replace(padded.build(work), checkpointed=True)
        loss = step.run(keep_gradients=True).loss
        gradients = {name: p.grad for name, p in work.model.named_parameters()}
        return Truth(loss or 0.0, gradients)
    model = work.exact_model()
    loss = {"pro": _official, "dpo": pairs.plain_loss}[loss_type](model, work)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Truth(loss.item(), gradients)


def _official(model: nn.Module, work: Workload) -> Tensor:
    from pro_trainer.train.official import official_batch, official_loss

    batch = work.on_device(official_batch(work.features, work.pad))
    return official_loss(model, batch, use_cache=False).loss
