"""Whose checkpoints lie in a folder, and which of them are whole.

Every checkpoint carries ``pro_run.json``, the options and the data that make two runs the same run,
and ``manifest.json``, written last: size and SHA-256 of each of its files. One without it was cut
off while it was written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pro_trainer import files
from pro_trainer.prepare.output import write_json
from pro_trainer.text.options import ListOptions
from pro_trainer.train.config import PROConfig
from pro_trainer.train.distributed import describe_lists
from pro_trainer.train.options import LossOptions
from pro_trainer.train.reference import COLUMN

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

IDENTITY = "pro_run.json"
_MANIFEST = "manifest.json"
_FREE = ("loss_impl", "budget_mb", "on_bad_line")  # may change on resuming: same maths, same data
_ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")  # of the lists
_MODEL_FILES = ("model*.safetensors*", "adapter_*", "config.json", "generation_config.json")


def run_identity(
    args: PROConfig, model: PreTrainedModel, dataset: datasets.Dataset | None
) -> dict[str, Any]:
    """What two runs must agree on for one to go on from the other's checkpoint."""
    names = [f.name for part in (LossOptions, ListOptions) for f in fields(part)]
    identity: dict[str, Any] = {n: getattr(args, n) for n in names if n not in _FREE}
    identity["step"] = step_size(args)
    identity["tokens_per_batch"] = args.tokens_per_batch
    identity |= {n: getattr(args, n, None) for n in _ORDER} | {"optim": str(args.optim)}
    identity["model"] = f"{type(model).__name__}, {model.num_parameters()} parameters"
    base = model.config._name_or_path
    identity["base_model"] = str(Path(base).resolve()) if base and Path(base).exists() else base
    if dataset is not None:
        computed = [COLUMN] if COLUMN in dataset.column_names else []
        identity["train_dataset"] = describe_lists(dataset.remove_columns(computed))
    return identity


def step_size(args: PROConfig) -> dict[str, int]:
    """How many lists (or tokens) a step has, first, and how they are made up."""
    made = {
        "processes": args.world_size,
        "a batch": args.tokens_per_batch or args.per_device_train_batch_size,
        "accumulated": args.gradient_accumulation_steps,
    }
    return {"tokens" if args.tokens_per_batch else "lists": math.prod(made.values()), **made}


def read_identity(folder: Path) -> dict[str, Any]:
    """The ``pro_run.json`` of a checkpoint or of a saved model.

    Raises:
        ValueError: nothing of that kind is there.
    """
    try:
        identity = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError):
        identity = None
    if not isinstance(identity, dict):
        raise ValueError(
            f"{folder / IDENTITY} must be a JSON object with the options of a run, and is not: "
            "PROTrainer did not write that"
        )
    return identity


def prepare_output(
    folder: Path, resume: str | Path | bool | None, identity: dict[str, Any], args: PROConfig
) -> str | None:
    """The checkpoint to resume from, or None for a fresh run in a folder that is free for it.

    Raises:
        ValueError: see ``PROTrainer.train``.
    """
    if resume:
        checkpoint = find(folder, resume, print if args.should_log else str)
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


def find(folder: Path, resume: str | Path | bool, say: Callable[[str], Any] = print) -> Path:
    """The checkpoint that ``resume`` names, or the last whole one of ``folder`` for True.

    Raises:
        ValueError: it is not whole, or there is none.
    """
    if resume is True:
        if checkpoint := last_whole(folder, say):
            return checkpoint
        raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {folder}")
    checkpoint = Path(resume)
    if flaw := _flaw(checkpoint):
        whole = last_whole(checkpoint.parent, str)
        instead = f"resume from {whole}" if whole else f"none in {checkpoint.parent} is whole"
        raise ValueError(f"resume_from_checkpoint {checkpoint}: {flaw}; {instead}")
    return checkpoint


def remove_model(folder: Path) -> None:
    """Remove the model that an earlier run saved in ``folder``, before another is saved there.

    Weights of one kind beside adapters of another would be loaded together.
    """
    if (folder / IDENTITY).exists():
        for pattern in _MODEL_FILES:
            for file in folder.glob(pattern):
                file.unlink()


def alone(args: PROConfig) -> contextlib.AbstractContextManager:
    """No other run writes ``output_dir`` meanwhile; the main process sees to that."""
    if args.process_index:
        return contextlib.nullcontext()
    folder = Path(args.output_dir)
    check_folder(folder)
    return files.alone("output_dir", folder, folder / ".lock")


def check_apart(folder: Path, *sources: str | None) -> None:
    """Raise ValueError where what is saved in ``folder`` would change one of ``sources``."""
    for source in filter(None, sources):
        same = files.lies_in(source, folder) and files.lies_in(folder, source)
        if same or any(files.lies_in(source, checkpoint) for checkpoint in checkpoints(folder)):
            raise files.destroyed("output_dir", folder, source)


def check_folder(folder: Path) -> None:
    """Raise ValueError where ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError where ``folder`` is a file or holds a run that must stay."""
    check_folder(folder)
    # What we began and did not end holds nothing to go on from; another program's we cannot judge.
    runs = [
        c
        for c in checkpoints(folder)
        if sealed(c) or ((c / "trainer_state.json").exists() and not (c / IDENTITY).exists())
    ]
    held = [*runs, *folder.glob(IDENTITY)]
    if held and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds another run ({held[0].name}): go on from it with "
            "resume_from_checkpoint, or replace it with overwrite"
        )


def checkpoints(folder: Path) -> list[Path]:
    """``checkpoint-N`` folders, by N."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last_whole(folder: Path, say: Callable[[str], Any] = print) -> Path | None:
    """The last checkpoint that is whole; ``say`` is told why later ones are passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        flaw = _flaw(checkpoint)
        if not flaw:
            return checkpoint
        say(f"{checkpoint} is passed over: {flaw}")
    return None


def sealed(checkpoint: Path) -> bool:
    """Whether it was written to its end; what became of it since is not looked at."""
    return (checkpoint / _MANIFEST).exists()


def seal(checkpoint: Path, only_model: bool) -> None:
    """Mark a checkpoint as written to its end."""
    paths = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != _MANIFEST]
    names = [p.relative_to(checkpoint).as_posix() for p in paths]
    sizes = [p.stat().st_size for p in paths]
    about = dict(zip(names, zip(sizes, _hashes(paths), strict=True), strict=True))
    write_json(checkpoint / _MANIFEST, {"only_model": only_model, "files": about})


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but neither the newest nor ``best``.

    ``Trainer`` does so before the newest is sealed.
    """

    def age(checkpoint: Path) -> float:
        return (checkpoint / _MANIFEST).stat().st_mtime_ns if sealed(checkpoint) else 0

    found = sorted(checkpoints(folder), key=age)
    kept = {*found[-1:], *(c for c in found if best and c == Path(best))}
    excess = len(found) - max(limit, len(kept)) if limit and limit > 0 else 0
    for old in [c for c in found if c not in kept][: max(0, excess)]:
        shutil.rmtree(old, ignore_errors=True)


def _flaw(checkpoint: Path) -> str | None:
    """Why there is no resuming from it, or None where it is whole."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        wanted = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
        only_model = manifest["only_model"]
    except FileNotFoundError:
        if not checkpoint.exists():
            return "there is no such checkpoint"
        return f"it has no {_MANIFEST}, so it was cut off while it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MANIFEST} cannot be read"
    if only_model:
        return "it was saved with save_only_model, without the optimizer that resuming needs"
    for name, (size, _) in wanted.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (now := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {now} bytes, {size} were written"
    hashes = _hashes([checkpoint / name for name in wanted])
    for (name, (_, digest)), now in zip(wanted.items(), hashes, strict=True):
        if now != digest:
            return f"{name} is not what was written"
    return None


def _hashes(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda p: _sha256(p, p.stat().st_size, p.stat().st_mtime_ns), paths))


@functools.cache  # a command looks for the checkpoint before it loads anything, and then resumes
def _sha256(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_same_run(checkpoint: Path, identity: dict[str, Any]) -> int:
    """Refuse the checkpoint of another run; returns how many processes wrote it."""
    then = read_identity(checkpoint)
    now = json.loads(json.dumps(identity))
    step_then, step_now = then.pop("step", {}), now.pop("step")
    for run in (then, now):
        run.pop("base_model", None)  # a model may be moved
    if [*step_then.items()][:1] != [*step_now.items()][:1]:
        raise ValueError(
            f"{checkpoint}: its steps were of other lists: {_shown(step_then)} then, "
            f"{_shown(step_now)} now; per_device_train_batch_size (or tokens_per_batch) x "
            "gradient_accumulation_steps must make up for another number of processes"
        )
    differ = [k for k in now.keys() | then.keys() if now.get(k) != then.get(k)]
    if differ:
        shown = "; ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in sorted(differ))
        raise ValueError(f"{checkpoint} belongs to another run: {shown}")
    return step_then["processes"]


def _shown(step: dict[str, int]) -> str:
    (kind, total), *made = step.items() or (("lists", "unknown"),)
    product = " x ".join(f"{n} {name}" for name, n in made)
    return f"{total} {kind} ({product})"
