"""Small files, a small tokenizer and a small model for the trainer's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")

RECORDS = [
    {"prompt": f"q{i}: ", "completions": ["good", "okay?", "bad!"], "rewards": [1.5, 0.25, -1.0]}
    for i in range(8)
]


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Write records (or raw bytes) as lines of a file and return its path."""

    def write(*lines: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        path.write_bytes(b"".join(x + b"\n" for x in raw))
        return str(path)

    return write


@pytest.fixture
def data_file(write_lines: Callable[..., str]) -> str:
    """Eight lists of three candidates."""
    return write_lines(*RECORDS)


@pytest.fixture(scope="session")
def tiny():
    """The demo's model and tokenizer; not to be trained in place."""
    from pro_trainer.models import tiny_llama

    return tiny_llama(0)
