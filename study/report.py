"""What the runs found -> ``study.md``, ``study.json`` and ``study.png``; nothing is measured here.

What the page claims is put into words by comparing numbers, so it holds whatever they are.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.engine import record
from bench.report.tables import update_block
from pro_kernels.losses import LOSSES
from pro_trainer.evaluate.compare import Difference, compare, intervals
from pro_trainer.evaluate.metrics import ListStatistics, list_statistics
from pro_trainer.evaluate.plots import draw_intervals
from pro_trainer.evaluate.tables import markdown_table
from pro_trainer.prepare.output import write_json
from pro_trainer.train.objective import list_losses
from pro_trainer.train.options import LossOptions
from study.run import METHODS, scores_from

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study.md"
PACKAGES = ("torch", "transformers", "pro-kernels")
NAMES = {
    "base": "base model",
    "sft": "SFT on the best",
    "dpo": "DPO, best and worst",
    "pro_2": "PRO, n = 2",
    "pro_4": "PRO, n = 4",
    "pro_8": "PRO, n = 8",
    "pro_4_sum": "PRO, n = 4, SFT term summed",
    "pro_4_filter": "PRO, n = 4, with grad_filter",
}
MEASURES = {
    "pairwise_accuracy": "pairwise accuracy",
    "kendall_tau": "Kendall's tau-b",
    "ndcg": "NDCG",
    "loss": "PRO loss",
}
_BASES = {"base": "the base model", "sft": "SFT", "dpo": "DPO"}
Runs = Sequence[Mapping[str, Any]]
Differences = Mapping[str, Mapping[str, Difference]]


class Found(NamedTuple):
    """What a method did on each list, averaged over its seeds."""

    statistics: ListStatistics  # by mean log-probability
    log_ratios: ListStatistics  # by the log-ratio to the base model, which is what DPO trains
    losses: torch.Tensor


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write the numbers, the plot and the page's blocks into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", results)
    found = measured(results["runs"])
    draw_intervals(
        out / "study.png",
        {
            label: {NAMES[m]: value[name] for m, value in found.items() if name in value}
            for name, label in list(MEASURES.items())[:2]
        },
        {MEASURES["pairwise_accuracy"]: ("longer is better", by_length(results["runs"]))},
    )
    page = out / PAGE.name
    if not page.exists():
        shutil.copy(PAGE, page)  # the numbers in it are those of its blocks
    for name, text in blocks(results).items():
        update_block(page, text, name)


def found_by_method(runs: Runs) -> dict[str, Found]:
    """Of each method that ran, the base model first."""
    (base,) = (run for run in runs if run["method"] == "base")
    reference, found = scores_from(base).logps, {}
    for method in ("base", *METHODS):
        own = [scores_from(run) for run in runs if run["method"] == method]
        if own:
            ranked = [list_statistics(x.ranked_by(True), x.rewards, x.mask) for x in own]
            moved = [list_statistics(x.logps - reference, x.rewards, x.mask) for x in own]
            losses = torch.stack([list_losses(x, LossOptions()) for x in own]).mean(0)
            found[method] = Found(_mean(ranked), _mean(moved), losses)
    return found


def _mean(statistics: Sequence[ListStatistics]) -> ListStatistics:
    columns = zip(*statistics, strict=True)
    return ListStatistics(*(torch.stack([x.double() for x in c]).mean(0) for c in columns))


def measured(runs: Runs) -> dict[str, dict[str, tuple[float, ...]]]:
    """Measure -> value and interval, of each method that ran."""
    measures = {}
    for method, (ranked, moved, losses) in found_by_method(runs).items():
        loss = compare(ranked, ranked, (torch.zeros_like(losses), losses))["loss"]
        measures[method] = intervals(ranked) | {"loss": loss[1:]}
        if method != "base":
            measures[method]["log_ratio"] = intervals(moved)["pairwise_accuracy"]
    return measures


def by_length(runs: Runs) -> float:
    """Pairwise accuracy of no model: the completion with more tokens is better."""
    scores = scores_from(runs[0])
    lengths = torch.zeros_like(scores.logps)
    for row, values in zip(lengths, runs[0]["whole_lengths"], strict=True):
        row[: len(values)] = torch.tensor(values, dtype=row.dtype)
    return list_statistics(lengths, scores.rewards, scores.mask).metrics()["pairwise_accuracy"]


def terms(runs: Runs) -> list[list[Any]]:
    """SFT term and loss of the base model at n = 2, 4, ..., as a sum and as a mean."""
    scores = scores_from(runs[0])
    whole = scores.mask.all(1)
    order = scores.rewards[whole].argsort(dim=1, descending=True, stable=True)
    most, rows = order.shape[1], []
    for n in (n for n in (2, 4, 8) if n <= most):
        at = order[:, [round(i * (most - 1) / (n - 1)) for i in range(n)]]
        logps, lengths, rewards = (
            x[whole].gather(1, at) for x in (scores.logps, scores.lengths, scores.rewards)
        )
        row: list[Any] = [n]
        for reduction in ("sum", "mean"):
            loss, found = LOSSES["pro"](
                logps, lengths, rewards=rewards, sft_reduction=reduction, equal_rewards="keep"
            )
            row += [f"{found['sft_loss'].item():.1f}", f"{loss.item():.1f}"]
        rows.append(row)
    return rows


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page, Markdown."""
    settings, runs, facts = results["settings"], results["runs"], results["facts"]
    given = (
        f"The model is {results['model'][0]}, the data {results['data'][0]}: real prompts, each "
        f"with answers of many models and a reward for each answer. {len(runs[0]['rewards'])} "
        f"lists of {settings['candidates']} answers are held out. No method sees their prompts.",
        f"Each method trains all weights for {settings['lists'] // settings['batch']} steps of "
        f"{settings['batch']} lists, {settings['lists']} different lists in all. With one seed all "
        f"methods see the same lists. Sequences are cut to {settings['max_length']} tokens. The "
        f"learning rate is {settings['learning_rate']:g} for every method, with warm-up and cosine "
        "decay. It was not tuned for any of them, so a method that needs another rate looks worse "
        "here than it is.",
    )
    machine = f"{facts['machine']}; {facts['precision']}; {facts['processes']} processes of one"
    how = f"{machine} thread. {provenance(facts, ', Python ' + facts['python'])}"
    seeds = [
        [NAMES[run["method"]], run["seed"], _accuracy(run), f"{run['seconds'] / 60:.1f}"]
        for method in METHODS
        for run in runs
        if run["method"] == method
    ]
    known, found = found_by_method(runs), measured(runs)
    against = {
        base: {
            method: compare(known[base].statistics, x.statistics, (known[base].losses, x.losses))
            for method, x in known.items()
            if method not in ("base", base)
        }
        for base in _BASES
        if base in known
    }
    tables = [_differences(base, x) for base, x in against.items() if x]
    return {
        "study.given": "\n\n".join(map(_text, given)),
        "study.measured": _measures(found, [run["method"] for run in runs]),
        "study.found": "\n\n".join(["\n".join(findings(against, found, by_length(runs))), *tables]),
        "study.terms": markdown_table(
            ["candidates", "term, summed", "loss", "term, mean", "loss"], terms(runs)
        ),
        "study.seeds": markdown_table(["", "seed", "pairwise accuracy", "minutes"], seeds),
        "study.run": f"    {facts['command']}\n\n{_text(how)}",
    }


def findings(
    against: Mapping[str, Differences],
    found: Mapping[str, Mapping[str, tuple[float, ...]]],
    length: float,
) -> list[str]:
    """What the intervals say of pairwise accuracy, and what they do not."""
    lines = []
    for base, methods in against.items():
        by_verdict: dict[str, list[str]] = {}
        for method, measures in methods.items():
            verdict = _verdict(measures["pairwise_accuracy"])
            by_verdict.setdefault(verdict, []).append(NAMES[method])
        for verdict, names in by_verdict.items():
            lines.append(f"- {verdict} {_BASES[base]} in pairwise accuracy: {'; '.join(names)}.")
    best = max(found, key=lambda m: found[m]["pairwise_accuracy"][0])
    value = found[best]["pairwise_accuracy"][0]
    word = "more" if value > length else "less"
    lines.append(
        f"- The highest accuracy is that of {NAMES[best]}, {value:.3f}. To call the longer answer "
        f"better is right for {length:.3f} of the pairs. The model tells {word} than length."
    )
    if value < 0.5:
        lines.append(
            "- No method reaches one half: the worse answer of a pair is still the likelier one "
            "more often than not."
        )
    ratios = {m: x["log_ratio"][0] for m, x in found.items() if "log_ratio" in x}
    if ratios:
        order = sorted(ratios, key=ratios.__getitem__, reverse=True)
        shown = ", ".join(f"{NAMES[m]} {ratios[m]:.3f}" for m in order)
        lines.append(f"- By log-ratio, from the highest: {shown}.")
    return lines


def facts(processes: int, command: str) -> dict[str, Any]:
    """On what the study runs."""
    bf16 = torch.cpu._is_avx512_bf16_supported()
    return {
        **record.facts(torch.device("cpu"), PACKAGES),
        "command": command,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "processes": processes,
    }


def provenance(facts: Mapping[str, Any], more: str = "") -> str:
    """Versions, commit and date of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    changed = " with uncommitted changes" if more and facts["modified"] else ""
    commit = (facts["commit"] or "unknown")[:12]
    return f"{versions}{more}; commit {commit}{changed}; {facts['date'][:10]}."


def _measures(found: Mapping[str, Mapping[str, tuple[float, ...]]], ran: Sequence[str]) -> str:
    columns = {**MEASURES, "log_ratio": "accuracy by log-ratio"}
    rows = [
        [NAMES[m], "" if m == "base" else ran.count(m), *(_interval(x.get(c)) for c in columns)]
        for m, x in found.items()
    ]
    return markdown_table(["", "seeds", *columns.values()], rows)


def _differences(base: str, found: Differences) -> str:
    rows = [
        [NAMES[m], *(_interval((x[n].change, x[n].low, x[n].high)) for n in MEASURES)]
        for m, x in found.items()
    ]
    table = markdown_table(["", *MEASURES.values()], rows)
    return f"Minus {_BASES[base]}, on the same lists:\n\n{table}"


def _interval(value: Sequence[float] | None) -> str:
    if value is None:
        return ""
    digits = 3 if abs(value[0]) < 10 else 1
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def _accuracy(run: Mapping[str, Any]) -> str:
    scores = scores_from(run)
    found = list_statistics(scores.ranked_by(True), scores.rewards, scores.mask)
    return f"{found.metrics()['pairwise_accuracy']:.3f}"


def _verdict(difference: Difference) -> str:
    if difference.low > 0:
        return "Better than"
    return "Worse than" if difference.high < 0 else "Not told apart from"


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)
