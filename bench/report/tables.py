"""Markdown of a results file: numbers, tables of a case, what stands above them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.report.targets import Outcome

Column = tuple[str, Callable[[dict], str]]


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def columns_table(columns: list[Column], rows: list[dict]) -> str:
    """A line a row, without the columns that are empty in every line."""
    cells = {title: [cell(row).replace("|", "\\|") for row in rows] for title, cell in columns}
    used = [title for title, column in cells.items() if any(column)]
    return table(used, [[cells[title][i] for title in used] for i in range(len(rows))])


def number(key: str, form: str, scale: float = 1, after: str = "") -> Callable[[dict], str]:
    """A cell: ``row[key]`` scaled and formatted, empty for None."""

    def cell(row: dict) -> str:
        value = row.get(key)
        return "" if value is None else format(value * scale, form) + after

    return cell


def joined(*parts: str) -> str:
    """Paragraphs, without those that are empty."""
    return "\n\n".join(part.strip("\n") for part in parts if part)


def image(name: str, where: str) -> str:
    return f"![{name.removesuffix('.png')}]({where})"


def milliseconds(value: float | None) -> str:
    """Three digits, in milliseconds."""
    return "" if value is None else f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"


def seconds(value: float | None) -> str:
    """Three digits, in seconds."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(name: str, unit: Callable[[float | None], str]) -> list[Column]:
    """Who, median and quartiles."""
    return [
        ("", lambda row: row["label"]),
        (name, lambda row: unit(row["seconds"])),
        ("quartiles", lambda row: f"{unit(row['q1'])} - {unit(row['q3'])}"),
    ]


_MIB = 2**-20
_NOTE: Column = ("note", lambda row: row["note"])
_MEMORY: list[Column] = [
    ("peak extra MB", number("peak_bytes", ".1f", _MIB)),
    (
        "of it gradients MB",
        lambda row: number("gradient_bytes", ".1f", _MIB)(row) if row["peak_bytes"] else "",
    ),
]
_LOSS: list[Column] = [
    *_times("ms", milliseconds),
    ("warm ms", lambda row: milliseconds(row["warm_seconds"])),
    ("TFLOP/s", lambda row: number("rate", ".3g", 1e-12)(row) if row["flops"] else ""),
    ("GB/s", lambda row: "" if row["flops"] else number("rate", ".3g", 1e-9)(row)),
    ("of ceiling", number("of_ceiling", ".2f")),
    ("of floor", number("of_floor", ".2f")),
    ("of fp32 floor", number("of_floor_fp32", ".2f")),
    ("x ours", number("vs_ours", ".2f")),
    *_MEMORY,
    ("error: loss", number("loss_error", ".0e")),
    ("log-prob", number("logp_error", ".0e")),
    ("d input", number("input_grad_error", ".0e")),
    ("d weight", number("weight_grad_error", ".0e")),
    _NOTE,
]
_STEP: list[Column] = [
    *_times("step, s", seconds),
    ("tokens/s", number("tokens_per_second", ",.0f")),
    ("forward + backward, s", lambda row: seconds(row["gradient_seconds"])),
    ("AdamW, s", lambda row: seconds(row["optimizer_seconds"])),
    ("x faster", number("speedup", ".2f")),
    ("x faster without AdamW", number("speedup_gradient", ".2f")),
    ("x TRL", number("vs_trl", ".2f")),
    ("of floor", number("of_floor", ".2f")),
    ("head, s", lambda row: seconds(row["head_seconds"])),
    ("head's share", number("head_share", ".0%")),
    *_MEMORY,
    ("of official's peak", number("of_official", ".2f")),
    ("collation ms", number("collate_seconds", ".2f", 1e3)),
    ("of the step", number("collate_share", ".2%")),
    ("error: loss", number("loss_error", ".0e")),
    ("gradient", number("grad_error", ".0e")),
    _NOTE,
]


def case_table(rows: list[dict]) -> str:
    """One case: a line a provider that ran; who did not is named under it."""
    official = next((r["peak_bytes"] for r in rows if r["provider"] == "official"), None)
    ran = []
    for row in (row for row in rows if row["seconds"] is not None):
        peak, same = row["peak_bytes"], row.get("loss_type") == "pro"
        share = peak / official if peak and official and same else None
        ran.append({**row, "of_official": share})
    text = columns_table(_STEP if "shape" in rows[0] else _LOSS, ran) if ran else ""
    return joined(text, not_run(rows))


def not_run(rows: list[dict]) -> str:
    """Who has no numbers, and why."""
    reasons = {
        r["label"]: r["note"].removeprefix("not run: ").split(": pip")[0]
        for r in rows
        if r["seconds"] is None
    }
    return f"Not run: {'; '.join(f'{k} ({v})' for k, v in reasons.items())}." if reasons else ""


def growth_table(cases: dict[str, list[dict]]) -> str:
    """A line a case: milliseconds and peak extra memory of each provider."""
    labels = dict.fromkeys(row["label"] for rows in cases.values() for row in rows)
    columns: list[Column] = [("", lambda found: found["case"])]
    for unit, key, scale in (("ms", "seconds", 1e3), ("peak MB", "peak_bytes", _MIB)):
        for label in labels:
            cell = number(key, ".1f", scale)
            columns.append((f"{label}, {unit}", lambda found, x=label, c=cell: c(found.get(x, {}))))
    lines = [
        {"case": name.removeprefix("growth "), **{r["label"]: r for r in rows}}
        for name, rows in cases.items()
    ]
    return columns_table(columns, lines)


def by_case(rows: list[dict], group: str | None = None) -> dict[str, list[dict]]:
    """Rows by case, of one group or of all."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if group is None or row["group"] == group:
            found.setdefault(row["case"], []).append(row)
    return found


def outcome_table(found: list[Outcome]) -> str:
    """Target, measured, met or not; those that were measured."""
    said = {True: "yes", False: "**no**"}
    lines = [[o.what, o.target, o.measured, said[o.met]] for o in found if o.met is not None]
    missing = [o.what for o in found if o.met is None]
    text = table(["", "target", "measured", "met"], lines) if lines else ""
    return joined(text, f"Not measured: {'; '.join(missing)}." if missing else "")


def header(data: dict) -> str:
    """Where, with what and when it was measured."""
    kind = "it multiplies bf16"  # which numbers it can be compared with
    if data["bf16_matmuls"] != "native":
        kind = "it emulates bf16, so the cases are in fp32"
    kind = "a GPU" if data["device"].startswith("cuda") else kind
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items() if v)
    commit = (data["commit"] or "unknown")[:12] + (" (modified)" if data["modified"] else "")
    lines = [
        f"Machine: {data['machine']} ({kind}); device {data['device']}, {data['threads']} threads.",
        f"Versions: {versions}, Python {data['python']}; commit {commit}; {data['date'][:10]}.",
    ]
    if not data["complete"]:
        lines.append("**Partial: the run did not end; what is missing was not measured.**")
    return "\n".join(lines)


def command(data: dict) -> str:
    settings = data["settings"]
    words = [f"pro-kernels bench {data['benchmark']} --preset", settings["preset"]]
    for flag, names in (("case", settings["cases"]), ("provider", settings["providers"])):
        words += [f"--{flag} '{name}'" for name in names]
    if settings["repeats"]:
        words.append(f"--repeats {settings['repeats']}")
    return f"Measured by `{' '.join(words)}`."


def marks(block: str) -> tuple[str, str]:
    """What stands before and after a block of a page."""
    return f"<!-- {block}:begin -->", f"<!-- {block}:end -->"


def block_of(page: Path, block: str) -> str | None:
    """What stands between the two marks of a block, None without them.

    Raises:
        ValueError: the file does not hold each mark once, in order.
    """
    begin, end = marks(block)
    text = page.read_text()
    if begin not in text and end not in text:
        return None
    found = re.findall(f"{re.escape(begin)}\n(.*?)\n?{re.escape(end)}", text, re.DOTALL)
    if len(found) != 1 or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} must hold {begin} and, after it, {end}, once each")
    return found[0]


def update_block(page: Path, text: str, block: str) -> None:
    """Replace what stands between the two marks of a block."""
    begin, end = marks(block)
    old = block_of(page, block)
    if old is None:
        raise ValueError(f"{page} must hold the marks {begin} and {end}")
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
