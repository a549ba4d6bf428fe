"""The case tables, by preset: every shape that is measured.

Legend: as in ``cases``. ``MODELS`` are also names of presets: the head of one model, 4096 and 16384
positions on a GPU, few on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.cases import Case, head_case

_FLOORS = ("floor", "floor-fp32")
_PLAIN = (*_FLOORS, "ours", "plain-fp32", "official")
_ONE_FLOOR = ("floor", *_PLAIN[2:])
_TIERS = ("ours-T2", "ours-T3")
_BOTH = ("floor", "ours")
# Peers that take hidden states, and what PyTorch itself offers.
_HEAD_PEERS = ("trl", "cce", "verl", "quack", "torch-lce")
_EVERY = (
    *(*_PLAIN, "ours-torch", "ours-cpu", "ours-cuda", "ours-triton", *_TIERS, "official-compiled"),
    *(*_HEAD_PEERS, "torch-lce-chunked", "liger"),
)
_CE = (*_BOTH, "official", *_HEAD_PEERS, "torch-lce-mean", "liger-ce", "quack-mean")
_LOGITS = (*_BOTH, "ours-torch", "ours-cuda", "ours-triton", "plain-fp32", "official",
           "official-compiled", "trl", "quack")  # fmt: skip
_RANKING = (*_BOTH, "ours-torch", "ours-cuda", "ours-triton", "plain-fp32", "plain-compiled")
MASKED = (0.6, 0.0, 0.9)


@dataclass(frozen=True)
class Head:
    """The head of a model, as its configuration file has it."""

    H: int
    V: int
    softcap: float | None = None


MODELS = {
    "llama3-8b": Head(4096, 128256),
    "qwen2.5-0.5b": Head(896, 151936),
    "qwen2.5-7b": Head(3584, 152064),
    "gemma2-2b": Head(2304, 256000, softcap=30.0),
    "gemma3-27b": Head(5376, 262208),
}


def _tiny() -> list[Case]:
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
        _ranking_case(4, 3, 5, 2),
        _small_case(2, 4, 32, 211, 2),
        *_growth_cases(16, 400, 2, points=2, T=16),
        _prompt_case(32, 1009, 64, 1 << 20),
    ]  # fmt: skip


def _cpu_small() -> list[Case]:
    """Three minutes on two slow cores: the first shape against its floor, all else smaller."""
    few = {"tokens": 1024, "repeats": 3}
    return [
        head_case(1024, 32000, 0.6, repeats=3, only=(*_FLOORS, "ours", "official", "trl", "cce")),
        head_case(512, 16000, 0.6, **few),
        head_case(512, 16000, 0.6, n=2, **few, only=(*_BOTH, "official", "liger")),
        *_entrances(512, 16000, **few),
        *_logits_cases(256, (32000,), 3),
        *(_ranking_case(512, n, 16, 5) for n in (4, 64)),
        _small_case(2, 4, 64, 256, 20),
        *_growth_cases(128, 8000, 5, points=3),
        _prompt_case(256, 32000, 1024, 256 << 20),
    ]


def _cpu() -> list[Case]:
    """Twenty minutes on two slow cores; at the large shapes fewer peers and rounds."""
    few = (*_FLOORS, "ours", "official")
    pairs = (*_BOTH, "official", "liger")
    return [
        head_case(1024, 32000, 0.6, repeats=9, memory=True, only=_EVERY),
        head_case(1024, 32000, 0.0, repeats=5, only=(*_PLAIN, "trl", "cce")),
        head_case(1024, 32000, 0.9, repeats=7, only=(*_PLAIN, "trl", "cce")),
        head_case(1024, 32000, 0.6, n=2, repeats=5, only=pairs),
        head_case(1024, 32000, 0.6, n=8, repeats=5, only=pairs),
        head_case(896, 151936, 0.6, repeats=5, only=(*_PLAIN, "trl", "cce")),
        head_case(896, 151936, 0.0, tokens=1024, repeats=3, only=few),
        head_case(896, 151936, 0.9, repeats=5, only=few),
        head_case(2048, 128256, 0.6, repeats=3, only=(*few, "cce")),
        head_case(2304, 256000, 0.6, tokens=1024, repeats=3, softcap=30.0, only=(*few, "cce")),
        *_entrances(1024, 32000, repeats=7),
        *_logits_cases(512, (32000, 64000, 128256, 256000), 7),
        *(_ranking_case(512, n, 16, 9) for n in (2, 4, 8, 16, 32, 64)),
        *(_small_case(2, n, 64, 256, 41) for n in (2, 4, 8)),
        *_growth_cases(256, 16000, 5, points=5),
        _prompt_case(896, 151936, 4096, 1 << 30),
        _budget_case(896, 151936, 64 << 20),
    ]


def _gpu_quick() -> list[Case]:
    """A minute or two on a GPU: the main shape with every peer, each entrance once."""
    return [
        head_case(4096, 128256, 0.6, tokens=16384, repeats=7, memory=True, only=_EVERY),
        *_gpu_entrances(4096, 128256, 4096, 5),
        *_logits_cases(4096, (128256,), 7),
        _ranking_case(4096, 64, 64, 11),
        _small_case(2, 4, 1024, 32000, 41),
    ]


def _gpu() -> list[Case]:
    """Five or six minutes on an H100 or H200; the most telling cases first."""
    main = {"tokens": 16384, "memory": True, "repeats": 11}
    H, V = 4096, 128256
    return [
        head_case(H, V, 0.6, only=_EVERY, **main),
        head_case(H, V, 0.0, only=(*_PLAIN, *_HEAD_PEERS, *_TIERS), **main),
        *_gpu_entrances(H, V, 16384, 7),
        *_logits_cases(4096, (32000, 64000, 128256, 256000), 11),
        *(_ranking_case(4096, n, tokens, 21) for n, tokens in ((2, 64), (8, 64), (64, 64))),
        *(_small_case(2, n, 1024, 32000, 41) for n in (2, 4, 8)),
        head_case(H, V, 0.9, only=(*_PLAIN, *_HEAD_PEERS), **main),
        head_case(H, V, 0.6, n=2, only=(*_PLAIN[2:], "floor", *_HEAD_PEERS, "liger"), **main),
        head_case(H, V, 0.6, n=8, only=(*_BOTH, "official", "trl"), **main),
        *_growth_cases(1024, 32000, 5, points=5, T=512),
        *(
            head_case(head.H, head.V, 0.6, tokens=4096, repeats=7, softcap=head.softcap,
                      only=(*_BOTH, "official", *_HEAD_PEERS))
            for head in MODELS.values()
        ),
    ]  # fmt: skip


def _model(head: Head, on_gpu: bool) -> list[Case]:
    """One model's head: masks, candidates, entrances. On a CPU few tokens and peers."""
    H, V, cap = head.H, head.V, head.softcap
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


def _entrances(H: int, V: int, repeats: int, **more) -> list[Case]:
    """The other ways in, 60 % masked."""

    def case(*only: str, **fields) -> Case:
        fields.setdefault("group", fields.get("kind"))
        return head_case(H, V, 0.6, repeats=repeats, only=only, **fields, **more)

    return [
        case(*_ONE_FLOOR, dtype="fp32", group="fp32"),
        case(*_PLAIN, "ours-trained-head", "cce", kind="frozen"),
        case(*_PLAIN, "trl", "cce", "torch-lce", kind="score"),
        case(*_CE, kind="ce"),
    ]


def _gpu_entrances(H: int, V: int, tokens: int, repeats: int) -> list[Case]:
    def case(*only: str, **fields) -> Case:
        fields.setdefault("group", fields.get("kind"))
        return head_case(H, V, 0.6, tokens=tokens, repeats=repeats, only=only, **fields)

    return [
        case(*_BOTH, "ours-trained-head", "official", "trl", "cce", kind="frozen"),
        case(*_BOTH, "official", "trl", "cce", "verl", kind="score"),
        case(*_CE, kind="ce"),
        case(*_BOTH, "plain-fp32", dtype="fp16", group="fp16"),
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


PRESETS: dict[str, Callable[[], list[Case]]] = {
    "tiny": _tiny,
    "cpu-small": _cpu_small,
    "cpu": _cpu,
    "gpu-quick": _gpu_quick,
    "gpu": _gpu,
}
NAMES = (*PRESETS, *MODELS)


def cases_of(preset: str, patterns: tuple[str, ...] = (), on_gpu: bool = False) -> list[Case]:
    """The cases of a preset whose name or group contains one of ``patterns`` (none: all).

    Raises:
        ValueError: an unknown preset, or nothing left.
    """
    if preset not in NAMES:
        raise ValueError(f"preset must be one of {list(NAMES)}, got {preset!r}")
    table = _model(MODELS[preset], on_gpu) if preset in MODELS else PRESETS[preset]()
    found = [
        case
        for case in table
        if not patterns or any(p in case.name or p == case.group for p in patterns)
    ]
    if not found:
        raise ValueError(f"no case of preset {preset!r} matches {list(patterns)}")
    return found
