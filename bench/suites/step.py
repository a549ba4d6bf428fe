"""One training step: the official procedure and TRL's DPO against the trainer's, the same lists.

docs/benchmarks.md says what a step, its head and its floor are. Loss and every parameter's gradient
are held against the plain procedure's in fp32. Of large batches that takes too much memory: there
it is our step on padded rows, with gradient checkpointing, which other cases hold against it.
"""

from __future__ import annotations

import importlib.util
import statistics
import timeit
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.engine import lists, memory
from bench.engine.case import DTYPES
from bench.engine.record import flag_wrong, note
from bench.engine.run import Run, Settings, Suite
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
from bench.engine.timing import Step, describe, interleaved, paired, summary
from bench.providers.base import Provider, all_providers
from pro_kernels import backends

BASELINE, TRL = "official", "trl-dpo"
_PADDED = {"pro": "ours-padded", "dpo": "ours-dpo-padded"}
_COLLATIONS = 5
# What a row has beside ``run.COMMON``.
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


Truth = tuple[float, dict[str, Tensor]]  # the loss and every parameter's gradient


def _truth(work: Workload, loss_type: str) -> Truth | str:
    """Or why there is none: one that fails (out of memory) must not end the run."""
    model = work.model
    try:
        if work.case.is_large:
            padded = all_providers(work.device, "step")[_PADDED[loss_type]]
            step = replace(padded.build(work), checkpointed=True)
            loss = step.run(keep_gradients=True).loss
        else:
            model = work.exact_model()
            value = {"pro": _official, "dpo": _dpo}[loss_type](model, work)
            value.backward()
            loss = value.item()
        return loss, {name: p.grad for name, p in model.named_parameters()}
    except Exception as error:
        return f"not compared: {describe(error)}"
    finally:
        work.clear()


def _official(model: nn.Module, work: Workload) -> Tensor:
    from pro_trainer.train.official import official_batch, official_loss

    batch = work.on_device(official_batch(work.features, work.pad))
    return official_loss(model, batch, use_cache=False).loss


def _dpo(model: nn.Module, work: Workload) -> Tensor:
    """DPO's loss of a batch of pairs, written from the paper: -log sigmoid of the margin, mean."""
    gains = plain_scores(model, work) - work.reference_scores  # (B, 2)
    return -torch.nn.functional.logsigmoid(BETA * (gains[:, 0] - gains[:, 1])).mean()


def _compare(row: dict, truth: Truth | str, work: Workload) -> None:
    """Put the distance from the true loss and gradients into a row; flag it if too large."""
    if isinstance(truth, str):
        note(row, truth)
        return
    loss, gradients = truth
    row["loss_error"] = abs(row["loss"] - loss) / abs(loss)
    row["grad_error"] = max(
        float((p.grad - gradients[name]).norm() / gradients[name].norm())
        for name, p in work.model.named_parameters()
    )
    most = TOLERANCES[row["loss_type"], row["shape"]["dtype"]]
    if not (row["loss_error"] <= most[0] and row["grad_error"] <= most[1]):
        flag_wrong(row)


def _drifts(row: dict, loss: float) -> bool:
    """Whether a later step's loss is another than the first's (NaN included)."""
    most = TOLERANCES[row["loss_type"], row["shape"]["dtype"]][0]
    return not abs(loss - row["loss"]) <= most * abs(row["loss"])


def measure(case: TrainingCase, providers: list[Provider], run: Run) -> list[dict]:
    """One row a provider: build and check each, then the interleaved rounds."""
    work = Workload(case, run.device)
    rows = {p.name: SUITE.blank(case, p) for p in providers}
    losses = sorted({p.loss_type for p in providers if not p.is_floor})
    truths = {name: _truth(work, name) for name in losses}
    steps: dict[str, TrainingStep | Floor] = {}
    heads: dict[str, HeadAlone] = {}

    def failed(name: str, error: Exception) -> None:
        rows[name]["note"] = describe(error)
        work.clear()

    def head_failed(name: str, error: Exception) -> None:
        """The step goes on without it."""
        note(rows[name], f"head not measured: {describe(error)}")
        heads.pop(name, None)
        work.clear()

    for provider in providers:
        name, row = provider.name, rows[provider.name]
        try:
            steps[name] = _prepared(provider, work, truths, row)
        except Exception as error:  # one that runs out of memory must not end the run
            failed(name, error)
            continue
        try:
            if not provider.is_floor:
                heads[name] = _head_of(steps[name], row)
        except Exception as error:
            head_failed(name, error)
    truths.clear()

    def take(name: str) -> Timed:
        timed, head = steps[name].run(), None
        if timed.loss is not None and _drifts(rows[name], timed.loss):
            flag_wrong(rows[name], "WRONG RESULT: its loss changed from round to round")
        try:
            head = heads[name].run().seconds if name in heads else None
        except Exception as error:
            head_failed(name, error)
        return replace(timed, head_seconds=head)

    times = interleaved(steps, run.repeats(case), take, clock=run.clock, failed=failed)
    for name, taken in times.items():
        _fill(rows[name], taken, times)
    return list(rows.values())


def _prepared(
    provider: Provider, work: Workload, truths: dict[str, Truth | str], row: dict
) -> TrainingStep | Floor:
    """A provider built, warmed up and checked."""
    step = provider.build(work)
    timed = step.run(keep_gradients=True)
    row |= {"note": step.detail, "gradient_bytes": work.gradient_bytes, "loss": timed.loss}
    if timed.loss is not None:
        _compare(row, truths[provider.loss_type], work)
        taken = timeit.repeat(step.collate, number=1, repeat=_COLLATIONS)
        row["collate_seconds"] = statistics.median(taken)
    work.clear()
    return step


def _head_of(step: TrainingStep, row: dict) -> HeadAlone:
    """The step's head alone, warmed up."""
    head = HeadAlone(step)
    if _drifts(row, head.run().loss):
        raise ValueError("the head alone gives another loss")
    return head


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


def _real(data: str, only: tuple[str, ...]) -> TrainingCase:
    found = lists.load()[data]
    n, longest = len(found.completions[0]), max(map(max, found.completions))
    name = f"{data} n={n}, SmolLM2 in {MODELS['SmolLM2'].dtype}"
    B, P = len(found.prompts), max(found.prompts)
    return TrainingCase(name, n, P, longest, B, "SmolLM2", only, repeats=3, data=data)


def _growth(B: int) -> TrainingCase:
    """``B`` lists of 508 tokens that differ."""
    return TrainingCase(
        f"{GROWTH}{B} lists", 4, 128, 96, B, "SmolLM2", ("floor", "ours-lists"), repeats=3
    )


def _fitting(cases: tuple[TrainingCase, ...], on_gpu: bool) -> list[TrainingCase]:
    """Those that need a GPU are left out elsewhere."""
    return [case for case in cases if on_gpu or not case.shape.needs_gpu]


def _about(settings: Settings, cases: list[TrainingCase], device: torch.device) -> dict:
    """The backend, and the cases that are left out for want of a GPU."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("step needs transformers: pip install 'pro-kernels[train]'")
    dtypes = dict.fromkeys(DTYPES[case.shape.dtype] for case in cases)
    used = dict.fromkeys(backends.resolve("auto", device, dtype) for dtype in dtypes)
    every = SUITE.cases(settings.preset, settings.cases, on_gpu=True)
    left_out = [case.name for case in every if case.shape.needs_gpu and device.type != "cuda"]
    return {"backend": ", ".join(used), "left_out": left_out}


# Seconds; for tests of the harness, the numbers mean nothing.
_TINY = (
    _case(3, 12, 4, model="test", repeats=2, only=_ALL),
    _case(2, 4, 4, model="test", repeats=2, only=_PAIRS),
)
# A few minutes: one prompt a batch, fewer rounds; pairs on tiny and, on a GPU, on 0.5B.
_SMALL = (
    _case(4, 512, 64, B=1, repeats=3, only=_MOST),
    _case(2, 512, 64, model="tiny", repeats=3, only=_PAIRS),
    _case(2, 512, 64, B=4, model="0.5B", repeats=3, only=_PAIRS),
)
# About forty minutes on two quiet slow cores, most of it the official procedure and TRL.
_FULL = (
    _case(4, 512, 64, only=_ALL),
    _case(8, 512, 64),
    _case(8, 128, 128),
    _case(2, 64, 64, repeats=9, only=_PAIRS),
    _case(2, 512, 64, only=_PAIRS),
    _case(4, 512, 64, model="large vocabulary", repeats=3),
    _case(4, 512, 64, model="tiny"),
    _case(2, 512, 64, model="tiny", only=_PAIRS),
    _case(16, 2048, 64, B=1, repeats=3, only=_OURS),
    _real("HH", ("floor", *_DPO)),
    _real("ranked", _OURS),
    _real("ranked pairs", _OURS),
    *map(_growth, (4, 8, 16, 32)),
    _case(4, 512, 64, model="0.5B"),
    _case(2, 512, 64, B=4, model="0.5B", only=_PAIRS),
)
PRESETS = {
    "tiny": partial(_fitting, _TINY),
    "cpu-small": partial(_fitting, _SMALL),
    "cpu": partial(_fitting, _FULL),
    "gpu-quick": partial(_fitting, _SMALL),
    "gpu": partial(_fitting, _FULL),
}
SUITE = Suite("step", TrainingCase, PRESETS, measure, weigh, _MEASURED, _about)
