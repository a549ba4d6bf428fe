"""Train and evaluate causal language models with Preference Ranking Optimization.

The folders follow the way of a record: ``data`` (read, recognised, cleaned) -> ``text`` (token ids)
-> ``batch`` (rows and their ``Layout``) -> ``train`` (the model up to its head, the fused loss,
steps). ``evaluate`` and ``prepare`` stand beside it, ``cli`` has one file a command.
Everything here uses the public names of ``pro_kernels`` only.
"""

from __future__ import annotations

from pro_trainer.batch.collate import PROCollator
from pro_trainer.data.fields import DataError
from pro_trainer.data.lists import read_lists
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.errors import TrainingError
from pro_trainer.text.store import load_dataset, split_held_out
from pro_trainer.train.config import PROConfig
from pro_trainer.train.objective import Scores, batch_loss, score_metrics
from pro_trainer.train.trainer import PROTrainer

__all__ = [
    "DataError",
    "DataReport",
    "PROCollator",
    "PROConfig",
    "PROTrainer",
    "RankedList",
    "Scores",
    "TrainingError",
    "batch_loss",
    "load_dataset",
    "read_lists",
    "score_metrics",
    "split_held_out",
]
