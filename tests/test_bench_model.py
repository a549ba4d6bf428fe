"""The performance model by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench.model import costs  # noqa: E402
from bench.model.cards import H200  # noqa: E402


def test_flops_and_bytes_by_hand():
    R, N, H, V = 16384, 6528, 4096, 128256
    full = costs.linear(R, N, H, V, 32, 4)
    assert (full.tier, full.flops) == ("T1", 6.0 * N * H * V)
    assert costs.linear(R, N, H, V, 32, 4, "frozen").flops == 4.0 * N * H * V
    assert costs.linear(R, N, H, V, 32, 4, "score").flops == 2.0 * N * H * V
    logits = costs.logits_in(R, N, V, 32, 4)
    needed = (2 * N + R) * V * 2
    assert needed < logits.moved < 1.001 * needed


def test_times_by_hand():
    N, H, V = 6528, 4096, 128256
    cost = costs.linear(16384, N, H, V, 32, 4)
    assert cost.matmul_seconds(H200) == pytest.approx(6.0 * N * H * V / 785e12)
    row = costs.residual_kernel(N, V)
    assert row.bound(H200) == "bandwidth"
    assert row.seconds(H200) == pytest.approx(4.0 * N * V / 4.3e12, rel=1e-3)
    # Few rows against a wide head: the weight's bytes, not the flops.
    thin = costs.matmul("", 16, V, H)
    assert thin.bound(H200) == "bandwidth"


def test_what_the_model_does_not_cover_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        costs.linear(8, 8, 8, 8, 1, 2, "trian")
    with pytest.raises(ValueError, match="tier T3 is not modelled"):
        costs.linear(16384, 16384, 4096, 128256, 32, 4, budget=1 << 30)
