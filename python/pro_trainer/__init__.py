"""Train and evaluate causal language models with Preference Ranking Optimization.

The path of a candidate: ``files`` and ``records`` (what is on disk) -> ``data`` (usable lists) ->
``tokenization`` and ``store`` (token ids) -> ``collate`` (a batch and its ``Layout``) -> ``prefix``
(the prompt once for all its candidates) -> ``objective`` (decoder, fused loss) -> ``trainer``.
Everything here uses the public names of ``pro_kernels`` only.
"""

from __future__ import annotations

from pro_trainer.batch.collate import PROCollator
from pro_trainer.data.formats import DataError, RankedList
from pro_trainer.data.lists import read_lists
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
