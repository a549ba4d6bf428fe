"""What the runs found -> ``study.md``, ``study.json`` and ``study.png``; nothing is measured here.

What the page claims is put into words by comparing numbers, so it holds whatever they are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engine import record
from pro_kernels.losses import LOSSES
from pro_trainer.evaluate.compare import Difference, compare, intervals
from pro_trainer.evaluate.metrics import ListStatistics, list_statistics
from pro_trainer.evaluate.plots import draw_intervals
from pro_trainer.evaluate.tables import markdown_table
from pro_trainer.prepare.output import write_atomically, write_json
from pro_trainer.train.objective import list_losses
from pro_trainer.train.options import LossOptions
from study.run import METHODS, scores_from

_PACKAGES = ("torch", "transformers", "pro-kernels")
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


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write the page, the numbers and the plot into the folder ``out``."""
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
    write_atomically(out / "study.md", [page(results).encode()])


def measured(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Measure -> value and interval, of each method that ran; seeds are averaged list by list."""
    found = {}
    own = _by_method(runs)
    for method, of_method in own.items():
        found[method] = intervals(_mean([_statistics(run) for run in of_method]))
        found[method]["loss"] = _loss(of_method)
        if method != "base":
            ratios = [_statistics(run, own["base"][0]) for run in of_method]
            found[method]["log_ratio"] = intervals(_mean(ratios))["pairwise_accuracy"]
    return found


def differences(
    runs: Sequence[Mapping[str, Any]], base: str, methods: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """What each method measures beside ``base``."""
    own = _by_method(runs)
    known = {name: _mean([_statistics(run) for run in found]) for name, found in own.items()}
    losses = {
        name: torch.stack([_losses(run) for run in found]).mean(0) for name, found in own.items()
    }
    return {
        method: compare(known[base], known[method], (losses[base], losses[method]))
        for method in methods
        if method in known and base in known
    }


def by_length(runs: Sequence[Mapping[str, Any]]) -> float:
    """Pairwise accuracy of no model: the completion with more tokens is better."""
    (base,) = _by_method(runs)["base"]
    scores = scores_from(base)
    lengths = torch.zeros_like(scores.logps)
    for row, values in zip(lengths, base["whole_lengths"], strict=True):
        row[: len(values)] = torch.tensor(values, dtype=row.dtype)
    return list_statistics(lengths, scores.rewards, scores.mask).metrics()["pairwise_accuracy"]


def terms(runs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """SFT term and loss of the base model at n = 2, 4, ..., as a sum and as a mean."""
    scores = scores_from(_by_method(runs)["base"][0])
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


def page(results: Mapping[str, Any]) -> str:
    """The whole page, Markdown."""
    settings, runs, facts = results["settings"], results["runs"], results["facts"]
    found = measured(runs)
    seeds = {method: len(own) for method, own in _by_method(runs).items()}
    held_out = len(_by_method(runs)["base"][0]["rewards"])
    steps = settings["lists"] // settings["batch"]
    trained = [method for method in METHODS if method in found]
    rows = [
        [
            NAMES[m],
            seeds.get(m, "") if m != "base" else "",
            *(_interval(values[x]) if x in values else "" for x in (*MEASURES, "log_ratio")),
        ]
        for m, values in found.items()
    ]
    against = {
        base: differences(runs, base, [m for m in trained if m != base])
        for base in ("base", "sft", "dpo")
    }
    parts = [
        "# Study: preference losses on a real model",
        _text(
            "Written by `make study`. Every number comes from its runs, and is also in "
            "[study.json](study.json)."
        ),
        "## What was done",
        _text(
            f"The model is {results['model'][0]}, the data {results['data'][0]}: real prompts, "
            f"each with answers of many models and a reward for each answer. {held_out} lists of "
            f"{settings['candidates']} answers are held out. No method sees their prompts."
        ),
        _text(
            f"Each method trains all weights for {steps} steps of {settings['batch']} lists, "
            f"{settings['lists']} different lists in all. With one seed all methods see the same "
            f"lists. Sequences are cut to {settings['max_length']} tokens. The learning rate is "
            f"{settings['learning_rate']:g} for every method, with warm-up and cosine decay. It "
            "was not tuned for any of them, so a method that needs another rate looks worse here "
            "than it is."
        ),
        "- **SFT on the best**: cross-entropy on the best answer of each list.\n"
        "- **DPO, best and worst**: beta 0.1, the base model as reference.\n"
        "- **PRO, n**: the best, the worst and answers between them. Rewards set the "
        "temperatures.\n"
        "- **SFT term summed**: PRO with the term as the paper has it, a sum over tokens. The "
        "default is a mean.",
        _text(
            "At equal steps the methods do not read equally much: SFT reads one answer of a list, "
            "DPO two, PRO n."
        ),
        "## What was found",
        _text(
            "Held-out lists, ranked by the mean log-probability of a token. In brackets stands the "
            "95 % interval, from a bootstrap over lists. Where there are several seeds, the "
            "numbers of each list are averaged over them first."
        ),
        markdown_table(["", "seeds", *MEASURES.values(), "accuracy by log-ratio"], rows),
        _text(
            "The last column ranks by the log-ratio to the base model instead, a sum over tokens. "
            "That is what DPO trains. It tells how training moved the answers, and not which ones "
            "the model prefers."
        ),
        "![Held-out ranking by method](study.png)",
        "\n".join(findings(against, found, by_length(runs))),
        *(
            part
            for base, title in (("base", "the base model"), ("sft", "SFT"), ("dpo", "DPO"))
            if against[base]
            for part in (f"Minus {title}, on the same lists:", _difference_table(against[base]))
        ),
        "## Why the SFT term is a mean by default",
        _text(
            "The SFT term of PRO and the whole loss on the held-out lists before training, with "
            "the term as a sum over tokens (the paper) and as a mean. Of each list the best, the "
            "worst and those evenly between them are taken."
        ),
        markdown_table(["candidates", "term, summed", "loss", "term, mean", "loss"], terms(runs)),
        "## Each seed",
        "Pairwise accuracy, and minutes of training (with whatever else ran on the machine):",
        markdown_table(["", "seed", "pairwise accuracy", "minutes"], _by_seed(runs)),
        "## How it was run",
        f"    {facts['command']}",
        _text(
            f"{facts['machine']}; {facts['precision']}; {facts['processes']} processes of one "
            "thread. "
            + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            + f", Python {facts['python']}; commit {(facts['commit'] or 'unknown')[:12]}"
            + (" with uncommitted changes" if facts["modified"] else "")
            + f"; {facts['date'][:10]}."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def findings(
    against: Mapping[str, Mapping[str, Mapping[str, Difference]]],
    found: Mapping[str, Mapping[str, tuple[float, ...]]],
    length: float,
) -> list[str]:
    """What the intervals say of pairwise accuracy, and what they do not."""
    lines = []
    for base, title in (("base", "the base model"), ("sft", "SFT"), ("dpo", "DPO")):
        by_verdict: dict[str, list[str]] = {}
        for method, measures in against[base].items():
            verdict = _verdict(measures["pairwise_accuracy"])
            by_verdict.setdefault(verdict, []).append(NAMES[method])
        for verdict, names in by_verdict.items():
            lines.append(f"- {verdict} {title} in pairwise accuracy: {'; '.join(names)}.")
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
        **record.facts(torch.device("cpu"), _PACKAGES),
        "command": command,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "processes": processes,
    }


def _by_method(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name in ("base", *METHODS):
        if own := [run for run in runs if run["method"] == name]:
            found[name] = own
    return found


def _statistics(run: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> ListStatistics:
    """By mean log-probability, or by the log-ratio to ``base``, which is what DPO trains."""
    scores = scores_from(run)
    known = scores.ranked_by(True) if base is None else scores.logps - scores_from(base).logps
    return list_statistics(known, scores.rewards, scores.mask)


def _mean(statistics: Sequence[ListStatistics]) -> ListStatistics:
    columns = zip(*statistics, strict=True)
    return ListStatistics(*(torch.stack([x.double() for x in c]).mean(0) for c in columns))


def _losses(run: Mapping[str, Any]) -> torch.Tensor:
    return list_losses(scores_from(run), LossOptions())


def _loss(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    losses = torch.stack([_losses(run) for run in runs]).mean(0)
    statistics = _statistics(runs[0])
    found = compare(statistics, statistics, (torch.zeros_like(losses), losses))["loss"]
    return found.tuned, found.low, found.high


def _interval(value: Sequence[float]) -> str:
    digits = 3 if abs(value[0]) < 10 else 1
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def _difference_table(found: Mapping[str, Mapping[str, Difference]]) -> str:
    rows = [
        [NAMES[m], *(_interval((x[n].change, x[n].low, x[n].high)) for n in MEASURES)]
        for m, x in found.items()
    ]
    return markdown_table(["", *MEASURES.values()], rows)


def _by_seed(runs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [
        [
            NAMES[run["method"]],
            run["seed"],
            f"{_statistics(run).metrics()['pairwise_accuracy']:.3f}",
            f"{run['seconds'] / 60:.1f}",
        ]
        for own in _by_method(runs).values()
        for run in own
        if run["method"] != "base"
    ]


def _verdict(difference: Difference) -> str:
    if difference.low > 0:
        return "Better than"
    return "Worse than" if difference.high < 0 else "Not told apart from"


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)
