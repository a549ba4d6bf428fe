"""What ``pro-kernels rounds`` can be told beside what ``prepare`` and ``train`` are."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from typing import ClassVar

from pro_trainer.options import check_integers, check_positive, option


@dataclass
class RoundOptions:
    """How many rounds, on which prompts, and what else is trained on."""

    group: ClassVar[str] = "rounds"

    prompts: list[str] = option(
        [],
        'Prompts, in any form that prepare reads: {"prompt": text or messages}, ranked lists, '
        "hub names. Candidates that they come with are not used.",
    )
    held_out: str = option(
        "0.2",
        "Prompts that the model is evaluated on and never trained on: a share of the prompts "
        "(whichever their text decides, so that it is the same at every call), or a file.",
    )
    rounds: int = option(3, "Rounds of sampling, scoring, training and evaluating.")
    sampling_temperature: list[float] = option(
        [1.0], "Temperature of the samples. Several: a prompt's samples have them in turn."
    )
    mix_previous: float = option(
        0.0, "Share of a round's lists that come from earlier rounds, as in 0.25."
    )
    mix_reference: list[str] = option(
        [], "Ranked lists of your own, mixed into every round. Their rewards stay as they are."
    )
    mix_reference_share: float = option(0.25, "Their share of a round's lists.")
    stop_if_worse: bool = option(
        True, "Stop after a round whose held-out win rate against the base fell."
    )
    reload_command: str | None = option(
        None,
        "With a server: shell command that makes it serve the model in $PRO_KERNELS_CHECKPOINT, "
        "and returns once it does. It runs before the first samples of each model, the base "
        "included ($PRO_KERNELS_ROUND is 0 then).",
    )
    launch: str | None = option(
        None,
        "Train by this launcher, as in 'torchrun --nproc_per_node 8' or 'accelerate launch'. "
        "Default: in this process.",
    )

    def share_held_out(self) -> float | None:
        """The share of the prompts that ``held_out`` says, in (0, 1); None: it names a file."""
        try:
            share = float(self.held_out)
        except ValueError:
            return None
        if not 0 < share < 1:
            raise ValueError(f"held_out must lie in (0, 1), or name a file, got {self.held_out}")
        return share

    def check_rounds(self) -> None:
        """Raise ValueError or TypeError for options out of range or at odds."""
        if not self.prompts:
            raise ValueError("prompts: no file, folder or hub name given")
        check_integers(self, "rounds")
        check_positive(self, "rounds", "mix_reference_share")
        self.share_held_out()
        if self.mix_reference_share != 0.25 and not self.mix_reference:
            raise ValueError("mix_reference_share is of lists: give them as mix_reference")
        if self.mix_previous < 0:
            raise ValueError(f"mix_previous must lie in [0, 1), got {self.mix_previous}")
        if (total := self.mix_previous + self.reference_share()) >= 1:
            raise ValueError(
                "mix_previous and mix_reference_share must leave a share for the round's own "
                f"lists, but are {total:g} together"
            )
        for name in ("reload_command", "launch"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise ValueError(f"{name}: a command was expected, got {value!r}")
        if self.launch and not shutil.which(shlex.split(self.launch)[0]):
            raise ValueError(f"launch: there is no command {shlex.split(self.launch)[0]}")

    def reference_share(self) -> float:
        """``mix_reference_share``, or 0 without lists."""
        return self.mix_reference_share if self.mix_reference else 0.0
