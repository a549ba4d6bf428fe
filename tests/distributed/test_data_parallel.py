"""Attached models under DDP and FSDP2, 2 and 4 gloo ranks, through torchrun: as in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed
from bench.scaling import wire

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("data_parallel.py")


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world, tmp_path):
    """Tied heads and not, ranks of other sizes and one that scores nothing, two tiers.

    And every byte that is sent for the head is known to the scaling model.
    """
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(SCRIPT), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for call in found.pop("bytes"):
            V, H, b = call["V"], call["H"], call["b"]
            predicted = (
                wire.sharded_weight(world, V, H, b, steps=2)
                if call["kind"] == "FSDP2"
                else wire.replicated_weight(world, V, H, b)
            )
            sent = {kind: [x[2] for x in call["sent"] if x[0] == kind] for kind, *_ in call["sent"]}
            assert {c.kind: (c.calls, c.size) for c in predicted} == {
                kind: (len(sizes), sum(sizes)) for kind, sizes in sent.items()
            }
        message = found.pop("FSDP2, head apart")
        assert "sharded as a unit of its own" in message and "leave it to the root" in message
        kinds = [f"{kind}, tied={tied}" for tied in (False, True) for kind in ("DDP", "FSDP2")]
        assert sorted(found) == sorted(
            f"{kind}, budget={budget}" for kind in kinds for budget in (None, 1 << 13)
        )
        assert all(count >= 20 for count in found.values())
