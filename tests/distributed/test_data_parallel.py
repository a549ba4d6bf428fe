"""Attached models under DDP, FSDP2 and with split heads, 2 and 4 gloo ranks: as in one process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torchrun import launched

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed
from bench.suites.ranks import wire

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("data_parallel.py")
SHARDED = {False: "FSDP2, head apart", True: "FSDP2, head with embedding"}
BUDGETS = (None, 1 << 13)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(world, tmp_path):
    """Ranks of other sizes and one that scores nothing; a repeated step has the same bits.

    And every byte that is sent for the head is known to the scaling model.
    """
    every = [f"{kind}, tied={tied}" for tied in SHARDED for kind in ("DDP", "FSDP2", SHARDED[tied])]
    frozen = ["frozen head", "frozen body"]
    if importlib.util.find_spec("peft"):
        frozen += ["LoRA", "LoRA on the head"]
    kinds = ("DDP", "FSDP2", SHARDED[False])
    plans: set[tuple] = set()
    for found in launched(SCRIPT, world, tmp_path):
        for call in found["bytes"]:
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
        assert set(found["kinds"]) == {f"{x}, budget={b}" for x in every for b in BUDGETS}
        assert set(found["accumulated"]) == set(every)
        assert set(found["distinct"]) == set(every) and min(found["distinct"].values()) > 0.2
        made = found["logits"]
        assert set(made) == {*every, *(f"DDP, {x}, tied={y}" for x in ("unused", "static") for y in
                                       (False, True))}  # fmt: skip
        # A static graph has to see a gradient of DDP's outputs.
        assert not any(n for kind, n in made.items() if "static" not in kind)
        assert set(found["frozen"]) == {
            f"{kind}, {x}, budget={b}" for kind in kinds for x in frozen for b in BUDGETS
        }
        assert set(found["functional"]) == {f"functional, budget={b}" for b in BUDGETS}
        split = found["tensor parallel"]
        assert "tensor parallel and a unit of FSDP2 of its own" in split.pop("refused")
        assert "its head is no DTensor" in split.pop("whole")
        ways = ("mesh", "its group", "gathered")
        assert set(split) == {f"{way}, budget={b}" for way in ways for b in BUDGETS}
        for what in ("kinds", "accumulated", "functional", "tensor parallel"):
            assert all(count >= 20 for count in found[what].values())
        assert all(count >= 1 for count in found["frozen"].values())
        plans |= {tuple(x) for x in found["plans"]}
    # All rows retained, a frozen head, and some of the rows computed again.
    assert plans >= {("T1", True), ("T1f", False), ("T3", False)}
