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
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/margins": "rewards/margins",
    "rewards/accuracies": "rewards/accuracies",
}
_BY_SIZE = {
    "candidates": "candidates",
    "prompts": "lists",
    "pairs": "pairs",
    "pairwise_accuracy": "pairwise accuracy",
    "top1_accuracy": "top-1 accuracy",
    "kendall_tau": "Kendall's tau-b",
    "ndcg": "NDCG",
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


def evaluation_report(result: Mapping[str, Any]) -> str:
    """What ``evaluate_files`` found, as Markdown: the whole, its terms, its parts, the answers."""
    metrics = result["metrics"]
    terms = [name for name in metrics if name.startswith("rank_loss_") or name == "sft_loss"]
    terms.sort(key=lambda name: (name == "sft_loss", len(name), name))
    others = [name for name in metrics if name not in _NAMES and name not in terms]
    overall = [name for name in _NAMES if name in metrics] + others
    parts = [
        f"# Evaluation of {result['model']}",
        markdown_table(["metric", "value"], [[_NAMES.get(n, n), metrics[n]] for n in overall]),
    ]
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
        found = result["generation"]
        found = {**found, "bleu": round(found["bleu"], 2)}  # of short answers it can be 1e-25
        rows = [[text, found[name]] for name, text in _GENERATION.items() if name in found]
        parts += ["## Greedy answers", markdown_table(["measure", "value"], rows)]
    return "\n\n".join(parts) + "\n"
