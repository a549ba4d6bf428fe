"""Results of the study -> ``study.md``, ``study.json`` and the plots; nothing is measured here.

What the page claims is put into words by comparing numbers, so it holds whatever they are.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pro_trainer.evaluate.tables import markdown_table
from study.plots import LABELS, METHODS, STYLES, draw_known, draw_real, replace_file

Results = dict[str, Any]
REAL_COMMAND = "python -m study --out docs --real-data LISTS.jsonl.gz"
_MEASURES = ("greedy_reward", "sampled_reward", "pairwise_accuracy", "kendall_tau")
_RANKING = ("pairwise_accuracy", "kendall_tau", "top1_accuracy")


def write(results: Results, out: Path) -> None:
    """Write the page, the numbers and the plots into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    draw_known(out / "study.png", results["known"])
    if results["real"]:
        draw_real(out / "study-real.png", results["real"])
    numbers, text = json.dumps(results, indent=1) + "\n", page(results)
    replace_file(out / "study.json", lambda part: part.write_text(numbers, encoding="utf-8"))
    replace_file(out / "study.md", lambda part: part.write_text(text, encoding="utf-8"))


def page(results: Results) -> str:
    """The whole page, Markdown."""
    known, real = results["known"], results["real"]
    parts = [
        "# Study: PRO against SFT on the best, and longer lists",
        _text(
            "Written by `python -m study`; every number comes from that run and is "
            "also in [study.json](study.json)."
        ),
        "## Under a known reward",
        *_known_set_up(known),
        _summary_table(known),
        "Minus SFT on the best of as many, seed by seed:",
        _advantage_table(known),
        findings(known),
        "![Reward and ranking accuracy by n](study.png)",
        "Every learning rate tried: greedy reward, mean over the seeds of the choice.",
        _rates_table(known),
        "## On real ranked lists",
        *(_real_parts(real) if real else ["Not part of this run."]),
        _text(
            f"`{REAL_COMMAND}` runs both parts, this one on any file of ranked lists with rewards."
        ),
        "## How it was run",
        *_provenance(results),
    ]
    return "\n\n".join(parts) + "\n"


def findings(known: Results) -> str:
    """The two claims, PRO ahead and longer lists better, as the numbers have them."""
    lines = []
    for name in ("greedy_reward", "sampled_reward"):
        sizes: dict[str, list[int]] = {}
        for row in known["advantages"]:
            if row["method"] == "pro":
                sizes.setdefault(_verdict(*row[name]), []).append(row["candidates"])
        words = "; ".join(f"{word} at n = {_listed(ns)}" for word, ns in sizes.items())
        lines.append(f"- {LABELS[name].capitalize()}: PRO is {words}.")
    for method in STYLES:
        rows = [row for row in known["summary"] if row["method"] == method]
        ns = " → ".join(str(row["candidates"]) for row in rows)
        for name in ("greedy_reward", "sampled_reward") if rows else ():
            means = " → ".join(f"{row[name][0]:.2f}" for row in rows)
            lines.append(f"- {METHODS[method]}, {LABELS[name]}, n = {ns}: {means}.")
    return "\n".join(lines)


def plus_minus(value: Sequence[float], sign: bool = False) -> str:
    """Mean ± standard error; the mean alone where there is no error."""
    mean, error = value
    text = f"{mean:+.3f}" if sign else f"{mean:.3f}"
    return text if error != error else f"{text} ± {error:.3f}"


def _known_set_up(known: Results) -> list[str]:
    settings, clones = known["settings"], known["clones"]
    best = {
        n: fmean(clone["best_of_n_reward"][str(n)] for clone in clones)
        for n in settings["candidates"]
    }
    samples = ", ".join(f"{mean:.2f} (best of {n})" for n, mean in best.items())
    behaviour = fmean(clone["behaviour_reward"] for clone in clones)
    rates = _listed([f"{rate:g}" for rate in settings["learning_rates"]])
    return [
        _text(
            "A prompt is five letters, the right answer moves each three places round a ring of "
            "twelve, and the reward (0 to 5) adds up how near each letter comes. The behaviour "
            "policy writes answers of mixed quality: some letters it mostly gets wrong, some "
            "answers are written with less care, and what it does instead is mostly to copy the "
            "letter, for which there is no reward (`python/pro_trainer/study/task.py`). Mean "
            f"reward of its answers: {behaviour:.2f}; of those trained on: {samples}. An answer "
            "whose reward its list has already is drawn again, so there are no ties."
        ),
        _text(
            f"A byte-level Llama of {clones[0]['parameters']:,} parameters is trained on "
            f"{settings['behaviour_prompts']:,} answers of the policy (the clone). From there, on "
            f"{settings['train_prompts']:,} other prompts with n = "
            f"{_listed(settings['candidates'])} answers each (a longer list holds the shorter):"
        ),
        "- **SFT**: cross-entropy, mean over tokens, on the best of the n;\n- **PRO**: "
        f'`loss_type="pro"`, `temperature="reward"`, `sft_weight` {settings["sft_weight"]}, on all '
        "n, as in the paper;\n- **PRO, constant SFT term**: with `sft_weight` "
        f"{settings['sft_weight']} / (n - 1)². The loss multiplies the term by (n - 1)²,\n  so "
        "longer lists otherwise also mean more SFT (at n = 2 this is PRO);\n- **PRO, constant SFT "
        'term, temperature 1**: with `temperature="1"` too. Temperatures from reward gaps\n  make '
        "the entries of the denominator exp(s · gap), s < 0 the mean log-probability: the larger "
        "the gap, the\n  smaller the entry, so that a longer list is mostly about candidates of "
        "nearly the same reward.",
        "The last two were added when trial runs on another seed had PRO fall with n.",
        _text(
            "All are runs of `PROTrainer` (SFT on lists of one candidate, which leaves the SFT "
            f"term) with the same prompts in the same order, {settings['steps']} steps of "
            f"{settings['batch']} prompts, AdamW, warm-up and cosine decay. At equal steps PRO "
            "reads n answers a prompt and SFT one. The learning rate is chosen for each method "
            f"and n, always from {rates}, by the greedy reward on "
            f"{len(settings['choice_seeds'])} further seeds, which are not reported."
        ),
        _text(
            f"Measured on {settings['held_out_prompts']} held-out prompts: the true reward of "
            "greedy answers and of samples at temperature 1, and how log-probabilities rank "
            f"{max(settings['candidates'])} answers of the policy. Mean ± standard error over "
            f"{len(settings['seeds'])} seeds, each with its own model, data and held-out prompts:"
        ),
    ]


def _summary_table(known: Results) -> str:
    rows = [
        [
            METHODS[row["method"]],
            row["candidates"] or "",
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            *(plus_minus(row[name]) for name in _MEASURES),
        ]
        for row in known["summary"]
    ]
    return markdown_table(["", "n", "learning rate", *(LABELS[x] for x in _MEASURES)], rows)


def _advantage_table(known: Results) -> str:
    rows = [
        [
            METHODS[row["method"]],
            row["candidates"],
            *(plus_minus(row[name], sign=True) for name in _MEASURES),
        ]
        for row in known["advantages"]
    ]
    return markdown_table(["", "n", *(LABELS[name] for name in _MEASURES)], rows)


def _rates_table(known: Results) -> str:
    settings = known["settings"]
    rewards: dict[tuple[str, int], dict[float, list[float]]] = {}
    for run in known["choices"]:
        by_rate = rewards.setdefault((run["method"], run["candidates"]), {})
        by_rate.setdefault(run["learning_rate"], []).append(run["greedy_reward"])
    rates = settings["learning_rates"]
    rows = [
        [METHODS[method], n, *(f"{fmean(rewards[method, n][rate]):.2f}" for rate in rates)]
        for method in STYLES
        for n in settings["candidates"]
        if (method, n) in rewards
    ]
    return markdown_table(["", "n", *(f"{rate:g}" for rate in rates)], rows)


def _real_parts(real: Results) -> list[str]:
    settings, start, runs = real["settings"], real["pretrain"], real["runs"]
    nats = " to ".join(f"{value:.2f}" for value in start["nats_a_token"])
    rows = [
        ["longer is better (no model)", *_ranks(start["by_length"])],
        ["before PRO", *_ranks(runs[0]["summary"]["all"]["before"])],
        *([_name(run), *_ranks(run["summary"]["all"]["after"])] for run in runs),
    ]
    changes = [[_name(run), *_ranks(run["summary"]["all"]["change"], sign=True)] for run in runs]
    cut = [
        [
            run["candidates"],
            *(
                plus_minus(run["summary"]["cut"][when][name])
                for name in _RANKING[:2]
                for when in ("before", "after")
            ),
        ]
        for run in runs
    ]
    cut_header = [f"{LABELS[name]}, {w}" for name in _RANKING[:2] for w in ("before", "after")]
    tried = [
        [f"{run['learning_rate']:g}", run["sft_reduction"], *_ranks(run["summary"]["all"]["after"])]
        for run in real["choices"]
    ]
    header = [LABELS[name] for name in _RANKING]
    return [
        _text(
            f"{start['training_lists']} lists to train on, {start['held_out_lists']} held out, no "
            f"prompt on both sides. A byte-pair tokenizer of {settings['vocabulary']:,} tokens and "
            f"a Llama of {start['parameters']:,} parameters are trained on all "
            f"{start['completions']:,} completions of the training lists by cross-entropy "
            f"({start['steps']:,} steps, from {nats} nats a token); sequences are cut to "
            f"{settings['max_length']} tokens. From there PRO takes {runs[0]['steps']} steps of "
            f"{settings['batch']} lists with n = {_listed(settings['candidates'])} candidates (the "
            "best, the worst and those evenly between), "
            f"`sft_weight` {settings['sft_weight']}, temperatures from reward gaps. A model so "
            "small, trained for minutes, knows little of language: this shows what PRO does to the "
            "ranking of lists it has not seen, not how good a model can become."
        ),
        "Held-out lists with all their candidates, mean ± standard error over the lists:",
        markdown_table(["", *header], rows),
        _text(
            "Candidates of equal reward are not compared, and tau-b counts them against the order: "
            f"at best its mean is {start['tau_at_most']:.3f}. After minus before, list by list:"
        ),
        markdown_table(["", *header], changes),
        "Held-out lists cut to the n trained on:",
        markdown_table(["n", *cut_header], cut),
        "![Held-out ranking over the steps](study-real.png)",
        _text(
            f"Learning rate {runs[0]['learning_rate']:g} and an SFT term that is the "
            f"{runs[0]['sft_reduction']} of the best candidate's log-probabilities gave the "
            f"highest accuracy at n = {settings['choice_candidates']} on "
            f"{settings['choice_share']:.0%} of the training lists, which these runs did not rank. "
            "When the study was made, on 500 lists of AlpacaEval, a first full run chose among "
            "sums and the two lower rates only, and left held-out accuracy below one half at every "
            "n; the mean and the highest rate were added after that was seen. It also tried "
            '`ties="skip"` at n = 4, which gave bitwise the same as `"zero"`.'
        ),
        markdown_table(["learning rate", "SFT term", *header], tried),
    ]


def _provenance(results: Results) -> list[str]:
    facts, known, real = results["facts"], results["known"]["settings"], results["real"]
    versions = _listed([f"{name} {version}" for name, version in facts["versions"].items()])
    changed = " with uncommitted changes" if facts["modified"] else ""
    seeds = f"{_listed(known['seeds'])}; to choose learning rates {_listed(known['choice_seeds'])}"
    if real:
        seeds += f"; real lists {real['settings']['seed']}"
    return [
        f"    {facts['command']}",
        _text(
            f"{facts['machine']}; {facts['processes']} processes of one thread, "
            f"{results['seconds'] / 60:.1f} minutes ({facts['processor_seconds'] / 60:.1f} minutes "
            f"of processor time in all). {versions}, Python {facts['python']}; commit "
            f"{facts['commit'] or 'unknown'}{changed}; {facts['date']}. Seeds: {seeds}."
        ),
    ]


def _verdict(mean: float, error: float) -> str:
    """A difference counts from two standard errors on; without an error none does."""
    if not abs(mean) > 2 * error:
        return "within two standard errors of SFT"
    return "ahead of SFT" if mean > 0 else "behind SFT"


def _ranks(row: Results, sign: bool = False) -> list[str]:
    return [plus_minus(row[name], sign) for name in _RANKING]


def _name(run: Results) -> str:
    return f"PRO, n = {run['candidates']}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 110, break_long_words=False, break_on_hyphens=False)
