"""Reports of the suites with providers: the loss, and a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.engine.case import is_main
from bench.engine.lists import MODELS
from bench.engine.step import GROWTH
from bench.report.suites import Links
from bench.report.tables import (
    Column,
    by_case,
    case_table,
    columns_table,
    command,
    growth_table,
    header,
    image,
    joined,
    milliseconds,
    not_run,
    number,
    outcome_table,
    seconds,
)
from bench.report.targets import outcomes

_TITLES = {
    "head": "Hidden states in, head trained: `linear_pro_loss`, forward + backward",
    "fp32": "The same in fp32",
    "fp16": "The same in fp16",
    "frozen": "Head frozen (LoRA, PEFT)",
    "score": "Score only, no gradient",
    "real": "Hidden states and heads of real models",
    "equal": "Equal lengths, by the share that is scored",
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
_COLUMNS = 'What the columns mean stands in docs/benchmarks.md, "What the columns mean".'


def _kind(data: dict, name: str) -> str:
    """A block's name: a page has one for each kind of machine."""
    if data["device"].startswith("cuda"):
        return f"{name}-gpu"
    return name if data["bf16_matmuls"] == "native" else f"{name}-fp32"


def _report(title: str, top: str, data: dict, images: Sequence[str], numbers: list[str]) -> str:
    targets = [command(data), _ceilings(data), "## Targets", outcome_table(outcomes(data))]
    plots = [image(x, x) for x in images]
    parts = [f"# {title}", top, *targets, _left_out(data), *plots, "## Numbers", _COLUMNS, *numbers]
    return joined(*parts) + "\n"


def loss_report(data: dict, images: Sequence[str]) -> str:
    """Every number of every case."""
    parts = []
    for group, title in _TITLES.items():
        cases = by_case(data["results"], group)
        if cases:
            parts.append(f"### {title}")
        if group.startswith("growth") and cases:
            first = next(iter(cases.values()))[0]
            parts += [f"{_loss_shape(first)} at the first", growth_table(cases)]
            continue
        for case, rows in cases.items():
            parts += [f"**{case}**: {_loss_shape(rows[0])}", case_table(rows)]
    return _report("Benchmarks", header(data), data, images, parts)


def loss_blocks(data: dict, links: Links) -> dict[str, str]:
    """Targets, times of the main cases, and the plots."""
    main = [rows for rows in by_case(data["results"]).values() if is_main(rows[0])]
    real = [*by_case(data["results"], "real").values()]
    parts = [header(data), command(data), "### Targets", outcome_table(outcomes(data))]
    for title, cases in (
        ("Forward + backward, ms (times ours)", main),
        ("Hidden states and heads of real models", real),
    ):
        if cases:
            parts += [f"### {title}", _main_table(cases)]
    if "time.png" in links:
        parts.append(image("time by provider", links["time.png"]))
    more = [header(data), command(data), _ceilings(data)]
    for name in ("roofline", "memory-by-n", "errors", "entrances", "growth"):
        if f"{name}.png" in links:
            more.append(image(name, links[f"{name}.png"]))
    return {_kind(data, "loss"): joined(*parts), _kind(data, "measured"): joined(*more)}


def _ceilings(data: dict) -> str:
    if "ceilings" not in data or data["benchmark"] == "step":
        return ""
    found = data["ceilings"]
    rates = ", ".join(f"{k} {v['rate'] / 1e12:.3g} TFLOP/s" for k, v in found["matmul"].items())
    N, H, V = found["sizes"]["matmul"]
    return (
        f"Ceilings: copy {found['copy']['rate'] / 1e9:.3g} GB/s "
        f"({found['sizes']['copy_bytes'] >> 20} MiB, read and written); matmul "
        f"({N} x {H} by {H} x {V}) {rates}."
    )


def _main_table(cases: list[list[dict]]) -> str:
    """A line a provider, a column a case; who ran nowhere is named under it."""
    labels = dict.fromkeys(row["label"] for rows in cases for row in rows)
    lines = {label: {"label": label} for label in labels}
    for i, rows in enumerate(cases):
        for row in rows:
            lines[row["label"]][i] = _time(row)
    columns: list[Column] = [
        (_size(rows[0]), lambda line, i=i: line.get(i, "")) for i, rows in enumerate(cases)
    ]
    ran = [line for line in lines.values() if any(cell(line) for _, cell in columns)]
    first = cases[0][0]
    if first.get("data"):
        what = f"{first['dtype']}, real lists; R positions, N of them scored."
    else:
        masked = f"{first['masked']:.0%} of the positions not scored"
        what = f"{first['dtype']}, n={first['n']}, {masked}; R positions."
    every = [row for rows in cases for row in rows]
    names = {line["label"] for line in ran}
    missing = {row["label"]: row for row in every if row["label"] not in names}
    here = [row for row in every if row["label"] in names and row["seconds"] is None]
    partly = [{**row, "label": f"{row['label']} at {_size(row)}"} for row in here]
    text = columns_table([("", lambda line: line["label"]), *columns], ran)
    return joined(text, what, not_run([*missing.values(), *partly]))


def _time(row: dict) -> str:
    ratio = "" if row["vs_ours"] is None else f" ({row['vs_ours']:.2f}x)"
    return "" if row["wrong"] or row["seconds"] is None else milliseconds(row["seconds"]) + ratio


def _size(row: dict) -> str:
    cap = "" if row["softcap"] is None else f" softcap {row['softcap']:g}"
    if not row.get("data"):
        return f"H={row['H']} V={row['V']} R={row['tokens']}{cap}"
    sizes = f"H={row['H']} V={row['V']} n={row['n']} R={row['tokens']} N={row['scored']}"
    whose = MODELS[row["model"]].label if row["model"] else row["data"]
    return f"{whose}, {sizes}{cap}"


def _loss_shape(row: dict) -> str:
    return (
        f"B={row['B']} n={row['n']} T={row['T']} {row['dtype']}, "
        f"{row['scored']} of {row['tokens']} tokens scored"
    )


def step_report(data: dict, images: Sequence[str]) -> str:
    """Every number of every case."""
    parts = []
    for case, rows in by_case(data["results"]).items():
        parts += [f"**{case}**: {_step_shape(rows[0])}", case_table(rows)]
    return _report("One training step", _step_header(data), data, images, parts)


def step_blocks(data: dict, links: Links) -> dict[str, str]:
    """Targets, ratios, rates, growth and the plot."""
    cases = by_case(data["results"])
    growth = {name: cases.pop(name) for name in list(cases) if name.startswith(GROWTH)}
    parts = [_step_header(data), outcome_table(outcomes(data)), *_step_tables(cases)]
    if growth:
        dtype = next(iter(growth.values()))[0]["shape"]["dtype"]
        what = f"508 tokens that differ in each list; SmolLM2's shape in {dtype}."
        parts += [growth_table(growth), what]
    parts.append(_left_out(data))
    if "time.png" in links:
        parts.append(image("time of a training step", links["time.png"]))
    return {_kind(data, "step"): joined(*parts)}


def _step_header(data: dict) -> str:
    return f"{header(data)}\nBackend of pro_trainer's loss: {data['backend']}."


_RATES = {
    "official": "official", "ours-lists": "lists", "trl-dpo": "TRL DPO",
    "trl-dpo-distinct": "TRL DPO, accelerate_trl()",
    "ours-dpo-padded": "ours DPO, padded", "ours-dpo-lists": "ours DPO, lists",
}  # fmt: skip


def _step_tables(cases: dict[str, list[dict]]) -> list[str]:
    """A line a case: ours against the official step; tokens a second and the head's share."""
    lines = [
        {"case": case, **{row["provider"]: row for row in rows if not row["wrong"]}}
        for case, rows in cases.items()
    ]

    def of(provider: str, cell: Callable[[dict], str]) -> Callable[[dict], str]:
        return lambda line: cell(line[provider]) if provider in line else ""

    def share(line: dict) -> str:
        peaks = [line.get(x, {}).get("peak_bytes") for x in ("ours-lists", "official")]
        return f"{peaks[0] / peaks[1]:.2f}x" if all(peaks) else ""

    case: Column = ("", lambda line: line["case"])
    faster = [
        ("official, s", of("official", lambda row: seconds(row["seconds"]))),
        ("padded", of("ours-padded", number("speedup", ".2f", after="x"))),
        ("lists", of("ours-lists", number("speedup", ".2f", after="x"))),
        ("lists against padded", of("ours-lists", number("vs_padded", ".2f", after="x"))),
        ("peak memory, lists", share),
    ]
    rates = [(f"{label}, tokens/s (head)", of(x, _rate)) for x, label in _RATES.items()]
    parts = [
        columns_table([case, *faster], lines),
        "One training step (forward, backward, AdamW), times as fast as the official procedure.",
    ]
    if any(cell(line) for _, cell in rates for line in lines):
        parts += [
            columns_table([case, *rates], lines),
            "Tokens of all sequences of the batch (prompts once a candidate) a second, and the "
            "share of the step spent between hidden states and loss, forward and backward. DPO "
            "(pairs, reference log-probs precomputed) is another loss.",
        ]
    return parts


def _rate(row: dict) -> str:
    """Tokens a second and the head's share, as far as they were measured."""
    share = number("head_share", ".0%")(row)
    return number("tokens_per_second", ",.0f")(row) + (f" ({share})" if share else "")


def _left_out(data: dict) -> str:
    """What the run left out for want of a GPU."""
    names = data.get("left_out")
    return f"Not measured, needs a GPU: {'; '.join(names)}." if names else ""


def _step_shape(row: dict) -> str:
    shape = row["shape"]
    tied = ", head tied to the embeddings" if shape["tied"] else ""
    return (
        f"{row['B']} lists a batch, {row['scored']} scored of {row['tokens']} tokens; Llama of "
        f"{shape['layers']} layers, H={shape['H']}, V={shape['V']}, {shape['dtype']}{tied}"
    )
