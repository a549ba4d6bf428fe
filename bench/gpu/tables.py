"""gpu.md from gpu.json; predictions are made from the floors of the same run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from bench.model import costs
from bench.model.cards import H200, Card
from bench.tables import header, table

BLOCK = "gpu-measured"
_TITLES = {
    "floors": "Floors",
    "linear": "`linear_pro_loss`, forward + backward",
    "logits": "Logits in, forward + backward",
    "ranking": "Ranking kernel",
    "score": "Scoring",
    "rows": "Row kernels alone",
    "small": "Two prompts, by the wall clock",
    "tuning": "Triton's configurations",
}
# Parts of ``summary``, and what else of the part they are set beside.
_BESIDE = {"linear": "floor", "logits": None, "ranking": None, "small": "plain"}


def full_report(data: dict, _: Sequence[str] = ()) -> str:
    """The whole page."""
    gpu = data["gpu"] or {"name": "no GPU", "capability": "", "cuda": ""}
    parts = [
        "# GPU run",
        f"{gpu['name']}, capability {gpu['capability']}, CUDA {gpu['cuda']}.",
        header({**data, "settings": {"preset": "gpu"}}),
        "## Parts",
        table(
            ["job", "part", "status", "seconds", "note"],
            [[p["job"], p["part"], p["status"], f"{p['seconds']:.1f}", _cell(p["note"])]
             for p in data["parts"]],
        ),
        "## Targets", _targets(data),
    ]  # fmt: skip
    rows = [row for part in data["parts"] for row in part["rows"]]
    card = measured_card(data)
    for name, title in _TITLES.items():
        lines = [_line(row, card) for row in rows if row["part"] == name and "seconds" in row]
        if lines:
            head = ["case", "backend", "", "ms", "quartiles", "TB/s", "TFLOP/s", "predicted, ms",
                    "times the others"]  # fmt: skip
            parts += [f"## {title}", table(head, lines)]
    errors = [row for row in rows if row["part"] == "accuracy"]
    if errors:
        lines = [
            [r["case"], r["backend"], f"{r['error']:.2e}", f"{r['plain_error']:.2e}"]
            for r in errors
        ]
        parts += ["## Error against fp64", table(["", "backend", "ours", "plain PyTorch"], lines)]
    return "\n\n".join(parts) + "\n"


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """What a page shows: each time beside its prediction."""
    card, found = measured_card(data), {}
    for row in (row for part in data["parts"] for row in part["rows"] if "seconds" in row):
        kernel = row["part"] == "rows" and row["name"] != "copy"
        if kernel or (row["part"] in _BESIDE and row["name"] == "ours"):
            what = row["name"] if kernel else _TITLES[row["part"]]
            found.setdefault((what, row["case"]), {})[row["backend"]] = row
    lines = []
    for (what, case), rows in found.items():
        first = next(iter(rows.values()))
        guess = None if card is None else predicted(first, card)
        beside = _BESIDE.get(first["part"])
        cells = [what, case, "" if guess is None else _ms(guess)]
        for backend in ("cuda", "triton"):
            row = rows.get(backend)
            cells.append("" if row is None else _ms(row["seconds"]))
            over = row and beside and row["over"][beside]
            cells.append(f"{over:.2f} of {beside}" if over else "")
        lines.append(cells)
    head = ["", "case", "predicted, ms", "CUDA, ms", "", "Triton, ms", ""]
    where = header({**data, "settings": {"preset": "gpu"}})
    return {BLOCK: f"{where}\n\n{table(head, lines)}"}


def measured_card(data: dict) -> Card | None:
    """The card of this run by its own floors; None where they are missing."""
    rows = [r for p in data["parts"] if p["part"] == "floors" for r in p["rows"]]
    copy = [r["bytes_per_second"] for r in rows if r["case"] == "copy"]
    rates = [r["flops_per_second"] for r in rows if r["case"] == "matmul"]
    if not copy or not rates or data["gpu"] is None:
        return None
    return dataclasses.replace(
        H200, name=data["gpu"]["name"], copy=copy[0], matmul=statistics.mean(rates),
        sms=data["gpu"]["sms"], memory=data["gpu"]["memory"], source="this run",
    )  # fmt: skip


def predicted(row: dict, card: Card) -> float | None:
    """Seconds the model predicts for a row, None where it says nothing."""
    shape, name = row.get("shape"), row["name"]
    if shape is None or name == "copy":
        return None
    if row["part"] == "linear":
        kind = "trained" if name == "full" or row["case"] == "trained" else "frozen"
        cost = costs.linear(**shape, kind=kind)
        return cost.matmul_seconds(card) if name == "floor" else cost.seconds(card)
    if row["part"] == "logits":
        return costs.logits_in(**shape).seconds(card)
    if "tokens" in shape:
        return costs.ranking_kernel(**shape).seconds(card)
    if row["part"] == "score":
        product = costs.matmul("", shape["N"], shape["V"], shape["H"]).seconds(card)
        read = costs.logp_kernel(shape["N"], shape["V"]).seconds(card)
        return {"floor": product, "ours": product + read}.get(name)
    N, V = shape["N"], shape["V"]
    kernels = {
        "logp": costs.logp_kernel(N, V),
        "residual": costs.residual_kernel(N, V),
        "logits_grad": costs.logits_grad_kernel(N, N, V),
    }
    return kernels[name].seconds(card)


def _line(row: dict, card: Card | None) -> list[str]:
    guess = None if card is None else predicted(row, card)
    over = ", ".join(f"{k} {v:.3f}" for k, v in row["over"].items())
    return [
        row["case"],
        row["backend"],
        row["name"],
        _ms(row["seconds"]),
        f"{_ms(row['q1'])} ... {_ms(row['q3'])}",
        _rate(row.get("bytes_per_second")),
        _rate(row.get("flops_per_second")),
        "" if guess is None else _ms(guess),
        over,
    ]


def _targets(data: dict) -> str:
    """The lines of the issue's table, by backend, against what was measured."""
    lines = []
    rows = [row for part in data["parts"] for row in part["rows"] if row.get("name") == "ours"]
    copies = {
        row["backend"]: row["bytes_per_second"]
        for part in data["parts"]
        for row in part["rows"]
        if row["part"] == "logits" and row["name"] == "copy"
    }
    for row in rows:
        value, limit, what = _target(row, copies)
        if value is not None:
            met = value >= limit if what.startswith("logits") else value <= limit
            sign = ">=" if what.startswith("logits") else "<="
            cells = [what, row["backend"], f"{sign} {limit:g}", f"{value:.3g}"]
            lines.append([*cells, "yes" if met else "no"])
    return table(["", "backend", "target", "measured", "met"], lines)


def _target(row: dict, copies: dict[str, float]) -> tuple[float | None, float, str]:
    if row["part"] == "linear" and row["case"] == "trained":
        return row["over"]["floor"], 1.10, "head trained, times the three matmuls"
    if row["part"] == "linear":
        return row["over"]["full"], 0.70, "head frozen, share of the full time"
    if row["part"] == "logits":
        share = row["bytes_per_second"] / copies[row["backend"]]
        return share, 0.90, "logits in, share of the copy bandwidth"
    if row["part"] == "ranking" and row["shape"]["n"] == 64:
        return row["seconds"] * 1e6, 50, f"ranking, us, {row['case']}"
    if row["part"] == "small":
        return row["over"]["plain"], 1.0, "two prompts, times plain PyTorch"
    if row["part"] == "accuracy" and "loss" not in row["case"]:  # one number: luck decides
        times = row["error"] / max(row["plain_error"], 1e-12)
        return times, 1.0, f"error, times plain PyTorch's, {row['case']}"
    return None, 0.0, ""


def _cell(note: str) -> str:
    return (note.strip().splitlines() or [""])[-1].replace("|", "/")[:160]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.3g}"
