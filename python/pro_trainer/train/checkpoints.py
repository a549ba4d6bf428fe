"""Whose checkpoints lie in a folder, and which of them are whole.

Every checkpoint carries ``pro_run.json``: the options and the data that make two runs the same run.
``Trainer`` writes ``trainer_state.json`` last, so a checkpoint without it was cut off; one without
an optimizer was saved with ``save_only_model``. Both are passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pro_trainer.text.options import ListOptions
from pro_trainer.train.config import LossOptions, PROConfig

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

IDENTITY = "pro_run.json"
_FREE = ("loss_impl", "budget_mb", "on_bad_line")  # may change on resuming: same maths, same data
_HASHED_LISTS = 64
_MODEL_FILES = ("model*.safetensors*", "adapter_*", "config.json", "generation_config.json")


def run_identity(
    args: PROConfig, model: PreTrainedModel, dataset: datasets.Dataset | None
) -> dict[str, Any]:
    """What two runs must agree on for one to go on from the other's checkpoint."""
    names = [f.name for part in (LossOptions, ListOptions) for f in fields(part)]
    identity: dict[str, Any] = {n: getattr(args, n) for n in names if n not in _FREE}
    identity["step"] = step_size(args)
    identity |= {"seed": args.seed, "data_seed": args.data_seed, "optim": str(args.optim)}
    identity["model"] = f"{type(model).__name__}, {model.num_parameters()} parameters"
    if dataset is not None:
        step = max(1, len(dataset) // _HASHED_LISTS)
        digest = hashlib.sha256()
        for i in range(0, len(dataset), step):
            digest.update(json.dumps(dataset[i], sort_keys=True).encode())
        identity["train_dataset"] = f"{len(dataset)} lists, sha256 {digest.hexdigest()[:16]}"
    return identity


def step_size(args: PROConfig) -> dict[str, int]:
    """How the lists of a step are made up, and ``lists``, how many they are."""
    made = {
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    return {"lists": math.prod(made.values()), **made}


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Put ``pro_run.json`` into a checkpoint."""
    (folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")


def prepare_output(
    folder: Path, resume: str | Path | bool | None, identity: dict[str, Any], args: PROConfig
) -> str | None:
    """The checkpoint to resume from, or None for a fresh run in a folder that is free for it.

    Raises:
        ValueError: see ``PROTrainer.train``.
    """
    if resume:
        checkpoint = find(folder, resume)
        then = _check_same_run(checkpoint, identity)
        if args.should_log and then != args.world_size:
            print(
                f"resuming on {args.world_size} processes what {then} wrote: the same lists a "
                "step, summed in another order; what draws random numbers (dropout) draws others"
            )
        return str(checkpoint)
    check_free(folder, args.overwrite)
    if args.overwrite and args.should_save:
        for old in checkpoints(folder):
            shutil.rmtree(old)
    return None


def find(folder: Path, resume: str | Path | bool) -> Path:
    """The checkpoint that ``resume`` names, or the last whole one of ``folder`` for True.

    Raises:
        ValueError: there is none.
    """
    checkpoint = last_whole(folder) if resume is True else _whole(Path(resume))
    if checkpoint is None:
        where = folder if resume is True else resume
        raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {where}")
    return checkpoint


def remove_model(folder: Path) -> None:
    """Remove the model that an earlier run saved in ``folder``, before another is saved there.

    Weights of one kind beside adapters of another would be loaded together.
    """
    if (folder / IDENTITY).exists():
        for pattern in _MODEL_FILES:
            for file in folder.glob(pattern):
                file.unlink()


def check_folder(folder: Path) -> None:
    """Raise ValueError where ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError where ``folder`` is a file or holds a run that must stay."""
    check_folder(folder)
    # What was cut off while it was written holds nothing to go on from.
    whole = [c for c in checkpoints(folder) if (c / "trainer_state.json").exists()]
    held = [*whole, *folder.glob(IDENTITY)]
    if held and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds another run ({held[0].name}): go on from it with "
            "resume_from_checkpoint, or replace it with overwrite"
        )


def checkpoints(folder: Path) -> list[Path]:
    """``checkpoint-N`` folders, by N."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next(filter(None, map(_whole, reversed(checkpoints(folder)))), None)


def _whole(checkpoint: Path) -> Path | None:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    optimizer = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]  # DeepSpeed's
    return checkpoint if optimizer else None


def _check_same_run(checkpoint: Path, identity: dict[str, Any]) -> int:
    """Refuse the checkpoint of another run; returns how many processes wrote it."""
    try:
        then = json.loads((checkpoint / IDENTITY).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{checkpoint}: not a checkpoint of PROTrainer (no {IDENTITY})") from None
    now = json.loads(json.dumps(identity))
    step_then, step_now = then.pop("step", {}), now.pop("step")
    if step_then.get("lists") != step_now["lists"]:
        raise ValueError(
            f"{checkpoint}: its steps were of other lists: {_shown(step_then)} then, "
            f"{_shown(step_now)} now; per_device_train_batch_size x gradient_accumulation_steps "
            "must make up for another number of processes"
        )
    differ = [k for k in now.keys() | then.keys() if now.get(k) != then.get(k)]
    if differ:
        shown = "; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in sorted(differ))
        raise ValueError(f"{checkpoint} belongs to another run: {shown}")
    return step_then["processes"]


def _shown(step: dict[str, int]) -> str:
    lists, *made = step.values() or ("unknown",)
    names = ("processes", "a batch", "accumulated")
    product = " x ".join(f"{n} {name}" for n, name in zip(made, names, strict=False))
    return f"{lists} ({product})"
