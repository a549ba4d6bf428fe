"""The runs of the study: each in a process of its own, its scores in a file of its own.

A study that was cut short goes on with the runs whose files are missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pro_trainer.models import load, load_tokenizer
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.output import file_identity, write_json
from pro_trainer.text.store import load_dataset, split_held_out
from pro_trainer.train.config import PROConfig
from pro_trainer.train.objective import Scores
from pro_trainer.train.trainer import PROTrainer

SFT = {"sft_weight": 1.0, "sft_reduction": "mean"}  # of lists of one candidate: cross-entropy
PRO = {"loss_type": "pro", "sft_reduction": "mean"}
# What each method is told; "candidates" of a list are the best, the worst and others between them.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"candidates": 1, **SFT},
    "dpo": {"candidates": 2, "loss_type": "dpo"},
    "pro_2": {"candidates": 2, **PRO},
    "pro_4": {"candidates": 4, **PRO},
    "pro_8": {"candidates": 8, **PRO},
    "pro_4_sum": {"candidates": 4, **PRO, "sft_reduction": "sum"},
    # Not of a whole study; beside the one above it: ``--only pro_4 pro_4_filter``.
    "pro_4_filter": {"candidates": 4, **PRO, "grad_filter": 0.0024},
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the study; each method takes ``lists / batch`` optimizer steps."""

    seeds: tuple[tuple[str, int], ...] = (  # how many each method is run with
        ("sft", 2), ("dpo", 2), ("pro_2", 1), ("pro_4", 2), ("pro_8", 1), ("pro_4_sum", 1),
    )  # fmt: skip
    lists: int = 128
    batch: int = 4
    held_out_share: float = 0.16
    candidates: int = 8  # of the held-out lists
    max_length: int = 192
    max_prompt_length: int = 96  # given, so that every method sees the same prompts
    learning_rate: float = 5e-5


class Run(NamedTuple):
    """One method with one seed; ``base`` is the model as it comes, with its scores only."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method}-{self.seed}"


def runs(settings: Settings) -> list[Run]:
    """All of them: the first seed of every method before any second one, long runs first."""
    long_first = sorted(settings.seeds, key=lambda entry: -METHODS[entry[0]]["candidates"])
    found = [Run("base", 0)]
    for seed in range(1, 1 + max(count for _, count in settings.seeds)):
        found += [Run(method, seed) for method, count in long_first if seed <= count]
    return found


def study(
    model: str, data: str, folder: Path, settings: Settings | None = None, processes: int = 2
) -> dict[str, Any]:
    """Run what ``folder`` does not hold yet; returns all of it, and what it was run on.

    Raises:
        ValueError: a model or data that cannot be used.
    """
    settings = settings or Settings()
    same = {
        "settings": asdict(settings),
        "model": [Path(model).name, file_identity(model)],
        "data": [Path(data).name, file_identity(data)],
    }
    same = json.loads(json.dumps(same))
    lists_of(data, load_tokenizer(model), settings, settings.candidates)  # bad data shows now
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs(settings) if _read(folder, run, same) is None]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    # A process a run: what one leaves in memory must not stand beside the next.
    alone = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}
    with ProcessPoolExecutor(processes, context, _one_thread, **alone) as pool:
        futures = [pool.submit(_job, model, data, settings, run, folder, same) for run in missing]
        try:
            for future in as_completed(futures):
                minutes = (time.monotonic() - started) / 60
                print(f"{future.result()}: {minutes:.1f} minutes", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    done = [_read(folder, run, same) for run in runs(settings)]
    return {**same, "runs": done}


def _read(folder: Path, run: Run, same: dict[str, Any]) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / f"{run.name}.json").read_text())
        if all(found[key] == value for key, value in same.items()):
            return {key: value for key, value in found.items() if key not in same}
    return None


def _one_thread() -> None:
    torch.set_num_threads(1)  # two runs side by side do more than one with two threads


def _job(
    path: str, data: str, settings: Settings, run: Run, folder: Path, same: dict[str, Any]
) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        found = measure(path, data, settings, run)
    write_json(folder / f"{run.name}.json", {**same, **found})
    return run.name


def measure(path: str, data: str, settings: Settings, run: Run) -> dict[str, Any]:
    """Train by one method, and score the held-out lists."""
    model, tokenizer = load(path, ModelOptions(dtype="float32"))
    _, held_out = lists_of(data, tokenizer, settings, settings.candidates)
    result: dict[str, Any] = {**run._asdict(), "seconds": 0.0, "log": []}
    if run.method == "base":
        result["whole_lengths"] = whole_lengths(data, tokenizer, settings)
        with _trainer(model, tokenizer, settings, held_out=held_out) as trainer:
            return {**result, **numbers(trainer.score(held_out))}
    options = dict(METHODS[run.method])
    candidates = options.pop("candidates")
    lists, _ = lists_of(data, tokenizer, settings, max(2, candidates))
    lists = lists.shuffle(seed=run.seed).select(range(settings.lists))
    if candidates == 1:
        lists = lists.map(best_alone)
    options |= {"seed": run.seed, "max_steps": settings.lists // settings.batch}
    with _trainer(model, tokenizer, settings, lists, held_out, **options) as trainer:
        result["seconds"] = trainer.train().metrics["train_runtime"]
        names = ("step", "loss", "sft_loss", "pairwise_accuracy", "scored_tokens_per_second")
        result["log"] = [
            {name: entry[name] for name in names if name in entry}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        return {**result, **numbers(trainer.score(held_out))}


def lists_of(data: str, tokenizer: Any, settings: Settings, candidates: int) -> tuple[Any, Any]:
    """Training lists and held-out ones; the split is by prompt, and the same for all methods."""
    options = _config("unused", settings, num_candidates=candidates)
    lists, _ = load_dataset([data], tokenizer, options)
    training, held_out = split_held_out(lists, settings.held_out_share, 0)
    if len(training) < settings.lists:
        raise ValueError(f"{data}: {len(training)} lists to train on, {settings.lists} are needed")
    return training, held_out


def best_alone(row: dict[str, Any]) -> dict[str, Any]:
    """The best candidate of a tokenised list, as a list of one: all of its loss is SFT."""
    best = max(range(len(row["rewards"])), key=row["rewards"].__getitem__)
    prompts = row["prompts"] if len(row["prompts"]) == 1 else [row["prompts"][best]]
    return {"prompts": prompts, "completions": [row["completions"][best]], "rewards": [0.0]}


def whole_lengths(data: str, tokenizer: Any, settings: Settings) -> list[list[int]]:
    """Tokens of the held-out completions before any is cut."""
    uncut = Settings(**{**asdict(settings), "max_length": 1 << 20})
    _, held_out = lists_of(data, tokenizer, uncut, settings.candidates)
    return [[len(ids) for ids in row["completions"]] for row in held_out]


_NUMBERS = ("logps", "lengths", "rewards", "mask")


def numbers(scores: Scores) -> dict[str, Any]:
    """``Scores`` as lists for JSON; ``scores_from`` turns them back."""
    return {name: getattr(scores, name).tolist() for name in _NUMBERS}


def scores_from(run: Mapping[str, Any]) -> Scores:
    """What ``numbers`` wrote; the SFT candidate is the best."""
    known = {name: torch.tensor(run[name]) for name in _NUMBERS}
    best = known["rewards"].masked_fill(~known["mask"], -torch.inf).argmax(1)
    return Scores(**known, sft_index=best)


def _config(folder: str, settings: Settings, **options: Any) -> PROConfig:
    return PROConfig(
        output_dir=folder,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.lists // settings.batch // 10),
        logging_steps=max(1, settings.lists // settings.batch // 12),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=torch.cpu._is_avx512_bf16_supported(),
        **options,
    )


@contextlib.contextmanager
def _trainer(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    lists: Any = None,
    held_out: Any = None,
    **options: Any,
) -> Iterator[PROTrainer]:
    with tempfile.TemporaryDirectory(prefix="pro_study_") as folder:
        args = _config(folder, settings, **options)
        yield PROTrainer(model, args, lists, held_out, tokenizer)
