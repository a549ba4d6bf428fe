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


def paper_loss(scores, sums, rewards, w):
    """Sections 2's formula for one prompt, in Python floats, straight from the page."""
    n = len(scores)
    total = 0.0
    for k in range(n - 1):
        tau = {i: rewards[k] - rewards[i] for i in range(k + 1, n)}
        own = max(tau.values())
        z = math.exp(scores[k] * own) + sum(math.exp(scores[i] * tau[i]) for i in tau)
        total += math.log(z) - scores[k] * own
    return total + w * (n - 1) ** 2 * -sums[0]


def test_paper_formula_against_python_floats():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 5, 11, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 11, (3, 4, 5), generator=g)
    targets[torch.rand(3, 4, 5, generator=g) < 0.3] = -100
    rewards = torch.randn(3, 4, generator=g, dtype=torch.float64).sort(1, descending=True).values
    expected = []
    for b in range(3):
        sums, scores = [], []
        for i in range(4):
            total, count = 0.0, 0
            for t in range(5):
                if targets[b, i, t] == -100:
                    continue
                row = [math.exp(x) for x in logits[b, i, t].tolist()]
                total += math.log(row[targets[b, i, t]] / sum(row))
                count += 1
            sums.append(total)
            scores.append(total / count)
        expected.append(paper_loss(scores, sums, rewards[b].tolist(), 0.05))
    out = pk.reference.pro_loss(logits, targets, rewards, sft_reduction="sum")
    assert out.loss.item() == pytest.approx(sum(expected) / 3, rel=1e-12)


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


def test_token_logps_are_cross_entropy():
    logits, targets = torch.randn(7, 13, dtype=torch.float64), torch.randint(0, 13, (7,))
    targets[2] = -100
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(pk.reference.token_logps(logits, targets), expected)


def test_official_final_casts():
    logits, targets = torch.randn(2, 3, 4, 9), torch.randint(0, 9, (2, 3, 4))
    r = torch.randn(2, 3)
    spec = pk.reference.pro_loss(logits, targets, r, compat="official", final_dtype=torch.bfloat16)
    fused = pk.pro_loss(logits, targets, r, compat="official", final_dtype=torch.bfloat16)
    assert spec.loss.dtype == fused.loss.dtype == torch.bfloat16
    assert torch.equal(spec.rank_losses, fused.rank_losses)
