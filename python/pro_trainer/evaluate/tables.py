"""Tables of an evaluation in Markdown, aligned so that they read well in a terminal too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {  # metric -> how it is called, in the order of the table
    "prompts": "lists",
    "pairs": "pairs of different reward",
    "pairwise_accuracy": "pairwise accuracy",
    "top1_accuracy": "top-1 accuracy",
    "kendall_tau": "Kendall's tau-b",
    "ndcg": "NDCG",
    "best_accuracy": "best against the rest, accuracy",
    "best_margin": "best against the rest, margin",
    "loss": "loss",
    **{f"rewards/{x}": f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")},
}
_BY_SIZE = {
    "candidates": "candidates",
    "prompts": "lists",
    "pairs": "pairs",
    **{x: _NAMES[x] for x in ("pairwise_accuracy", "top1_accuracy", "kendall_tau", "ndcg")},
    "best_margin": "margin of the best",
}
_BY_GAP = {
    "gap_from": "gap from",
    "gap_to": "to",
    "pairs": "pairs",
    "pairwise_accuracy": "pairwise accuracy",
}
_GENERATION = {
    "prompts": "prompts answered",
    "bleu": "BLEU against the best completion",
    "reward": "mean reward of the answers",
    "best_completion_reward": "mean reward of the best completions",
    "win_rate": "answers with the higher reward (share)",
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is set left, numbers right, NaN is a dash."""
    cells = [[str(name) for name in header], *([cell(x) for x in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in cells
    ]
    rule = "|" + "|".join(
        ("-" * (width + 2)) if i == 0 else ("-" * (width + 1) + ":")
        for i, width in enumerate(widths)
    )
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def cell(value: Any) -> str:
    """Counts with separators, other numbers to four significant places, NaN as a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or not value else f"{value:.4g}"


def change_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What training changed, from the metrics before and after it."""
    rows = [
        [_NAMES[name], before[name], after[name], _signed(after[name] - before[name])]
        for name in _NAMES
        if name in before and name in after and name not in ("prompts", "pairs")
    ]
    return markdown_table(["held-out lists", "before", "after", "difference"], rows)


def evaluation_report(result: Mapping[str, Any]) -> str:
    """What ``evaluate_files`` found, as Markdown: the whole, its terms, its parts, the answers."""
    metrics, base = result["metrics"], result.get("base_metrics")
    terms = [name for name in metrics if name.startswith("rank_loss_") or name == "sft_loss"]
    terms.sort(key=lambda name: (name == "sft_loss", len(name), name))
    others = [name for name in metrics if name not in _NAMES and name not in terms]
    overall = [name for name in _NAMES if name in metrics] + others
    if base is None:
        title = f"# Evaluation of {result['model']}"
        whole = markdown_table(
            ["metric", "value"], [[_NAMES.get(n, n), metrics[n]] for n in overall]
        )
    else:
        title = f"# Evaluation of {result['model']} against {result['base']}"
        whole = _comparison_table(metrics, base, result["comparison"], overall)
    parts = [title, whole]
    if terms:
        rows = [[name.replace("_", " "), metrics[name]] for name in terms]
        parts += ["## Terms of the loss", markdown_table(["term, weighted", "mean"], rows)]
    for title, columns, key in (
        ("## By number of candidates", _BY_SIZE, "by_candidates"),
        ("## Pairs by reward gap", _BY_GAP, "by_reward_gap"),
    ):
        if result[key]:
            rows = [[row[name] for name in columns] for row in result[key]]
            parts += [title, markdown_table(list(columns.values()), rows)]
    if "generation" in result:
        found = [result[key] for key in ("base_generation", "generation") if key in result]
        found = [{**x, "bleu": round(x["bleu"], 2)} for x in found]  # short answers: 1e-25
        rows = [[text, *(x[n] for x in found)] for n, text in _GENERATION.items() if n in found[0]]
        header = ["measure", "base", "tuned"] if len(found) == 2 else ["measure", "value"]
        parts += ["## Greedy answers", markdown_table(header, rows)]
    return "\n\n".join(parts) + "\n"


def side_by_side(result: Mapping[str, Any], at_most: int | None = None) -> str:
    """Prompts with the answers of both models (of one, where there is no base)."""
    found = {
        name: result[key]["answers"]
        for name, key in (("base", "base_generation"), ("tuned", "generation"))
        if key in result
    }
    lines = []
    for number, row in enumerate(found["tuned"][:at_most]):
        lines += [f"--- prompt {number + 1}", _plain(row["prompt"])]
        for name, rows in found.items():
            lines += [f"--- {name}", rows[number]["answer"].strip()]
    left = len(found["tuned"]) - len(found["tuned"][:at_most])
    return "\n".join([*lines, *([f"({left} more in eval.md)"] if left else [])])


def _comparison_table(
    metrics: Mapping[str, float],
    base: Mapping[str, float],
    comparison: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
) -> str:
    rows = []
    for name in names:
        row = [_NAMES.get(name, name), base[name], metrics[name], "", ""]
        if name not in ("prompts", "pairs"):
            row[3] = _signed(metrics[name] - base[name])
        if name in comparison:
            found = comparison[name]
            row[4] = f"{_signed(found['low'])} to {_signed(found['high'])}"
        rows.append(row)
    return markdown_table(["metric", "base", "tuned", "difference", "95 % interval"], rows)


def _signed(value: float) -> str:
    return cell(value) if math.isnan(value) or value < 0 else f"+{cell(value)}"


def _plain(prompt: Any) -> str:
    """A prompt as it is read: a string, or the turns of a chat."""
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
