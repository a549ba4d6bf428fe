"""``--bench-preset`` for ``pytest --benchmark-only bench``."""

from __future__ import annotations

import pytest

from bench.suites import load


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-preset", choices=load("loss").presets, default="tiny",
        help="case table of the loss (default: tiny)",
    )  # fmt: skip
