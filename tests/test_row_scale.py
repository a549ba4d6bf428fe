"""A ``logit_scale`` of each row, such as 1 / temperature of sampling: every backend and entrance.

What is compared with is the reference, which multiplies logits.
"""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import CPU, Case, assert_no_worse, compare, fp32_sums, upstreams
from pro_kernels.api import linear_token_stats
from pro_kernels.backends import get
from subjects import every_case, every_subject, every_subject_and_dtype

CASES = [
    Case("plain", T=9),
    Case("all masked", masked=1.0),
    Case("softcap", T=9, options={"softcap": 5.0}),
    Case("odd vocabulary", V=1009, T=4),
]
BUDGET = Case("budget", T=9, H=48, V=333, options={"softcap": 5.0})
FUNCTIONS = ["linear_token_logps", "linear_pro_loss", "linear_cross_entropy"]


def scales(case: Case) -> torch.Tensor:
    """Of both signs, from 0.25 to 2; none where nothing is scored."""
    g = torch.Generator().manual_seed(3)
    size = 0.25 + 1.75 * torch.rand(case.B, case.n, case.T, generator=g, device=CPU)
    found = torch.where(torch.rand(size.shape, generator=g, device=CPU) < 0.2, -size, size)
    unscored = case.tensors()[3] < 0
    return found.masked_fill(unscored, torch.nan).to(torch.get_default_device())


def check(case: Case, dtype: torch.dtype, function: str, **options) -> None:
    shared = {"logit_scale": scales(case)}
    if function == "linear_token_logps":
        options["upstream"] = upstreams(case)
    if function == "linear_cross_entropy":
        smooth = {} if "softcap" in case.options else {"label_smoothing": 0.2}
        shared |= {"z_loss": 0.1, "class_weight": torch.linspace(0.5, 2, case.V), **smooth}
        options["upstream"] = [torch.tensor(1.7)]
    compare(case, dtype, function, shared=shared | options.pop("shared", {}), **options)


@every_case(CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_backend(case, subject, dtype, function, poison):
    check(case, dtype, function, backend=subject.name)


@pytest.mark.parametrize("freeze", [(), ("weight",), ("hidden",)], ids=str)
@pytest.mark.parametrize("tier", ["T1", "T2", "T3"])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"head_dtype": "float32"}),
        (torch.float16, {"head_dtype": "float32"}),
    ],
    ids=str,
)
def test_every_tier(dtype, more, tier, freeze, force_tier, monkeypatch, poison):
    force_tier(tier)
    for gpu in (False, True):
        if gpu:
            fp32_sums(monkeypatch)
        for function in FUNCTIONS:
            check(BUDGET, dtype, function, freeze=freeze, **more)
        for output in ("return_entropy", "return_lse"):
            check(BUDGET, dtype, FUNCTIONS[0], freeze=freeze, shared={output: True}, **more)


def test_an_fp32_head_is_scaled_without_a_rounding(monkeypatch):
    """Nor by a GPU's matmuls; and no kernel that scores without logits takes the scale for it."""
    hidden, weight = torch.randn(40, 64).bfloat16(), torch.randn(75, 64).bfloat16()
    targets, scale = torch.randint(0, 75, (40,)), 0.3 + torch.rand(40)
    args = hidden.double(), weight.double(), targets
    exact = pk.reference.linear_token_logps(*args, logit_scale=scale).float()
    options = {"logit_scale": scale, "head_dtype": "float32"}
    near = {"rtol": 0, "atol": 2e-5}
    if get("triton").unusable(CPU) is None:
        monkeypatch.setenv("PRO_KERNELS_SCORE", "fused")
        for more in ({}, {"head_dtype": None}):
            found = pk.linear_token_logps(
                hidden, weight, targets, **options | more, backend="triton"
            )
            torch.testing.assert_close(found, exact, rtol=0, atol=0.3 if more else 2e-5)
    torch.testing.assert_close(
        pk.linear_token_logps(hidden, weight, targets, **options), exact, **near
    )
    fp32_sums(monkeypatch)
    torch.testing.assert_close(
        pk.linear_token_logps(hidden, weight, targets, **options), exact, **near
    )


@every_subject(every_way=False)
def test_powers_of_two_are_numbers(subject):
    """To the bit, and with what policy-gradient trainers log."""
    hidden, weight, _, targets, _ = (
        None if x is None else x.to(torch.get_default_device()) for x in BUDGET.tensors()
    )
    results = []
    for scale in (0.5, torch.full_like(targets, 0.5, dtype=torch.bfloat16)):
        leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
        options = {"logit_scale": scale, "extra": True, "backend": subject.name}
        stats = linear_token_stats(*leaves, targets, **options)
        (stats.logps * 3 + stats.entropy).sum().backward()
        results.append([*stats, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if a.itemsize == 4 else 2**-12)


@pytest.mark.parametrize("form", ["dense", "shared rows"])
@pytest.mark.parametrize("tier", ["T1", "T2", "T3"])
def test_layouts(form, tier, force_tier):
    """The scale is of a row of hidden, whichever tokens read it."""
    force_tier(tier)
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 50, (12,), generator=g)
    rows = torch.tensor([0, 1, 0, 2, 0, 3, 4, 5, 4, 6, 4, 7])
    if form == "dense":
        targets[3] = -100
        layout, count = pk.Layout.dense(targets.view(2, 3, 2)), 12
    else:
        layout = pk.Layout.from_rows(rows, targets, torch.arange(0, 13, 2), 3, num_rows=8)
        count = 8
    hidden, weight = (torch.randn(n, 16, generator=g).double() for n in (count, 50))
    scale, rewards = 0.5 + torch.rand(count, generator=g), torch.randn(2, 3, generator=g)
    found = []
    for function in (pk.linear_pro_loss, pk.reference.linear_pro_loss):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = function(*leaves, None, rewards, layout=layout, logit_scale=scale)
        found.append([out.loss, *torch.autograd.grad(out.loss, leaves)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10, check_dtype=False)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("size", [2.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_filter_drops_is_what_it_drops_for_a_number(dtype, size, budget):
    case, results = Case("filter", B=4, T=8, V=301, scale=16.0), []
    hidden, weight, _, targets, _ = case.tensors()
    hidden[..., 0], weight[:150, 0] = 3 * size, -9  # columns of little probability in every row
    for scale in (size, torch.full_like(hidden[..., 0], size)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        options = {"logit_scale": scale, "grad_filter": 0.03, "budget": budget}
        if dtype == torch.bfloat16:
            options["head_dtype"] = "float32"
        logps, dropped = pk.linear_token_logps(*leaves, targets, return_dropped=True, **options)
        grads = torch.autograd.grad((logps * upstreams(case)[0]).sum(), leaves)
        results.append([logps, dropped, *grads])
    assert dropped.amin(0)[targets >= 0].gt(0).all()
    (logps, lost, *grads), (others, told, *same) = results
    torch.testing.assert_close(logps, others, rtol=1e-5, atol=1e-6)
    # A column at the limit may fall on either side of it.
    torch.testing.assert_close(lost, told, rtol=0.05, atol=1e-6)
    up = upstreams(case)[0]
    for a, b, of in zip(grads, same, (2, 1), strict=True):
        room = (up * (lost[of] + told[of])).norm() + 4 * torch.finfo(dtype).eps * b.norm()
        assert (a - b).norm() <= room
        torch.testing.assert_close(a, b, rtol=0.05, atol=float(b.abs().max()) / 100)


LOGITS = Case("logits", T=5, V=301)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@every_subject_and_dtype(every_way=False, interpreted=(torch.bfloat16,))
def test_from_logits(subject, dtype, inplace, options, monkeypatch, poison):
    monkeypatch.setattr("pro_kernels.fused.matmul.WORKSPACE", 4 * 301 * 7)  # blocks of 7 rows
    *_, targets, rewards = LOGITS.tensors()
    logits = torch.randn(*targets.shape, 301, dtype=torch.float64).mul(4).to(dtype)
    ours = {"backend": subject.name, "inplace_backward": inplace}
    for function, args, more in (
        ("token_logps", (targets,), {"return_entropy": True}),
        ("pro_loss", (targets, rewards), {}),
    ):
        results = []
        for of, kind, extra in ((pk, dtype, ours), (pk.reference, dtype, {}),
                                (pk.reference, torch.float64, {})):  # fmt: skip
            leaf = logits.to(kind, copy=True).requires_grad_()
            given = {"logit_scale": scales(LOGITS), **options, **more, **extra}
            out = getattr(of, function)(leaf * 1, *args, **given)
            values = list(out) if more else [out.loss, out.logps]
            up = upstreams(LOGITS) if more else [torch.tensor(1.7)]
            sum((x * u).sum() for x, u in zip(values, up, strict=False)).backward()
            results.append((*(x.detach() for x in values), leaf.grad))
        for i, name in enumerate(("log-probs", "entropies", "gradient of logits")):
            assert_no_worse(*(r[i] for r in results), dtype, name, norm=i == 2)


@pytest.mark.parametrize("entrance", ["hidden", "logits", "loss"])
def test_compiled_whole(entrance):
    hidden, weight, _, targets, rewards = BUDGET.tensors()
    tensors = [x.float().requires_grad_() for x in (hidden, weight)]

    def loss(h, w, scale):
        if entrance == "loss":
            return pk.linear_pro_loss(h, w, targets, rewards, logit_scale=scale).loss
        if entrance == "hidden":
            return pk.linear_token_logps(h, w, targets, logit_scale=scale).sin().sum()
        return pk.token_logps(h @ w.t(), targets, logit_scale=scale).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (scales(BUDGET), 2 * scales(BUDGET)):
        grads = (torch.autograd.grad(f(*tensors, scale), tensors) for f in (loss, compiled))
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("scale", "more", "message"),
    [
        (ONES[..., :1], {}, r"logit_scale must have shape .*.shape\[:-1\] = \(2, 3, 4\), got"),
        (torch.tensor(0.5), {}, r"logit_scale must have shape .* got \(\)"),
        (ONES.long(), {}, "logit_scale must be float64, .* got torch.int64"),
        (ONES.to("meta"), {}, "logit_scale must be on the device of .* got meta"),
        (ONES.clone().requires_grad_(), {}, "logit_scale must be a constant, .* detach it"),
        (ONES * 0, {}, r"logit_scale must be of a size in \[1e-30, 1e\+06\] in every row, got 0"),
        (ONES / 0, {}, "in every row, got inf"),
        (ONES * torch.nan, {}, "in every row, got nan"),
        (ONES, {"bias": torch.zeros(11)}, "logit_scale must be a number where there is a bias"),
    ],
)
def test_bad_input(scale, more, message):
    hidden, weight = torch.randn(2, 3, 4, 8), torch.randn(11, 8)
    targets, rewards = torch.randint(0, 11, (2, 3, 4)), torch.randn(2, 3)
    options = {"logit_scale": scale, **more}
    calls = [
        lambda: pk.linear_token_logps(hidden, weight, targets, **options),
        lambda: pk.linear_pro_loss(hidden, weight, targets, rewards, **options),
        lambda: linear_token_stats(hidden, weight, targets, **options),
    ]
    if not more:
        calls += [
            lambda: pk.token_logps(hidden, targets % 8, **options),
            lambda: pk.pro_loss(hidden, targets % 8, rewards, **options),
        ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
