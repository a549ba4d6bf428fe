"""DeepSpeed ZeRO-2 and ZeRO-3 on 2 and 4 gloo ranks, through torchrun: as in one process.

``make zero``. Not in the ``test`` extra: DeepSpeed compiles an op of its own when it first runs on
a CPU, which ``make test`` must do without.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
for name in ("deepspeed", "transformers", "peft"):
    pytest.importorskip(name)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world, tmp_path):
    """Attached and functional, tied and not, adapters, a model loaded partitioned, three steps.

    A rank that fails a check fails the launch.
    """
    script = Path(__file__).with_name("zero.py")
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {x.name for x in tmp_path.glob("*.done")} == {f"{rank}.done" for rank in range(world)}
