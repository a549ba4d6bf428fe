"""Ranked lists that the project generated itself (``generate.py``): quick start and tests."""

from __future__ import annotations

from pathlib import Path

BUNDLED_TRAIN = str(Path(__file__).parent / "train.jsonl")
BUNDLED_EVAL = str(Path(__file__).parent / "eval.jsonl")
