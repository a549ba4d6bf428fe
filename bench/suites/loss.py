"""The loss: every batch that is measured, and how.

Legend: as in ``engine.case``. ``MODELS`` are also names of presets: the head of one model, 4096 and
16384 positions on a GPU, few on a CPU.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial

import torch

from bench import roofline
from bench.engine import memory
from bench.engine.case import Case, head_case, native, real_case
from bench.engine.record import NO_TIME, flag_wrong, note
from bench.engine.run import DeviceLost, Run, Suite
from bench.engine.timing import Refused, Step, Timer, describe, interleaved, paired, summary, wait
from bench.engine.truth import Inputs, Truth, make_inputs, make_truth
from bench.providers.base import Provider, available_bytes, ours_name

# A provider further than this from fp64 computes something else: its row is flagged. Gradient rows
# of the official code's bf16 arithmetic are off by 0.05, a missing rank term by 1.
TOLERANCES = {"loss_error": 2e-2, "input_grad_error": 0.2, "weight_grad_error": 0.2}
# What a row has beside ``run.COMMON``: rates of what the maths needs, of the ceiling; ratios
# floor / this and this / ours; errors against fp64.
_MEASURED = ("warm_seconds", "rate", "of_ceiling", "of_floor_fp32", "vs_ours", "logp_error",
             "input_grad_error", "weight_grad_error")  # fmt: skip


def measure(case: Case, providers: list[Provider], run: Run) -> list[dict]:
    """One row a provider: numbers, or why there are none."""
    need, free = case.input_bytes, available_bytes()
    rows = {p.name: SUITE.blank(case, p) for p in providers}
    if case.kind == "memory" and run.device.type != "cuda":
        return list(rows.values())  # weighed later
    try:
        if need > 0.7 * free:
            raise Refused(f"its inputs need {need / 1e9:.0f} GB, {free / 1e9:.0f} are free")
        contest = _Contest(case, run, rows)
    except Refused as refused:
        return [{**row, "note": f"not run: {refused}"} for row in rows.values()]
    return contest.rows_of(providers)


class _Contest:
    """Providers of one case: built and checked against fp64, then the interleaved rounds."""

    def __init__(self, case: Case, run: Run, rows: dict[str, dict]) -> None:
        torch._dynamo.reset()  # or the recompile limit would quietly turn compilation off
        self.case, self.run, self.rows, self.device = case, run, rows, run.device
        self.inputs: Inputs = make_inputs(case, run.device)
        self.truth: Truth = make_truth(self.inputs)
        self.timer = Timer(run.device, flush=case.fits_cache, lead=not case.fits_cache)
        self.always = {"floor", "floor-fp32", ours_name(run.device)}  # take part in every round
        self.steps: dict[str, Step] = {}
        self.first: dict[str, float] = {}  # seconds of one that takes no part in the rounds

    def rows_of(self, providers: list[Provider]) -> list[dict]:
        for provider in providers:
            self._prepare(provider)
        most = self.run.settings.peer_seconds
        taken = interleaved(
            [name for name in self.steps if name not in self.first],
            self.run.repeats(self.case), self._time,
            clock=self.run.clock, least=3, failed=self._failed,
            skip=lambda name, so_far: name not in self.always and sum(t for t, _ in so_far) > most,
        )  # fmt: skip
        cold = {name: [t for t, _ in times] for name, times in taken.items()}
        cold |= {name: [seconds] for name, seconds in self.first.items()}
        names = [ours_name(self.device), *(n for n in self.rows if n.startswith("ours-"))]
        ours = next((n for n in names if n in cold and not self.rows[n]["wrong"]), "")
        for name, times in cold.items():
            warm = [w for _, w in taken.get(name, []) if w is not None]
            self._fill(self.rows[name], cold, times, warm, cold.get(ours, []))
        return list(self.rows.values())

    def _prepare(self, provider: Provider) -> None:
        """Build, warm up, check and, on a GPU, weigh one provider; a note where it cannot run."""
        name, row, record = provider.name, self.rows[provider.name], self.run.record
        lost = record.lost(self.case.name, name) if record else None
        late = f"not run: {NO_TIME}" if self.run.clock.over else ""
        row["note"] = lost or provider.refusal_of_size(self.case) or late
        if row["note"]:
            return
        self.run.running(self.case.name, name)
        try:
            step = provider.build(self.inputs)
            start = time.perf_counter()
            value = step.run()
            wait(self.device)
            first = time.perf_counter() - start
            if not provider.is_floor:
                check(row, self.truth, float(value), step)
            step.clear()
            if in_process(self.device) and self.case.memory and not provider.is_floor:
                del value
                row["peak_bytes"], _ = memory.peak_extra_bytes(step, self.device)
        except Exception as error:  # a peer may raise anything; its row says what
            self._failed(name, error)
            return
        finally:
            for leaf in self.inputs.leaves:
                leaf.grad = None
        self.run.running()
        self.steps[name] = step
        may_leave = name not in self.always and not provider.compiles
        if may_leave and first > self.run.settings.peer_seconds:
            self.first[name] = first
            note(row, "one call, the first")

    def _time(self, name: str) -> tuple[float, float | None]:
        """Seconds with cold caches and, of small cases, with warm ones."""
        step, warm = self.steps[name], None
        self.run.running(self.case.name, name)
        cold = self.timer(step)
        step.clear()
        if self.case.fits_cache:
            warm = self.timer(step, warm=True)
            step.clear()
        self.run.running()
        return cold, warm

    def _failed(self, name: str, error: Exception) -> None:
        """What a provider raised, in its row; the run ends where the device is lost."""
        self.rows[name]["note"] = describe(error)
        try:
            wait(self.device)
        except RuntimeError as lost:
            raise DeviceLost(f"{name}: {describe(lost)}") from None
        self.run.running()  # what comes next is not to blame

    def _fill(
        self, row: dict, cold: dict, times: list[float], warm: list[float], ours: list[float]
    ) -> None:
        """Medians, quartiles, ratios within rounds, rates."""
        if not times:
            row["note"] = row["note"] or f"not run: {NO_TIME}"
            return
        row |= summary(times)
        row["warm_seconds"] = statistics.median(warm) if warm else None
        row["of_floor"] = paired(cold.get("floor", []), times)
        row["of_floor_fp32"] = paired(cold.get("floor-fp32", []), times)
        row["vs_ours"] = paired(times, ours)
        row["rate"] = (self.case.flops or self.case.bytes or 0) / row["seconds"]
        known = self.run.record.data.get("ceilings") if self.run.record else None
        ceiling = roofline.of_case(known, self.case)
        row["of_ceiling"] = row["rate"] / ceiling if ceiling else None


def check(row: dict, truth: Truth, loss: float, step: Step) -> None:
    """Errors against fp64 into a row; flagged where loss or gradient are another's (NaN too)."""
    row |= {"loss": loss, **truth.errors(loss, step), "gradient_bytes": step.gradient_bytes}
    limits = TOLERANCES.items()
    if any(row[key] is not None and not row[key] <= limit for key, limit in limits):
        flag_wrong(row)


def in_process(device: torch.device) -> bool:
    """A GPU's allocator counts; a CPU's memory is weighed in a process made for it."""
    return device.type == "cuda"


def weigh(provider: Provider, case: Case, device: torch.device) -> dict:
    """Peak memory of a case; of one that is never interleaved its time and errors, too."""
    torch._dynamo.reset()
    alone = case.kind == "memory"
    # The large case warms up on a short one: libraries load, nothing depends on its length.
    step = provider.build(make_inputs(replace(case, T=16) if alone else case, device))
    step.run()
    step.clear()
    if alone:
        del step
        inputs = make_inputs(case, device)
        step = provider.build(inputs)
    start = time.perf_counter()
    peak, value = memory.peak_extra_bytes(step, device)
    seconds = time.perf_counter() - start
    answer = {"peak_bytes": peak, "gradient_bytes": step.gradient_bytes}
    if alone:
        answer |= dict.fromkeys(TOLERANCES) | summary([seconds])
        check(answer, make_truth(inputs), float(value), replace(step, logps=None))
    return answer


_FLOORS = ("floor", "floor-fp32")
_PLAIN = (*_FLOORS, "ours", "plain-fp32", "official")
_ONE_FLOOR = ("floor", *_PLAIN[2:])
_TIERS = ("ours-T2", "ours-T3")
_BOTH = ("floor", "ours")
# Peers that take hidden states, and what PyTorch itself offers.
_HEAD_PEERS = ("trl", "cce", "verl", "quack", "liger-sm90", "torch-lce")
_EVERY = (
    *(*_PLAIN, "ours-torch", "ours-cpu", "ours-cuda", "ours-triton", *_TIERS, "official-compiled"),
    *(*_HEAD_PEERS, "torch-lce-chunked", "liger"),
)
_CE = (*_BOTH, "official", *_HEAD_PEERS, "torch-lce-mean", "liger-ce",
       "liger-sm90-mean", "quack-mean")  # fmt: skip
_LOGITS = (*_BOTH, "ours-torch", "ours-cuda", "ours-triton", "plain-fp32", "official",
           "official-compiled", "trl", "quack")  # fmt: skip
_RANKING = (*_BOTH, "ours-torch", "ours-cuda", "ours-triton", "plain-fp32", "plain-compiled")
MASKED = (0.6, 0.0, 0.9)


# H, V and the softcap of the head of a model, as its configuration file has it.
MODELS: dict[str, tuple[int, int, float | None]] = {
    "llama3-8b": (4096, 128256, None),
    "qwen2.5-0.5b": (896, 151936, None),
    "qwen2.5-7b": (3584, 152064, None),
    "gemma2-2b": (2304, 256000, 30.0),
    "gemma3-27b": (5376, 262208, None),
}


def _tiny(_: bool) -> list[Case]:
    """Seconds; for tests of the harness, the numbers mean nothing."""
    base = Case("tiny", 32, 211, 2, 4, 12, 0.6, repeats=2)
    return [
        replace(base, name="tiny head", memory=True),
        replace(base, name="tiny pairs", n=2, only=("ours", "floor", "liger")),
        replace(base, name="tiny softcap", softcap=5.0, only=(*_ONE_FLOOR, "trl")),
        replace(base, name="tiny fp32", dtype="fp32", group="fp32", only=_ONE_FLOOR),
        replace(base, name="tiny frozen", kind="frozen", group="frozen",
                only=(*_PLAIN, "ours-trained-head")),
        replace(base, name="tiny score", kind="score", group="score", only=_PLAIN),
        replace(base, name="tiny logits", kind="logits", H=0, group="logits", only=_ONE_FLOOR),
        replace(base, name="tiny ce", kind="ce", group="ce",
                only=(*_BOTH, "official", "torch-lce", "torch-lce-mean")),
        replace(real_case("HH", 2, 32, 211, only=_BOTH, repeats=2), name="tiny real lengths"),
        _ranking_case(4, 3, 5, 2),
        _small_case(2, 4, 32, 211, 2),
        *_growth_cases(16, 400, 2, points=2, T=16),
        _prompt_case(32, 1009, 64, 1 << 20),
    ]  # fmt: skip


def _cpu_small(_: bool) -> list[Case]:
    """Three minutes on two slow cores: the first shape against its floor, all else smaller."""
    few = {"repeats": 3, "dtype": native()}
    return [
        real_case(
            "ranked 4", 1, 1024, 32000, only=(*_FLOORS, "ours", "official", "trl", "cce"), **few
        ),
        real_case("HH", 4, 512, 16000, only=(*_BOTH, "official", "liger"), **few),
        *_entrances(1, 512, 16000, **few),
        *_logits_cases(256, (32000,), 3),
        *(_ranking_case(512, n, 16, 5) for n in (4, 64)),
        _small_case(2, 4, 64, 256, 20),
        *_growth_cases(128, 8000, 5, points=3),
        _prompt_case(256, 32000, 1024, 256 << 20),
    ]


def _cpu(_: bool) -> list[Case]:
    """Half an hour on two slow cores; at the large shapes fewer lists, peers and rounds."""
    few = (*_FLOORS, "ours", "official")
    large = {"only": (*few, "cce"), "repeats": 3, "dtype": native()}
    pairs = {"only": (*_BOTH, "official", "liger"), "repeats": 5, "dtype": native()}
    models = {**large, "only": (*few, "trl", "cce"), "group": "real"}
    equal = {**large, "only": (*_PLAIN, "trl", "cce"), "group": "equal"}
    of_masks = [head_case(1024, 32000, masked, **equal) for masked in MASKED]
    return [
        real_case("ranked 4", 2, 1024, 32000, memory=True, only=_EVERY, dtype=native()),
        real_case("ranked 4", 2, 896, 151936, **{**large, "only": (*few, "trl", "cce")}),
        real_case("ranked 4", 1, 2048, 128256, **large),
        real_case("ranked 4", 1, 2304, 256000, softcap=30.0, **large),
        real_case("ranked 4", 2, 576, 49152, "smollm2-135m-instruct", **models),
        real_case("ranked, Gemma 3", 2, 640, 262144, "gemma3-270m", **models),
        real_case("HH", 8, 1024, 32000, **pairs),
        real_case("ranked", 2, 1024, 32000, **pairs),
        *(replace(case, name=f"equal lengths, {case.name}") for case in of_masks),
        *_entrances(2, 1024, 32000, repeats=5, dtype=native()),
        *_logits_cases(512, (32000, 64000, 128256, 256000), 7),
        *(_ranking_case(512, n, 16, 9) for n in (2, 4, 8, 16, 32, 64)),
        *(_small_case(2, n, 64, 256, 41) for n in (2, 4, 8)),
        *_growth_cases(256, 16000, 5, points=5),
        _prompt_case(896, 151936, 4096, 1 << 30),
        _budget_case(896, 151936, 64 << 20),
    ]


def _gpu_quick(_: bool) -> list[Case]:
    """A minute or two on a GPU: the main shape with every peer, each entrance once."""
    return [
        real_case("ranked 4", 4, 4096, 128256, repeats=7, memory=True, only=_EVERY),
        *_entrances(4, 4096, 128256, repeats=5),
        *_logits_cases(4096, (128256,), 7),
        _ranking_case(4096, 64, 64, 11),
        _small_case(2, 4, 1024, 32000, 41),
    ]


def _gpu(_: bool) -> list[Case]:
    """Five or six minutes on an H100 or H200; the most telling cases first."""
    main = {"tokens": 16384, "memory": True, "repeats": 11}
    H, V = 4096, 128256
    return [
        head_case(H, V, 0.6, only=_EVERY, **main),
        head_case(H, V, 0.0, only=(*_PLAIN, *_HEAD_PEERS, *_TIERS), **main),
        real_case("ranked", 4, H, V, only=(*_PLAIN, *_HEAD_PEERS), repeats=7, group="real"),
        *_entrances(4, H, V, repeats=7),
        *_logits_cases(4096, (32000, 64000, 128256, 256000), 11),
        *(_ranking_case(4096, n, tokens, 21) for n, tokens in ((2, 64), (8, 64), (64, 64))),
        *(_small_case(2, n, 1024, 32000, 41) for n in (2, 4, 8)),
        head_case(H, V, 0.9, only=(*_PLAIN, *_HEAD_PEERS), **main),
        head_case(H, V, 0.6, n=2, only=(*_PLAIN[2:], "floor", *_HEAD_PEERS, "liger"), **main),
        head_case(H, V, 0.6, n=8, only=(*_BOTH, "official", "trl"), **main),
        *_growth_cases(1024, 32000, 5, points=5, T=512),
        *(
            head_case(H, V, 0.6, tokens=4096, softcap=softcap,
                      only=(*_BOTH, "official", *_HEAD_PEERS))
            for H, V, softcap in MODELS.values()
        ),
    ]  # fmt: skip


def _model(name: str, on_gpu: bool) -> list[Case]:
    """One model's head: masks, candidates, entrances. On a CPU few tokens and peers."""
    H, V, cap = MODELS[name]
    sizes, repeats = ((4096, 16384), 7) if on_gpu else ((512,), 3)
    few = (*_FLOORS, "ours", "official", *_HEAD_PEERS) if on_gpu else (*_FLOORS, "ours", "official")
    cases = []
    for tokens in sizes:
        more = {"tokens": tokens, "repeats": repeats, "softcap": cap}
        cases += [head_case(H, V, m, only=few, memory=on_gpu, **more) for m in MASKED]
        cases += [head_case(H, V, 0.6, n=n, only=few, **more) for n in (2, 8) if tokens >= 128 * n]
        for kind in ("frozen", "score"):
            cases.append(head_case(H, V, 0.6, kind=kind, group=kind, only=few, **more))
    if cap is None:
        cases += _logits_cases(sizes[0], (V,), repeats)
    return cases


def _entrances(B: int, H: int, V: int, **more) -> list[Case]:
    """The other ways in, on real lists; and the other dtypes of the first one."""

    def case(*only: str, **fields) -> Case:
        fields.setdefault("group", fields.get("kind"))
        return real_case("ranked 4", B, H, V, only=only, **{**more, **fields})

    others = ("fp16",) if torch.cuda.is_available() else ("fp32",)
    return [
        *(case(*_ONE_FLOOR, dtype=x, group=x) for x in others if x != more.get("dtype")),
        case(*_PLAIN, "ours-trained-head", "trl", "cce", kind="frozen"),
        case(*_PLAIN, "trl", "cce", "verl", "torch-lce", kind="score"),
        case(*_CE, kind="ce"),
    ]


def _logits_cases(tokens: int, vocabularies: tuple[int, ...], repeats: int) -> list[Case]:
    """Logits in, over vocabularies; the first with fp32 logits too."""
    more = {"tokens": tokens, "kind": "logits", "group": "logits", "repeats": repeats}
    cases = [
        head_case(0, V, 0.6, only=_LOGITS, memory=V == vocabularies[0], **more)
        for V in vocabularies
    ]
    wide = head_case(0, vocabularies[0], 0.6, only=_ONE_FLOOR, dtype="fp32", **more)
    return [*cases, wide]


def _ranking_case(B: int, n: int, T: int, repeats: int) -> Case:
    """Log-probs in, every one scored: the ranking kernel and what it replaces."""
    return Case(
        f"ranking n={n}, {B} prompts, {T} tokens a candidate", 0, 0, B, n, T, 0.0, "fp32",
        "ranking", "ranking", only=_RANKING, repeats=repeats,
    )  # fmt: skip


def _small_case(B: int, n: int, H: int, V: int, repeats: int) -> Case:
    """So small that launches and host work are all there is."""
    only = ("floor", "ours", "ours-layout", "ours-torch", "plain-fp32", "official")
    return Case(
        f"small: {B} prompts, n={n}, T=8, H={H}, V={V}", H, V, B, n, 8, 0.5, "fp32",
        group="small", only=only, repeats=repeats,
    )  # fmt: skip


def _growth_cases(H: int, V: int, repeats: int, points: int, T: int = 128) -> list[Case]:
    """Time and memory along one axis, everything else fixed; sizes small."""
    only = ("floor", "ours", "ours-T3", "official")
    base = Case("", H, V, 4, 4, T, 0.5, only=only, memory=True, repeats=repeats)
    cases = []
    for i in range(points):
        k = 2**i
        n = 2 * k
        cases += [
            replace(base, name=f"growth N: {base.scored_each * 4 * k}", B=k, group="growth N"),
            replace(base, name=f"growth V: {V // 2 * k}", V=V // 2 * k, group="growth V"),
            replace(base, name=f"growth n: {n}", n=n, B=1, group="growth n"),
        ]
    for k in (1, 2, 4, 8)[:points]:
        name = f"growth unscored: {k}x positions"
        longer = {"T": base.scored_each * k, "masked": 1 - 1 / k}
        cases.append(replace(base, name=name, group="growth unscored", **longer))
    return sorted(cases, key=lambda case: case.group)


def _prompt_case(H: int, V: int, T: int, budget: int) -> Case:
    """One prompt of 8 long candidates, every token scored."""
    return Case(
        f"one prompt of 8 x {T} scored tokens, V={V}, budget {budget >> 20} MiB",
        H, V, 1, 8, T, 0.0, kind="memory", group="memory", only=("ours",), memory=True, repeats=1,
        budget=budget,
    )  # fmt: skip


def _budget_case(H: int, V: int, budget: int) -> Case:
    """What a small budget saves beside the official formulation."""
    case = head_case(H, V, 0.6, kind="memory", group="budget", budget=budget, memory=True,
                     only=("ours", "official"), repeats=1)  # fmt: skip
    return replace(case, name=f"budget {budget >> 20} MiB, H={H} V={V}, {case.tokens} positions")


PRESETS = {
    "tiny": _tiny,
    "cpu-small": _cpu_small,
    "cpu": _cpu,
    "gpu-quick": _gpu_quick,
    "gpu": _gpu,
    **{name: partial(_model, name) for name in MODELS},
}
SUITE = Suite("loss", Case, PRESETS, measure, weigh, _MEASURED, in_process=in_process)
