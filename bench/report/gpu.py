"""The report of a GPU run, and its block: each kernel beside what it was predicted to take."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.tables import Column, by_case, columns_table, header, number, table

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
# Parts whose rows "ours" a page shows, and what else of the part they are set beside.
_BESIDE = {"linear": "floor", "logits": None, "ranking": None, "small": "plain"}
_MS = number("seconds", ".4g", 1e3)
_PREDICTED = number("predicted", ".4g", 1e3)
_ROWS: list[Column] = [
    ("case", lambda row: row["case"]),
    ("backend", lambda row: row["backend"]),
    ("", lambda row: row["name"]),
    ("ms", _MS),
    ("quartiles", lambda row: f"{row['q1'] * 1e3:.4g} ... {row['q3'] * 1e3:.4g}"),
    ("TB/s", number("bytes_per_second", ".3g", 1e-12)),
    ("TFLOP/s", number("flops_per_second", ".3g", 1e-12)),
    ("predicted, ms", _PREDICTED),
    ("times the others", lambda row: ", ".join(f"{k} {v:.3f}" for k, v in row["over"].items())),
]


def report(data: dict, _: Sequence[str] = ()) -> str:
    """The whole page."""
    gpu = data["gpu"] or {"name": "no GPU", "capability": "", "cuda": ""}
    lines = [
        [p["job"], p["part"], p["status"], f"{p['seconds']:.1f}", _last_line(p["note"])]
        for p in data["parts"]
    ]
    parts = [
        "# GPU run",
        f"{gpu['name']}, capability {gpu['capability']}, CUDA {gpu['cuda']}.",
        header(data),
        "## Parts",
        table(["job", "part", "status", "seconds", "note"], lines),
    ]
    timed = [row for row in data["results"] if "seconds" in row]
    for name, title in _TITLES.items():
        rows = [row for row in timed if row["part"] == name]
        if rows:
            parts += [f"## {title}", columns_table(_ROWS, rows)]
    errors = [row for row in data["results"] if row["part"] == "accuracy"]
    if errors:
        lines = [
            [r["case"], r["backend"], f"{r['error']:.2e}", f"{r['plain_error']:.2e}"]
            for r in errors
        ]
        parts += ["## Error against fp64", table(["", "backend", "ours", "plain PyTorch"], lines)]
    return "\n\n".join(parts) + "\n"


def blocks(data: dict, _: dict[str, str]) -> dict[str, str]:
    """What a page shows: each time beside its prediction."""
    shown = []
    for row in data["results"]:
        kernel = row["part"] == "rows" and row["name"] != "copy"
        if "seconds" in row and (kernel or (row["part"] in _BESIDE and row["name"] == "ours")):
            what = row["name"] if kernel else _TITLES[row["part"]]
            shown.append({**row, "what": what, "case": f"{what}, {row['case']}"})
    lines = []
    for case, rows in by_case(shown).items():
        cells = [case, _PREDICTED(rows[0])]
        for backend in ("cuda", "triton"):
            row = next((r for r in rows if r["backend"] == backend), {})
            beside = _BESIDE.get(row.get("part", ""))
            over = f"{row['over'][beside]:.2f} of {beside}" if beside else ""
            cells += [_MS(row), over]
        lines.append(cells)
    head = ["", "predicted, ms", "CUDA, ms", "", "Triton, ms", ""]
    return {"gpu-measured": f"{header(data)}\n\n{table(head, lines)}"}


def _last_line(note: str) -> str:
    return (note.strip().splitlines() or [""])[-1].replace("|", "/")[:160]
