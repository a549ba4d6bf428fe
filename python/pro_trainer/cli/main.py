"""The command ``pro-kernels``: help at once, the rest where it belongs.

``env``, ``check`` and ``bench`` are those of ``python -m pro_kernels``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pro_trainer.cli import help as texts
from pro_trainer.cli.flags import near


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for a wrong call)."""
    try:
        return _run(argv)
    except KeyboardInterrupt:  # while the command was imported
        print("\ninterrupted before anything was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of a reader that has seen enough, as head
        sys.stderr.close()
        return 0


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(texts.overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    loss_type = "dpo" if command == "dpo" else None
    command = "train" if loss_type else command  # what TRL calls its command
    if command in ("env", "check", "bench"):
        from pro_kernels.__main__ import main as of_kernels

        return of_kernels(argv)
    if command == "run":
        from pro_trainer.cli.run import run

        return run(rest)
    if command not in texts.COMMANDS:
        known = [*texts.COMMANDS, "dpo", "run", "env", "check", "bench"]
        return _wrong(f"no command {command!r}{near(command, known)}")
    topic = texts.asked(rest)
    try:
        if topic is not None:
            print(texts.page(command, topic))
            return 0
        from pro_trainer.cli import commands
    except ModuleNotFoundError as error:
        return _wrong(f"{command} needs {error.name}: pip install 'pro-kernels[train]'")
    except ValueError as error:
        return _wrong(str(error))
    return commands.run(command, rest, loss_type)


def _wrong(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
