"""Bad input: the exact error, for every loss."""

from __future__ import annotations

import math

import pytest
import torch

from pro_kernels.losses import LOSSES, get_loss

ONES = torch.ones(2, 3)


def rows(*values):
    return torch.tensor(values)


def call(name, **changes):
    arguments = {
        "logps": -ONES,
        "lengths": ONES.long(),
        "rewards": rows([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        "ref_logps": -ONES,
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    return LOSSES[name](**(arguments | changes))


def check_raises(error, message, name, **changes):
    with pytest.raises(error) as caught:
        call(name, **changes)
    assert message in str(caught.value)


NO_FLOAT = "be float64, float32, bfloat16 or float16, got torch.int"
NO_RANK = "have shape (B, n) with n >= 1, got"
DEVICE = "be on the device of logps (cpu)"
SHAPE = "have shape (B, n) = (2, 3), got"
FINITE, NAN, INF = "be finite, got", math.nan, math.inf
# What is wrong with which input: "NAME must ...".
BAD_INPUTS = [
    ("logps", [[1.0]], TypeError, "be a tensor, got list"),
    ("logps", torch.ones(3), ValueError, f"{NO_RANK} (3,)"),
    ("logps", torch.ones(2, 0), ValueError, f"{NO_RANK} (2, 0)"),
    ("logps", ONES.long(), TypeError, f"{NO_FLOAT}64"),
    ("lengths", torch.ones(2, 2), ValueError, f"{SHAPE} (2, 2)"),
    ("lengths", ONES.bool(), TypeError, "be real numbers, got torch.bool"),
    ("lengths", rows([1, 1, 1], [1, -2, 1]), ValueError, "be >= 0, got a negative one in rows [1]"),
    ("rewards", torch.ones(3, 2), ValueError, f"{SHAPE} (3, 2)"),
    ("rewards", [3, 2, 1], TypeError, "be a tensor, got list"),
    ("rewards", ONES.cfloat(), TypeError, "be real numbers, got torch.complex64"),
    ("rewards", rows([1, 0, NAN], [2, 1, 0]), ValueError, f"{FINITE} nan for prompt 0 candidate 2"),
    (
        "rewards",
        rows([2, 1, 0], [INF, 0, -INF]),
        ValueError,
        f"{FINITE} inf for prompt 1 candidate 0",
    ),
    ("ref_logps", torch.ones(2), ValueError, f"{SHAPE} (2,)"),
    ("ref_logps", ONES.int(), TypeError, f"{NO_FLOAT}32"),
    ("mask", ONES, TypeError, "be a bool tensor, got torch.float32"),
    ("mask", ONES.bool()[:1], ValueError, f"{SHAPE} (1, 3)"),
    ("mask", ONES.bool().to("meta"), ValueError, f"{DEVICE}, got meta"),
]


@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(name):
    call(name)
    for what, value, error, message in BAD_INPUTS:
        check_raises(error, f"{what} must {message}", name, **{what: value})
    for what in LOSSES[name].needs():
        check_raises(ValueError, f"{name} needs {what}: expected a ", name, **{what: None})
    check_raises(TypeError, "unexpected keyword argument 'betta'", name, betta=1.0)


REDUCTION = "be one of ['sum', 'mean', 'tokens']"
INDEX = "be an integer tensor, got"
PLACE = "lie in [0, 3), got"
OF_PROMPTS = "have shape (B,) = (2,), got"
# Losses, their option, a value: "OPTION must ..., got VALUE".
BAD_OPTIONS = [
    ("dpo dpo_pl s_dpo ipo simpo cpo orpo lipo_lambda", "beta", 0, ValueError, "be > 0"),
    ("dpo ipo simpo cpo orpo slic", "pairs", "any", ValueError, "be one of ['all', 'best']"),
    ("cpo orpo rrhf slic dpo", "sft_reduction", "none", ValueError, REDUCTION),
    ("plackett_luce ipo slic listnet pro", "length_normalize", "no", TypeError, "be a bool"),
    *(("dpo", "beta", x, TypeError, "be a number") for x in (True, "0.1", None)),
    ("dpo cpo simpo exo", "label_smoothing", 0.6, ValueError, "be <= 0.5"),
    ("robust", "label_smoothing", 0.5, ValueError, "be <= 0.49"),
    ("kto", "desirable", ONES, TypeError, "be a bool tensor, got torch.float32"),
    ("kto", "desirable", ONES.bool().to("meta"), ValueError, f"{DEVICE}, got meta"),
    ("bco", "running", [0.0, 0.0], TypeError, "be a tensor, got list"),
    ("bco", "running", ONES.double(), ValueError, "have shape (2,) = (2,), got (2, 3)"),
    ("bco", "running", torch.zeros(2).double().to("meta"), ValueError, f"{DEVICE}, got meta"),
    ("bco", "running", torch.zeros(2), TypeError, "be float64, got torch.float32"),
    ("kto", "kl", ONES, ValueError, "have shape () = (), got (2, 3)"),
    ("infonca nca exo", "alpha", -1, ValueError, "be >= 0"),
    ("dpo_ties f_dpo", "alpha", 0, ValueError, "be > 0"),
    ("lire listnet neural_ndcg", "temperature", 0, ValueError, "be > 0"),
    ("swepo", "reference_free", 1, TypeError, "be a bool"),
    ("dpo", "sft_on", "worst", ValueError, "be one of ['best', 'all']"),
    ("simpo", "gamma", -1, ValueError, "be >= 0"),
    ("cpo rrhf slic pro dpo", "sft_weight", -1, ValueError, "be >= 0"),
    ("slic", "delta", -1, ValueError, "be >= 0"),
    ("lipo_lambda", "gain", "x", ValueError, "be one of ['exp2', 'linear', 'rank']"),
    ("plackett_luce pro", "top_k", 0, ValueError, "be None or an integer >= 1"),
    ("pro", "top_k", 1.0, TypeError, "be None or an integer >= 1"),
    ("pro", "sft_reduction", "tokens", ValueError, "be one of ['sum', 'mean']"),
    ("pro", "length_normalize", 1, TypeError, "be a bool"),
    ("pro", "temperature", "r", ValueError, "be a number or one of ['reward']"),
    ("pro", "temperature", 0.0, ValueError, "be > 0"),
    ("pro", "temperature", None, TypeError, "be a number"),
    ("pro", "ties", "drop", ValueError, "be one of ['zero', 'skip']"),
    ("pro", "eps", math.nan, ValueError, "be 0 or of a size in [1e-30, 1e+30]"),
    ("pro", "reward_scale", 0, ValueError, "be > 0"),
    ("pro", "reward_scale", 1e39, ValueError, "be of a size in [1e-30, 1e+30]"),
    ("pro", "equal_rewards", "x", ValueError, "be one of ['error', 'keep']"),
    ("pro", "sft_index", [0, 0], TypeError, f"{INDEX} list"),
    ("pro", "sft_index", torch.zeros(2), TypeError, f"{INDEX} dtype"),
    ("pro", "sft_index", torch.zeros(3).long(), ValueError, f"{OF_PROMPTS} (3,)"),
    ("pro", "sft_index", torch.tensor([0, 3]), ValueError, f"{PLACE} [0, 3]"),
    ("pro", "sft_index", torch.tensor([0, -1]), ValueError, f"{PLACE} [0, -1]"),
    ("pro dpo", "prompt_weights", rows(1.0, -1.0), ValueError, "be finite and >= 0, got [1."),
    ("pro kto", "prompt_weights", torch.ones(2, 1), ValueError, f"{OF_PROMPTS} (2, 1)"),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "error", "message"),
    [(name, *row) for names, *row in BAD_OPTIONS for name in names.split()],
)
def test_bad_options(name, option, value, error, message):
    got = "" if "got" in message else f", got {value!r}"
    check_raises(error, f"{option} must {message}{got}", name, **{option: value})


LARGE, FAR = rows([300.0, 1, 0], [300.0, 1, 0]), rows([0.0, 1, 2], [3e38, -3e38, 0])
TOGETHER = [
    ("lipo_lambda", {"rewards": LARGE}, "rewards 0 to 300 are too large for the gain 2"),
    ("neural_ndcg", {"rewards": LARGE}, "rewards 0 to 300 are too large for the gain 2"),
    (
        "approx_ndcg",
        {"rewards": -ONES},
        "rewards -1 to -1 are below 0, and so is their gain: add a",
    ),
    ("dpo", {"sft_on": "all"}, "got sft_on='all' without sft_weight"),
    ("f_dpo", {"alpha": 0.5}, "alpha must be None with divergence='reverse_kl'"),
    ("exo", {"alpha": 1.0, "label_smoothing": 0.1}, "label_smoothing must be None with alpha > 0"),
    ("pro", {"rewards": FAR}, "rewards of prompt 1 are too far apart"),
]
for _weight in (1e39, 1e-39):
    _weights = torch.tensor([_weight, 0], dtype=torch.double)
    TOGETHER.append(("pro", {"prompt_weights": _weights}, "add up to"))


@pytest.mark.parametrize(("name", "changes", "message"), TOGETHER, ids=str)
def test_what_does_not_go_together_or_is_too_large(name, changes, message):
    check_raises(ValueError, message, name, **changes)
    assert torch.isfinite(call("lipo_lambda", rewards=LARGE, gain="linear")[0])


def test_unknown_loss_lists_the_names():
    with pytest.raises(ValueError, match="unknown loss 'grpo'; expected one of") as caught:
        get_loss("grpo")
    assert all(name in str(caught.value) for name in LOSSES)
