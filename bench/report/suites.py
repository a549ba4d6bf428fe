"""Reports of the suites that measure ours alone or other people's programs: tables of their rows.

Each function gives the blocks of pages, by name; ``filter_report`` a whole report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bench.report.tables import Column, columns_table, header, image, joined, number, outcome_table
from bench.report.targets import Outcome, Target, Value
from bench.suites.filter import best, certified, shown
from bench.suites.frameworks.measure import WAYS
from bench.suites.frameworks.table import FRAMEWORKS

Links = dict[str, str]  # name of a plot, and where it is from the page
_FILTER: list[Column] = [
    ("distribution", lambda row: row["batch"]),
    ("dtype", lambda row: row["dtype"]),
    ("rows", number("scored", "d")),
    ("mean top-1", number("top1", ".2f")),
    ("tau", shown),
    ("columns kept", number("columns_kept", ".1%")),
    ("of the dense floor", number("of_floor", ".2f")),
    ("of no filter", number("of_plain", ".2f")),
    ("certified error", lambda row: f"{certified(row):.1e}"),
    ("error", lambda row: f"{max(row['error_hidden'], row['error_weight']):.1e}"),
]


def filter_report(data: dict, images: Sequence[str]) -> str:
    what = (
        f"Medians of {data['settings']['rounds']} interleaved rounds. Floor: the three dense head "
        "matmuls on the scored rows. Errors are relative to the norm of the gradient without a "
        "filter; one above the certified error is the rounding of bf16 gradients."
    )
    parts = ["# grad_filter: time against tau and error", header(data), what]
    parts.append(columns_table(_FILTER, data["results"]))
    return joined(*parts, *(image(x, x) for x in images)) + "\n"


def filter_blocks(data: dict, _: Links) -> dict[str, str]:
    """For each batch the fastest run within the certified error that is asked for."""
    return {"filter": joined(header(data), columns_table(_FILTER, best(data["results"])))}


def attach_blocks(data: dict, _: Links) -> dict[str, str]:
    """What ``attach`` costs, and what the swap under TRL saves."""

    def median(side: str) -> Callable[[dict], str]:
        return lambda row: f"{row['seconds'][side][1]:.3g}" if "seconds" in row else ""

    columns: list[Column] = [
        ("forward + backward", lambda row: row["name"]),
        ("without, s", median("plain")),
        ("with, s", median("ours")),
        ("ratio", number("ratio", ".3f", after="x")),
        ("target", lambda row: row.get("wanted", "")),
        ("losses", lambda row: " / ".join(f"{x:.6g}" for x in row.get("losses", {}).values())),
        ("note", lambda row: row.get("note", "")),
    ]
    what = "bf16, 8 rows of 128 tokens, 60 % not scored."
    return {"attach": joined(header(data), what, columns_table(columns, data["results"]))}


def load_line(data: dict) -> str:
    """What else ran on the machine, and whether the run may be called clean."""
    said = (
        f"other processes took {data['others']:.2f} cores and the host {data['stolen']:.2f} "
        f"(load before the run {data['load_before']:.2f})"
    )
    return f"Clean run: {said}." if data["clean"] else f"**Not a clean run**: {said}."


def ranks_blocks(data: dict, _: Links) -> dict[str, str]:
    """The measured block of docs/scaling.md."""
    split, *weak = data["results"]
    B, n, T, H, V = data["settings"]["split"]
    b, m, t, h, v = data["settings"]["weak"]
    whole, parts, predicted = (split[f"{x}_bytes"] for x in ("whole", "part", "predicted"))
    share = 1 / len(parts)
    found = [
        Outcome(
            "largest rank's memory of the head, of one process's", f"{share:.2f} +- 10 %",
            f"{split['share']:.4f} ({max(parts) / 1e6:.1f} of {whole / 1e6:.1f} MB)",
            abs(split["share"] - share) <= 0.1 * share,
        )
    ]  # fmt: skip
    targets = [Target("loss, relative difference", _number("loss_difference"), 1e-6, form="{:.1e}")]
    for name in ("hidden", "weight"):
        alone, plain = split[f"{name}_error_alone"], split[f"{name}_plain_error"]
        aside = f"one process {alone:.1e}, plain PyTorch {plain:.1e}"
        targets.append(
            Target(f"gradient of {name}, error against fp64", _number(f"{name}_error"),
                   split[f"{name}_allowed"], form="{:.1e}", aside=lambda _, text=aside: text)
        )  # fmt: skip
    found += [target.outcome([split]) for target in targets]
    for row in weak[1:]:
        name = f"weak scaling, {row['name']}"
        found.append(Target(name, _number("efficiency"), 0.9, "", True).outcome([row]))
    times: list[Column] = [
        ("weak scaling", lambda row: row["name"]),
        ("one rank, ms", number("alone", ".0f", 1e3)),
        ("two ranks, ms", number("both", ".0f", 1e3)),
        ("efficiency", number("efficiency", ".3f")),
        ("quartiles", lambda row: f"{row['q1']:.3f} ... {row['q3']:.3f}"),
        ("by processor time", number("by_processor", ".3f")),
        ("rounds", number("rounds", "d")),
    ]
    text = joined(
        header(data), load_line(data), outcome_table(found),
        f"Memory: fp32, B = {B}, n = {n}, T = {T}, 60 % not scored, H = {H}, V = {V}; the "
        "weight and what a forward and backward take at most beyond it, in processes that "
        f"return freed memory at once. The planner counts {predicted[0] / 1e6:.1f} and "
        f"{predicted[1] / 1e6:.1f} MB.",
        columns_table(times, weak),
        f"bf16, B = {b}, n = {m}, T = {t}, 60 % not scored, H = {h}, V = {v} a rank, a thread "
        "a rank. *Head matmuls alone* is `torch.mm` and no communication: what two cores of "
        "this machine give. *By processor time*: the same of the seconds that the ranks' "
        "threads ran, which other processes disturb less; waiting is not in it.",
    )  # fmt: skip
    return {"scaling-measured": text}


def frameworks_blocks(data: dict, _: Links) -> dict[str, str]:
    """The table of docs/integrations/frameworks.md, and where it was measured."""
    frameworks, ways = {x.key: x for x in FRAMEWORKS}, [*WAYS]
    known = {(row["framework"], row["way"]): row for row in data["results"]}

    def name(row: dict) -> str:
        own, versions = frameworks[row["framework"]], row["versions"]
        text = f"{own.name} {own.pin[1]}, transformers {versions['transformers']}"
        return text if own.pin[0] == "trl" else f"{text}, TRL {versions['trl']}"

    def typed(row: dict) -> str:
        ours = f"pro-kernels {' '.join(WAYS[row['way']])} -- " if WAYS[row["way"]] else ""
        return f"`{ours}{frameworks[row['framework']].command}`"

    def difference(row: dict) -> str:
        """The largest between the losses of a run and those without pro_kernels."""
        plain = known[row["framework"], ways[0]]
        if row is plain or "note" in row:
            return ""
        steps = zip(row["losses"], plain["losses"], strict=True)
        return f"{max(abs(a - b) for a, b in steps):.1e}"

    def share(what: str) -> Callable[[dict], str]:
        """Of what the run said it had left out."""
        return lambda row: "".join(re.findall(rf"(\d+%) of {what}", row["said"] or "")[:1])

    columns: list[Column] = [
        ("framework", name),
        ("what is typed", typed),
        ("losses", lambda r: r.get("note") or ", ".join(f"{x:.6f}" for x in r["losses"])),
        ("difference", difference),
        ("CPU s a step", number("seconds", ".2f")),
        ("peak memory, GB", number("peak_bytes", ".2f", 1e-9)),
        ("logits never made", share("the logits")),
        ("tokens not run", share(r"\d+ tokens were not run")),
    ]
    rows = [known[x, way] for x in frameworks for way in ways if (x, way) in known]
    text = columns_table(columns, rows)
    return {"frameworks": joined(f"{header(data)}\ntorch {rows[0]['versions']['torch']}.", text)}


def _number(key: str) -> Value:
    return lambda rows: rows[0][key]
