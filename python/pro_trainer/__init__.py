"""Train and evaluate causal language models with Preference Ranking Optimization.

The path of a candidate: ``data`` (records on disk) -> ``collate`` (token ids, ``Layout``) ->
``model`` (hidden states, head) -> ``objective`` (the fused loss) -> ``trainer`` / ``evaluate``.
Everything here uses the public names of ``pro_kernels`` only.
"""

from __future__ import annotations

from pro_trainer.collate import Batch, TokenizedList, collate, tokenize
from pro_trainer.config import EvalConfig, TrainConfig
from pro_trainer.data import DataError, DataReport, RankedList, read_lists
from pro_trainer.evaluate import evaluate
from pro_trainer.trainer import TrainingError, train

__all__ = [
    "Batch",
    "DataError",
    "DataReport",
    "EvalConfig",
    "RankedList",
    "TokenizedList",
    "TrainConfig",
    "TrainingError",
    "collate",
    "evaluate",
    "read_lists",
    "tokenize",
    "train",
]
