"""The results file: what was run, where, and one named row a (case, provider).

Written after every case, so an interrupted run keeps what it measured, with "complete": false.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
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

    def __init__(self, path: Path, facts: dict, resume: bool = False) -> None:
        """Start a file at ``path``, or go on with the one there; ``facts`` describe the run.

        Cases that had no time are measured again; whoever was running when the process died is
        remembered as lost.

        Raises:
            ValueError: the file to go on with is of another machine, commit, preset or versions.
        """
        self.path = path
        self.data = {"schema": SCHEMA, "complete": False, **facts, "results": []}
        if resume and path.exists():
            self.data = load(path)
            self._go_on(facts)
        self.save()

    def _go_on(self, facts: dict) -> None:
        for key in ("machine", "device", "threads", "versions", "commit"):
            if self.data.get(key) != facts[key]:
                raise ValueError(
                    f"{self.path} was made with {key} {self.data.get(key)}, not {facts[key]}: it "
                    "cannot be resumed"
                )
        if self.data["settings"]["preset"] != facts["settings"]["preset"]:
            raise ValueError(f"{self.path} is of preset {self.data['settings']['preset']!r}")
        late = {r["case"] for r in self.data["results"] if r["note"].endswith(NO_TIME)}
        self.data["results"] = [r for r in self.data["results"] if r["case"] not in late]
        self.data["complete"] = False
        if "running" in self.data:
            self.data.setdefault("lost", []).append(self.data.pop("running"))

    def has(self, case: str) -> bool:
        return any(row["case"] == case for row in self.data["results"])

    def lost(self, case: str, provider: str) -> str | None:
        """Why a provider takes no further part in a case: the process died in it."""
        died = [case, provider] in self.data.get("lost", [])
        return "not run: the process died, or the GPU was lost, in its first try" if died else None

    def put(self, **facts: object) -> None:
        """Set what is said of the whole run and save; None takes it away."""
        for key, value in facts.items():
            self.data[key] = value
            if value is None:
                del self.data[key]
        self.save()

    def add(self, rows: list[dict]) -> None:
        self.data["results"] += rows
        self.save()

    def update(self, case: str, provider: str, numbers: dict) -> None:
        """Merge numbers into one row and save; notes add up."""
        rows = self.data["results"]
        row = next(r for r in rows if (r["case"], r["provider"]) == (case, provider))
        note(row, numbers.pop("note", ""))
        row.update(numbers)
        self.save()

    def finish(self) -> None:
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
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": env.machine(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "bf16_matmuls": "fp32 by blocks"
        if matmul.upcasts(torch.bfloat16, device.type)
        else "native",
        "python": platform.python_version(),
        "versions": {name: env.version(name) for name in packages},
        "commit": env.git("rev-parse", "HEAD") or None,
        "modified": bool(env.git("status", "--porcelain", "--untracked-files=no")),
        "settings": settings,
    }


def note(row: dict, *texts: str) -> None:
    """Add to a row's note."""
    row["note"] = "; ".join(x for x in (row["note"], *texts) if x)


def flag_wrong(row: dict, why: str = "WRONG RESULT: not comparable") -> None:
    """Take a row out of every comparison, with the reason."""
    row["wrong"], row["note"] = True, why
