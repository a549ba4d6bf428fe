"""What every public function says to input it cannot take, before any work."""

from __future__ import annotations

import re

import pytest
import torch

import pro_kernels as pk
from cases import usable_backends
from pro_kernels.options import PROOptions


def batch(**changes):
    args = {
        "hidden": torch.randn(2, 3, 4, 8),
        "weight": torch.randn(11, 8),
        "targets": torch.randint(0, 11, (2, 3, 4)),
        "rewards": torch.randn(2, 3),
    }
    return {**args, **changes}


def nan_reward():
    r = torch.randn(2, 3)
    r[1, 2] = float("nan")
    return r


BAD = [
    ("hidden", {"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
    ("int hidden", {"hidden": torch.ones(2, 3, 4, 8).long()}, TypeError, "hidden must be float64"),
    ("H", {"hidden": torch.randn(2, 3, 4, 9)}, ValueError, "H = 8 as in weight (11, 8), got (2, 3"),
    ("3-d", {"hidden": torch.randn(6, 4, 8)}, ValueError, "hidden must have shape (B, n, T, H)"),
    ("weight", {"weight": torch.randn(11)}, ValueError, "weight must have shape (V, H), got (11,)"),
    ("V = 0", {"weight": torch.randn(0, 8)}, ValueError, "weight must not be empty"),
    ("dtypes", {"weight": torch.randn(11, 8).double()}, ValueError, "one dtype outside autocast"),
    (
        "device",
        {"weight": torch.randn(11, 8, device="meta")},
        ValueError,
        "on the device of hidden",
    ),
    ("bias", {"bias": torch.randn(10)}, ValueError, "bias must have shape (11,)"),
    ("no targets", {"targets": None}, TypeError, "targets must be an integer tensor"),
    ("float targets", {"targets": torch.zeros(2, 3, 4)}, TypeError, "got dtype torch.float32"),
    (
        "T",
        {"targets": torch.zeros(2, 3, 5).long()},
        ValueError,
        "targets must have shape (B, n, T)",
    ),
    ("target V", {"targets": torch.full((2, 3, 4), 11)}, ValueError, "[0, 11) or be ignore_index"),
    ("target -1", {"targets": torch.full((2, 3, 4), -1)}, ValueError, "got -1 at flat position 0"),
    ("rewards", {"rewards": [1, 2]}, TypeError, "rewards must be a tensor, got list"),
    (
        "shape",
        {"rewards": torch.randn(2, 4)},
        ValueError,
        "rewards must have shape (B, n) = (2, 3)",
    ),
    ("NaN", {"rewards": nan_reward()}, ValueError, "got nan for prompt 1 candidate 2"),
    ("flag", {"length_normalize": "no"}, TypeError, "length_normalize must be a bool, got 'no'"),
    ("equal", {"rewards": torch.ones(2, 3)}, ValueError, "all equal in prompts [0, 1]"),
    ("mask", {"candidate_mask": torch.ones(2, 3)}, TypeError, "candidate_mask must be a bool"),
    (
        "mask shape",
        {"candidate_mask": torch.ones(3, 2, dtype=torch.bool)},
        ValueError,
        "candidate_mask must have shape (B, n) = (2, 3), got (3, 2)",
    ),
    ("weights", {"prompt_weights": torch.tensor([1.0, -1.0])}, ValueError, "finite and >= 0"),
    (
        "sft",
        {"sft_index": torch.tensor([0, 3])},
        ValueError,
        "sft_index must lie in [0, 3), got [0, 3]",
    ),
    ("sft list", {"sft_index": [0, 0]}, TypeError, "sft_index must be an integer tensor, got list"),
    ("sft float", {"sft_index": torch.zeros(2)}, TypeError, "sft_index must be an integer tensor"),
    (
        "mask list",
        {"candidate_mask": [[True]]},
        TypeError,
        "candidate_mask must be a tensor, got list",
    ),
    (
        "complex",
        {"rewards": torch.zeros(2, 3, dtype=torch.complex64)},
        TypeError,
        "rewards must be real numbers, got torch.complex64",
    ),
    ("far apart", {"rewards": torch.tensor([[3e38, -3e38, 0.0]] * 2)}, ValueError, "too far apart"),
    (
        "too close",
        {"rewards": torch.tensor([[1e-6, 0, 0]] * 2), "reward_scale": 1e-25},
        ValueError,
        "too close together: the largest gap is 1e-06, which times reward_scale=1e-25 must lie in "
        "[1e-30, 1e+30]",
    ),
    (
        "no fp32",
        {"rewards": torch.tensor([[1e39, 0, 1]] * 2, dtype=torch.double)},
        ValueError,
        "too far apart: the largest gap is 1e+39",
    ),
    (
        "no candidate",
        {"hidden": torch.randn(2, 0, 4, 8), "targets": torch.zeros(2, 0, 4).long()},
        ValueError,
        "hidden must have shape (B, n, T, H)",
    ),
    (
        "uint8",
        {"targets": torch.zeros(2, 3, 4, dtype=torch.uint8)},
        TypeError,
        "got dtype torch.uint8",
    ),
    (
        "shift with layout",
        {
            "layout": pk.Layout.from_padded(torch.zeros(2, 3, 4).long()),
            "targets": None,
            "shift": True,
        },
        ValueError,
        "shift must be False when layout is given",
    ),
    (
        "reduction",
        {"sft_reduction": "max"},
        ValueError,
        "must be one of [None, 'sum', 'mean'], got 'max'",
    ),
    ("ties", {"ties": "drop"}, ValueError, "ties must be one of ['zero', 'skip'], got 'drop'"),
    ("compat", {"compat": "paper"}, ValueError, "compat must be one of [None, 'official']"),
    ("temperature", {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    (
        "temperature s",
        {"temperature": "hot"},
        ValueError,
        "temperature must be a number or one of ['reward']",
    ),
    ("eps", {"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
    ("eps type", {"eps": "0"}, TypeError, "eps must be a number, got '0'"),
    ("top_k", {"top_k": 0}, ValueError, "top_k must be None or an integer >= 1, got 0"),
    ("softcap", {"softcap": -1.0}, ValueError, "softcap must be > 0, got -1.0"),
    ("scale", {"logit_scale": 0.0}, ValueError, "logit_scale must not be 0"),
    (
        "logits_dtype",
        {"logits_dtype": torch.float16},
        ValueError,
        "logits_dtype must be None, float",
    ),
    ("backend", {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of"),
    ("budget", {"budget": 0}, ValueError, "budget must be > 0 bytes, got 0"),
    ("budget type", {"budget": 1e9}, TypeError, "budget must be an integer number of bytes"),
    (
        "official, no rewards",
        {"rewards": None, "compat": "official"},
        ValueError,
        'rewards must be given with compat="official"',
    ),
    (
        "both",
        {"layout": pk.Layout.from_padded(torch.zeros(2, 3, 4).long())},
        ValueError,
        "targets must be None when layout is given",
    ),
    (
        "layout of another type",
        {"layout": torch.zeros(2, 3, 4), "targets": None},
        TypeError,
        "layout must be a Layout or None, got Tensor",
    ),
    (
        "rows",
        {"layout": pk.Layout.from_padded(torch.zeros(2, 3, 5).long()), "targets": None},
        ValueError,
        "hidden must have 30 rows as the layout says, got 24",
    ),
]


SIZES = {  # of numbers that fp32 does not hold, or not with what it multiplies
    "softcap": (1e38, 1e300, 1e-50),
    "logit_scale": (1e9, -1e-50),
    "temperature": (1e39, 1e-39),
    "reward_scale": (1e39, 1e-39),
    "eps": (1e300,),
    "sft_weight": (1e39, torch.nan),
}
BAD += [
    (f"{name} {value}", {name: value}, ValueError, "of a size in [1e-30, 1e")
    for name, values in SIZES.items()
    for value in values
]
BAD += [
    (
        f"weights {value}",
        {"prompt_weights": torch.full((2,), value, dtype=torch.double)},
        ValueError,
        "prompt_weights must be 0 or add up to a number in [1.2e-38, 3.4e+38]",
    )
    for value in (3e38, 1e300, 1e-39, 1e-300)
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_linear_pro_loss(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pk.linear_pro_loss(**batch(**changes))


@pytest.mark.parametrize("backend", usable_backends())
def test_sizes_that_are_taken_are_computed_with(backend):
    assert all(PROOptions(temperature=x).ranking().tau > 0 for x in (1e-30, 1e30))
    x, t = torch.randn(3, 40), torch.tensor([0, 39, 5])
    expected = pk.token_logps(x, t, backend=backend)
    for name, value, factor in (
        ("softcap", 1e30, 1),
        ("logit_scale", 1e6, 1e-6),
        ("logit_scale", 1e-30, 1e30),
    ):
        found = pk.token_logps(x * factor, t, backend=backend, **{name: value})
        torch.testing.assert_close(found, expected)


def test_a_stray_minus_100_is_found_where_another_index_is_ignored():
    targets = torch.tensor([[[3, -100, 5]]])
    logits = torch.randn(1, 1, 3, 7)
    for call in (
        lambda: pk.token_logps(logits, targets, ignore_index=-1),
        lambda: pk.pro_loss(logits, targets, None, ignore_index=-1),
        lambda: pk.linear_pro_loss(logits, torch.randn(9, 7), targets, None, ignore_index=-1),
    ):
        with pytest.raises(ValueError, match="got -"):
            call()


@pytest.mark.parametrize("by", [{}, {"temperature": 1.0}, {"reward_scale": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all there", "masked"])
def test_rewards_order_and_lie_apart_before_they_are_rounded(by, dtype, masked):
    gaps, far = torch.tensor([[1, 2, 0], [5, 0, 7]]), 2**40
    args = batch(rewards=gaps.float()) | by
    if masked:
        args["candidate_mask"] = torch.tensor([[True] * 3, [True, True, False]])
    logits = args["hidden"] @ args["weight"].T
    from_logits = {k: v for k, v in args.items() if k not in ("hidden", "weight")}
    expected = pk.linear_pro_loss(**args).loss
    moved = {"rewards": (far + gaps).to(dtype)}
    for found in (
        pk.linear_pro_loss(**args | moved),
        pk.reference.linear_pro_loss(**args | moved),
        pk.pro_loss(logits, **from_logits | moved),
    ):
        torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(dtype):
    args = batch()
    expected = pk.linear_pro_loss(**args)
    torch.set_default_dtype(dtype)
    try:
        out = pk.linear_pro_loss(**args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out.loss, expected.loss) and out.loss.dtype == torch.float32


def test_a_layout_target_beyond_the_vocabulary_is_found_before_any_work():
    layout = pk.Layout.from_padded(torch.full((2, 3, 4), 11))
    with pytest.raises(ValueError, match=re.escape("[0, 11)")):
        pk.linear_pro_loss(**batch(targets=None), layout=layout)


def test_all_equal_rewards_can_be_ranked_by_column():
    equal = torch.ones(2, 3)
    args = batch()
    by_column = pk.linear_pro_loss(**{**args, "rewards": equal}, temperature=1.0)
    order_only = pk.linear_pro_loss(**{**args, "rewards": None})
    torch.testing.assert_close(by_column.loss, order_only.loss)
    official = pk.linear_pro_loss(**{**args, "rewards": equal}, compat="official")
    torch.testing.assert_close(official.rank_losses, torch.tensor([3.0, 2.0]).log())


def test_official_mode_refuses_a_candidate_without_a_scored_token():
    targets = torch.randint(0, 11, (2, 3, 4))
    targets[1, 0] = -100
    with pytest.raises(ValueError, match="prompt 1 candidate 0 has none"):
        pk.linear_pro_loss(**batch(targets=targets), compat="official")


def test_official_mode_gives_zero_for_one_candidate():
    args = batch(hidden=torch.randn(2, 1, 4, 8), targets=torch.zeros(2, 1, 4).long())
    out = pk.linear_pro_loss(**{**args, "rewards": torch.ones(2, 1)}, compat="official")
    assert out.loss == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "logits must have shape (B, n, T, V)"),
        ({"logits": torch.zeros(2, 3, 4, 5).long()}, TypeError, "logits must be float64"),
        ({"targets": torch.zeros(2, 3, 3).long()}, ValueError, "(B, n, T) = (2, 3, 4)"),
        ({"targets": torch.full((2, 3, 4), 5)}, ValueError, "[0, 5)"),
        ({"rewards": torch.full((2, 3), float("inf"))}, ValueError, "rewards must be finite"),
    ],
)
def test_pro_loss(changes, error, message):
    args = {
        "logits": torch.randn(2, 3, 4, 5),
        "targets": torch.zeros(2, 3, 4).long(),
        "rewards": torch.randn(2, 3),
    }
    with pytest.raises(error, match=re.escape(message)):
        pk.pro_loss(**{**args, **changes})


def test_token_functions():
    with pytest.raises(ValueError, match=re.escape("hidden.shape[:-1] = (3,), got (4,)")):
        pk.linear_token_logps(torch.randn(3, 8), torch.randn(5, 8), torch.zeros(4).long())
    with pytest.raises(ValueError, match=re.escape("logits.shape[:-1] = (3,), got (4,)")):
        pk.token_logps(torch.randn(3, 8), torch.zeros(4).long())
    with pytest.raises(ValueError, match=re.escape("logits must have shape (..., V), got (3,)")):
        pk.token_logps(torch.randn(3), torch.zeros(()).long())


def test_more_candidates_than_a_kernel_takes(monkeypatch):
    from pro_kernels import backends

    name = usable_backends()[0]
    monkeypatch.setattr(backends.get(name), "MAX_CANDIDATES", 2)
    with pytest.raises(ValueError, match="3 candidates a prompt; it takes at most 2"):
        pk.linear_pro_loss(**batch(), backend=name)
    assert pk.linear_pro_loss(**batch()).loss.isfinite()  # auto goes on to the next backend


def test_auto_never_picks_an_interpreter(monkeypatch):
    from pro_kernels import backends

    monkeypatch.setattr(backends.get("cpu"), "unusable", lambda device: "not built")
    assert backends.resolve("auto", torch.device("cpu"), torch.float32) == "torch"


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(ValueError, match="cannot serve this call: logits are float64"):
        args = {k: v.double() if v.is_floating_point() else v for k, v in batch().items()}
        name = next(n for n in usable_backends() if n != "torch")
        pk.linear_pro_loss(**args, backend=name)


@pytest.mark.gpu
def test_bad_targets_on_a_gpu_trip_an_asynchronous_assertion():
    """In a child process: a device-side assertion leaves its CUDA context unusable."""
    import subprocess
    import sys

    code = (
        "import torch, pro_kernels as pk\n"
        "pk.token_logps(torch.randn(2, 5, device='cuda'), torch.tensor([1, 5], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode != 0
