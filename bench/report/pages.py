"""From a results file to its report, its plots and its blocks in a page.

The same file always gives the same report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.engine.case import is_main
from bench.engine.lists import MODELS
from bench.engine.record import load
from bench.engine.step import GROWTH
from bench.report import frameworks, ranks, round
from bench.report.tables import (
    block_of,
    by_case,
    case_table,
    command,
    growth_table,
    header,
    milliseconds,
    not_run,
    outcome_table,
    seconds,
    table,
    update_block,
)
from bench.report.targets import outcomes
from bench.suites.filter import best, certified, shown

DOCS = Path(__file__).resolve().parents[2] / "docs"
Links = dict[str, str]  # name of a plot, and where it is from the page
TITLES = {
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
_LOSS_NOTES = """\
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
_STEP_NOTES = """\
One step: forward, backward and AdamW (fused, the same for all) on one batch of ranked lists. Every
row but those of DPO computes the same thing, `compat="official"`: before the timing, loss and every
parameter's gradient are held against the official procedure's, run once more in fp32 (*error*,
relative; gradients in norm, the worst parameter). The learning rate is 0, so that no step changes
the next one's problem. Token ids and weights are random. Lists of a case have equal lengths, so
nothing is padding; those of *HH* and *ranked* have the lengths and common prefixes of real lists
under SmolLM2's tokenizer (`bench/engine/lists.json`). Their errors, and those of *growth*, are
against our own step on padded rows.

*Official procedure*: `pro_trainer.train.official`, written from the published description: each
candidate a forward of its own over the whole batch, `log_softmax` over every position and the whole
vocabulary, no gradient checkpointing; sdpa attention and the same threads as everywhere. Hidden
states and cache, which the authors' forwards keep too, are left out of it, to its advantage; the
row *as published* has them. *Padded*: each candidate a row, one forward. *Lists*: the distinct
tokens of the batch in one row (docs/distinct.md); the default.

*DPO*, lists of two: another loss, so these rows are compared with each other only (*x TRL*), and
their errors are against DPO in plain PyTorch, in fp32. The pair's first completion is the chosen
one, beta 0.1. The reference is a frozen model of other random weights; its log-probs are computed
before the timing (by TRL itself for TRL: `precompute_ref_log_probs=True`), so no step runs or holds
it. *TRL*: `compute_loss` of a real `DPOTrainer` on a batch of its own collator, with its fused head
in chunks and the metrics (entropy, mean logits, accuracy, rewards) that it computes at every step.
Gradient checkpointing, on by default there, is off as in the other rows. On a CPU TRL's head
projects every position, on a GPU with Triton the scored ones only; it shares no prefixes. *TRL,
fused head*: with `accelerate_trl(rows="padded")`. *TRL, accelerate_trl()*: on distinct rows, too.
*pro_trainer*: `loss_type="dpo"` given the reference log-probs. Neither is run inside its training
loop.

*x faster* = official procedure / this; *of floor* = floor / (forward + backward). Ratios are
medians over rounds of times taken in the same round, all steps interleaved in one process. *Floor*:
bare matmuls, forward and both gradients, of every linear layer on the positions that the loss
depends on (prompts once, no completion's last token; the head on the scored tokens); no attention,
norms or optimizer. *Peak extra*: high water of a step in a process of its own beyond weights,
AdamW's moments and batch; *of it gradients*. *Collation*: making the batch from token lists.

*Tokens/s* = all positions of all sequences of the batch, B n (P + R), over the time of the step.
The same number of tokens for every row of a case: a prompt counts once a candidate, scored or not,
also where it is run once for all. *Head*: the step's own code from the decoder's hidden states to
the loss and back (their gradients and that of the head's weight), run by itself right after the
step in the same round, the decoder replaced by the hidden states that it once gave; its result is
held against the step's loss. *Head's share* = its time / the step's, AdamW included in the latter.
It is measured apart, so a noisy round can put it above what the step itself spent there. Where
there is no number it was not measured; the note says why.
"""


class Report(NamedTuple):
    """What is made of a suite's results file.

    Attributes:
        file: name of the report; "" where the blocks say all.
        text: the report, given the plots beside it; None where there is no file.
        blocks: what pages show, by the names of the blocks.
    """

    file: str
    text: Callable[[dict, Sequence[str]], str] | None
    blocks: Callable[[dict, Links], dict[str, str]]


def write_report(results: Path, pages: Sequence[Path] = ()) -> list[Path]:
    """Write the report and PNGs beside a results file, and its blocks in these pages.

    Without matplotlib the report has no plots and says so. A page gets the blocks that it has marks
    for.

    Raises:
        ValueError: a page without a mark of this benchmark.
    """
    data, folder = load(results), results.parent
    report, images = REPORTS[data["benchmark"]], _draw(data, folder)
    written = [folder / name for name in images or []]
    if report.text is not None:
        text = report.text(data, images or [])
        if images is None:
            text += "\nNo plots: matplotlib is not installed.\n"
        (folder / report.file).write_text(text)
        written.insert(0, folder / report.file)
    for page in pages:
        found = blocks(results, page)
        present = [name for name in found if block_of(page, name) is not None]
        if not present:
            raise ValueError(f"{page} must hold the marks of one of the blocks {list(found)}")
        for name in present:
            update_block(page, found[name], name)
    return written


def write_committed(folder: Path) -> list[Path]:
    """Reports, plots and pages of every results file under ``folder``."""
    pages = [page for page in sorted(DOCS.rglob("*.md")) if ":begin -->" in page.read_text()]
    written: list[Path] = []
    for results in committed(folder):
        names = blocks(results, DOCS / "x.md")
        own = [p for p in pages if any(block_of(p, name) is not None for name in names)]
        written += [*write_report(results, own), *own]
    return written


def committed(folder: Path) -> list[Path]:
    """Every results file under ``folder``."""
    return sorted(folder.rglob("results.json"))


def blocks(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of ``page``, by name; with the plots that are there."""
    data, folder = load(results), results.parent
    report = REPORTS[data["benchmark"]]
    link = os.path.relpath(folder.resolve(), page.resolve().parent).replace(os.sep, "/")
    found = report.blocks(data, {p.name: f"{link}/{p.name}" for p in folder.glob("*.png")})
    more = f"\n\n[All numbers]({link}/{report.file})" if report.file else ""
    return {name: text + more for name, text in found.items()}


def _draw(data: dict, folder: Path) -> list[str] | None:
    """File names of the plots, None without matplotlib."""
    try:
        from bench.report import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return plots.draw(data, folder)


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _image(name: str, where: str) -> str:
    return f"![{name.removesuffix('.png')}]({where})"


def _kind(data: dict, name: str) -> str:
    """A block's name: a page has one for each kind of machine."""
    if data["device"].startswith("cuda"):
        return f"{name}-gpu"
    return name if data["bf16_matmuls"] == "native" else f"{name}-fp32"


def _loss_report(data: dict, images: Sequence[str]) -> str:
    parts = ["# Benchmarks", header(data), command(data), ceilings_line(data), "## Targets"]
    parts += [outcome_table(outcomes(data)), _upcasts(data), *(_image(x, x) for x in images)]
    parts += ["## Numbers", _LOSS_NOTES]
    for group, title in TITLES.items():
        cases = by_case(data["results"], group)
        if cases:
            parts.append(f"### {title}")
        if group.startswith("growth") and cases:
            first = next(iter(cases.values()))[0]
            parts += [f"{_loss_shape(first)} at the first", growth_table(cases)]
            continue
        for case, rows in cases.items():
            parts += [f"**{case}**: {_loss_shape(rows[0])}", case_table(rows)]
    return _joined(*parts) + "\n"


def _loss_blocks(data: dict, links: Links) -> dict[str, str]:
    main = [rows for rows in by_case(data["results"]).values() if is_main(rows[0])]
    parts = [header(data), command(data), "### Targets", outcome_table(outcomes(data))]
    parts.append(_upcasts(data))
    if main:
        parts += ["### Forward + backward, ms (times ours)", _main_table(main)]
    real = by_case(data["results"], "real")
    if real:
        parts += ["### Hidden states and heads of real models", _main_table([*real.values()])]
    if "time.png" in links:
        parts.append(_image("time by provider", links["time.png"]))
    more = [header(data), command(data), ceilings_line(data)]
    for name in ("roofline", "memory-by-n", "errors", "entrances", "growth"):
        if f"{name}.png" in links:
            more.append(_image(name, links[f"{name}.png"]))
    return {_kind(data, "loss"): _joined(*parts), _kind(data, "measured"): _joined(*more)}


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


def _upcasts(data: dict) -> str:
    bf16 = any(row["dtype"] == "bf16" and row["group"] == "head" for row in data["results"])
    return _UPCASTS if bf16 and data["bf16_matmuls"] != "native" else ""


def _main_table(cases: list[list[dict]]) -> str:
    """A line a provider, a column a case; who ran nowhere is named under it."""

    def cell(rows: list[dict], label: str) -> str:
        row = next((r for r in rows if r["label"] == label), None)
        if row is None or row["seconds"] is None or row["wrong"]:
            return ""
        ratio = "" if row["vs_ours"] is None else f" ({row['vs_ours']:.2f}x)"
        return milliseconds(row["seconds"]) + ratio

    labels = dict.fromkeys(row["label"] for rows in cases for row in rows)
    lines = {label: [cell(rows, label) for rows in cases] for label in labels}
    ran = {label: cells for label, cells in lines.items() if any(cells)}
    text = table(["", *(_size(rows[0]) for rows in cases)], [[k, *v] for k, v in ran.items()])
    first = cases[0][0]
    if first.get("data"):
        what = f"{first['dtype']}, real lists; R positions, N of them scored."
    else:
        masked = f"{first['masked']:.0%} of the positions not scored"
        what = f"{first['dtype']}, n={first['n']}, {masked}; R positions."
    every = [row for rows in cases for row in rows]
    missing = {row["label"]: row for row in every if row["label"] not in ran}
    here = [row for row in every if row["label"] in ran and row["seconds"] is None]
    partly = [{**row, "label": f"{row['label']} at {_size(row)}"} for row in here]
    return _joined(text, what, not_run([*missing.values(), *partly]))


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


def _step_report(data: dict, images: Sequence[str]) -> str:
    parts = [
        "# One training step",
        _step_header(data),
        command(data),
        "## Targets",
        outcome_table(outcomes(data)),
    ]
    parts += [_left_out(data), *(_image(x, x) for x in images), "## Numbers", _STEP_NOTES]
    for case, rows in by_case(data["results"]).items():
        parts += [f"**{case}**: {_step_shape(rows[0])}", case_table(rows)]
    return _joined(*parts) + "\n"


def _step_blocks(data: dict, links: Links) -> dict[str, str]:
    cases = by_case(data["results"])
    growth = {name: cases.pop(name) for name in list(cases) if name.startswith(GROWTH)}
    parts = [_step_header(data), outcome_table(outcomes(data)), _step_table(cases)]
    parts += _step_rates(cases)
    if growth:
        dtype = next(iter(growth.values()))[0]["shape"]["dtype"]
        what = f"508 tokens that differ in each list; SmolLM2's shape in {dtype}."
        parts += [growth_table(growth), what]
    parts.append(_left_out(data))
    if "time.png" in links:
        parts.append(_image("time of a training step", links["time.png"]))
    return {_kind(data, "step"): _joined(*parts)}


def _step_header(data: dict) -> str:
    return f"{header(data)}\nBackend of pro_trainer's loss: {data['backend']}."


def _used(head: list[str], lines: list[list[str]]) -> str:
    """A table without the columns that are empty in every line."""
    used = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return table([head[i] for i in used], [[line[i] for i in used] for line in lines])


def _step_table(cases: dict[str, list[dict]]) -> str:
    """A line a case: seconds of the official step, and times faster and share of memory of ours."""
    head = ["", "official, s", "padded", "lists", "lists against padded", "peak memory, lists"]
    lines = []
    for case, rows in cases.items():
        row = _by_provider(rows)
        official, lists = row.get("official"), row.get("ours-lists")
        peaks = [r and r["peak_bytes"] for r in (lists, official)]
        names = ("ours-padded", "ours-lists")
        faster = [row[name]["speedup"] if name in row else None for name in names]
        faster.append(lists and lists["vs_padded"])
        lines.append([
            case,
            seconds(official and official["seconds"]),
            *("" if value is None else f"{value:.2f}x" for value in faster),
            f"{peaks[0] / peaks[1]:.2f}x" if all(peaks) else "",
        ])  # fmt: skip
    what = (
        "\n\nOne training step (forward, backward, AdamW), times as fast as the official procedure."
    )
    return _used(head, lines) + what


def _step_rates(cases: dict[str, list[dict]]) -> list[str]:
    """A line a case: tokens a second and the head's share, of PRO and of DPO steps."""
    names = {
        "official": "official", "ours-lists": "lists", "trl-dpo": "TRL DPO",
        "trl-dpo-distinct": "TRL DPO, accelerate_trl()",
        "ours-dpo-padded": "ours DPO, padded", "ours-dpo-lists": "ours DPO, lists",
    }  # fmt: skip
    head = ["", *(f"{label}, tokens/s (head)" for label in names.values())]
    lines = []
    for case, rows in cases.items():
        row = _by_provider(rows)
        lines.append([case, *(_rate(row.get(name)) for name in names)])
    if not any(cell for _, *cells in lines for cell in cells):
        return []
    what = (
        "\n\nTokens of all sequences of the batch (prompts once a candidate) a second, and the "
        "share of the step spent between hidden states and loss, forward and backward. DPO (pairs, "
        "reference log-probs precomputed) is another loss."
    )
    return [_used(head, lines) + what]


def _by_provider(rows: list[dict]) -> dict[str, dict]:
    """Rows of a case by provider, without wrong ones."""
    return {row["provider"]: row for row in rows if not row["wrong"]}


def _rate(row: dict | None) -> str:
    """Tokens a second and the head's share, as far as they were measured."""
    if row is None or row["tokens_per_second"] is None:
        return ""
    share = row["head_share"]
    return f"{row['tokens_per_second']:,.0f}" + ("" if share is None else f" ({share:.0%})")


def _left_out(data: dict) -> str:
    """What the run left out for want of a GPU."""
    names = data["left_out"]
    return f"Not measured, needs a GPU: {'; '.join(names)}." if names else ""


def _step_shape(row: dict) -> str:
    shape = row["shape"]
    tied = ", head tied to the embeddings" if shape["tied"] else ""
    return (
        f"{row['B']} lists a batch, {row['scored']} scored of {row['tokens']} tokens; Llama of "
        f"{shape['layers']} layers, H={shape['H']}, V={shape['V']}, "
        f"{shape['dtype']}{tied}"
    )


_FILTER_HEAD = ["distribution", "dtype", "rows", "mean top-1", "tau", "columns kept",
                "of the dense floor", "of no filter", "certified error", "error"]  # fmt: skip


def _filter_table(rows: list[dict]) -> str:
    def cells(row: dict) -> list[str]:
        error = max(row["error_hidden"], row["error_weight"])
        shares = [f"{row['of_floor']:.2f}", f"{row['of_plain']:.2f}"]
        kept = f"{row['columns_kept']:.1%}"
        errors = [f"{certified(row):.1e}", f"{error:.1e}"]
        what = [row["batch"], row["dtype"], str(row["scored"])]
        return [*what, f"{row['top1']:.2f}", shown(row), kept, *shares, *errors]

    return table(_FILTER_HEAD, [cells(row) for row in rows])


def _filter_report(data: dict, images: Sequence[str]) -> str:
    what = (
        f"Medians of {data['settings']['rounds']} interleaved rounds. Floor: the three dense head "
        "matmuls on the scored rows. Errors are relative to the norm of the gradient without a "
        "filter; one above the certified error is the rounding of bf16 gradients."
    )
    parts = ["# grad_filter: time against tau and error", header(data), what]
    return _joined(*parts, _filter_table(data["results"]), *(_image(x, x) for x in images)) + "\n"


def _filter_blocks(data: dict, _: Links) -> dict[str, str]:
    """For each batch the fastest run within the certified error that is asked for."""
    return {"filter": _joined(header(data), _filter_table(best(data["results"])))}


def _attach_blocks(data: dict, _: Links) -> dict[str, str]:
    def cells(row: dict) -> list[str]:
        if "note" in row:
            return [row["name"], row["note"], "", "", "", ""]
        both = [f"{row['seconds'][side][1]:.3g}" for side in ("plain", "ours")]
        losses = " / ".join(f"{x:.6g}" for x in row["losses"].values())
        return [row["name"], *both, f"{row['ratio']:.3f}x", row["wanted"], losses]

    head = ["forward + backward", "without, s", "with, s", "ratio", "target", "losses"]
    what = "bf16, 8 rows of 128 tokens, 60 % not scored."
    return {"attach": _joined(header(data), what, table(head, [*map(cells, data["results"])]))}


REPORTS = {
    "loss": Report("report.md", _loss_report, _loss_blocks),
    "step": Report("report.md", _step_report, _step_blocks),
    "filter": Report("report.md", _filter_report, _filter_blocks),
    "attach": Report("", None, _attach_blocks),
    "ranks": Report("", None, ranks.blocks),
    "gpu-round": Report("report.md", round.report, round.blocks),
    "frameworks": Report("", None, frameworks.blocks),
}
