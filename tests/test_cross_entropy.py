"""The cross-entropy of hidden states: every tier, every option, and with other outputs.

Among them what the suites of the peers state: of Apple's cut-cross-entropy its log-sum-exp, z-loss
and partial gradients (tests/test_cce_lse.py, test_cce_loss_backward.py, test_compute_z_loss.py). Of
Liger's options: tests/test_switches.py.
"""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from cases import Case, compare, run, same_compiled, upstreams
from pro_kernels.fused import matmul
from pro_kernels.fused.gather_scatter import add_rows
from pro_kernels.fused.thin import ChosenLogits
from pro_kernels.options import LogitOptions

every_tier = pytest.mark.parametrize("tier", ["T1", "T3"])
F = torch.nn.functional
LSE = {"return_lse": True}
CLASSES = torch.linspace(0.0, 2.0, 37)
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.3},
    "classes": {"class_weight": CLASSES},
    "smoothed": {"label_smoothing": 0.3},
    "all": {"class_weight": CLASSES, "label_smoothing": 0.3, "z_loss": 0.1},
    # In 16 bits what the head and the mean column add to dW would be rounded one by one.
    "nothing but smooth": {"class_weight": CLASSES, "label_smoothing": 1.0},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@every_tier
def test_cross_entropy(tier, name, reduction, force_tier, poison):
    force_tier(tier)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for i, dtype in enumerate(dtypes[: 2 if name.startswith("nothing") else None]):
        for case in (
            Case("bias", T=9, bias=True, options={"logit_scale": 0.5}),
            Case("all masked", masked=1.0),
            Case("cap", T=9, options={} if "label_smoothing" in OPTIONS[name] else {"softcap": 3}),
        ):
            up = upstreams(case)[0] if reduction == "none" else torch.tensor(-0.7)
            freeze = ((), ("hidden",), ("weight", "bias"), ())[i]
            shared = {**OPTIONS[name], "reduction": reduction}
            compare(
                case, dtype, "linear_cross_entropy", upstream=[up], freeze=freeze, shared=shared
            )


def test_the_reference_is_pytorchs_and_cces_z_loss():
    """``cross_entropy`` on logits, and CCE's ``compute_z_loss``: a mean over scored tokens."""
    hidden, weight, bias, targets, _ = Case("same", T=9, bias=True).tensors()
    z = F.linear(hidden, weight, bias)[..., :-1, :].flatten(0, -2)
    t = targets[..., 1:].flatten()
    for reduction in ("mean", "sum", "none"):
        given = {"reduction": reduction, "label_smoothing": 0.2}
        want = F.cross_entropy(z, t, CLASSES.double(), **given)
        lse = z.logsumexp(-1)[t >= 0]
        want = want + {"mean": lse.square().mean(), "sum": lse.square().sum()}.get(reduction, 0)
        given |= {"class_weight": CLASSES, "z_loss": float(reduction != "none"), "shift": True}
        for function in (pk.linear_cross_entropy, pk.reference.linear_cross_entropy):
            got = function(hidden, weight, targets, bias=bias, **given)
            got = got[..., :-1].flatten() if reduction == "none" else got
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_statistics():
    hidden, weight, _, targets, _ = Case("stats", T=9).tensors()
    for scale in (0.5, -0.5):
        options = {"logit_scale": scale, "shift": True, "z_loss": 0.1}
        out = pk.linear_cross_entropy(hidden, weight, targets, return_stats=True, **options)
        logps, lse = pk.linear_token_logps(
            hidden, weight, targets, logit_scale=scale, shift=True, **LSE
        )
        scored = F.pad(targets[..., 1:], (0, 1), value=-100) >= 0
        top = (scale * hidden @ weight.T).argmax(-1)
        assert out.predicted.equal(torch.where(scored, top, -1))
        assert out.logps.equal(logps) and out.lse.equal(lse) and not lse[~scored].any()
        z_loss = 0.1 * lse.square().sum() / scored.sum()
        torch.testing.assert_close(out.z_loss, z_loss)
        torch.testing.assert_close(out.loss, z_loss - logps.sum() / scored.sum())


@every_tier
def test_together_with_entropies_and_a_filter(tier, force_tier):
    force_tier(tier)
    case = Case("together", T=9, V=301, scale=9.0, bias=True)
    up = torch.randn(3, *case.tensors()[3].shape).double()
    shared = {**LSE, "return_entropy": True}
    for dtype in (torch.float64, torch.bfloat16):
        compare(case, dtype, "linear_token_logps", upstream=up, shared=shared)
    found, want = (
        run(pk.linear_token_logps, case, torch.float64, up, **LSE, **more)
        for more in ({"grad_filter": 0.1, "return_dropped": True}, {})
    )
    *_, (mass, _, bound, _) = found.output
    off = (found.grads["hidden"] - want.grads["hidden"]).norm(dim=-1)
    assert mass.max() > 0 and (off <= (up[0] - up[1]).abs() * bound + 1e-12).all()


@every_tier
def test_fp64(tier, force_tier):
    force_tier(tier)
    hidden, weight, bias, targets, _ = Case("fp64", V=17, T=4, bias=True).tensors()
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    classes, places = torch.rand(17), torch.tensor([0, 3, 3, 1])
    columns = torch.randint(0, 17, (4, 3))

    def several(h, w, b):
        more = {"return_lse": True, "return_entropy": True, "softcap": 3.0}
        yield from pk.linear_token_logps(h, w, targets, bias=b, **more)
        more = {"class_weight": classes, "label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": 0.5}
        yield pk.linear_cross_entropy(h, w, targets, bias=b, **more)
        given = places, columns, torch.float64, LogitOptions(3.0, 0.5)
        yield ChosenLogits.apply(h.flatten(0, 2), w, b, *given)

    assert torch.autograd.gradcheck(lambda *x: tuple(several(*x)), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_targets_share_is_summed_before_it_is_rounded(dtype):
    """In bf16 ones that are added one by one come to 256."""
    out, rows = torch.ones(4, 3, dtype=dtype), torch.tensor([2, 0] * 1000)
    add_rows(out, rows, torch.full((2000,), 0.5), torch.ones(2000, 3, dtype=dtype))
    assert out.equal(torch.tensor([[501.0], [1], [501], [1]]).expand(4, 3).to(dtype))


def outputs(name: str, hidden, weight, targets) -> tuple:
    """The cross-entropy with these options, or log-probs and entropies from hidden or logits."""
    if name in OPTIONS:
        return (pk.linear_cross_entropy(hidden, weight, targets, **OPTIONS[name]),)
    if name == "logits":
        return pk.token_logps(hidden @ weight.t(), targets, return_entropy=True)
    return pk.linear_token_logps(hidden, weight, targets, return_entropy=True)


@pytest.mark.parametrize("name", [*OPTIONS, "hidden"])
def test_no_matmul_more(name, monkeypatch):
    rows = {"logits_into": 0, "hidden_grad": 0, "weight_grad": 0}
    for matmul_name in rows:
        function = getattr(matmul, matmul_name)

        def counted(first, *args, name=matmul_name, function=function, **kwargs):
            rows[name] += first.shape[0]
            return function(first, *args, **kwargs)

        monkeypatch.setattr(matmul, matmul_name, counted)
    hidden, weight, _, targets, _ = Case("matmuls", T=9).tensors()
    tensors = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    sum(x.sum() for x in outputs(name, *tensors, targets)).backward()
    assert rows == dict.fromkeys(rows, int((targets >= 0).sum()))


COMPILED = [("z-loss", (0,)), ("all", (0,))]
COMPILED += [(name, used) for name in ("hidden", "logits") for used in ((0, 1), (0,), (1,))]


@pytest.mark.parametrize(("name", "used"), COMPILED, ids=str)
def test_compiled_whole(name, used):
    hidden, weight, _, targets, _ = Case("compiled", T=9).tensors()
    tensors = [x.float().requires_grad_() for x in (hidden, weight)]

    def loss(h, w):
        found = outputs(name, h, w, targets)
        return sum(found[i].sin().sum() for i in used)

    same_compiled(loss, tensors)


def test_without_autocasts_rounding():
    """Under it the matmuls are in 16 bits, and means of the head are not."""
    case = Case("autocast", T=9, bias=True)
    want = run(
        pk.reference.linear_cross_entropy, case, torch.float32, [torch.ones(())], **OPTIONS["all"]
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = run(pk.linear_cross_entropy, case, torch.float32, [torch.ones(())], **OPTIONS["all"])
    torch.testing.assert_close(got.output, want.output, rtol=2e-3, atol=0)
    for key, grad in want.grads.items():
        assert (got.grads[key] - grad).norm() < 0.01 * grad.norm()


WRONG = [
    ({"class_weight": [1.0]}, TypeError, "class_weight must be a tensor, got list"),
    ({"class_weight": torch.ones(37).long()}, TypeError, "class_weight must be float64"),
    (
        {"class_weight": torch.ones(36)},
        ValueError,
        r"class_weight must have shape \(V,\) = \(37,\)",
    ),
    ({"class_weight": torch.ones(37, requires_grad=True)}, ValueError, "not require a gradient"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be <= 1, got 1.5"),
    ({"label_smoothing": 0.1, "softcap": 3.0}, ValueError, "label_smoothing cannot be had with a"),
    ({"z_loss": -1.0}, ValueError, "z_loss must be >= 0, got -1.0"),
    ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ({"weights": CLASSES}, TypeError, "got options"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_what_it_cannot_take(options, error, message):
    hidden, weight, _, targets, _ = Case("wrong").tensors()
    with pytest.raises(error, match=message):
        pk.linear_cross_entropy(hidden, weight, targets, **options)
