"""``python -m study.rounds --model MODEL``: three rounds on a reward with a known best.

Prompts are made here, the reward is ``short_and_named``, and the work is that of ``pro-kernels
rounds``. A run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pro_trainer.cli import commands
from study import short_and_named

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m study.rounds", description=__doc__)
    parser.add_argument("--model", required=True, help="folder (or hub name) of a chat model")
    parser.add_argument("--work", type=Path, default=Path("study-rounds"), help="folder of the run")
    given = parser.parse_args(arguments)
    return run(given.model, given.work)


if __name__ == "__main__":
    sys.exit(main())
