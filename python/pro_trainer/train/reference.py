"""The reference model: its log-probs computed once and stored, or the model moved along."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from pro_trainer.files import appearing
from pro_trainer.models import quiet
from pro_trainer.train.config import PROConfig
from pro_trainer.train.distributed import describe_lists

if TYPE_CHECKING:
    import datasets

COLUMN = "ref_logps"
FOLDER = "ref_model"  # of a checkpoint, where the reference model moves


def check(args: PROConfig, ref_model: Any, adapted: bool) -> None:
    """Raise TypeError or ValueError for a reference model that cannot be, or that is not there.

    ``adapted``: the model has adapters, and is its own reference without them.
    """
    if ref_model is not None and not isinstance(ref_model, nn.Module):
        raise TypeError(f"ref_model must be a model, got {type(ref_model).__name__}")
    if not args.needs_reference():
        given = [n for n in ("sync_ref_model", "precompute_ref_log_probs") if getattr(args, n)]
        if given or ref_model is not None:
            raise ValueError(
                f"{(given or ['ref_model'])[0]} is about a reference model, and loss_type="
                f"{args.loss_type!r} has none"
            )
    if args.precompute_ref_log_probs and args.loss_type == "kto" and args.kto_kl != "batch":
        raise ValueError(
            "precompute_ref_log_probs scores the candidates of each list once, and "
            "kto_kl='other_prompts' scores other completions at each step: set kto_kl='batch'"
        )
    if args.sync_ref_model and adapted:
        raise ValueError(
            "sync_ref_model moves a reference model, and a model with adapters has none of its own"
        )


def fingerprint(model: nn.Module) -> str:
    """What tells the reference model from others: its parameters' names, shapes and sums.

    Adapters are left out: the reference model is the one below them.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            numbers = parameter.detach().double()
            digest.update(f"{name} {tuple(parameter.shape)} ".encode())
            digest.update(f"{numbers.sum().item()} {numbers.abs().sum().item()}\n".encode())
    return digest.hexdigest()


def with_log_probs(
    dataset: datasets.Dataset, file: Path, model: str, score: Callable[[Any], Tensor], keep: bool
) -> datasets.Dataset:
    """``dataset`` with the reference model's log-probs of its candidates in the column ``COLUMN``.

    They are read from ``file`` where it holds those of this model and these lists.

    ``model`` tells the reference model from others, ``score`` gives the (L, n) log-probs of a data
    set, ``keep`` tells whether this process writes the file.
    """
    about = {"model": model, "lists": describe_lists(dataset)}
    logps = None
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if stored.metadata() == about:
                logps = stored.get_tensor(COLUMN)
    if logps is None:
        if keep:
            print(f"scoring {len(dataset)} lists by the reference model", flush=True)
        logps = score(dataset).float().contiguous()
        if keep:
            with appearing(file.parent) as writing:
                save_file({COLUMN: logps}, writing / file.name, about)
    counts = (len(row) for row in dataset["completions"])
    rows = [row[:n] for row, n in zip(logps.tolist(), counts, strict=True)]
    with quiet():
        found = dataset.add_column(COLUMN, rows)
    if hasattr(dataset, "temporary_folder"):  # goes with the last data set that reads from it
        found.temporary_folder = dataset.temporary_folder
    return found


class SyncReference(TrainerCallback):
    """Every so many steps: reference = alpha * trained + (1 - alpha) * reference.

    TR-DPO, arXiv 2404.09656; TRL's ``sync_ref_model``.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module) -> None:
        self._model = model
        self._ref_model = ref_model

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the reference model."""
        if state.global_step % args.ref_model_sync_steps:
            return
        alpha = args.ref_model_mixup_alpha
        pairs = zip(self._ref_model.parameters(), self._model.parameters(), strict=True)
        for reference, trained in pairs:
            reference.lerp_(trained.to(reference), alpha)
