"""What the project set out to reach, against what a results file holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MEMORY_SLACK = 64 << 20
# Pages, log-probs and statistics beside a gradient of hundreds of megabytes.
_GRADIENT_SLACK = 8 << 20
_LINEAR, _FREE = 0.2, 1.1
# Peers that serve a gradient per token, which PRO needs.
PEERS = ("trl", "cce", "verl", "quack", "torch-lce")


@dataclass(frozen=True)
class Outcome:
    """One line of the targets table; ``met`` is None where the run did not measure it."""

    what: str
    target: str
    measured: str
    met: bool | None


class Results:
    """Look-ups in the rows of a results file."""

    def __init__(self, rows: list[dict]) -> None:
        """Index ``rows`` of a results file."""
        self.rows = rows
        timed = [r for r in rows if r["provider"].startswith("ours-") and r["vs_ours"] == 1.0]
        ours = {r["provider"] for r in timed} - {"ours-trained-head"}
        known = {r["provider"] for r in rows if r["provider"].startswith("ours-")}
        self.ours = min(ours or known, default="ours")

    def find(self, provider: str, **fields) -> dict | None:
        """The first row of a provider ("ours" for backend="auto") with these fields."""
        name = self.ours if provider == "ours" else provider
        for row in self.rows:
            if row["provider"] == name and all(row[k] == v for k, v in fields.items()):
                return row
        return None

    def group(self, group: str, provider: str) -> list[dict]:
        """Timed rows of a provider in a group, in order."""
        name = self.ours if provider == "ours" else provider
        return [
            r
            for r in self.rows
            if r["group"] == group and r["provider"] == name and r["seconds"] is not None
        ]


def outcomes(rows: list[dict], on_gpu: bool = False) -> list[Outcome]:
    """Every target of this kind of device, measured or not."""
    results = Results(rows)
    return _gpu_outcomes(results) if on_gpu else _cpu_outcomes(results)


def _cpu_outcomes(results: Results) -> list[Outcome]:
    main = {"group": "head", "H": 1024, "V": 32000, "masked": 0.6, "n": 4}
    lines = [_of_floor(results, "(1024, 32000) bf16, 60 % not scored", 0.92, main)]
    for name, label, factor in (
        ("official", "the official formulation", 2.3),
        ("official-compiled", "its torch.compile", 1.9),
        ("trl", "TRL's chunked log-probs + the same loss", 4.0),
    ):
        lines.append(_faster(results, f"the same against {label}", name, factor, main))
    for H, V in ((896, 151936), (2048, 128256)):
        at = {**main, "H": H, "V": V}
        lines.append(_of_floor(results, f"({H}, {V}) bf16, 60 % not scored", 0.90, at))
    lines.append(_of_floor(results, "fp32, (1024, 32000)", 0.92, {**main, "group": "fp32"}))
    logits = {"group": "logits", "dtype": "bf16", "V": 32000}
    lines.append(
        _faster(results, "from logits, against plain fp32 PyTorch", "plain-fp32", 3.0, logits)
    )
    return [*lines, _logits_memory(results, logits), _frozen(results), _prompt_memory(results),
            _budget(results), _linear_time(results), _unscored(results)]  # fmt: skip


def _gpu_outcomes(results: Results) -> list[Outcome]:
    masked = {"group": "head", "H": 4096, "V": 128256, "n": 4, "tokens": 16384, "masked": 0.6}
    full = {**masked, "masked": 0.0}
    return [
        _of_floor(results, "60 % not scored", 1 / 1.1, masked),
        _best(results, "the same against the best peer", PEERS, 2.3, masked),
        _faster(results, "the same against the official formulation", "official", 8.0, masked),
        _best(results, "nothing masked, against the best peer with gradients per token", PEERS,
              1.0, full),
        _faster(results, "nothing masked, against TRL", "trl", 1.25, full),
        _frozen(results),
    ]  # fmt: skip


def _outcome(
    what: str, target: str, value: float | None, text: Callable[[float], str], met: bool
) -> Outcome:
    if value is None:
        return Outcome(what, target, "not measured", None)
    return Outcome(what, target, text(value), met)


def _of_floor(results: Results, what: str, least: float, fields: dict) -> Outcome:
    row = results.find("ours", **fields)
    value = row and row["of_floor"]
    other = row and row["of_floor_fp32"]
    aside = f" ({other:.2f} of the fp32-operand floor)" if other else ""
    return _outcome(
        what, f">= {least:.2f} of the floor", value, lambda v: f"{v:.2f}{aside}",
        (value or 0) >= least,
    )  # fmt: skip


def _faster(results: Results, what: str, peer: str, least: float, fields: dict) -> Outcome:
    row = results.find(peer, **fields)
    value = row and row["vs_ours"]
    return _outcome(
        what, f">= {least:g}x as fast", value, lambda v: f"{v:.2f}x", (value or 0) >= least
    )


def _best(
    results: Results, what: str, peers: tuple[str, ...], least: float, fields: dict
) -> Outcome:
    """Against the fastest of these peers that ran, and ran right."""
    found = [results.find(peer, **fields) for peer in peers]
    ran = [row for row in found if row and row["vs_ours"] and not row["wrong"]]
    best = min(ran, key=lambda row: row["vs_ours"], default=None)
    target = f">= {least:g}x as fast"
    if best is None:
        return Outcome(what, target, "not measured", None)
    value = best["vs_ours"]
    return Outcome(what, target, f"{value:.2f}x ({best['label']})", value >= least)


def _budget(results: Results) -> Outcome:
    """Beyond the gradients: ours within its budget, the official formulation ten times that."""
    ours, other = (results.find(name, group="budget") for name in ("ours", "official"))
    what = "peak extra memory beyond the gradients, under a small budget"
    target = "the budget; official >= 10x that"
    if not (ours and other and ours["peak_bytes"] and other["peak_bytes"]):
        return Outcome(what, target, "not measured", None)
    mine, theirs = (row["peak_bytes"] - row["gradient_bytes"] for row in (ours, other))
    budget = ours["budget"]
    text = (
        f"{mine / 2**20:.0f} MB of {budget >> 20} MB; official {theirs / 2**20:.0f} MB, "
        f"{theirs / budget:.0f}x the budget"
    )
    return Outcome(what, target, text, mine <= budget and theirs >= 10 * budget)


def _logits_memory(results: Results, fields: dict) -> Outcome:
    row = results.find("ours", **fields)
    beyond = row["peak_bytes"] - row["gradient_bytes"] if row and row["peak_bytes"] else None
    return _outcome(
        "from logits: peak extra memory",
        f"the gradient (+ {_GRADIENT_SLACK >> 20} MB)",
        beyond,
        lambda v: f"gradient {v / 2**20:+.1f} MB",
        beyond is not None and beyond <= _GRADIENT_SLACK,
    )


def _frozen(results: Results) -> Outcome:
    row = results.find("ours-trained-head", group="frozen")
    value = 1 / row["vs_ours"] if row and row["vs_ours"] else None
    return _outcome(
        "frozen head", "<= 0.70 of the full time", value, lambda v: f"{v:.2f}", (value or 9) <= 0.7
    )


def _prompt_memory(results: Results) -> Outcome:
    row = results.find("ours", group="memory")
    what = f"peak extra memory, {row['case']}" if row else "peak extra memory, one long prompt"
    target = "<= gradients + budget + 64 MB"
    if row is None or row["peak_bytes"] is None:
        return Outcome(what, target, "not measured", None)
    beyond = row["peak_bytes"] - row["gradient_bytes"]
    limit = row["budget"] + MEMORY_SLACK
    text = f"gradients + {beyond / 2**20:.0f} MB (limit {limit / 2**20:.0f} MB)"
    return Outcome(what, target, text, beyond <= limit)


def _linear_time(results: Results) -> Outcome:
    rows = results.group("growth N", "ours")
    worst = None
    if len(rows) > 2:
        worst = linear_misfit([r["scored"] for r in rows], [r["seconds"] for r in rows])
    return _outcome(
        "time linear in scored tokens", f"a line fits within {_LINEAR:.0%}", worst,
        lambda v: f"within {v:.0%}", (worst or 0) <= _LINEAR,
    )  # fmt: skip


def _unscored(results: Results) -> Outcome:
    """Each time taken against the floor of its own rounds, which the cases share."""
    rows = [r for r in results.group("growth unscored", "ours") if r["of_floor"]]
    what = "unscored tokens cost nothing"
    if len(rows) < 2:
        return Outcome(what, f"<= {_FREE:.1f}x the time", "not measured", None)
    value = rows[0]["of_floor"] / rows[-1]["of_floor"]
    times = rows[-1]["tokens"] // rows[0]["tokens"]
    what += f": {times}x the positions, the same scored ones"
    return Outcome(what, f"<= {_FREE:.1f}x the time", f"{value:.2f}x", value <= _FREE)


def linear_misfit(x: list[int], y: list[float]) -> float:
    """Largest relative distance of ``y`` from the line a + b x of least relative squares."""
    w = [1 / value**2 for value in y]
    total = sum(w)
    mean_x = sum(a * b for a, b in zip(w, x, strict=True)) / total
    mean_y = sum(a * b for a, b in zip(w, y, strict=True)) / total
    covariance = sum(a * (b - mean_x) * (c - mean_y) for a, b, c in zip(w, x, y, strict=True))
    slope = covariance / sum(a * (b - mean_x) ** 2 for a, b in zip(w, x, strict=True))
    return max(abs(mean_y + slope * (a - mean_x) - b) / b for a, b in zip(x, y, strict=True))
