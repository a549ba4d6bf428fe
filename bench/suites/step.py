"""One training step: the official procedure and TRL's DPO against the trainer's, the same lists.

The lists of a synthetic case have equal lengths, so nothing is padding: the official procedure,
which pads to the longest candidate, has no smaller batch. Those of a real case have the lengths,
common prefixes and rewards of real lists. Right after its step, each head runs alone. Before that
each step's loss and every parameter's gradient are held against the plain procedure's in fp32. Of
large batches the plain procedure takes too much memory: there it is our step on padded rows, with
gradient checkpointing, which the other cases hold against the plain one.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.engine import lists, memory
from bench.engine.case import DTYPES
from bench.engine.record import empty_row, flag_wrong, note
from bench.engine.rounds import Settings, interleaved
from bench.engine.run import Run, Suite
from bench.engine.step import (
    BETA,
    GROWTH,
    MODELS,
    Floor,
    HeadAlone,
    Timed,
    TrainingCase,
    TrainingStep,
    Workload,
    plain_scores,
)
from bench.engine.timing import Step, describe, paired, summary
from bench.providers.base import Provider, all_providers
from pro_kernels import backends

BASELINE, TRL = "official", "trl-dpo"
_PADDED = {"pro": "ours-padded", "dpo": "ours-dpo-padded"}
_COLLATIONS = 5
_FIELDS = ("n", "P", "R", "B", "model", "tokens", "scored", "needed")
# What a row has beside ``record.COMMON``.
_MEASURED = ("tokens_per_second", "gradient_seconds", "optimizer_seconds", "head_seconds",
             "head_share", "speedup", "speedup_gradient", "vs_trl", "vs_padded",
             "collate_seconds", "collate_share", "grad_error")  # fmt: skip

# Loss and gradient, relative. fp32, same weights and lists: what differs is the order of sums, and
# a DPO loss is made of differences of sums hundreds of times its size.
TOLERANCES = {
    ("pro", "fp32"): (1e-5, 1e-4),
    ("dpo", "fp32"): (1e-4, 1e-4),
    # Against fp32 on the same weights, as in the suite loss: rounding of the whole model.
    ("pro", "bf16"): (2e-2, 0.2),
    ("dpo", "bf16"): (2e-2, 0.2),
}


@dataclass(frozen=True)
class Truth:
    """Loss and every parameter's gradient, or why there are none."""

    loss: float = 0.0
    gradients: dict[str, Tensor] | None = None
    trouble: str = ""


def _truths_of(work: Workload, loss_types: Iterable[str]) -> dict[str, Truth]:
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


def _compare(row: dict, truth: Truth, work: Workload) -> None:
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
        flag_wrong(row)


def _drifts(row: dict, loss: float) -> bool:
    """Whether a later step's loss is another than the first's (NaN included)."""
    most = TOLERANCES[row["loss_type"], row["shape"]["dtype"]][0]
    return not abs(loss - row["loss"]) <= most * abs(row["loss"])


def _truth(work: Workload, loss_type: str) -> Truth:
    if work.case.is_large:
        padded = all_providers(work.device, "step")[_PADDED[loss_type]]
        step = replace(padded.build(work), checkpointed=True)
        loss = step.run(keep_gradients=True).loss
        gradients = {name: p.grad for name, p in work.model.named_parameters()}
        return Truth(loss or 0.0, gradients)
    model = work.exact_model()
    loss = {"pro": _official, "dpo": _dpo}[loss_type](model, work)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Truth(loss.item(), gradients)


def _official(model: nn.Module, work: Workload) -> Tensor:
    from pro_trainer.train.official import official_batch, official_loss

    batch = work.on_device(official_batch(work.features, work.pad))
    return official_loss(model, batch, use_cache=False).loss


def _dpo(model: nn.Module, work: Workload) -> Tensor:
    """DPO's loss of a batch of pairs, written from the paper: -log sigmoid of the margin, mean."""
    gains = plain_scores(model, work) - work.reference_scores  # (B, 2)
    return -torch.nn.functional.logsigmoid(BETA * (gains[:, 0] - gains[:, 1])).mean()


def blank(case: TrainingCase, provider: Provider) -> dict:
    """A row without numbers."""
    fields = {key: getattr(case, key) for key in _FIELDS}
    fields |= {"shape": asdict(case.shape), "loss_type": provider.loss_type}
    return empty_row(case.name, provider.name, provider.label, fields, _MEASURED)


def measure(case: TrainingCase, providers: list[Provider], run: Run) -> list[dict]:
    """One row a provider: build and check each, then the interleaved rounds."""
    work = Workload(case, run.device, run.settings.seed)
    rows = {p.name: blank(case, p) for p in providers}
    truths = _truths_of(work, (p.loss_type for p in providers if not p.is_floor))
    steps: dict[str, TrainingStep | Floor] = {}
    heads: dict[str, HeadAlone] = {}
    for provider in providers:
        name, row = provider.name, rows[provider.name]
        step = _prepare(provider, work, truths, row)
        if step is not None:
            steps[name] = step
        if isinstance(step, TrainingStep) and (head := _head_of(step, row)) is not None:
            heads[name] = head
    truths.clear()

    def take(name: str) -> Timed:
        timed = steps[name].run()
        if timed.loss is not None and _drifts(rows[name], timed.loss):
            flag_wrong(rows[name], "WRONG RESULT: its loss changed from round to round")
        return replace(timed, head_seconds=_head_seconds(name, heads, rows))

    def failed(name: str, error: Exception) -> None:
        rows[name]["note"] = describe(error)
        work.clear()

    times = interleaved(
        steps, run.repeats(case), take, seed=run.settings.seed, clock=run.clock, failed=failed
    )
    for name, taken in times.items():
        _fill(rows[name], taken, times)
    return list(rows.values())


def _prepare(
    provider: Provider, work: Workload, truths: dict[str, Truth], row: dict
) -> TrainingStep | Floor | None:
    """Build, warm up and check one provider; None where it fails, with a note."""
    try:
        step = provider.build(work)
        timed = step.run(keep_gradients=True)
        row |= {"note": step.detail, "gradient_bytes": work.gradient_bytes, "loss": timed.loss}
        if timed.loss is not None:
            _compare(row, truths[provider.loss_type], work)
            row["collate_seconds"] = _collation(step)
    except Exception as error:  # one that runs out of memory must not end the run
        row["note"] = describe(error)
        return None
    finally:
        work.clear()
    return step


def _head_of(step: TrainingStep, row: dict) -> HeadAlone | None:
    """The step's head alone, warmed up; None, with a note, where it is not the step's."""
    try:
        head = HeadAlone(step)
        if _drifts(row, head.run().loss):
            raise ValueError("the head alone gives another loss")
    except Exception as error:
        note(row, f"head not measured: {describe(error)}")
        return None
    return head


def _head_seconds(name: str, heads: dict[str, HeadAlone], rows: dict[str, dict]) -> float | None:
    """Of the head alone, once; one that fails is not tried again."""
    if name not in heads:
        return None
    try:
        return heads[name].run().seconds
    except Exception as error:
        note(rows[name], f"head not measured: {describe(error)}")
        heads.pop(name).step.work.clear()
        return None


def _collation(step: TrainingStep) -> float:
    """Seconds of making the batch."""
    taken = []
    for _ in range(_COLLATIONS):
        start = time.perf_counter()
        step.collate()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _fill(row: dict, taken: list[Timed], times: dict[str, list[Timed]]) -> None:
    """Medians, quartiles and ratios within rounds."""
    full = {name: [t.seconds for t in ts] for name, ts in times.items()}
    gradient = {name: [t.gradient_seconds for t in ts] for name, ts in times.items()}
    name, loss_type = row["provider"], row["loss_type"]
    row |= summary(full[name])
    row["gradient_seconds"] = statistics.median(gradient[name])
    row["of_floor"] = paired(gradient.get("floor", []), gradient[name])
    if name == "floor":
        return
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    row["optimizer_seconds"] = statistics.median(t.optimizer_seconds for t in taken)
    if loss_type == "pro":
        row["speedup"] = paired(full.get(BASELINE, []), full[name])
        row["speedup_gradient"] = paired(gradient.get(BASELINE, []), gradient[name])
    else:
        row["vs_trl"] = paired(full.get(TRL, []), full[name])
    row["vs_padded"] = paired(full.get(_PADDED[loss_type], []), full[name])
    row["collate_share"] = row["collate_seconds"] / row["seconds"]
    heads = [t.head_seconds for t in taken if t.head_seconds is not None]
    if len(heads) == len(taken):
        row["head_seconds"] = statistics.median(heads)
        row["head_share"] = paired(heads, full[name])


def weigh(provider: Provider, case: TrainingCase, device: torch.device) -> dict:
    """Peak memory of forward, backward and AdamW, beyond weights, AdamW's moments and batch."""
    work = Workload(case, device)
    step = provider.build(work)
    step.run()  # AdamW makes its moments
    once = Step(partial(step.run, keep_gradients=True))
    peak, _ = memory.peak_extra_bytes(once, device)
    return {"peak_bytes": peak, "gradient_bytes": work.gradient_bytes}


def _line(row: dict) -> str:
    if row["seconds"] is None:
        return f"{row['label']:52} {row['note']}"
    ratios = (("speedup", "official"), ("vs_trl", "TRL"))
    faster = "".join(f"  {row[k]:6.2f}x {name}" for k, name in ratios if row[k] is not None)
    head = "" if row["head_share"] is None else f"  head {row['head_share']:.0%}"
    return f"{row['label']:52} {row['seconds'] * 1e3:10.1f} ms{faster}{head}  {row['note']}"


_FEW = ("floor", "official", "ours-padded", "ours-lists")
_MOST = (*_FEW, "official-published")
_ALL = (*_MOST, "official-checkpointed", "ours-lists-checkpointed")
_OURS = ("floor", "ours-padded", "ours-lists")
_DPO = ("trl-dpo", "trl-dpo-head", "trl-dpo-distinct", "ours-dpo-padded", "ours-dpo-lists")
_PAIRS = (*_FEW, *_DPO)

# How the name of a case ends; V where nothing is said.
_SUFFIXES = {"small": "", "tiny": ", tiny", "0.5B": ", 0.5B in bf16"}


def _case(n: int, P: int, R: int, model: str = "small", **more) -> TrainingCase:
    suffix = _SUFFIXES.get(model, f", V={MODELS[model].V}")
    return TrainingCase(f"n={n} P={P} R={R}{suffix}", n, P, R, model=model, **more)


def _real(data: str, only: tuple[str, ...], **more) -> TrainingCase:
    found = lists.load()[data]
    n, longest = len(found.completions[0]), max(map(max, found.completions))
    name = f"{data} n={n}, SmolLM2 in {MODELS['SmolLM2'].dtype}"
    B, P = len(found.prompts), max(found.prompts)
    return TrainingCase(name, n, P, longest, B, "SmolLM2", only, data=data, **more)


def _growth(B: int) -> TrainingCase:
    """``B`` lists of 508 tokens that differ."""
    return TrainingCase(
        f"{GROWTH}{B} lists", 4, 128, 96, B, "SmolLM2", ("floor", "ours-lists"), repeats=3
    )


def _tiny(_: bool) -> list[TrainingCase]:
    """Seconds; for tests of the harness, the numbers mean nothing."""
    return [
        _case(3, 12, 4, model="test", repeats=2, only=_ALL),
        _case(2, 4, 4, model="test", repeats=2, only=_PAIRS),
    ]


def _small(_: bool) -> list[TrainingCase]:
    """A few minutes: one prompt a batch, fewer rounds; pairs on tiny and, on a GPU, on 0.5B."""
    return [
        _case(4, 512, 64, B=1, repeats=3, only=_MOST),
        _case(2, 512, 64, model="tiny", repeats=3, only=_PAIRS),
        _case(2, 512, 64, B=4, model="0.5B", repeats=3, only=_PAIRS),
    ]


def _full(_: bool) -> list[TrainingCase]:
    """About forty minutes on two quiet slow cores, most of it the official procedure and TRL."""
    return [
        _case(4, 512, 64, only=_ALL),
        _case(8, 512, 64),
        _case(8, 128, 128),
        _case(2, 64, 64, repeats=9, only=_PAIRS),
        _case(2, 512, 64, only=_PAIRS),
        _case(4, 512, 64, model="large vocabulary", repeats=3),
        _case(4, 512, 64, model="tiny"),
        _case(2, 512, 64, model="tiny", only=_PAIRS),
        _case(16, 2048, 64, B=1, repeats=3, only=_OURS),
        _real("HH", ("floor", *_DPO), repeats=3),
        _real("ranked", _OURS, repeats=3),
        _real("ranked pairs", _OURS, repeats=3),
        *map(_growth, (4, 8, 16, 32)),
        _case(4, 512, 64, model="0.5B"),
        _case(2, 512, 64, B=4, model="0.5B", only=_PAIRS),
    ]


def _fitting(table, on_gpu: bool) -> list[TrainingCase]:  # noqa: ANN001
    """Those that need a GPU are left out elsewhere."""
    return [case for case in table(on_gpu) if on_gpu or not case.shape.needs_gpu]


def _about(settings: Settings, cases: list[TrainingCase], device: torch.device) -> dict:
    """The backend, and the cases that are left out for want of a GPU."""
    dtypes = dict.fromkeys(DTYPES[case.shape.dtype] for case in cases)
    used = dict.fromkeys(backends.resolve("auto", device, dtype) for dtype in dtypes)
    every = SUITE.cases(settings.preset, settings.cases, on_gpu=True)
    left_out = [case.name for case in every if case.shape.needs_gpu and device.type != "cuda"]
    return {"backend": ", ".join(used), "left_out": left_out}


def _check() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("step needs transformers: pip install 'pro-kernels[train]'")


_TABLES = {"tiny": _tiny, "cpu-small": _small, "cpu": _full, "gpu-quick": _small, "gpu": _full}
PRESETS = {name: partial(_fitting, table) for name, table in _TABLES.items()}
SUITE = Suite("step", TrainingCase, PRESETS, measure, _line, weigh, blank, _about, check=_check)
