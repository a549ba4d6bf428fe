"""DeepSpeed ZeRO-2 and ZeRO-3 on 2 and 4 gloo ranks, through torchrun: as in one process.

``make zero``. Not in the ``test`` extra: DeepSpeed compiles an op of its own when it first runs on
a CPU, which ``make test`` must do without.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torchrun import launched

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
for name in ("deepspeed", "transformers", "peft"):
    pytest.importorskip(name)
SCRIPT = Path(__file__).with_name("zero.py")
BUDGETS = (None, 1 << 13)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world, tmp_path):
    """Attached and functional, tied and not, adapters, a model loaded partitioned, three steps."""
    for found in launched(SCRIPT, world, tmp_path):
        assert set(found["attached"]) == {
            f"stage {stage}, tied={tied}, budget={budget}"
            for stage in (2, 3) for tied in (False, True) for budget in BUDGETS
        }  # fmt: skip
        assert all(count >= 20 for count in found["attached"].values())
        assert set(found["distinct"]) == {"stage 2", "stage 3"}
        assert min(found["distinct"].values()) > 0.2
        assert "hold it for forward and backward" in found["functional"].pop("refused")
        assert set(found["functional"]) == {
            f"{way}, budget={budget}" for way in ("in a forward", "held") for budget in BUDGETS
        }
        assert all(count == 21 for count in found["functional"].values())
        assert found["adapters"] == 6
        assert "attach within deepspeed.zero.GatheredParameters" in found["loaded"]["refused"]
        assert found["loaded"]["compared"] == 21
