"""Layouts from every batch form describe the same tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pro_kernels as pk
from cases import Case
from pro_kernels import Layout
from pro_kernels.layout import _scored, _scored_on_cpu
from pro_kernels.selfcheck.trust.measure import threads


def tokens_of(layout: Layout) -> list[list[tuple[int, int]]]:
    """(row, target) of every token, sequence by sequence."""
    pairs = list(zip(layout.rows.tolist(), layout.targets.tolist(), strict=True))
    ends = layout.offsets.tolist()
    return [pairs[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_padded_layout_holds_exactly_the_scored_tokens(data):
    b, n, t = (data.draw(st.integers(1, 4)) for _ in range(3))
    values = data.draw(st.lists(st.integers(-1, 9), min_size=b * n * t, max_size=b * n * t))
    targets = torch.tensor(values).view(b, n, t)
    targets[targets < 0] = -100
    layout = Layout.from_padded(targets)
    expected = [
        [(s * t + i, int(v)) for i, v in enumerate(targets.view(-1, t)[s].tolist()) if v != -100]
        for s in range(b * n)
    ]
    assert tokens_of(layout) == expected
    assert layout.lengths.tolist() == [len(x) for x in expected]
    assert layout.prompt_tokens == tuple(
        sum(map(len, expected[p * n : (p + 1) * n])) for p in range(b)
    )
    assert layout.shape == (b, n) and layout.num_rows == b * n * t


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (2, 2, 0), (0, 3, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_few_tokens_are_laid_out_like_many(shape, dtype, monkeypatch):
    targets = torch.randint(-1, 9, shape, dtype=dtype)
    found = Layout.from_padded(targets, ignore_index=-1, vocab_size=9)
    monkeypatch.setattr(pk.layout, "_HOST_TOKENS", -1)
    expected = Layout.from_padded(targets, ignore_index=-1, vocab_size=9)
    for field in dataclasses.fields(Layout):
        a, b = (getattr(x, field.name) for x in (found, expected))
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("limit", [-1, 256])
@pytest.mark.parametrize(("bad", "vocab"), [(-1, None), (-2, 9), (9, 9)])
def test_a_bad_target_is_shown_with_its_place(limit, bad, vocab, monkeypatch):
    monkeypatch.setattr(pk.layout, "_HOST_TOKENS", limit)
    targets = torch.tensor([[[-100, 3], [bad, 100]]])
    for find in (
        lambda: Layout.from_padded(targets, vocab_size=vocab),
        lambda: _scored(targets.flatten(), torch.tensor([0, 4]), -100, vocab),
    ):
        with pytest.raises(ValueError, match=f"got {bad} at flat position 2"):
            find()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_scored_tokens_are_found_alike_on_a_cpu_and_on_a_device(data):
    values = data.draw(st.lists(st.sampled_from([-100, 0, 5, 9]), max_size=12))
    ends = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    targets = torch.tensor(values, dtype=torch.int64)
    args = (targets, torch.tensor([0, *ends, len(values)]), -100, 10)
    *found, host = _scored_on_cpu(*args)
    *expected, expected_host = _scored(*args)
    assert all(map(torch.equal, found, expected)) and host == expected_host


def test_packed_equals_padded():
    hidden, weight, _, targets, rewards = Case("packed", B=2, n=3, T=5, masked=0.4).tensors()
    lengths = [5, 3, 4, 5, 1, 2]  # cut the rows: what follows is not scored in either form
    for s, keep in enumerate(lengths):
        targets.view(6, 5)[s, keep:] = -100
    padded = pk.linear_pro_loss(hidden, weight, targets, rewards)
    rows = torch.cat([torch.arange(5 * s, 5 * s + keep) for s, keep in enumerate(lengths)])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    layout = Layout.from_packed(targets.view(-1)[rows], ends, 3)
    packed = pk.linear_pro_loss(hidden.view(30, -1)[rows], weight, None, rewards, layout=layout)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(packed.logps, padded.logps)


def test_ragged_numbers_of_candidates():
    hidden, weight, _, targets, rewards = Case("ragged", B=2, n=3, T=4, masked=0.0).tensors()
    packed = targets.view(-1)[: 5 * 4], torch.arange(0, 21, 4), [3, 2]
    layout = Layout.from_packed(*packed, vocab_size=weight.shape[0])
    assert layout.sequences.tolist() == [[0, 1, 2], [3, 4, -1]]
    out = pk.linear_pro_loss(hidden.view(24, -1)[:20], weight, None, rewards, layout=layout)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    expected = pk.linear_pro_loss(hidden, weight, targets, rewards, candidate_mask=mask)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.lengths.tolist() == [[4, 4, 4], [4, 4, 0]]


def test_shared_rows_are_summed_in_a_fixed_order():
    rows, ends = torch.randint(0, 4, (2000,)), torch.tensor([0, 900, 2000])
    layout = Layout.from_rows(rows, torch.zeros(2000).long(), ends, 2, num_rows=4)
    weight, rewards, grads = torch.randn(5, 64), torch.tensor([[1.0, 0.0]]), []
    with threads(2):
        for _ in range(5):
            hidden = torch.ones(4, 64).mul_(torch.arange(64)).requires_grad_()
            pk.linear_pro_loss(hidden, weight, None, rewards, layout=layout).loss.backward()
            grads.append(hidden.grad)
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shared_rows_add_their_gradients(dtype):
    """The n first completion tokens of a prompt all read the prompt's last row."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, 8, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(19, 8, generator=g, dtype=torch.float64).to(dtype)
    rows = torch.tensor([3, 4, 5, 3, 6, 3, 7, 8, 9])  # row 3 is the prompt's last
    targets = torch.randint(0, 19, (9,), generator=g)
    layout = Layout.from_rows(rows, targets, torch.tensor([0, 3, 5, 9]), 3, num_rows=10)
    rewards = torch.tensor([[2.0, 1.0, -1.0]])
    grads = []
    for function in (pk.linear_pro_loss, pk.reference.linear_pro_loss):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, None, rewards, layout=layout).loss
        loss.backward()
        grads.append((loss.double(), h.grad.double(), w.grad.double()))
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= tol * b.norm()
    assert (grads[0][1][:3] == 0).all()


def test_shift_stays_inside_each_sequence():
    labels = torch.arange(10, 17)
    layout = Layout.from_packed(labels, torch.tensor([0, 3, 3, 7]), 3, shift=True)
    assert tokens_of(layout) == [[(0, 11), (1, 12)], [], [(3, 14), (4, 15), (5, 16)]]
    padded = Layout.from_padded(labels[:6].view(1, 2, 3), shift=True)
    assert tokens_of(padded) == [[(0, 11), (1, 12)], [(3, 14), (4, 15)]]


def test_to_moves_every_tensor_and_keeps_the_rest():
    layout = Layout.from_padded(torch.randint(0, 5, (2, 2, 3)))
    moved = layout.to("meta")
    assert moved.device.type == moved.offsets.device.type == "meta"
    assert moved.prompt_tokens == layout.prompt_tokens


FOUR, TWO_OF_TWO = torch.zeros(4).long(), torch.tensor([0, 2, 4])
BAD_ROWS = torch.tensor([0, 9]), torch.zeros(2).long(), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Layout.from_padded(FOUR), r"must have shape \(B, n, T\) or \(B, T\), got \(4,\)"),
        (
            lambda: Layout.from_padded(torch.tensor([[[1, 7]]]), vocab_size=7),
            r"targets must lie in \[0, 7\) or be ignore_index=-100, got 7 at flat position 1",
        ),
        (lambda: Layout.from_padded(torch.zeros(2, 3)), "an integer tensor, got dtype torch.float"),
        (lambda: Layout.from_padded([1]), "targets must be an integer tensor, got list"),
        (lambda: Layout.from_packed(FOUR, TWO_OF_TWO[:2], 1), "cu_seqlens must rise from 0 to 4"),
        (lambda: Layout.from_packed(FOUR, TWO_OF_TWO, 3), "=3 does not divide the 2 sequences"),
        (lambda: Layout.from_packed(FOUR, TWO_OF_TWO, [1, 2]), "add up to the 2 sequences"),
        (lambda: Layout.from_rows(*BAD_ROWS, 1, num_rows=5), r"lie in \[0, 5\), got 0 ... 9"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(TypeError if "integer tensor" in message else ValueError, match=message):
        call()
