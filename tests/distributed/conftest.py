"""The launches of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchrun import launched


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each rank of the module's SCRIPT found; one that fails a comparison fails the launch."""
    script: Path = request.module.SCRIPT
    return launched(script, request.param, tmp_path_factory.mktemp("ranks"))
