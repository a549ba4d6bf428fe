"""DeepSpeed ZeRO-2 and ZeRO-3 on 2 and 4 gloo ranks: as in one process.

``make zero``, which installs DeepSpeed.
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


def test_losses_and_gradients_are_those_of_one_process(tmp_path):
    """Attached and functional, tied and not, adapters, a model loaded partitioned, three steps.

    A rank that fails a check fails the launch.
    """
    script = Path(__file__).with_name("worlds.py")
    command = [sys.executable, str(script), str(tmp_path), "2,4", "zero"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
