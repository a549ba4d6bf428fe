"""Bad input: the exact error, for every loss."""

from __future__ import annotations

import re

import pytest
import torch
from loss_oracles import NEEDS_REF

from pro_kernels.losses import LOSSES, get_loss

ONES = torch.ones(2, 3)
NO_FLOAT = "must be float64, float32, bfloat16 or float16, got torch.int"
SHAPE = "must have shape (B, n) = (2, 3), got"


def call(name, **changes):
    arguments = {
        "logps": -ONES,
        "lengths": ONES.long(),
        "rewards": torch.tensor([[3.0, 2.0, 1.0]] * 2),
        "ref_logps": -ONES,
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    return LOSSES[name](**(arguments | changes))


BAD_INPUTS = [
    ({"logps": [[1.0]]}, TypeError, "logps must be a tensor, got list"),
    ({"logps": torch.ones(3)}, ValueError, "logps must have shape (B, n) with n >= 1, got (3,)"),
    (
        {"logps": torch.ones(2, 0)},
        ValueError,
        "logps must have shape (B, n) with n >= 1, got (2, 0)",
    ),
    (
        {"logps": ONES.long()},
        TypeError,
        f"logps {NO_FLOAT}64",
    ),
    (
        {"lengths": torch.ones(2, 2)},
        ValueError,
        f"lengths {SHAPE} (2, 2)",
    ),
    ({"lengths": ONES.bool()}, TypeError, "lengths must be real numbers, got torch.bool"),
    (
        {"lengths": torch.tensor([[1, 1, 1], [1, -2, 1]])},
        ValueError,
        "lengths must be >= 0, got a negative one in rows [1]",
    ),
    (
        {"rewards": torch.ones(3, 2)},
        ValueError,
        f"rewards {SHAPE} (3, 2)",
    ),
    ({"rewards": [3, 2, 1]}, TypeError, "rewards must be a tensor, got list"),
    ({"rewards": ONES.cfloat()}, TypeError, "rewards must be real numbers, got torch.complex64"),
    (
        {"rewards": torch.tensor([[1.0, 0.0, torch.nan], [2.0, 1.0, 0.0]])},
        ValueError,
        "rewards must be finite, got nan for prompt 0 candidate 2",
    ),
    (
        {"rewards": torch.tensor([[2.0, 1.0, 0.0], [torch.inf, 0.0, -torch.inf]])},
        ValueError,
        "rewards must be finite, got inf for prompt 1 candidate 0",
    ),
    (
        {"ref_logps": torch.ones(2)},
        ValueError,
        f"ref_logps {SHAPE} (2,)",
    ),
    (
        {"ref_logps": ONES.int()},
        TypeError,
        f"ref_logps {NO_FLOAT}32",
    ),
    ({"mask": ONES}, TypeError, "mask must be a bool tensor, got torch.float32"),
    ({"mask": ONES.bool()[:1]}, ValueError, f"mask {SHAPE} (1, 3)"),
    (
        {"mask": ONES.bool().to("meta")},
        ValueError,
        "mask must be on the device of logps (cpu), got meta",
    ),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("changes", "error", "message"), BAD_INPUTS)
def test_bad_input(name, changes, error, message):
    call(name)
    with pytest.raises(error, match=re.escape(message)):
        call(name, **changes)


@pytest.mark.parametrize("name", sorted(NEEDS_REF))
def test_reference_is_required(name):
    with pytest.raises(ValueError, match=f"{name} needs ref_logps: expected a .* tensor, got None"):
        call(name, ref_logps=None)


def test_listnet_needs_rewards():
    with pytest.raises(ValueError, match="listnet needs rewards: expected a .* tensor, got None"):
        call("listnet", rewards=None)


BETA = "beta must be > 0, got 0"
PAIRS = "pairs must be one of ['all', 'best'], got 'any'"
REDUCTION = "sft_reduction must be one of ['sum', 'mean', 'tokens'], got 'none'"
BAD_OPTIONS = [
    *((n, {"beta": 0}, BETA) for n in ("dpo", "dpo_pl", "s_dpo", "ipo", "simpo", "cpo", "orpo")),
    ("lipo_lambda", {"beta": 0}, BETA),
    *((n, {"pairs": "any"}, PAIRS) for n in ("dpo", "ipo", "simpo", "cpo", "orpo", "slic")),
    *((n, {"sft_reduction": "none"}, REDUCTION) for n in ("cpo", "orpo", "rrhf", "slic")),
    ("dpo", {"label_smoothing": 0.6}, "label_smoothing must be <= 0.5, got 0.6"),
    ("simpo", {"gamma": -1}, "gamma must be >= 0, got -1"),
    ("cpo", {"cpo_alpha": -1}, "cpo_alpha must be >= 0, got -1"),
    ("rrhf", {"sft_weight": -1}, "sft_weight must be >= 0, got -1"),
    ("slic", {"sft_weight": -1}, "sft_weight must be >= 0, got -1"),
    ("slic", {"delta": -1}, "delta must be >= 0, got -1"),
    ("listnet", {"reward_temperature": 0}, "reward_temperature must be > 0, got 0"),
    ("lipo_lambda", {"gain": "x"}, "gain must be one of ['exp2', 'linear'], got 'x'"),
    ("plackett_luce", {"top_k": 0}, "top_k must be None or an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(name, **options)


@pytest.mark.parametrize("name", ["plackett_luce", "ipo", "slic", "listnet"])
def test_flags_must_be_bool(name):
    message = "length_normalize must be a bool, got 'no'"
    with pytest.raises(TypeError, match=re.escape(message)):
        call(name, length_normalize="no")


@pytest.mark.parametrize("beta", [True, "0.1", None])
def test_numbers_must_be_numbers(beta):
    with pytest.raises(TypeError, match="beta must be a number, got"):
        call("dpo", beta=beta)


def test_lipo_gain_overflow():
    with pytest.raises(ValueError, match="rewards up to 300 are too large for the gain 2"):
        call("lipo_lambda", rewards=torch.tensor([[300.0, 1.0, 0.0]] * 2))
    loss, _ = call("lipo_lambda", rewards=torch.tensor([[300.0, 1.0, 0.0]] * 2), gain="linear")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_option(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'betta'"):
        call(name, betta=1.0)


def test_unknown_loss_lists_the_names():
    with pytest.raises(ValueError, match="unknown loss 'grpo'; expected one of") as caught:
        get_loss("grpo")
    assert all(name in str(caught.value) for name in LOSSES)
