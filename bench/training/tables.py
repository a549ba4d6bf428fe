"""Markdown of the training benchmark from a results file."""

from __future__ import annotations

from bench.tables import (
    growth_table,
    header,
    megabytes,
    number,
    outcome_table,
    seconds,
    table,
    used_columns,
)
from bench.training.cases import GROWTH
from bench.training.targets import outcomes

BLOCK = "training"
_NOTES = """\
One step: forward, backward and AdamW (fused, the same for all) on one batch of ranked lists. Every
row but those of DPO computes the same thing, `compat="official"`: before the timing, loss and every
parameter's gradient are held against the official procedure's, run once more in fp32 (*error*,
relative; gradients in norm, the worst parameter). The learning rate is 0, so that no step changes
the next one's problem. Token ids and weights are random. Lists of a case have equal lengths, so
nothing is padding; those of *HH* and *ranked* have the lengths and common prefixes of real lists
under SmolLM2's tokenizer (`bench/training/shapes.json`). Their errors, and those of *growth*, are
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


def full_report(data: dict, images: list[str]) -> str:
    """The whole report; ``images`` are file names beside it."""
    parts = ["# One training step", _header(data), "## Targets"]
    parts.append(outcome_table(outcomes(data["results"])))
    parts += not_measured(data)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in images]
    parts += ["## Numbers", _NOTES]
    for case, rows in _cases(data["results"]).items():
        parts += [f"**{case}**: {_shape(rows[0])}", case_table(rows)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def blocks(data: dict, links: dict[str, str]) -> dict[str, str]:
    """What a page shows: machine, targets, main table, plot."""
    rows = data["results"]
    cases = _cases(rows)
    growth = {name: cases.pop(name) for name in list(cases) if name.startswith(GROWTH)}
    found = [outcome for outcome in outcomes(rows) if outcome.met is not None]
    parts = [_header(data), outcome_table(found), _main_table(cases), *_rates(cases)]
    if growth:
        dtype = next(iter(growth.values()))[0]["shape"]["dtype"]
        what = f"508 tokens that differ in each list; SmolLM2's shape in {dtype}."
        parts.append(f"{growth_table(growth)}\n\n{what}")
    parts += not_measured(data)
    if "time.png" in links:
        parts.append(f"![time of a training step]({links['time.png']})")
    # A page has a block for each kind of machine.
    emulated = any("SmolLM2 in fp32" in name for name in cases)
    block = f"{BLOCK}-fp32" if emulated else BLOCK
    return {block: "\n\n".join(part.strip("\n") for part in parts)}


def case_table(rows: list[dict]) -> str:
    """One case: a line a provider, its trouble in the last column where there are no numbers."""
    head = [
        "", "step, s", "quartiles", "tokens/s", "forward + backward, s", "AdamW, s", "x faster",
        "x faster without AdamW", "x TRL", "of floor", "head, s", "head's share", "peak extra MB",
        "of it gradients MB", "of official's peak", "collation ms", "of the step", "error: loss",
        "gradient", "note",
    ]  # fmt: skip
    official = next((r["peak_bytes"] for r in rows if r["provider"] == "official"), None)
    lines = []
    for row in rows:
        timed = row["seconds"] is not None
        peak = row["peak_bytes"]
        same = row["loss_type"] == "pro"
        lines.append([
            row["label"],
            seconds(row["seconds"]),
            f"{seconds(row['q1'])} - {seconds(row['q3'])}" if timed else "",
            number(row["tokens_per_second"], ",.0f"),
            seconds(row["gradient_seconds"]),
            seconds(row["optimizer_seconds"]),
            number(row["speedup"], ".2f"),
            number(row["speedup_gradient"], ".2f"),
            number(row["vs_trl"], ".2f"),
            number(row["of_floor"], ".2f"),
            seconds(row["head_seconds"]),
            number(row["head_share"], ".0%"),
            megabytes(peak),
            megabytes(row["gradient_bytes"] if peak is not None else None),
            number(peak / official if peak and official and same else None, ".2f"),
            number(row["collate_seconds"] and row["collate_seconds"] * 1e3, ".2f"),
            number(row["collate_share"], ".2%"),
            number(row["loss_error"], ".0e"),
            number(row["grad_error"], ".0e"),
            row["note"].replace("|", "\\|"),
        ])  # fmt: skip
    return table(*used_columns(head, lines))


def _header(data: dict) -> str:
    return f"{header(data)}\nBackend of pro_trainer's loss: {data['backend']}."


def _main_table(cases: dict[str, list[dict]]) -> str:
    """A line a case: seconds of the official step, and times faster and share of memory of ours."""
    head = ["", "official, s", "padded", "lists", "lists against padded", "peak memory, lists"]
    lines = []
    for case, rows in cases.items():
        row = summary_rows(rows)
        official, lists = row.get("official"), row.get("ours-lists")
        peaks = [r and r["peak_bytes"] for r in (lists, official)]
        names = ("ours-padded", "ours-lists")
        faster = [row[name]["speedup"] if name in row else None for name in names]
        faster.append(lists and lists["vs_padded"])
        lines.append([
            case,
            seconds(official and official["seconds"]),
            *(number(value, ".2f") + ("x" if value else "") for value in faster),
            f"{peaks[0] / peaks[1]:.2f}x" if all(peaks) else "",
        ])  # fmt: skip
    what = (
        "\n\nOne training step (forward, backward, AdamW), times as fast as the official procedure."
    )
    return table(*used_columns(head, lines)) + what


def _rates(cases: dict[str, list[dict]]) -> list[str]:
    """A line a case: tokens a second and the head's share, of PRO and of DPO steps."""
    names = {
        "official": "official", "ours-lists": "lists", "trl-dpo": "TRL DPO",
        "trl-dpo-distinct": "TRL DPO, accelerate_trl()",
        "ours-dpo-padded": "ours DPO, padded", "ours-dpo-lists": "ours DPO, lists",
    }  # fmt: skip
    head = ["", *(f"{label}, tokens/s (head)" for label in names.values())]
    lines = []
    for case, rows in cases.items():
        row = summary_rows(rows)
        lines.append([case, *(_rate(row.get(name)) for name in names)])
    if not any(cell for _, *cells in lines for cell in cells):
        return []
    what = (
        "\n\nTokens of all sequences of the batch (prompts once a candidate) a second, and the "
        "share of the step spent between hidden states and loss, forward and backward. DPO (pairs, "
        "reference log-probs precomputed) is another loss."
    )
    return [table(*used_columns(head, lines)) + what]


def summary_rows(rows: list[dict]) -> dict[str, dict]:
    """Rows of a case by provider, without wrong ones."""
    return {row["provider"]: row for row in rows if not row["wrong"]}


def _rate(row: dict | None) -> str:
    """Tokens a second and the head's share, as far as they were measured."""
    if row is None or row["tokens_per_second"] is None:
        return ""
    share = row["head_share"]
    return f"{row['tokens_per_second']:,.0f}" + ("" if share is None else f" ({share:.0%})")


def not_measured(data: dict) -> list[str]:
    """What the run left out for want of a GPU."""
    names = data["left_out"]
    return [f"Not measured, needs a GPU: {'; '.join(names)}."] if names else []


def _shape(row: dict) -> str:
    shape = row["shape"]
    tied = ", head tied to the embeddings" if shape["tied"] else ""
    return (
        f"{row['B']} lists a batch, {row['scored']} scored of {row['tokens']} tokens; Llama of "
        f"{shape['layers']} layers, H={shape['H']}, V={shape['V']}, "
        f"{shape['dtype']}{tied}"
    )


def _cases(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found
