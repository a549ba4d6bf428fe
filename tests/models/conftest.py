"""The real models, where they are built (``make test-models`` builds them)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("PRO_KERNELS_MODELS", "~/.cache/pro_kernels/models")).expanduser()
SMOLLM, GEMMA = "smollm2-135m-instruct", "gemma3-270m"


def folder(name: str) -> str:
    """The folder of a real model, or the test is skipped."""
    if not (FOLDER / name / "config.json").exists():
        pytest.skip(f"{name} is not in {FOLDER}: make test-models builds it")
    return str(FOLDER / name)


@pytest.fixture(scope="session")
def smollm() -> str:
    """SmolLM2-135M-Instruct: ChatML template, tied."""
    return folder(SMOLLM)


@pytest.fixture(scope="session")
def gemma() -> str:
    """Gemma 3 270M: no template, BOS needed, V 262144, sliding windows."""
    return folder(GEMMA)


@pytest.fixture(scope="session", params=[SMOLLM, GEMMA])
def real(request) -> str:
    """Each of them."""
    return folder(request.param)
