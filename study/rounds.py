"""``python -m study.rounds --model MODEL``: three rounds on a reward with a known best.

Prompts are made here, the reward is ``short_and_named``, and the work is that of ``pro-kernels
rounds``. A run that was cut short goes on. ``docs/rounds.md`` gets the table of what came out,
``rounds.json`` all numbers, ``rounds.png`` the plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.engine import record
from bench.report.tables import update_block
from pro_trainer.cli import commands
from pro_trainer.evaluate.tables import markdown_table
from pro_trainer.prepare.output import write_json
from pro_trainer.rounds.state import STATE, Round
from study import short_and_named
from study.report import PACKAGES, provenance

SUBJECTS = """
glacier volcano compass lighthouse submarine telescope microscope bicycle windmill waterfall rainbow
earthquake tornado desert rainforest coral beehive spider dolphin penguin elephant giraffe octopus
butterfly eagle wolf tiger kangaroo camel tortoise violin piano trumpet drum guitar opera ballet
theatre museum library castle pyramid cathedral bridge tunnel canal harbour airport railway rocket
satellite comet planet galaxy telegraph telephone radio printer battery magnet engine turbine
furnace bakery vineyard orchard chocolate cheese bread coffee cinnamon honey
""".split()
FORMS = ("Tell me about the {}.", "What is special about the {}?", "Explain the {} to a child.")
OPTIONS = {
    "rounds": 3,
    "held_out": 0.33,
    "num_samples": 6,
    "ranking_length": 4,
    "max_new_tokens": 64,
    "batch_size": 24,
    "learning_rate": 4e-5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "max_length": 192,
    "logging_steps": 4,
    "use_cpu": "true",
    "report_to": "none",
}


def run(model: str, folder: Path) -> int:
    """Write the prompts and run the rounds; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        records = [
            {"prompt": form.format(subject), "subject": subject}
            for subject, form in zip(SUBJECTS, itertools.cycle(FORMS), strict=False)
        ]
        prompts.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    reward = f"{short_and_named.__file__}:short_and_named"
    words = ["--model", model, "--prompts", str(prompts), "--reward", reward]
    words += ["--output_dir", str(folder / "run")]
    return commands.rounds(words + [f"--{name}={value}" for name, value in OPTIONS.items()])


def results(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` came to, what each part took, and one prompt's first answers."""
    found = json.loads((folder / STATE).read_text())
    of_rounds = [Round(folder, number) for number in range(len(found["rounds"]) + 1)]
    minutes, before = [], (folder / "held-out.jsonl").stat().st_mtime
    for this in of_rounds:
        # A part ends with its last file, so this holds of a run that was not interrupted.
        parts = {"sampling": this.sampled, "training": this.checkpoint / "metrics.json",
                 "answering": this.answers}  # fmt: skip
        own = {}
        for name, file in parts.items():
            if file.exists():
                now = file.stat().st_mtime
                own[name], before = round((now - before) / 60, 2), now
        minutes.append(own)
    answers = [json.loads(this.answers.read_text().splitlines()[0]) for this in of_rounds]
    return {
        "facts": record.facts(torch.device("cpu"), PACKAGES),
        "options": OPTIONS,
        "prompts": sum(1 for _ in (folder / "prompts.jsonl").open()),
        **{name: found[name] for name in ("base", "rounds", "best", "ended")},
        "minutes": minutes,
        "example": {
            "prompt": answers[0]["prompt"],
            "answers": [answer["completions"][0] for answer in answers],
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """The measured part of the page, Markdown."""
    rows = []
    for number, (x, minutes) in enumerate(
        zip([found["base"], *found["rounds"]], found["minutes"], strict=True)
    ):
        low, high = x["win_rate_interval"]
        times = [f"{minutes[part]:.1f}" if part in minutes else "" for part in
                 ("sampling", "training", "answering")]  # fmt: skip
        rows.append([f"round {number}" if number else "base", f"{x['reward']:.3f}",
                     f"{x['best_of']:.3f}", f"{x['win_rate']:.3f} [{low:.3f}, {high:.3f}]",
                     f"{x['length']:.0f}", *times])  # fmt: skip
    header = ["", "mean reward", f"best of {OPTIONS['num_samples']}", "win rate", "characters",
              "sampling, min", "training, min", "answering, min"]  # fmt: skip
    facts, example = found["facts"], found["example"]
    said = [f"    {' '.join(answer.split())}" for answer in example["answers"]]
    names = ["The base", *(f"Round {n}" for n in range(1, len(said)))]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"{found['prompts']} prompts to train on and {found['base']['prompts']} held out. "
            f"{facts['machine']}; fp32; {provenance(facts)} The first answers to the held-out "
            f"prompt *{example['prompt']}* (64 tokens at most):",
            *(part for name, text in zip(names, said, strict=True) for part in (f"{name}:", text)),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m study.rounds", description=__doc__)
    parser.add_argument("--model", required=True, help="folder (or hub name) of a chat model")
    parser.add_argument("--work", type=Path, default=Path("study-rounds"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of rounds.md")
    given = parser.parse_args(arguments)
    if code := run(given.model, given.work):
        return code
    found = results(given.work / "run")
    write_json(given.out / "rounds.json", found)
    shutil.copy(given.work / "run" / "rounds.png", given.out / "rounds.png")
    update_block(given.out / "rounds.md", table(found), "study.rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
