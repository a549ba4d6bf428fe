"""Commands that a round runs, which end where the round is ended."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from pro_trainer.errors import TrainingError


def call(option: str, command: str | Sequence[str], then: str, **variables: str) -> None:
    """Run a command, a line for the shell or its words, with these environment variables more.

    Args:
        option: that it is of, for messages.
        command: what is run.
        then: what a failure means.
        variables: names and values.

    Raises:
        TrainingError: it failed, or there is none of that name.
    """
    shown = command if isinstance(command, str) else shlex.join(command)
    environment: Mapping[str, str] = {**os.environ, **variables}
    try:
        process = subprocess.Popen(command, shell=isinstance(command, str), env=environment)
    except OSError as error:
        raise TrainingError(f"{option}: {shown} cannot be run: {error}") from error
    try:
        code = process.wait()
    except BaseException:  # interrupted: launchers end their workers when they are told to end
        process.terminate()
        process.wait()
        raise
    if code:
        raise TrainingError(f"{option}: {shown} ended with exit code {code}; {then}")
