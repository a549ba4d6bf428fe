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

from pro_kernels.fused import matmul
from pro_kernels.selfcheck import env

SCHEMA = 2
# Why a row has no numbers where the time was over.
NO_TIME = "no time was left"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy",
            "quack-kernels", "verl", "pro-kernels")  # fmt: skip


class Record:
    """Rows of one run, kept in step with its file."""

    def __init__(self, path: Path, facts: dict) -> None:
        """Start a file at ``path``; ``facts`` describe the run."""
        self.path = path
        self.data = {"schema": SCHEMA, "complete": False, **facts, "results": []}
        self.save()

    @classmethod
    def resume(cls, path: Path, facts: dict) -> Record:
        """Go on with the file at ``path``, or start it.

        Cases that had no time are measured again; whoever was running when the process died is
        remembered as lost.

        Raises:
            ValueError: it is of another machine, commit, preset or set of versions.
        """
        if not path.exists():
            return cls(path, facts)
        record = cls.__new__(cls)
        record.path, record.data = path, load(path)
        for key in ("machine", "device", "threads", "versions", "commit"):
            if record.data.get(key) != facts[key]:
                raise ValueError(
                    f"{path} was made with {key} {record.data.get(key)}, not {facts[key]}: "
                    "it cannot be resumed"
                )
        if record.data["settings"]["preset"] != facts["settings"]["preset"]:
            raise ValueError(f"{path} is of preset {record.data['settings']['preset']!r}")
        late = {r["case"] for r in record.data["results"] if r["note"].endswith(NO_TIME)}
        record.data["results"] = [r for r in record.data["results"] if r["case"] not in late]
        record.data["complete"] = False
        running = record.data.pop("running", None)
        if running is not None:
            record.data.setdefault("lost", []).append(running)
        record.save()
        return record

    def has(self, case: str) -> bool:
        """Whether the case is measured."""
        return any(row["case"] == case for row in self.data["results"])

    def lost(self, case: str, provider: str) -> str | None:
        """Why a provider takes no further part in a case: the process died in it."""
        died = [case, provider] in self.data.get("lost", [])
        return "not run: the process died, or the GPU was lost, in its first try" if died else None

    def row(self, case: str, provider: str) -> dict:
        """The row of a case and provider."""
        rows = self.data["results"]
        return next(r for r in rows if (r["case"], r["provider"]) == (case, provider))

    def put(self, **facts: object) -> None:
        """Set what is said of the whole run and save; None takes it away."""
        known = {**self.data, **facts}
        self.data = {key: value for key, value in known.items() if value is not None}
        self.save()

    def add(self, rows: list[dict]) -> None:
        """Append rows and save."""
        self.data["results"] += rows
        self.save()

    def update(self, case: str, provider: str, numbers: dict) -> None:
        """Merge numbers into one row and save; notes add up."""
        row = self.row(case, provider)
        note(row, numbers.pop("note", ""))
        row.update(numbers)
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


def facts(device: torch.device, packages: tuple[str, ...] = PACKAGES, **settings) -> dict:
    """Machine, versions, commit, threads and date of a run, with its settings."""
    root = Path(__file__).resolve().parents[2]
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


def note(row: dict, *texts: str) -> None:
    """Add to a row's note."""
    row["note"] = "; ".join(x for x in (row["note"], *texts) if x)


def flag_wrong(row: dict, why: str = "WRONG RESULT: not comparable") -> None:
    """Take a row out of every comparison, with the reason."""
    row["wrong"], row["note"] = True, why


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
