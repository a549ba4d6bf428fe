"""What makes log-probs agree: ``head_dtype="float32"``, ``batch_invariant=True``.

In every backend and tier, and of operands of any dtypes.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import pro_kernels as pk
from cases import Case, assert_no_worse, run, upstreams
from pro_kernels.fused import matmul
from pro_kernels.models.lazy import LazyLogits, real
from pro_kernels.selfcheck.trust.measure import threads
from subjects import every_subject
from tiny_models import V, make, next_logps

FP32 = {"head_dtype": "float32"}
# Of hidden states and of the head, and autocast's.
DTYPES = [
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float16, torch.float16, None),
    (torch.bfloat16, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.float16, torch.bfloat16, None),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float16),
]
CASE = Case("wide", T=9, H=48, V=333, bias=True, options={"softcap": 5.0, "logit_scale": 0.8})


def check(function: str, dtypes, **options) -> None:
    *pair, autocast = dtypes
    same = pair[0] == pair[1]
    given = {"upstream": 1.7}
    if function == "linear_token_logps":
        given = {"upstream": upstreams(CASE), "return_entropy": True}
    elif function == "linear_cross_entropy":
        given = {"upstream": [torch.tensor(1.7)], "z_loss": 0.1}
    with torch.autocast(torch.get_default_device().type, autocast, enabled=autocast is not None):
        ours = run(getattr(pk, function), CASE, tuple(pair), **given, **options, **FP32)
    plain = functools.partial(run, getattr(pk.reference, function), CASE, tuple(pair), **given)
    exact = plain(kind=torch.float64)
    # What the gradient matmuls round to is the dtype that both operands have.
    rounded = plain(**({} if same else FP32))
    for value, want in zip(*map(values_of, (ours, exact)), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=2e-6)
    for name, grad in ours.grads.items():
        assert grad.dtype == pair[name != "hidden"]
        grads = (grad, rounded.grads[name], exact.grads[name])
        dtype = pair[0] if same else grad.dtype
        assert_no_worse(*grads, dtype, f"gradient of {name} weight", norm=True)


def values_of(result) -> list[torch.Tensor]:
    out = result.output
    if hasattr(out, "loss"):
        return [out.loss, out.logps]
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(
    "function", ["linear_token_logps", "linear_pro_loss", "linear_cross_entropy"]
)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@every_subject(every_way=False)
def test_every_backend(subject, dtypes, function, poison):
    check(function, dtypes, backend=subject.name)


@pytest.mark.parametrize("tier", ["T1", "T2", "T3"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_tier(dtypes, tier, force_tier, poison):
    force_tier(tier)
    check("linear_pro_loss", dtypes)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_an_attached_model(autocast):
    """Its log-probs and its logits, lazy and made, are those of fp32 logits to fp32's roundings."""
    model = make() if autocast else make().bfloat16()
    ids = torch.randint(0, V, (2, 9))

    def run(**options):
        attached = pk.attach(copy.deepcopy(model), **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attached, attached(input_ids=ids, labels=ids), attached(input_ids=ids).logits

    plain = pk.OpenModel(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        heads = []
        plain.run(lambda head: heads.append(head) or (ids.sum(), {"logps": ids}), input_ids=ids)
    exact = next_logps(heads[0].exact_logits(), ids)
    attached, out, logits = run(**FP32)
    _, rounded, _ = run()
    near = {"rtol": 0, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(out.token_logps[:, :-1], exact, **near)
    assert (rounded.token_logps[:, :-1] - exact).abs().max() > 1e-4
    for z in (out.logits, logits):
        assert isinstance(z, LazyLogits) and z.dtype == torch.float32
        for way in (torch.clone, real):  # lazy, and made
            torch.testing.assert_close(next_logps(way(z), ids), exact, **near)
        hot = torch.rand(2, 9, 1) + 0.5
        want = next_logps(heads[0].exact_logits() / hot, ids)
        torch.testing.assert_close(next_logps(z / hot, ids), want, **near)
        top = z[:, :-1].topk(2).values
        torch.testing.assert_close(top, heads[0].exact_logits()[:, :-1].topk(2).values, **near)
    with torch.no_grad():  # of a few rows, too
        assert attached(input_ids=ids).logits.dtype == torch.float32


def test_an_fp32_weight_behind_16_bits_of_hidden_states():
    model = make().bfloat16()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    ids = torch.randint(0, V, (2, 9))
    exact = next_logps(model(input_ids=ids).logits.double(), ids).float()
    out = pk.attach(model, **FP32)(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.token_logps[:, :-1], exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtypes", "head_dtype"),
    [
        ((torch.bfloat16, torch.bfloat16), "float32"),
        ((torch.bfloat16, torch.float32), "float32"),
        ((torch.float32, torch.float32), None),
        ((torch.float16, torch.float16), None),
    ],
    ids=str,
)
@every_subject(every_way=False)
def test_a_row_is_the_same_to_the_bit_in_any_batch(subject, dtypes, head_dtype, poison):
    """Alone, among 7 and among 300, at other places, in chunks, with a gradient and without."""
    n, vocab = (130, 67) if subject.interpreted else (300, 4099)
    hidden = torch.randn(n, 96).to(dtypes[0])
    weight = torch.randn(vocab, 96).to(dtypes[1]).requires_grad_()
    targets, scale = torch.randint(0, vocab, (n,)), 0.5 + torch.rand(n)
    options = {"head_dtype": head_dtype, "batch_invariant": True, "backend": subject.name}

    def run(rows, **more):
        more = {"return_lse": True, **options, **more}
        found = pk.linear_token_logps(
            hidden[rows], weight, targets[rows], logit_scale=scale[rows], **more
        )
        return torch.stack([x.detach() for x in found if isinstance(x, torch.Tensor)])

    with threads(2):
        want = run(slice(None))
        parts = [torch.tensor([i]) for i in (0, 5, n - 1)]
        parts += [torch.arange(i, i + 7) for i in (0, 3, n - 7)] + [torch.randperm(n)]
        for rows in parts:
            assert run(rows).equal(want[:, rows])
            with torch.no_grad():
                assert run(rows).equal(want[:, rows])
        chunks = {} if subject.interpreted else {"budget": 1}
        for more in (chunks, {"return_entropy": True}, {"return_topk": 2}):
            assert run(slice(None), **more)[:2].equal(want)


def test_all_matmuls_of_logits_have_one_shape(monkeypatch):
    """Which libraries choose kernels by; without the option that is each batch's own."""
    shapes, own = [], matmul.logits_into
    monkeypatch.setattr(
        matmul, "logits_into", lambda out, x, *a: shapes.append(x.shape[0]) or own(out, x, *a)
    )
    weight = torch.randn(37, 16)
    for n, tiles in ((1, 1), (128, 1), (300, 3)):
        hidden, targets = torch.randn(n, 16), torch.zeros(n, dtype=torch.int64)
        pk.linear_token_logps(hidden, weight, targets)
        pk.linear_token_logps(hidden, weight, targets, batch_invariant=True)
        assert shapes == [n, *[128] * tiles]
        shapes.clear()
