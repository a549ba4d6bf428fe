"""The specification against the official code's outputs, against loops, and against gradcheck."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pro_kernels as pk
from pro_kernels.options import LogitOptions

DATA = Path(__file__).parent / "data"
GOLDEN = ["n2_f64", "n3_f32", "n3_ties_f64", "n5_f64", "n8_f32"]


def load(path: Path) -> dict:
    return {k: torch.from_numpy(v) if v.shape else float(v) for k, v in np.load(path).items()}


def check_golden(path: Path, function) -> None:
    d = load(path)
    tol = 1e-9 if d["logits"].dtype == torch.float64 else 1e-5
    targets = pk.reference.official_targets(d["input_ids"], d["attention_mask"], d["prefix_mask"])
    logits = d["logits"].requires_grad_()
    out = function(
        logits, targets, d["rewards"], sft_index=d["sft_index"], sft_weight=d["sft_weight"],
        compat="official",
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(d["loss"], rel=tol)
    assert out.sft_loss.item() == pytest.approx(d["sft_loss"], rel=tol)
    torch.testing.assert_close(out.rank_losses.double(), d["rank_losses"], rtol=tol, atol=0)
    error = (logits.grad - d["grad_logits"]).norm() / d["grad_logits"].norm()
    assert error <= tol


BOTH = pytest.mark.parametrize(
    "function", [pk.reference.pro_loss, pk.pro_loss], ids=["spec", "fused"]
)


@BOTH
@pytest.mark.parametrize("name", ["n2_f64", "n3_f32"])
def test_bundled_golden_outputs_of_the_official_code(name, function):
    check_golden(DATA / f"{name}.npz", function)


@pytest.mark.shared
@BOTH
@pytest.mark.parametrize("name", GOLDEN)
def test_all_golden_outputs_of_the_official_code(shared, name, function):
    check_golden(shared / "golden" / f"{name}.npz", function)


def test_order_only_is_plackett_luce_of_the_scores():
    logits = torch.randn(2, 4, 3, 9, dtype=torch.float64)
    targets = torch.randint(0, 9, (2, 4, 3))
    out = pk.reference.pro_loss(logits, targets, None, sft_weight=0.0)
    of_the_rest = out.scores.flip(1).logcumsumexp(1).flip(1)
    expected = (of_the_rest - out.scores).sum(1).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


def test_scale_and_softcap_by_hand():
    raw, slope = torch.linspace(-9, 9, 19, dtype=torch.float64), torch.empty(19).double()
    z = LogitOptions(softcap=3.0, logit_scale=0.7).transform(raw, slope=slope)
    t = [math.tanh(0.7 * x / 3) for x in raw.tolist()]
    assert z.tolist() == pytest.approx([3 * x for x in t], rel=1e-14)
    assert slope.tolist() == pytest.approx([0.7 * (1 - x * x) for x in t], rel=1e-12)


def test_log_probs_are_cross_entropies_and_scores_their_means():
    logits, targets = torch.randn(2, 3, 5, 13).double(), torch.randint(0, 13, (2, 3, 5))
    targets[torch.rand(2, 3, 5) < 0.3] = -100
    cross_entropy = torch.nn.functional.cross_entropy
    logps = -cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(2, 3, 5)
    torch.testing.assert_close(pk.reference.token_logps(logits, targets), logps)
    out = pk.reference.pro_loss(logits, targets, torch.randn(2, 3))
    torch.testing.assert_close(out.logps, logps.sum(-1))
    torch.testing.assert_close(out.scores, logps.sum(-1) / (targets >= 0).sum(-1).clamp(min=1))


def test_official_final_casts():
    logits, targets = torch.randn(2, 3, 4, 9), torch.randint(0, 9, (2, 3, 4))
    r = torch.randn(2, 3)
    spec = pk.reference.pro_loss(logits, targets, r, compat="official", final_dtype=torch.bfloat16)
    fused = pk.pro_loss(logits, targets, r, compat="official", final_dtype=torch.bfloat16)
    assert spec.loss.dtype == fused.loss.dtype == torch.bfloat16
    assert torch.equal(spec.rank_losses, fused.rank_losses)
