"""What every public function says to input it cannot take, before any work."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import pro_kernels as pk
from cases import CPU, usable_backends
from pro_kernels import backends
from pro_kernels.options import PROOptions

NAN, INF = float("nan"), float("inf")
FP32 = {"head_dtype": "float32"}


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def laid_out(*shape: int, target: int = 0) -> dict:
    return {"layout": pk.Layout.from_padded(torch.full(shape, target)), "targets": None}


def batch(**changes):
    args = {
        "hidden": torch.randn(2, 3, 4, 8),
        "weight": torch.randn(11, 8),
        "targets": torch.randint(0, 11, (2, 3, 4)),
        "rewards": torch.randn(2, 3),
    }
    return {**args, **changes}


def of_logits(**changes):
    """The same for ``pro_loss``."""
    args = batch(**changes)
    return {"logits": args.pop("hidden") @ args.pop("weight").T, **args}


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.double)


DOUBLE = {"hidden": torch.randn(2, 3, 4, 8).double(), "weight": torch.randn(11, 8).double()}
CLOSE = (
    "too close together: the largest gap is 1e-06, which times reward_scale=1e-25 must lie in "
    "[1e-30, 1e+30]"
)
UNSCORED = zeros(2, 3, 4)
UNSCORED[1, 0] = -100
TYPES = [
    ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
    ({"hidden": zeros(2, 3, 4, 8)}, "hidden must be float64"),
    ({"targets": None}, "targets must be an integer tensor"),
    ({"targets": torch.zeros(2, 3, 4)}, "got dtype torch.float32"),
    ({"targets": zeros(2, 3, 4).to(torch.uint8)}, "got dtype torch.uint8"),
    ({"rewards": [1, 2]}, "rewards must be a tensor, got list"),
    ({"rewards": zeros(2, 3).cfloat()}, "rewards must be real numbers, got torch.complex64"),
    ({"length_normalize": "no"}, "length_normalize must be a bool, got 'no'"),
    ({"candidate_mask": torch.ones(2, 3)}, "candidate_mask must be a bool"),
    ({"candidate_mask": [[True]]}, "candidate_mask must be a tensor, got list"),
    ({"sft_index": [0, 0]}, "sft_index must be an integer tensor, got list"),
    ({"sft_index": torch.zeros(2)}, "sft_index must be an integer tensor"),
    ({"eps": "0"}, "eps must be a number, got '0'"),
    ({"budget": 1e9}, "budget must be an integer number of bytes"),
    ({**laid_out(2, 3, 4), "layout": zeros(3)}, "layout must be a Layout or None, got Tensor"),
]
VALUES = [
    ({"hidden": torch.randn(2, 3, 4, 9)}, "H = 8 as in weight (11, 8), got (2, 3"),
    ({"hidden": torch.randn(6, 4, 8)}, "hidden must have shape (B, n, T, H)"),
    # No candidate.
    ({"hidden": torch.randn(2, 0, 4, 8), "targets": zeros(2, 0, 4)}, "have shape (B, n, T, H)"),
    ({"weight": torch.randn(11)}, "weight must have shape (V, H), got (11,)"),
    ({"weight": torch.randn(0, 8)}, "weight must not be empty"),
    ({"weight": torch.randn(11, 8).double()}, 'without head_dtype="float32", got torch.float32'),
    ({"weight": torch.randn(11, 8, device="meta")}, "on the device of hidden"),
    ({"bias": torch.randn(10)}, "bias must have shape (11,)"),
    ({"targets": zeros(2, 3, 5)}, "targets must have shape (B, n, T)"),
    ({"targets": zeros(2, 3, 4) + 11}, "[0, 11) or be ignore_index"),
    ({"targets": zeros(2, 3, 4) - 1}, "got -1 at flat position 0"),
    (laid_out(2, 3, 4, target=11), "[0, 11)"),
    (laid_out(2, 3, 5), "hidden must have 30 rows as the layout says, got 24"),
    ({**laid_out(2, 3, 4), "shift": True}, "shift must be False when layout is given"),
    ({**laid_out(2, 3, 4), "targets": zeros(1)}, "targets must be None when layout is given"),
    ({"rewards": torch.randn(2, 4)}, "rewards must have shape (B, n) = (2, 3)"),
    ({"rewards": torch.tensor([[0, 1, 2], [3, 4, NAN]])}, "got nan for prompt 1 candidate 2"),
    ({"rewards": torch.ones(2, 3)}, "all equal in prompts [0, 1]"),
    ({"rewards": torch.tensor([[3e38, -3e38, 0.0]] * 2)}, "too far apart"),
    ({"rewards": double([1e39, 0, 1], [1e39, 0, 1])}, "too far apart: the largest gap is 1e+39"),
    ({"rewards": double([1e-6, 0, 0], [1e-6, 0, 0]), "reward_scale": 1e-25}, CLOSE),
    ({"candidate_mask": zeros(3, 2) > 0}, "candidate_mask must have shape (B, n) = (2, 3), got (3"),
    ({"prompt_weights": torch.tensor([1.0, -1.0])}, "finite and >= 0"),
    ({"sft_index": torch.tensor([0, 3])}, "sft_index must lie in [0, 3), got [0, 3]"),
    ({"sft_reduction": "max"}, "must be one of [None, 'sum', 'mean'], got 'max'"),
    ({"ties": "drop"}, "ties must be one of ['zero', 'skip'], got 'drop'"),
    ({"compat": "paper"}, "compat must be one of [None, 'official']"),
    ({"compat": "official", "rewards": None}, 'rewards must be given with compat="official"'),
    ({"compat": "official", "targets": UNSCORED}, "prompt 1 candidate 0 has none"),
    ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ({"temperature": "hot"}, "temperature must be a number or one of ['reward']"),
    ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
    ({"top_k": 0}, "top_k must be None or an integer >= 1, got 0"),
    ({"softcap": -1.0}, "softcap must be > 0, got -1.0"),
    ({"logit_scale": 0.0}, "logit_scale must not be 0"),
    ({"head_dtype": torch.float32}, "one of [None, 'float32'], got torch.float32"),
    (DOUBLE | FP32, "head_dtype must be None for float64 hidden or weight, got 'float32'"),
    ({"backend": "cudnn"}, "backend must be 'auto' or one of"),
    # An explicit backend never falls back.
    (DOUBLE | {"backend": usable_backends()[0]}, "cannot serve this call: logits are float64"),
    ({"budget": 0}, "budget must be > 0 bytes, got 0"),
]
SIZES = {  # of numbers that fp32 does not hold, or not with what it multiplies
    "softcap": (1e38, 1e300, 1e-50),
    "logit_scale": (1e9, -1e-50),
    "temperature": (1e39, 1e-39),
    "reward_scale": (1e39, 1e-39),
    "eps": (1e300,),
    "sft_weight": (1e39, NAN),
}
VALUES += [({k: x}, "of a size in [1e-30, 1e") for k, values in SIZES.items() for x in values]
ADD_UP = "prompt_weights must be 0 or add up to a number in [1.2e-38, 3.4e+38]"
VALUES += [({"prompt_weights": double(x, x)}, ADD_UP) for x in (3e38, 1e300, 1e-39, 1e-300)]
REFUSED = [(TypeError, *x) for x in TYPES] + [(ValueError, *x) for x in VALUES]


@pytest.mark.parametrize(("error", "changes", "message"), REFUSED, ids=[x[2] for x in REFUSED])
def test_linear_pro_loss(error, changes, message):
    with pytest.raises(error, match=re.escape(message)):
        pk.linear_pro_loss(**batch(**changes))


HIDDEN, HEAD = torch.randn(3, 8), torch.randn(5, 8)
LOGITS, STRAY = torch.randn(1, 1, 3, 7), torch.tensor([[[3, -100, 5]]])
FILTERED = "return_entropy=True needs grad_filter=None"
ENTROPY = {"return_entropy": True}
OTHERS = [
    (pk.pro_loss, (), of_logits(logits=zeros(2, 3, 4).float()), "shape (B, n, T, V)"),
    (pk.pro_loss, (), of_logits(logits=zeros(2, 3, 4, 5)), "logits must be float64"),
    (pk.pro_loss, (), of_logits(targets=zeros(2, 3, 3)), "(B, n, T) = (2, 3, 4)"),
    (pk.pro_loss, (), of_logits(targets=zeros(2, 3, 4) + 11), "[0, 11)"),
    (pk.pro_loss, (), of_logits(rewards=zeros(2, 3) + INF), "rewards must be finite"),
    (pk.linear_token_logps, (HIDDEN, HEAD, zeros(4)), {}, "hidden.shape[:-1] = (3,), got (4,)"),
    (pk.token_logps, (HIDDEN, zeros(4)), {}, "logits.shape[:-1] = (3,), got (4,)"),
    (pk.token_logps, (HIDDEN[0], zeros()), {}, "logits must have shape (..., V), got (8,)"),
    (pk.linear_token_logps, (HIDDEN, HEAD, zeros(3)), ENTROPY | {"grad_filter": 0.1}, FILTERED),
    (pk.linear_token_logps, (HIDDEN, HEAD, zeros(3)), ENTROPY | {"return_dropped": True}, FILTERED),
    # A stray -100 where another index is ignored.
    (pk.token_logps, (LOGITS, STRAY), {"ignore_index": -1}, "got -"),
    (pk.pro_loss, (LOGITS, STRAY, None), {"ignore_index": -1}, "got -"),
    (pk.linear_pro_loss, (LOGITS, torch.randn(9, 7), STRAY, None), {"ignore_index": -1}, "got -"),
]


@pytest.mark.parametrize(("function", "args", "options", "message"), OTHERS)
def test_other_functions(function, args, options, message):
    with pytest.raises(TypeError if "float64" in message else ValueError, match=re.escape(message)):
        function(*args, **options)


@pytest.mark.parametrize("backend", usable_backends())
def test_sizes_that_are_taken_are_computed_with(backend):
    assert all(PROOptions(temperature=x).ranking().tau > 0 for x in (1e-30, 1e30))
    x, t = torch.randn(3, 40), torch.tensor([0, 39, 5])
    expected = pk.token_logps(x, t, backend=backend)
    for option, factor in (
        ({"softcap": 1e30}, 1),
        ({"logit_scale": 1e6}, 1e-6),
        ({"logit_scale": 1e-30}, 1e30),
    ):
        found = pk.token_logps(x * factor, t, backend=backend, **option)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", [{}, {"temperature": 1.0}, {"reward_scale": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all there", "masked"])
def test_rewards_order_and_lie_apart_before_they_are_rounded(by, dtype, masked):
    gaps = torch.tensor([[1, 2, 0], [5, 0, 7]])
    args = batch(rewards=gaps.float(), **by)
    if masked:
        args["candidate_mask"] = torch.tensor([[True] * 3, [True, True, False]])
    expected = pk.linear_pro_loss(**args).loss
    args["rewards"] = (2**40 + gaps).to(dtype)
    for found in (
        pk.linear_pro_loss(**args),
        pk.reference.linear_pro_loss(**args),
        pk.pro_loss(**of_logits(**args)),
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


def test_all_equal_rewards_can_be_ranked_by_column():
    args = batch(rewards=torch.ones(2, 3))
    by_column = pk.linear_pro_loss(**args, temperature=1.0)
    order_only = pk.linear_pro_loss(**{**args, "rewards": None})
    torch.testing.assert_close(by_column.loss, order_only.loss)
    official = pk.linear_pro_loss(**args, compat="official")
    torch.testing.assert_close(official.rank_losses, torch.tensor([3.0, 2.0]).log())


def test_official_mode_gives_zero_for_one_candidate():
    one = {"hidden": torch.randn(2, 1, 4, 8), "targets": zeros(2, 1, 4), "rewards": zeros(2, 1)}
    assert pk.linear_pro_loss(**batch(**one), compat="official").loss == 0


def test_auto_never_picks_an_interpreter(monkeypatch):
    monkeypatch.setattr(backends.get("cpu"), "unusable", lambda device: "not built")
    assert backends.resolve("auto", CPU, torch.float32) == "torch"


@pytest.mark.gpu
def test_bad_targets_on_a_gpu_trip_an_asynchronous_assertion():
    """In a child process: a device-side assertion leaves its CUDA context unusable."""
    code = (
        "import torch, pro_kernels as pk\n"
        "pk.token_logps(torch.randn(2, 5, device='cuda'), torch.tensor([1, 5], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
