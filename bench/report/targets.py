"""What the project set out to reach, against what a results file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.engine.case import is_main
from bench.engine.step import GROWTH

# Peers that serve a gradient per token, which PRO needs; and those that do not.
PEERS = ("trl", "cce", "verl", "quack", "liger-sm90", "torch-lce")
MEANS = ("quack-mean", "liger-sm90-mean", "liger-ce", "torch-lce-mean")
# Of the steps: against the official procedure, and lists against the same step on padded rows.
# Names say nothing of the dtype, which is the machine's.
SPEED = {"n=4 P=512 R=64": 3.5, "n=8 P=512 R=64": 5.0}
AGAINST_PADDED = {
    "n=8 P=128 R=128": 1.0,
    "ranked n=8, SmolLM2": 2.2,
    "ranked pairs n=2, SmolLM2": 1.0,
    "n=16 P=2048 R=64": 8.0,
}
TRL = "HH n=2, SmolLM2"
Rows = list[dict]
Value = Callable[[Rows], float | None]


class Outcome(NamedTuple):
    """One line of the targets table; ``met`` is None where the run did not measure it."""

    what: str
    target: str
    measured: str
    met: bool | None


class Target(NamedTuple):
    """At most ``bound`` is to be reached, or at least."""

    what: str
    value: Value
    bound: float
    unit: str = ""
    least: bool = False
    form: str = "{:.3g}"
    aside: Callable[[Rows], Any] = lambda _: ""  # what stands behind the number

    def outcome(self, rows: Rows) -> Outcome:
        """Against what was measured."""
        bound = f"{self.bound:.0%}" if "%" in self.form else f"{self.bound:.3g}"
        target = f"{'>=' if self.least else '<='} {bound}{self.unit}"
        value = self.value(rows)
        if value is None:
            return Outcome(self.what, target, "not measured", None)
        aside = self.aside(rows)
        measured = self.form.format(value) + (f" ({aside})" if aside else "")
        met = value >= self.bound if self.least else value <= self.bound
        return Outcome(self.what, target, measured, met)


def outcomes(data: dict) -> list[Outcome]:
    """Every target of the suite and this kind of device, measured or not."""
    rows = [row for row in data["results"] if not row.get("wrong")]
    if data["benchmark"] == "step":
        targets = STEP
    else:
        targets, rows = ON_GPU if data["device"].startswith("cuda") else LOSS, _named_ours(rows)
    return [target.outcome([*map(_known, rows)]) for target in targets]


def _named_ours(rows: Rows) -> Rows:
    """What backend="auto" picked is "ours"."""
    ours = {r["provider"]: r for r in rows if r["provider"].startswith("ours-")}
    ours.pop("ours-trained-head", None)
    timed = [r["provider"] for r in rows if r["provider"] in ours and r["vs_ours"] == 1.0]
    name = min(timed or ours, default="")
    return [r | {"provider": "ours" if r["provider"] == name else r["provider"]} for r in rows]


def _known(row: dict) -> dict:
    """A row with what follows from its numbers; memory in MB."""
    weighed = (row.get("peak_bytes"), row.get("gradient_bytes"))
    beyond = None if None in weighed else (weighed[0] - weighed[1]) / 2**20
    budget = (row.get("budget") or 0) / 2**20
    return row | {
        "main": "group" in row and is_main(row),
        "grown": row["case"].startswith(GROWTH),
        "step": row["case"].split(" in ")[0],
        "beyond": beyond,
        "over_budget": None if beyond is None else beyond - budget,
        "budgets": beyond / budget if beyond and budget else None,
    }


def best(key: str, where: str = "", scale: float = 1.0, **fields: Any) -> Value:
    """The least number, or ratio to ``key`` in the same rounds, of rows that fit.

    Their case holds ``where``, and their fields are (one of) what ``fields`` says.
    """

    def fits(row: dict) -> bool:
        wanted = ((row.get(k), v if isinstance(v, tuple) else (v,)) for k, v in fields.items())
        return where in row["case"] and all(found in v for found, v in wanted)

    def value(rows: Rows) -> float | None:
        found = [row.get("over", {}).get(key, row.get(key)) for row in rows if fits(row)]
        return min((scale * x for x in found if x is not None), default=None)

    return value


def of(key: str, where: str = "", **fields: Any) -> Value:
    """The same of the first row that fits."""
    one = best(key, where, **fields)
    return lambda rows: next((x for row in rows if (x := one([row])) is not None), None)


def ratio(one: Value, other: Value) -> Value:
    """Of two numbers; None without both."""

    def value(rows: Rows) -> float | None:
        a, b = one(rows), other(rows)
        return a / b if a and b else None

    return value


def inverse(value: Value) -> Value:
    return ratio(lambda _: 1.0, value)


def _noted(value: Value, form: str) -> Callable[[Rows], str]:
    return lambda rows: "" if (found := value(rows)) is None else form.format(found)


def misfit(x: str, y: str, **fields: Any) -> Value:
    """Distance from a line of one number in another, of rows that fit."""

    def value(rows: Rows) -> float | None:
        fit = (r for r in rows if r.get(y) and all(r.get(k) == v for k, v in fields.items()))
        points = [(r[x], r[y]) for r in fit]
        return linear_misfit(*map(list, zip(*points, strict=True))) if len(points) > 2 else None

    return value


def linear_misfit(x: list[float], y: list[float]) -> float:
    """Largest relative distance of ``y`` from the line a + b x of least relative squares."""
    lines = torch.tensor([[1 / b, a / b] for a, b in zip(x, y, strict=True)], dtype=torch.float64)
    ones = torch.ones(len(y), 1, dtype=torch.float64)
    return float((lines @ torch.linalg.lstsq(lines, ones).solution - ones).abs().max())


def _faster(what: str, value: Value, least: float, aside: Any = lambda _: "") -> Target:
    return Target(what, value, least, "x as fast", True, "{:.2f}x", aside)


def linear(what: str, value: Value, most: float) -> Target:
    return Target(f"{what}, distance from a line", value, most, form="{:.1%}")


def _best_peer(masked: float) -> tuple[Value, Callable[[Rows], str]]:
    """How far the best peer of the large head is, and its label."""
    large = {**_LARGE, "provider": PEERS, "masked": masked}
    value = best("vs_ours", **large)

    def label(rows: Rows) -> str:
        return next(r["label"] for r in rows if value([r]) == value(rows))

    return value, label


_LARGE = {"group": "head", "H": 4096, "V": 128256, "n": 4, "tokens": 16384}
_FIRST = {"main": True, "H": 1024, "V": 32000}
_LOGITS = {"group": "logits", "dtype": "bf16", "V": 32000}
FROZEN = Target(
    "frozen head", inverse(of("vs_ours", provider="ours-trained-head", group="frozen")), 0.7,
    " of the full time",
)  # fmt: skip
_GROWTH = {"provider": "ours", "group": "growth unscored"}
LOSS = (
    *(Target(f"({H}, {V}), 60 % not scored", of("of_floor", provider="ours", main=True, H=H, V=V),
             least, " of the floor", least=True,
             aside=_noted(of("of_floor_fp32", provider="ours", main=True, H=H, V=V),
                          "{:.2f} of the fp32-operand floor"))
      for H, V, least in ((1024, 32000, 0.92), (896, 151936, 0.9), (2048, 128256, 0.9))),
    *(_faster(f"the first against {what}", of("vs_ours", provider=name, **_FIRST), least)
      for name, what, least in (
          ("official", "the official formulation", 2.3),
          ("official-compiled", "its torch.compile", 1.9),
          ("trl", "TRL's chunked log-probs + the same loss", 4.0))),
    _faster("from logits, against plain fp32 PyTorch",
            of("vs_ours", provider="plain-fp32", **_LOGITS), 3.0),
    Target("from logits: peak memory beyond the gradient",
           of("beyond", provider="ours", **_LOGITS), 8, " MB", form="{:.1f} MB"),
    FROZEN,
    Target("one long prompt: peak memory beyond the gradients and the budget",
           of("over_budget", provider="ours", group="memory"), 64, " MB", form="{:.0f} MB"),
    Target("a small budget: peak memory beyond the gradients, of the budget",
           of("budgets", provider="ours", group="budget"), 1, "x", form="{:.2f}x"),
    Target("the same of the official formulation",
           of("budgets", provider="official", group="budget"), 10, "x", True, "{:.0f}x"),
    linear("time in scored tokens",
            misfit("scored", "seconds", provider="ours", group="growth N"), 0.2),
    # Each time taken against the floor of its own rounds, which the cases share.
    Target("8x the positions, the same scored ones",
           ratio(of("of_floor", " 1x", **_GROWTH), of("of_floor", " 8x", **_GROWTH)), 1.1,
           "x the time", form="{:.2f}x"),
)  # fmt: skip
ON_GPU = (
    Target("60 % not scored", of("of_floor", provider="ours", masked=0.6, **_LARGE), 1 / 1.1,
           " of the floor", least=True, form="{:.2f}"),
    _faster("the same against the best peer measured", _best_peer(0.6)[0], 2.3, _best_peer(0.6)[1]),
    _faster("the same against the official formulation",
            of("vs_ours", provider="official", masked=0.6, **_LARGE), 8.0),
    _faster("nothing masked, against the best peer measured that has gradients per token",
            _best_peer(0.0)[0], 1.0, _best_peer(0.0)[1]),
    _faster("nothing masked, against TRL", of("vs_ours", provider="trl", masked=0.0, **_LARGE),
            1.25),
    FROZEN,
)  # fmt: skip


def _lists(key: str, step: str, provider: str = "ours-lists") -> Value:
    return of(key, step=step, provider=provider)


def _peak(what: str, step: str, ours: str, theirs: str, most: float) -> Target:
    """Against the other's."""
    value = ratio(_lists("peak_bytes", step, ours), _lists("peak_bytes", step, theirs))
    return Target(what, value, most, "x", form="{:.2f}x")


STEP = (
    *(_faster(f"one training step, {step}, against the official procedure", _lists("speedup", step),
              least, _noted(_lists("speedup_gradient", step), "{:.2f}x without the optimizer"))
      for step, least in SPEED.items()),
    *(_peak(f"peak memory of that step, {step}", step, "ours-lists", "official", 0.4)
      for step in SPEED),
    *(_faster(f"{step}: lists against padded rows", _lists("vs_padded", step), least)
      for step, least in AGAINST_PADDED.items()),
    Target("ranked n=8, SmolLM2: lists", _lists("of_floor", "ranked n=8, SmolLM2"), 0.8,
           " of the floor", least=True),
    _faster(f"{TRL}: TRL with accelerate_trl() against TRL",
            _lists("vs_trl", TRL, "trl-dpo-distinct"), 3.5),
    _faster("the same against TRL with the fused head alone",
            ratio(_lists("vs_trl", TRL, "trl-dpo-distinct"), _lists("vs_trl", TRL, "trl-dpo-head")),
            3.0),
    _peak("peak memory of that step against TRL's", TRL, "trl-dpo-distinct", "trl-dpo", 0.5),
    *(linear(f"{name} in tokens that differ",
              misfit("needed", key, provider="ours-lists", grown=True), 0.1)
      for name, key in (("time", "seconds"), ("memory", "peak_bytes"))),
    Target("collation, the worst case",
           lambda rows: max((r["collate_share"] for r in rows if r["collate_share"]), default=None),
           0.03, " of a step", form="{:.2%}"),
)  # fmt: skip
