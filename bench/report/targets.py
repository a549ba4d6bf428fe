"""What the project set out to reach, against what a results file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.engine.case import is_main
from bench.engine.step import GROWTH

MIB = 1 << 20
MEMORY_SLACK = 64 * MIB
# Pages, log-probs and statistics beside a gradient of hundreds of megabytes.
_GRADIENT_SLACK = 8 * MIB
# Peers that serve a gradient per token, which PRO needs.
PEERS = ("trl", "cce", "verl", "quack", "liger-sm90", "torch-lce")
# Of the steps: against the official procedure, lists against the same step on padded rows, and the
# floor. Names say nothing of the dtype, which is the machine's.
SPEED = {"n=4 P=512 R=64": 3.5, "n=8 P=512 R=64": 5.0}
AGAINST_PADDED = {
    "n=8 P=128 R=128": 1.0,
    "ranked n=8, SmolLM2": 2.2,
    "ranked pairs n=2, SmolLM2": 1.0,
    "n=16 P=2048 R=64": 8.0,
}
OF_FLOOR = {"ranked n=8, SmolLM2": 0.8}
TRL = "HH n=2, SmolLM2"


class Outcome(NamedTuple):
    """One line of the targets table; ``met`` is None where the run did not measure it."""

    what: str
    target: str
    measured: str
    met: bool | None


def outcomes(data: dict) -> list[Outcome]:
    """Every target of the suite and this kind of device, measured or not."""
    rows = [row for row in data["results"] if not row["wrong"]]
    if data["benchmark"] == "step":
        return _of_steps(rows)
    loss = Loss(rows)
    return _of_loss_on_gpu(loss) if data["device"].startswith("cuda") else _of_loss(loss)


def _outcome(
    what: str,
    target: str,
    value: float | None,
    met: Callable[[float], bool],
    form: str | Callable[[float], str] = "{:.2f}",
) -> Outcome:
    if value is None:
        return Outcome(what, target, "not measured", None)
    text = form.format(value) if isinstance(form, str) else form(value)
    return Outcome(what, target, text, met(value))


def _faster(what: str, value: float | None, least: float, form: str = "{:.2f}x") -> Outcome:
    target = "never slower" if least == 1 else f">= {least:g}x as fast"
    return _outcome(what, target, value, lambda x: x >= least, form)


def _at_most(what: str, value: float | None, most: float, of: str = "x") -> Outcome:
    return _outcome(what, f"<= {most:.2f}{of}", value, lambda x: x <= most, "{:.2f}" + of[:1])


def _linear(what: str, points: list[tuple[float, float]], most: float) -> Outcome:
    worst = linear_misfit(*map(list, zip(*points, strict=True))) if len(points) > 2 else None
    return _outcome(what, f"a line fits within {most:.0%}", worst, lambda x: x <= most, "{:.1%}")


class Loss:
    """Look-ups in the rows of a results file of the loss."""

    def __init__(self, rows: list[dict]) -> None:
        """Index ``rows`` of a results file."""
        self.rows = rows
        timed = [r for r in rows if r["provider"].startswith("ours-") and r["vs_ours"] == 1.0]
        ours = {r["provider"] for r in timed} - {"ours-trained-head"}
        known = {r["provider"] for r in rows if r["provider"].startswith("ours-")}
        self.ours = min(ours or known, default="ours")

    def all(self, provider: str, **fields) -> list[dict]:
        """Rows of a provider ("ours" for backend="auto") with these fields."""
        name = self.ours if provider == "ours" else provider
        same = [r for r in self.rows if r["provider"] == name]
        return [r for r in same if all(r[k] == v for k, v in fields.items())]

    def of(self, key: str, provider: str, **fields) -> float | None:
        """A number of the first such row."""
        return next((r[key] for r in self.all(provider, **fields)), None)

    def main(self, key: str, provider: str, H: int, V: int) -> float | None:
        """The same of a main case."""
        found = self.all(provider, H=H, V=V)
        return next((r[key] for r in found if is_main(r)), None)


def _of_loss(loss: Loss) -> list[Outcome]:
    lines = []
    for (H, V), least in {(1024, 32000): 0.92, (896, 151936): 0.9, (2048, 128256): 0.9}.items():
        value, wide = (loss.main(k, "ours", H, V) for k in ("of_floor", "of_floor_fp32"))
        aside = f" ({wide:.2f} of the fp32-operand floor)" if wide else ""
        what, target = f"({H}, {V}), 60 % not scored", f">= {least:.2f} of the floor"
        lines.append(_outcome(what, target, value, lambda x, y=least: x >= y, "{:.2f}" + aside))
    for name, label, least in (
        ("official", "the official formulation", 2.3),
        ("official-compiled", "its torch.compile", 1.9),
        ("trl", "TRL's chunked log-probs + the same loss", 4.0),
    ):
        value = loss.main("vs_ours", name, 1024, 32000)
        lines.append(_faster(f"the first against {label}", value, least))
    logits = {"group": "logits", "dtype": "bf16", "V": 32000}
    speed = loss.of("vs_ours", "plain-fp32", **logits)
    lines.append(_faster("from logits, against plain fp32 PyTorch", speed, 3.0))
    lines.append(
        _outcome(
            "from logits: peak extra memory", f"the gradient (+ {_GRADIENT_SLACK // MIB} MB)",
            _beyond(loss.all("ours", **logits)), lambda x: x <= _GRADIENT_SLACK,
            lambda x: f"gradient {x / MIB:+.1f} MB",
        )
    )  # fmt: skip
    lines += [_frozen(loss), _prompt_memory(loss), _budget(loss)]
    growth = [(r["scored"], r["seconds"]) for r in loss.all("ours", group="growth N")]
    lines.append(_linear("time linear in scored tokens", growth, 0.2))
    return [*lines, _unscored(loss)]


def _of_loss_on_gpu(loss: Loss) -> list[Outcome]:
    shape = {"group": "head", "H": 4096, "V": 128256, "n": 4, "tokens": 16384}

    def best(masked: float) -> tuple[float | None, str]:
        found = [r for peer in PEERS for r in loss.all(peer, masked=masked, **shape)]
        ran = [(r["vs_ours"], r["label"]) for r in found if r["vs_ours"]]
        return min(ran, default=(None, ""))

    share = loss.of("of_floor", "ours", masked=0.6, **shape)
    lines = [_outcome("60 % not scored", ">= 0.91 of the floor", share, lambda x: x >= 1 / 1.1)]
    value, label = best(0.6)
    what = "the same against the best peer measured"
    lines.append(_faster(what, value, 2.3, "{:.2f}x (" + label + ")"))
    official = loss.of("vs_ours", "official", masked=0.6, **shape)
    lines.append(_faster("the same against the official formulation", official, 8.0))
    value, label = best(0.0)
    what = "nothing masked, against the best peer measured that has gradients per token"
    lines.append(_faster(what, value, 1.0, "{:.2f}x (" + label + ")"))
    trl = loss.of("vs_ours", "trl", masked=0.0, **shape)
    return [*lines, _faster("nothing masked, against TRL", trl, 1.25), _frozen(loss)]


def _beyond(rows: list[dict]) -> int | None:
    """Peak memory of the first row beyond the gradients of its inputs."""
    weighed = [r["peak_bytes"] - r["gradient_bytes"] for r in rows if r["peak_bytes"]]
    return weighed[0] if weighed else None


def _frozen(loss: Loss) -> Outcome:
    full = loss.of("vs_ours", "ours-trained-head", group="frozen")
    return _at_most("frozen head", 1 / full if full else None, 0.7, " of the full time")


def _prompt_memory(loss: Loss) -> Outcome:
    rows = loss.all("ours", group="memory")
    limit = rows[0]["budget"] + MEMORY_SLACK if rows else 0
    what = f"peak extra memory, {rows[0]['case'] if rows else 'one long prompt'}"
    return _outcome(
        what, "<= gradients + budget + 64 MB", _beyond(rows), lambda x: x <= limit,
        lambda x: f"gradients + {x / MIB:.0f} MB (limit {limit / MIB:.0f} MB)",
    )  # fmt: skip


def _budget(loss: Loss) -> Outcome:
    """Beyond the gradients: ours within its budget, the official formulation ten times that."""
    rows = loss.all("ours", group="budget")
    theirs = _beyond(loss.all("official", group="budget")) or 0
    budget = rows[0]["budget"] if rows else 1
    return _outcome(
        "peak extra memory beyond the gradients, under a small budget",
        "the budget; official >= 10x that", _beyond(rows) if theirs else None,
        lambda x: x <= budget and theirs >= 10 * budget,
        lambda x: f"{x / MIB:.0f} MB of {budget // MIB} MB; official {theirs / MIB:.0f} MB, "
        f"{theirs / budget:.0f}x the budget",
    )  # fmt: skip


def _unscored(loss: Loss) -> Outcome:
    """Each time taken against the floor of its own rounds, which the cases share."""
    rows = [r for r in loss.all("ours", group="growth unscored") if r["of_floor"]]
    what, value = "unscored tokens cost nothing", None
    if len(rows) > 1:
        value = rows[0]["of_floor"] / rows[-1]["of_floor"]
        what += f": {rows[-1]['tokens'] // rows[0]['tokens']}x the positions, the same scored ones"
    return _at_most(what, value, 1.1, "x the time")


def _of_steps(rows: list[dict]) -> list[Outcome]:
    """Every target of a training step; against the leaner official procedure."""
    found = {(row["case"].split(" in ")[0], row["provider"]): row for row in rows}

    def of(case: str, key: str, provider: str = "ours-lists") -> float | None:
        return found.get((case, provider), {}).get(key)

    def peak(what: str, case: str, ours: str, theirs: str, most: float) -> Outcome:
        mine, other = (of(case, "peak_bytes", name) for name in (ours, theirs))
        return _at_most(what, mine / other if mine and other else None, most)

    lines = []
    for case, least in SPEED.items():
        alone = of(case, "speedup_gradient")
        aside = f" ({alone:.2f}x without the optimizer)" if alone else ""
        what = f"one training step, {case}, against the official procedure"
        lines.append(_faster(what, of(case, "speedup"), least, "{:.2f}x" + aside))
    for case in SPEED:
        what = f"peak memory of that step, {case}"
        lines.append(peak(what, case, "ours-lists", "official", 0.4))
    for case, least in AGAINST_PADDED.items():
        what = f"{case}: lists against padded rows"
        lines.append(_faster(what, of(case, "vs_padded"), least, "{:.2f}x as fast"))
    for case, least in OF_FLOOR.items():
        value, target = of(case, "of_floor"), f">= {least:.2f} of the floor"
        lines.append(_outcome(f"{case}: lists", target, value, lambda x, y=least: x >= y))
    full, head = (of(TRL, "vs_trl", f"trl-dpo-{name}") for name in ("distinct", "head"))
    lines.append(_faster(f"{TRL}: TRL with accelerate_trl() against TRL", full, 3.5))
    over = full / head if full and head else None
    lines.append(_faster("the same against TRL with the fused head alone", over, 3.0))
    what = "peak memory of that step against TRL's"
    lines.append(peak(what, TRL, "trl-dpo-distinct", "trl-dpo", 0.5))
    mine = [r for r in rows if r["case"].startswith(GROWTH) and r["provider"] == "ours-lists"]
    for name, key in (("time", "seconds"), ("memory", "peak_bytes")):
        points = [(r["needed"], r[key]) for r in mine if r[key]]
        span = f", {points[0][0]:,} to {points[-1][0]:,}" if len(points) > 2 else ""
        lines.append(_linear(f"{name} linear in tokens that differ{span}", points, 0.1))
    shares = [r["collate_share"] for r in rows if r["provider"].startswith("ours-")]
    worst = max((x for x in shares if x is not None), default=None)
    what = "collation, the worst case"
    return [*lines, _outcome(what, "< 3% of a step", worst, lambda x: x < 0.03, "{:.2%}")]


def linear_misfit(x: list[float], y: list[float]) -> float:
    """Largest relative distance of ``y`` from the line a + b x of least relative squares."""
    w = [1 / value**2 for value in y]
    total = sum(w)
    mean_x = sum(a * b for a, b in zip(w, x, strict=True)) / total
    mean_y = sum(a * b for a, b in zip(w, y, strict=True)) / total
    covariance = sum(a * (b - mean_x) * (c - mean_y) for a, b, c in zip(w, x, y, strict=True))
    slope = covariance / sum(a * (b - mean_x) ** 2 for a, b in zip(w, x, strict=True))
    return max(abs(mean_y + slope * (a - mean_x) - b) / b for a, b in zip(x, y, strict=True))
