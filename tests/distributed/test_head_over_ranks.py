"""Split heads and tokens, DTensor heads, DDP and FSDP2 on 2 and 4 gloo ranks: as in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pro_kernels as pk

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def test_values_gradients_bytes_and_refusals(tmp_path):
    """A rank that fails a check fails the launch."""
    pytest.importorskip("transformers")
    script = Path(__file__).with_name("worlds.py")
    checks = "tensor_parallel", "dtensors", "sequence_parallel", "data_parallel"
    command = [sys.executable, str(script), str(tmp_path), "2,4", *checks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", ["process_group", "sequence_group"])
@pytest.mark.parametrize("compiling", [False, True])
def test_without_ranks_there_is_no_group(name, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    logits, targets = torch.randn(1, 2, 3, 5), torch.ones(1, 2, 3, dtype=torch.int64)
    reason = "cannot be compiled" if compiling else "needs torch.distributed.init_process_group"
    with pytest.raises(ValueError, match=f"{name} {reason}"):
        pk.linear_pro_loss(logits, torch.randn(7, 5), targets, None, **{name: object()})
    if name == "process_group":
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            pk.linear_token_logps(logits, torch.randn(7, 5), targets, process_group=object())
    else:
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            pk.pro_loss(logits, targets, None, sequence_group=object())
