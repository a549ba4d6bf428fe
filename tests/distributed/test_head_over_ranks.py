"""Split heads and tokens, DTensor heads, DDP, FSDP2 and ZeRO on 2 and 4 gloo ranks: as in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pro_kernels as pk

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.mark.parametrize("check", ["heads", "zero"])
def test_values_gradients_bytes_and_refusals(check, tmp_path):
    """A rank that fails a check fails the launch. DeepSpeed: ``make zero``, which installs it."""
    pytest.importorskip("transformers")
    modules = ["tensor_parallel", "dtensors", "sequence_parallel", "data_parallel"]
    if check == "zero":
        pytest.importorskip("deepspeed")
        pytest.importorskip("peft")
        modules = ["zero"]
    script = Path(__file__).with_name("worlds.py")
    command = [sys.executable, str(script), str(tmp_path), "2,4", *modules]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", ["process_group", "sequence_group"])
@pytest.mark.parametrize("compiling", [False, True])
def test_without_ranks_there_is_no_group(name, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    logits, targets = torch.randn(1, 2, 3, 5), torch.ones(1, 2, 3, dtype=torch.int64)
    reason = "cannot be compiled" if compiling else "needs torch.distributed.init_process_group"
    weight, group = torch.randn(7, 5), {name: object()}
    other = (pk.linear_token_logps, logits, weight, targets)
    if name == "sequence_group":
        other = (pk.pro_loss, logits, targets, None)
    for function, *given in ((pk.linear_pro_loss, logits, weight, targets, None), other):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            function(*given, **group)
