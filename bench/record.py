"""The results file: what was run, where, and one named row a (case, provider).

Written after every case, so an interrupted run keeps what it measured, with "complete": false.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from bench.cases import Case
from pro_kernels import env, matmul

SCHEMA = 1
_PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "pro-kernels")


class Record:
    """Rows of one run, kept in step with its file."""

    def __init__(self, path: Path, facts: dict) -> None:
        """Start a file at ``path``; ``facts`` describe the run."""
        self.path = path
        self.data = {"schema": SCHEMA, "complete": False, **facts, "results": []}
        self.save()

    def add(self, rows: list[dict]) -> None:
        """Append rows and save."""
        self.data["results"] += rows
        self.save()

    def update(self, case: str, provider: str, numbers: dict) -> None:
        """Merge numbers into one row and save; notes add up."""
        for row in self.data["results"]:
            if (row["case"], row["provider"]) == (case, provider):
                note = "; ".join(x for x in (row["note"], numbers.get("note", "")) if x)
                row.update(numbers, note=note)
        self.save()

    def finish(self) -> None:
        """Mark the run complete."""
        self.data["complete"] = True
        self.save()

    def save(self) -> None:
        """Write the whole file; the old one stays until the new one is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(part, self.path)


def load(path: Path) -> dict:
    """A results file.

    Raises:
        ValueError: not a results file of this schema.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    return data


def facts(device: torch.device, packages: tuple[str, ...] = _PACKAGES, **settings) -> dict:
    """Machine, versions, commit, threads and date of a run, with its settings."""
    root = Path(__file__).resolve().parent.parent
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": env.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "bf16_matmuls": "fp32 by blocks"
        if matmul.upcasts(torch.bfloat16, device.type)
        else "native",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _git(root, "rev-parse", "HEAD"),
        "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "settings": settings,
    }


def empty_row(case: Case, provider: str, label: str) -> dict:
    """A row without numbers: every key is always there."""
    return {
        "case": case.name,
        **{k: getattr(case, k) for k in ("group", "kind", "dtype", "H", "V", "B", "n", "T")},
        "masked": case.masked,
        "tokens": case.tokens,
        "scored": case.scored,
        "budget": case.budget,
        "provider": provider,
        "label": label,
        "seconds": None,
        "q1": None,
        "q3": None,
        "rounds": 0,
        "of_floor": None,
        "of_floor_fp32": None,
        "vs_ours": None,
        "peak_bytes": None,
        "gradient_bytes": None,
        "loss": None,
        "loss_error": None,
        "grad_error": None,
        "wrong": False,
        "note": "",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
