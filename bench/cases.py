"""The case table: every shape that is measured, and the presets that group them.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``H`` hidden, ``V`` vocabulary. ``masked``
is the share of the B*n*T positions that are not scored (prompt and padding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("linear", "frozen", "score", "logits", "memory")

_FLOORS = ("floor", "floor-fp32")
_PLAIN = (*_FLOORS, "ours", "plain-fp32", "official")
_ONE_FLOOR = ("floor", *_PLAIN[2:])


@dataclass(frozen=True)
class Case:
    """One batch shape and what is done with it.

    Attributes:
        name: unique within a preset.
        H: hidden size; 0 where the logits are the input.
        V: vocabulary.
        B: prompts.
        n: candidates a prompt.
        T: positions a candidate.
        masked: share of positions that are not scored, in [0, 1).
        dtype: "bf16", "fp16" or "fp32", of hidden states, weight and logits.
        kind: "linear" (hidden and head trained), "frozen" (head frozen), "score" (no gradient),
            "logits" (the logits are the input), "memory" (linear, weighed only, never interleaved).
        group: section of the report.
        only: provider names measured here ("ours" is what backend="auto" picks); empty for all.
        memory: weigh it too.
        repeats: rounds.
        budget: bytes given to ours, None for its default.
    """

    name: str
    H: int
    V: int
    B: int
    n: int
    T: int
    masked: float
    dtype: str = "bf16"
    kind: str = "linear"
    group: str = "head"
    only: tuple[str, ...] = ()
    memory: bool = False
    repeats: int = 7
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.kind not in KINDS or not 0 <= self.masked < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def tokens(self) -> int:
        """All positions, B*n*T."""
        return self.B * self.n * self.T

    @property
    def scored_each(self) -> int:
        """Mean number of scored tokens a candidate."""
        return max(1, round((1 - self.masked) * self.T))

    @property
    def scored(self) -> int:
        """Scored tokens in all."""
        return self.B * self.n * self.scored_each

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]


def head_case(H: int, V: int, masked: float, n: int = 4, tokens: int = 2048, **more) -> Case:
    """The main shape: 2048 tokens, 128 a candidate."""
    case = Case("", H, V, tokens // (128 * n), n, 128, masked, **more)
    what = "" if case.kind == "linear" else f"{case.kind} "
    size = f"V={V}" if case.kind == "logits" else f"H={H} V={V}"
    return replace(case, name=f"{what}{size} {case.dtype} n={n} masked {masked:.0%}")


def is_main(row: dict) -> bool:
    """Whether a results row belongs in the short table and the time plot: all peers, 55 %."""
    return row["group"] == "head" and row["n"] == 4 and row["masked"] in (0.5, 0.55)


def _special_cases(H: int, V: int, repeats: int, **more) -> list[Case]:
    """The other entrances, 55 % masked."""

    def case(*only: str, H: int = H, **fields) -> Case:
        fields.setdefault("group", fields.get("kind"))
        return head_case(H, V, 0.55, repeats=repeats, only=only, **fields, **more)

    return [
        case(*_ONE_FLOOR, dtype="fp32", group="fp32"),
        case(*_PLAIN, "ours-trained-head", "cce", kind="frozen"),
        case(*_PLAIN, "trl", "cce", kind="score"),
        case(*_ONE_FLOOR, "ours-torch", "official-compiled", "trl", H=0, kind="logits",
             memory=True),
        case(*_ONE_FLOOR, H=0, kind="logits", dtype="fp32"),
    ]  # fmt: skip


def _growth_cases(H: int, V: int, repeats: int, points: int, T: int = 128) -> list[Case]:
    """Time and memory along one axis, everything else fixed; sizes small."""
    base = Case(
        "", H, V, 4, 4, T, 0.5, only=("floor", "ours", "plain-fp32"), memory=True, repeats=repeats
    )
    cases = []
    for i in range(points):
        k = 2**i
        n = 2 * k
        cases += [
            replace(base, name=f"growth N: {base.scored_each * 4 * k}", B=k, group="growth N"),
            replace(base, name=f"growth V: {V // 2 * k}", V=V // 2 * k, group="growth V"),
            replace(base, name=f"growth n: {n}", n=n, B=2**points // n, group="growth n"),
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


def _tiny() -> list[Case]:
    """Seconds; for tests of the harness, the numbers mean nothing."""
    base = Case("tiny", 32, 211, 2, 4, 12, 0.5, repeats=2)
    return [
        replace(base, name="tiny head", memory=True),
        replace(base, name="tiny pairs", n=2, only=("ours", "floor", "liger")),
        replace(base, name="tiny fp32", dtype="fp32", group="fp32", only=_ONE_FLOOR),
        replace(base, name="tiny frozen", kind="frozen", group="frozen",
                only=(*_PLAIN, "ours-trained-head")),
        replace(base, name="tiny score", kind="score", group="score", only=_PLAIN),
        replace(base, name="tiny logits", kind="logits", H=0, group="logits", only=_ONE_FLOOR),
        *_growth_cases(16, 400, 2, points=2, T=16),
        _prompt_case(32, 1009, 64, 1 << 20),
    ]  # fmt: skip


def _quick() -> list[Case]:
    """Two or three minutes: the first shape against its floor, all else at a small one."""
    small: dict = {"tokens": 1024, "repeats": 3}
    return [
        head_case(1024, 32000, 0.55, repeats=3, only=(*_FLOORS, "ours", "official")),
        head_case(512, 16000, 0.55, **small),
        head_case(512, 16000, 0.55, n=2, **small, only=("floor", "ours", "official", "liger")),
        *_special_cases(512, 16000, **small),
        *_growth_cases(128, 8000, 5, points=3),
        _prompt_case(256, 32000, 1024, 256 << 20),
    ]


def _full() -> list[Case]:
    """Half an hour on two slow cores: every shape; at the large ones fewer peers and rounds."""
    few, both = (*_FLOORS, "ours", "official"), ("floor", "ours")
    pairs = (*both, "official", "liger")
    return [
        head_case(1024, 32000, 0.55, repeats=9, memory=True),
        head_case(1024, 32000, 0.0, repeats=5, only=_PLAIN),
        head_case(1024, 32000, 0.85, only=_PLAIN),
        head_case(1024, 32000, 0.55, n=2, repeats=5, only=pairs),
        head_case(1024, 32000, 0.55, n=8, repeats=5, only=pairs),
        head_case(896, 151936, 0.55, repeats=5, only=(*_PLAIN, "trl", "cce")),
        head_case(896, 151936, 0.0, repeats=3, only=few[:3]),
        head_case(896, 151936, 0.85, repeats=5, only=few),
        head_case(896, 151936, 0.55, n=2, repeats=3, only=both),
        head_case(896, 151936, 0.55, n=8, repeats=3, only=both),
        head_case(2048, 128256, 0.55, repeats=4, only=(*few, "cce")),
        head_case(2048, 128256, 0.0, repeats=2, only=few[:3]),
        head_case(2048, 128256, 0.85, repeats=4, only=few),
        head_case(2048, 128256, 0.55, n=2, repeats=2, only=both),
        head_case(2048, 128256, 0.55, n=8, repeats=2, only=both),
        *_special_cases(1024, 32000, repeats=7),
        *_growth_cases(256, 16000, 5, points=5),
        _prompt_case(896, 151936, 4096, 1 << 30),
    ]


PRESETS = {"tiny": _tiny, "quick": _quick, "full": _full}


def cases_of(preset: str, patterns: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a preset whose name or group contains one of ``patterns`` (none: all).

    Raises:
        ValueError: an unknown preset, or nothing left.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {preset!r}")
    found = [
        case
        for case in PRESETS[preset]()
        if not patterns or any(p in case.name or p == case.group for p in patterns)
    ]
    if not found:
        raise ValueError(f"no case of preset {preset!r} matches {list(patterns)}")
    return found
