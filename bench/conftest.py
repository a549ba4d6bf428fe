"""``--bench-preset`` for ``pytest bench/ --benchmark-only``."""

from __future__ import annotations

import pytest

from bench.presets import NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--bench-preset", choices=NAMES, default="tiny", help="case table (default: tiny)"
    )
