"""Markdown from a results file."""

from __future__ import annotations

from pathlib import Path

from bench.cases import is_main
from bench.targets import Outcome, outcomes

BLOCK, MEASURED, GPU = "bench", "measured", "gpu"
ERRORS = ("loss_error", "logp_error", "input_grad_error", "weight_grad_error")
TITLES = {
    "head": "Hidden states in, head trained: `linear_pro_loss`, forward + backward",
    "fp32": "The same in fp32",
    "fp16": "The same in fp16",
    "frozen": "Head frozen (LoRA, PEFT)",
    "score": "Score only, no gradient",
    "ce": "Mean cross-entropy on the scored tokens (peers without gradients per token run too)",
    "logits": "Logits in: `pro_loss`, forward + backward",
    "ranking": "Log-probs in: the ranking loss and its gradient",
    "small": "Two prompts: host work and launches",
    "growth N": "Growth with the scored tokens N",
    "growth V": "Growth with the vocabulary V",
    "growth n": "Growth with the candidates n, the same tokens in all",
    "growth unscored": "Growth with unscored positions, the same scored tokens",
    "memory": "One long prompt, under a budget",
    "budget": "A small budget",
}
_NOTES = """\
*Floor*: the head matmuls alone on the scored rows (`torch.mm`, three with the head trained, two
frozen, one to score), the same process and rounds; for logits, making the gradient buffer (scored
rows copied, the others zeroed); for log-probs, a copy. *Of floor* = floor / provider; *of fp32
floor*: the same matmuls with fp32 operands. *x ours* = provider / pro_kernels with
`backend="auto"`. Ratios are medians over rounds of times taken in the same round. Times are with
cold caches (256 MiB written before each call where the tensors are smaller than that), *warm* right
after another call. *TFLOP/s* counts the matmuls that no exact method avoids on the scored rows,
*GB/s* the bytes that the maths has to move: scored logits read twice, the gradient written. *Of
ceiling*: of the rate of one large matmul (the faster of the dtype's and fp32's), or of a large copy
(read and written), the fastest of seven rounds. *Peak extra*: high water in a process of its own
(GPU: of the allocator) beyond what was held before the call; *of it gradients*: the inputs'.
*Errors* against fp64: loss relative; log-prob the largest absolute; gradients of sampled rows,
relative in norm (d input: of hidden states, logits or log-probs, row by row).
"""
_UPCASTS = """\
This CPU has no matrix units for bf16, so pro_kernels multiplies in fp32, block by block, which is
faster here than `torch.mm` in bf16: its ratio to the bf16 floor can exceed 1. The floor with fp32
operands is then the bound to hold it to; both are shown. The peers multiply in bf16, as they are
written, and part of their distance is that.
"""


def full_report(data: dict, images: list[str]) -> str:
    """The whole report; ``images`` are file names beside it."""
    parts = ["# Benchmarks", header(data), f"Measured by `{command(data)}`.", ceilings_line(data)]
    parts += ["## Targets", targets_table(data)]
    parts += _upcast_note(data)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in images]
    parts += ["## Numbers", _NOTES]
    for group, title in TITLES.items():
        cases = _cases(data["results"], group)
        if cases:
            parts.append(f"### {title}")
        if group.startswith("growth") and cases:
            parts += [
                _shape(next(iter(cases.values()))[0])[2:] + " at the first",
                growth_table(cases),
            ]
            continue
        for case, rows in cases.items():
            parts += [f"**{case}**{_shape(rows[0])}", case_table(rows)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def blocks(data: dict, links: dict[str, str]) -> dict[str, str]:
    """What a page shows, by the names of its marks; ``links`` are plots and where they are."""
    text = summary(data, links.get("time.png"))
    if data["device"].startswith("cuda"):
        return {GPU: text}
    return {BLOCK: text, MEASURED: details(data, links)}


def summary(data: dict, image: str | None) -> str:
    """Machine, targets, main table, plot."""
    parts = [header(data), f"Measured by `{command(data)}`.", "### Targets", targets_table(data)]
    parts += _upcast_note(data)
    main = [rows for rows in _cases(data["results"], "head").values() if is_main(rows[0])]
    if main:
        parts += ["### Forward + backward, ms (times ours)", _main_table(main)]
    if image:
        parts.append(f"![time by provider]({image})")
    return "\n\n".join(part.strip("\n") for part in parts)


def details(data: dict, links: dict[str, str]) -> str:
    """Ceilings and plots."""
    parts = [header(data), f"Measured by `{command(data)}`.", ceilings_line(data)]
    for name in ("roofline.png", "memory-by-n.png", "errors.png", "entrances.png", "growth.png"):
        if name in links:
            parts.append(f"![{name.removesuffix('.png')}]({links[name]})")
    return "\n\n".join(parts)


def marks(block: str) -> tuple[str, str]:
    """What stands before and after a block of a page."""
    return f"<!-- {block}:begin -->", f"<!-- {block}:end -->"


def update_block(page: Path, text: str, block: str) -> None:
    """Replace what stands between the two marks of a block.

    Raises:
        ValueError: the file does not hold each mark once, in order.
    """
    begin, end = marks(block)
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{page} must hold {begin} and, after it, {end}, once each")
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def targets_table(data: dict) -> str:
    """Every target, what was measured, met or not."""
    return outcome_table(outcomes(data["results"], data["device"].startswith("cuda")))


def command(data: dict) -> str:
    """What was called."""
    settings = data["settings"]
    words = ["pro-kernels bench --preset", settings["preset"]]
    for flag, names in (("case", settings["cases"]), ("provider", settings["providers"])):
        words += [f"--{flag} '{name}'" for name in names]
    if settings["repeats"]:
        words.append(f"--repeats {settings['repeats']}")
    return " ".join(words)


def ceilings_line(data: dict) -> str:
    """The measured ceilings."""
    found = data.get("ceilings")
    if not found:
        return ""
    rates = ", ".join(f"{k} {v['rate'] / 1e12:.3g} TFLOP/s" for k, v in found["matmul"].items())
    N, H, V = found["sizes"]["matmul"]
    return (
        f"Ceilings: copy {found['copy']['rate'] / 1e9:.3g} GB/s "
        f"({found['sizes']['copy_bytes'] >> 20} MiB, read and written); matmul "
        f"({N} x {H} by {H} x {V}) {rates}."
    )


def outcome_table(found: list[Outcome]) -> str:
    """Target, measured, met or not."""
    said = {True: "yes", False: "**no**", None: "-"}
    lines = [[o.what, o.target, o.measured, said[o.met]] for o in found]
    return table(["", "target", "measured", "met"], lines)


def case_table(rows: list[dict]) -> str:
    """One case: a line a provider, a refusal in the last column where there are no numbers."""
    unit, scale = ("TFLOP/s", 1e12) if rows[0]["flops"] else ("GB/s", 1e9)
    head = [
        "provider", "ms", "quartiles", "warm ms", unit, "of ceiling", "of floor", "of fp32 floor",
        "x ours", "peak extra MB", "of it gradients MB", "error: loss", "log-prob", "d input",
        "d weight", "note",
    ]  # fmt: skip
    lines = []
    for row in rows:
        timed = row["seconds"] is not None
        lines.append([
            row["label"],
            milliseconds(row["seconds"]),
            f"{milliseconds(row['q1'])} - {milliseconds(row['q3'])}" if timed else "",
            milliseconds(row["warm_seconds"]),
            number(row["rate"] and row["rate"] / scale, ".3g"),
            number(row["of_ceiling"], ".2f"),
            number(row["of_floor"], ".2f"),
            number(row["of_floor_fp32"], ".2f"),
            number(row["vs_ours"], ".2f"),
            megabytes(row["peak_bytes"]),
            megabytes(row["gradient_bytes"] if row["peak_bytes"] is not None else None),
            *(number(row[key], ".0e") for key in ERRORS),
            row["note"].replace("|", "\\|"),
        ])  # fmt: skip
    return table(*used_columns(head, lines))


def used_columns(head: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in every line."""
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return [head[i] for i in used], [[line[i] for i in used] for line in lines]


def growth_table(cases: dict[str, list[dict]]) -> str:
    """A line a case: milliseconds and peak extra memory of each provider."""
    names = list(dict.fromkeys(row["label"] for rows in cases.values() for row in rows))
    weighed = {r["label"] for rows in cases.values() for r in rows if r["peak_bytes"] is not None}
    head = ["", *(f"{n}, ms" for n in names), *(f"{n}, peak MB" for n in names if n in weighed)]
    lines = []
    for case, rows in cases.items():
        row = {r["label"]: r for r in rows}
        times = [row[n]["seconds"] if n in row else None for n in names]
        peaks = [row[n]["peak_bytes"] if n in row else None for n in names if n in weighed]
        lines.append([
            case.removeprefix("growth "),
            *(number(t and t * 1e3, ".1f") for t in times),
            *(megabytes(b) for b in peaks),
        ])  # fmt: skip
    return table(head, lines)


def milliseconds(value: float | None) -> str:
    """Three digits, in milliseconds."""
    return "" if value is None else f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"


def seconds(value: float | None) -> str:
    """Three digits, in seconds."""
    if value is None:
        return ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _main_table(cases: list[list[dict]]) -> str:
    labels = list(dict.fromkeys(row["label"] for rows in cases for row in rows))
    head = ["", *(_size(rows[0]) for rows in cases)]
    lines = []
    for label in labels:
        found = [next((r for r in rows if r["label"] == label), None) for rows in cases]
        lines.append([label, *(_cell(row) for row in found)])
    first = cases[0][0]
    what = f"{first['dtype']}, n={first['n']}, {first['masked']:.0%} of the positions not scored"
    return f"{table(head, lines)}\n\n{what}; R positions."


def _size(row: dict) -> str:
    cap = "" if row["softcap"] is None else f" softcap {row['softcap']:g}"
    return f"H={row['H']} V={row['V']} R={row['tokens']}{cap}"


def _upcast_note(data: dict) -> list[str]:
    return [] if data["bf16_matmuls"] == "native" else [_UPCASTS]


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["seconds"] is None or row["wrong"]:
        return row["note"].split(":")[0]
    times = "" if row["vs_ours"] is None else f" ({row['vs_ours']:.2f}x)"
    return milliseconds(row["seconds"]) + times


def header(data: dict) -> str:
    """Where, with what and when it was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items() if v)
    commit = (data["commit"] or "unknown")[:12] + (" (modified)" if data["modified"] else "")
    lines = [
        f"Machine: {data['machine']}; device {data['device']}, {data['threads']} threads, "
        f"bf16 head matmuls of pro_kernels: {data['bf16_matmuls']}.",
        f"Versions: {versions}, Python {data['python']}; commit {commit}; {data['date'][:10]}; "
        f"preset {data['settings']['preset']}.",
    ]
    if "remeasured" in data:
        lines.append(data["remeasured"])
    if not data["complete"]:
        lines.append("**Partial: the run did not end; what is missing was not measured.**")
    return "\n".join(lines)


def _shape(row: dict) -> str:
    return (
        f": B={row['B']} n={row['n']} T={row['T']} {row['dtype']}, "
        f"{row['scored']} of {row['tokens']} tokens scored"
    )


def _cases(rows: list[dict], group: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["group"] == group:
            found.setdefault(row["case"], []).append(row)
    return found


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def number(value: float | None, form: str) -> str:
    """Formatted, empty for None."""
    return "" if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    """Bytes in MiB, empty for None."""
    return "" if value is None else f"{value / 2**20:.1f}"
