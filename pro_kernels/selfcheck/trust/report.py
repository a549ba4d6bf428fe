"""``pro-kernels check --full``: trust.md and trust.json from what was measured."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch

from pro_kernels import backends
from pro_kernels.fused import matmul
from pro_kernels.selfcheck import env
from pro_kernels.selfcheck.trust.cases import CASES, Case
from pro_kernels.selfcheck.trust.evaluate import official_only
from pro_kernels.selfcheck.trust.measure import (
    FLOOR,
    INTERPRETED_POSITIONS,
    Measured,
    Peers,
    Refusal,
    Row,
    devices,
    interpreted,
    label,
    measure,
)

# The report's columns; the gradients of weight and bias share one.
_COLUMNS = {
    "log-probs": ("log-probs",),
    "loss": ("loss",),
    "gradient of hidden or logits": ("gradient of hidden", "gradient of logits"),
    "gradient of weight, bias": ("gradient of weight", "gradient of bias"),
}
_OURS, _PLAIN = "ours, the worst", "plain PyTorch"
_RULE = """Our error against fp64 on the same rounded inputs is at most that of plain
PyTorch in the same dtype plus a floor of a few roundings ({floors}; for log-probs times the largest
one). Gradients by native 16-bit matmuls from hidden states are allowed √3 times plain PyTorch's
error; where sums stay fp32, √(3/2) times for the weight's alone (docs/design.md, "Numerics"). Here:
{routes}; {allowed} rows hold by that alone. Errors of log-probs are the largest, in nats, behind ~
relative to the largest log-prob: per token where tokens are asked for or scored, else of each
candidate's sum. The others are relative, in norm. The official formulation ({official}) and peers
are judged by nothing; they get the same inputs, and peers the plain ranking loss of
bench/engine/losses.py. "official" entrances are compat="official" against the reference's in fp64.
Batches are small and run on one thread, one of them on all."""


def run(out: Path, cases: Sequence[Case] = CASES) -> int:
    """Measure, write ``out``/trust.md and trust.json, print a summary.

    Returns:
        1 when a row breaks the rule, 2 when ``out`` cannot be written to (nothing is run then).
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        print(f"error: --out must be a folder that can be written to: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    peers, missing = _peers()
    measured = measure(official_only if peers is None else peers, cases)
    facts = _facts() | {"seconds": round(time.monotonic() - start), "peers": missing or "compared"}
    held = sum(r.passed for r in measured.rows)
    verdict = f"{held} of {len(measured.rows)} comparisons hold"
    data = {"verdict": verdict, **facts, "not run": _not_run()}
    data |= {k: [_plain_numbers(asdict(x)) for x in v] for k, v in vars(measured).items()}
    _write(out / "trust.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    summary = _summary(measured.rows)
    _write(out / "trust.md", _markdown(verdict, facts, summary, measured))
    print(f"{summary}\n\n{verdict}; {out / 'trust.md'} and trust.json have every row")
    return 0 if held == len(measured.rows) and held else 1


def _peers() -> tuple[Peers | None, str | None]:
    """``bench.trust.compare`` of this checkout; else why peers are not compared."""
    if not (env.ROOT / "bench" / "trust.py").is_file():
        return None, "not compared: no folder bench/ beside the package (run from a checkout)"
    sys.path.insert(0, str(env.ROOT))
    try:
        return importlib.import_module("bench.trust").compare, None
    except Exception as error:
        return None, f"not compared: bench/ cannot be imported: {error}"
    finally:
        sys.path.remove(str(env.ROOT))


def _facts() -> dict:
    """Machine, versions and commit."""
    found = env.report()
    commit = env.git("rev-parse", "HEAD") or "unknown"
    if env.git("status", "--porcelain", "-uno"):
        commit += ", with uncommitted changes"
    versions = {"python": found["python"], "pro_kernels": found["pro_kernels"], **found["packages"]}
    return {"machine": found["machine"], "commit": commit, "versions": versions}


def _not_run() -> list[str]:
    """A line for each backend, device and dtypes that nothing was measured of."""
    found = [] if torch.cuda.is_available() else ["no GPU here: nothing below ran on one"]
    for device in devices():
        for name in backends.ORDER:
            refused: dict[str, list[str]] = {}
            for dtype in FLOOR:
                if reason := backends.refusal(name, device, dtype):
                    refused.setdefault(reason, []).append(label(dtype))
            found += [
                f"{name} on {device.type}, {', '.join(dtypes)}: {reason}"
                for reason, dtypes in refused.items()
            ]
            if len(refused) < len(FLOOR) and interpreted(name, device):
                few = f"interpreted, so in batches of at most {INTERPRETED_POSITIONS} positions"
                found.append(f"{name} on {device.type}: {few} only")
    return found


def _summary(rows: list[Row]) -> str:
    """A line per device, backend and dtype: what holds, and the worst ratio to plain PyTorch."""
    lines = []
    for key, group in _grouped(rows, "device", "backend", "dtype"):
        worst = [
            _worst([r.error / max(r.plain, r.floor) for r in group if r.quantity in of])
            for of in _COLUMNS.values()
        ]
        held = sum(r.passed for r in group)
        ratios = ["" if x is None else f"{x:.2f}" for x in worst]
        allowed = str(sum(r.by_allowance for r in group) or "")
        lines.append([*key, f"{held} of {len(group)}", *ratios, allowed])
    return table(["device", "backend", "dtype", "hold", *_COLUMNS, "by allowance"], lines)


def _markdown(verdict: str, facts: dict, summary: str, measured: Measured) -> str:
    """The report."""
    rows = measured.rows
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in facts["versions"].items())
    failed = [
        [r.device, r.dtype, r.backend, r.case, r.entrance, r.quantity, f"{r.error:.2e}",
         f"{r.plain:.2e}", "FAILED", r.note]
        for r in rows if not r.passed
    ]  # fmt: skip
    head = ["device", "dtype", "backend", "case", "entrance", "quantity", "error", "plain PyTorch"]
    parts = [
        f"# Trust report\n\n**{verdict}**\n",
        f"{facts['machine']}; commit {facts['commit']}; {facts['seconds']} s  \n{versions}\n",
        "\n## Rows that break the rule\n\n" + table([*head, "", ""], failed) if failed else "",
        "\n## Worst ratio, ours / plain PyTorch\n",
        "Where plain PyTorch's error is below the floor, the floor stands for it.\n\n" + summary,
        "\n## The rule\n\n" + _rule(rows, facts["peers"] == "compared"),
        "\n## Peers\n\nThe largest error over the batches that each gives; ours (the worst "
        "backend and tier) in the same batches behind the stroke.\n",
        f"Peers: {facts['peers']}.\n" if facts["peers"] != "compared" else "",
        _peers_table(rows),
        "\n## Not run\n\n" + "\n".join(f"- {line}" for line in _not_run()),
        "\n## Peers that give no number\n\n" + _refusals(measured.refusals),
        "\n## All rows\n\nOurs / plain PyTorch.\n\n" + _all_rows(rows),
        "\n## Every formulation by batch\n\n" + _by_batch(rows),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _rule(rows: list[Row], compared: bool) -> str:
    """What is compared, and by which rule."""
    routes = "; ".join(
        f"{label} on {device.type}: {_route(dtype, device.type)}"
        for device in devices()
        for dtype, label in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
    )
    return _RULE.format(
        floors=", ".join(f"{label(d)} {x:.0e}" for d, x in FLOOR.items()),
        routes=routes,
        allowed=sum(r.by_allowance for r in rows) or "no",
        official="pro_trainer/train/official.py, everything in the model's dtype"
        if compared
        else 'the reference with compat="official"',
    )


def _route(dtype: torch.dtype, device: str) -> str:
    if matmul.upcasts(dtype, device):
        return "matmuls in fp32, no allowance"
    return "fp32 sums, √(3/2)" if matmul.leaves_sums(dtype, device) else "native matmuls, √3"


def _peers_table(rows: list[Row]) -> str:
    """The largest error of each formulation, and ours in the same batches."""
    lines = []
    for key, group in _grouped(rows, "device", "dtype"):
        for who in dict.fromkeys(name for r in group for name in r.others):
            shared = [r for r in group if who in r.others]
            pairs = zip(_cells(shared, who), _cells(shared, _OURS), strict=True)
            cells = [f"{their} / {our}" if their else "" for their, our in pairs]
            lines.append([*key, who, str(len({(r.case, r.kind) for r in shared})), *cells])
    return table(["device", "dtype", "formulation", "problems", *_COLUMNS], lines)


def _all_rows(rows: list[Row]) -> str:
    """A line per batch, entrance and backend; each cell is ours / plain PyTorch."""
    lines = []
    for key, group in _grouped(rows, "device", "dtype", "case", "entrance", "backend"):
        cells = ["; ".join(_cell(r) for r in group if r.quantity in of) for of in _COLUMNS.values()]
        said = "ok, by allowance" if any(r.by_allowance for r in group) else "ok"
        lines.append([*key, *cells, said if all(r.passed for r in group) else "FAILED"])
    return table(["device", "dtype", "case", "entrance", "backend", *_COLUMNS, ""], lines)


def _cell(row: Row) -> str:
    """Ours / plain PyTorch, of log-probs also ours relative to the largest."""
    relative = f" ~{row.error / row.scale:.0e}" if row.quantity == "log-probs" and row.scale else ""
    return f"{row.error:.1e}{relative} / {row.plain:.1e}"


def _by_batch(rows: list[Row]) -> str:
    """A line per batch and formulation; each cell is its error."""
    lines = []
    for key, group in _grouped(rows, "device", "dtype", "case", "kind"):
        names = dict.fromkeys(name for r in group for name in r.others)
        for who in (_OURS, _PLAIN, *names) if names else ():
            lines.append([*key, who, *_cells(group, who)])
    return table(["device", "dtype", "case", "asked for", "formulation", *_COLUMNS], lines)


def _cells(rows: list[Row], who: str) -> list[str]:
    """The largest error of a formulation in each column; empty where it gives none."""
    cells = []
    for of in _COLUMNS.values():
        errors = [{_OURS: r.error, _PLAIN: r.plain, **r.others} for r in rows if r.quantity in of]
        found = _worst([x[who] for x in errors if who in x])
        cells.append("" if found is None else f"{found:.1e}")
    return cells


def _worst(values: list[float]) -> float | None:
    """The largest, NaN if any is; None of none."""
    if any(math.isnan(x) for x in values):
        return math.nan
    return max(values, default=None)


def _refusals(refusals: list[Refusal]) -> str:
    """A line per formulation and reason."""
    groups = _grouped(refusals, "device", "who", "reason")
    return "\n".join(
        f"- {who} on {device}: {reason} ({len(group)} problems, first: {group[0].case}; "
        f"{group[0].kind}; {group[0].dtype})"
        for (device, who, reason), group in groups
    )


def _grouped(items: list, *names: str) -> list[tuple[tuple, list]]:
    """Items by the values of these attributes, in the order in which they first appear."""

    def key(item: object) -> tuple:
        return tuple(getattr(item, name) for name in names)

    order = {k: i for i, k in enumerate(dict.fromkeys(map(key, items)))}
    ordered = sorted(items, key=lambda item: order[key(item)])
    return [(k, list(group)) for k, group in groupby(ordered, key)]


def table(head: list[str], lines: list[list[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(x) + " |" for x in [head, ["---"] * len(head), *lines])


def _plain_numbers(value):  # noqa: ANN001, ANN202
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {k: _plain_numbers(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """All of a file, or none of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
