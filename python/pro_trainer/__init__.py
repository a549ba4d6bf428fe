"""Train and evaluate causal language models with Preference Ranking Optimization.

The folders follow the way of a record: ``data`` (read, recognised, cleaned) -> ``text`` (token ids)
-> ``batch`` (rows and their ``Layout``) -> ``train`` (the model up to its head, the fused loss,
steps). ``evaluate`` and ``prepare`` stand beside it, ``cli`` has one file a command.
Everything here uses the public names of ``pro_kernels`` only.

Names are imported when they are first used, so that a command can say its options at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pro_trainer.batch.collate import PROCollator as PROCollator
    from pro_trainer.data.fields import DataError as DataError
    from pro_trainer.data.lists import read_lists as read_lists
    from pro_trainer.data.records import RankedList as RankedList
    from pro_trainer.data.report import DataReport as DataReport
    from pro_trainer.errors import TrainingError as TrainingError
    from pro_trainer.text.store import load_dataset as load_dataset
    from pro_trainer.text.store import split_held_out as split_held_out
    from pro_trainer.train.config import PROConfig as PROConfig
    from pro_trainer.train.objective import Scores as Scores
    from pro_trainer.train.objective import batch_loss as batch_loss
    from pro_trainer.train.objective import score_metrics as score_metrics
    from pro_trainer.train.trainer import PROTrainer as PROTrainer

_AT = {
    "PROCollator": "batch.collate",
    "DataError": "data.fields",
    "read_lists": "data.lists",
    "RankedList": "data.records",
    "DataReport": "data.report",
    "TrainingError": "errors",
    "load_dataset": "text.store",
    "split_held_out": "text.store",
    "PROConfig": "train.config",
    "Scores": "train.objective",
    "batch_loss": "train.objective",
    "score_metrics": "train.objective",
    "PROTrainer": "train.trainer",
}

__all__ = [*_AT]


def __getattr__(name: str) -> Any:
    if name not in _AT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_AT[name]}"), name)
