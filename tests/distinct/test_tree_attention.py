"""Attention over trees, in each of its forms, against one dense softmax in fp64."""

from __future__ import annotations

import functools

import pytest
import torch

import pro_kernels as pk
from pro_kernels.backends import cpu
from pro_kernels.distinct import attention, gpu, interface
from trees import dense_attention, dense_mask, random_tree

SHAPES = [(4, 2, 8, 8), (3, 1, 8, 8), (2, 2, 8, 6)]  # heads, of keys and values, sizes of a head


def inputs(tree, shape, dtype=torch.float64, with_sinks=False):
    h, g, d, e = shape
    generator = torch.Generator().manual_seed(h + tree.num_tokens)
    sizes = [(1, h, tree.num_tokens, d), (1, g, tree.num_tokens, d), (1, g, tree.num_tokens, e)]
    sizes += [(h,)] * with_sinks
    found = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]
    return found if with_sinks else [*found, None]


def gradients(out, tensors):
    by = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return torch.autograd.grad(out, [x for x in tensors if x is not None], by)


def with_gradients(out, tensors):
    return [out, *gradients(out, tensors)]


def assert_same(out, want, tensors):
    for ours, theirs in zip(*(with_gradients(x, tensors) for x in (out, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def assert_as_good(out, plain, tensors, options, factor):
    """Against fp64, an error in norm at most ``factor`` times that of ``plain``."""
    exact = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    results = [(out, tensors), (plain, tensors), (dense_attention(*exact, *options), exact)]
    for ours, theirs, want in zip(*(with_gradients(*x) for x in results), strict=True):
        off, allowed = ((x - want).norm() for x in (ours, theirs))
        assert off <= factor * allowed + 4 * torch.finfo(out.dtype).eps * want.norm()


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("window", [None, 3, 7, 1000], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(attention, "_SCORES", 500)  # so that queries come in parts
    for seed in range(6):
        tree = random_tree(seed)
        tensors = inputs(tree, shape, with_sinks=sinks)
        want = dense_attention(*tensors, dense_mask(tree, window), 0.3, softcap)
        out, _ = attention.tree_attention(*tensors, tree.segments, 0.3, softcap, window)
        assert_same(out, want, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers_are_as_good_as_one_softmax_of_them(dtype):
    """Parts of a softmax cost no more than PyTorch's own attention does."""
    tree = random_tree(5, longest=300)
    tensors = inputs(tree, (4, 2, 32, 32), dtype)
    groups = [x.repeat_interleave(2, 1) for x in tensors[1:3]]
    mask = dense_mask(tree, None)
    plain = torch.nn.functional.scaled_dot_product_attention(
        tensors[0], *groups, attn_mask=mask, scale=0.2
    ).transpose(1, 2)
    out, _ = attention.tree_attention(*tensors, tree.segments, 0.2, None, None)
    assert_as_good(out, plain, tensors, (mask, 0.2, None), factor=1.5)


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "neon", "generic", "none"])
def isa(request, monkeypatch):
    """Each instruction set of the C++ library, and PyTorch without the library."""
    if request.param == "none":
        monkeypatch.setattr(attention, "_takes_cpu", lambda query: False)
        yield
        return
    try:
        cpu.set_isa(request.param)
    except (ValueError, RuntimeError):
        pytest.skip(f"this machine or this build has no {request.param}")
    yield
    cpu.set_isa(None)


@pytest.mark.parametrize("softcap, sinks", [(None, False), (5.0, True)], ids=["", "softcap, sinks"])
@pytest.mark.parametrize("window", [None, 7, 150], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("shape", [(4, 2, 32, 32), (3, 1, 40, 72)], ids=str)
def test_fp32_is_as_good_as_one_softmax(isa, shape, window, softcap, sinks):
    """Over several tiles and blocks of keys."""
    tree = random_tree(5, longest=400)
    tensors = inputs(tree, shape, torch.float32, with_sinks=sinks)
    options = dense_mask(tree, window), 0.3, softcap
    plain = dense_attention(*tensors, *options)
    out, _ = attention.tree_attention(*tensors, tree.segments, 0.3, softcap, window)
    assert_as_good(out, plain, tensors, options, factor=2)


def test_bits_are_the_same_on_any_number_of_threads(isa):
    tree = random_tree(5, longest=400)
    tensors = inputs(tree, (6, 2, 32, 32), torch.float32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, lse = attention.tree_attention(*tensors, tree.segments, 0.3, None, None)
        found.append((out, lse, *gradients(out, tensors)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(4, 2, 32, 32), (4, 2, 8, 12)], ids=str)
def test_the_op_is_one(shape):
    tree = random_tree(3)
    for sinks in (False, True):
        tensors = inputs(tree, shape, torch.float32, with_sinks=sinks)
        options = tree.segments, 0.3, None, None if sinks else 4
        torch.library.opcheck(attention.tree_attention, (*tensors, *options))
        out, lse = attention.tree_attention(*tensors, *options)
        tensors = [x.detach() for x in (torch.randn_like(out), *tensors[:3], out, lse)]
        torch.library.opcheck(attention.tree_attention_backward, (*tensors, *options))


def test_memory_is_linear_in_tokens():
    """No tensor of S x S, and no copies of an ancestor's keys, as saved for the backward."""

    def kept(candidates: int) -> int:
        prompt, sizes = list(range(512)), []
        rows = [[*prompt, *[600 + k] * 64] for k in range(candidates)]
        tree = pk.TokenTree.from_sequences(rows)
        tensors = inputs(tree, (4, 2, 16, 16), torch.float32)
        pack = lambda x: sizes.append(x.untyped_storage().nbytes()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention.tree_attention(*tensors, tree.segments, 0.3, None, None)
        return sum(sizes) / tree.num_tokens

    assert kept(32) <= 1.01 * kept(2)


@pytest.mark.parametrize("window", [None, 5, 100], ids=lambda w: f"window {w}")
def test_flex_attention_and_its_blocks(window):
    for seed in range(5):
        tree = random_tree(seed, longest=400)
        size, mask = tree.num_tokens, dense_mask(tree, window)
        for softcap, sinks in ((None, False), (5.0, True)):
            tensors = inputs(tree, (4, 2, 16, 16), torch.float32, with_sinks=sinks)
            tensors = [x if x is None else x.detach() for x in tensors]  # no backward on a CPU
            want = dense_attention(*tensors, mask, 0.3, softcap)
            out = gpu.by_flex(*tensors, tree.as_mask(), 0.3, softcap, window)
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        found = gpu.block_mask(tree.segments, window, "cpu")
        count = -(-size // gpu.BLOCK)
        whole = torch.zeros(count * gpu.BLOCK, count * gpu.BLOCK, dtype=torch.bool)
        inside = whole.clone()
        whole[:size, :size], inside[:size, :size] = mask, True
        tiles, within = (
            x.view(count, gpu.BLOCK, count, gpu.BLOCK).transpose(1, 2) for x in (whole, inside)
        )
        some, every = tiles.any(-1).any(-1), (tiles | ~within).all(-1).all(-1)
        listed = []
        for number, indices in (
            (found.kv_num_blocks, found.kv_indices),
            (found.full_kv_num_blocks, found.full_kv_indices),
        ):
            blocks = torch.zeros(count, count, dtype=torch.bool)
            for row in range(count):
                blocks[row, indices[0, 0, row, : number[0, 0, row]].long()] = True
            listed.append(blocks)
        partial, full = listed
        assert not (partial & full).any() and not (full & ~every).any()
        assert not (some & ~(partial | full)).any()
        if window is None:
            assert torch.equal(partial | full, some)


def varlen_kernel(q, k, v, rows, scale, window, causal_from="lower right"):
    """What is a GPU's, from plain PyTorch."""
    bounds = list(zip(rows.query_bounds.tolist(), rows.key_bounds.tolist(), strict=True))
    outs = []
    for (a, c), (b, d) in zip(bounds, bounds[1:], strict=False):
        assert b - a <= rows.longest_query and d - c <= rows.longest_key
        shift = (d - c) - (b - a) if causal_from == "lower right" else 0
        distance = torch.arange(b - a)[:, None] + shift - torch.arange(d - c)
        seen = (distance >= 0) & (distance < (window or d))
        parts = (x.transpose(0, 1)[None].double() for x in (q[a:b], k[c:d], v[c:d]))
        outs.append(dense_attention(*parts, None, seen, scale, None)[0].to(q.dtype))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 5], ids=lambda w: f"window {w}")
def test_what_a_varlen_kernel_is_given(window, monkeypatch):
    monkeypatch.setattr(gpu, "varlen", lambda: varlen_kernel)
    for seed in range(6):
        tree = random_tree(seed)
        tensors = inputs(tree, (4, 2, 8, 8))
        want = dense_attention(*tensors, dense_mask(tree, window), 0.3, None)
        assert_same(gpu.by_varlen(*tensors[:3], tree.as_mask(), 0.3, window), want, tensors)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_varlen_kernel_that_is_wrong_or_fails_is_not_used(windowed, monkeypatch):
    def fails(*_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    upper_left = functools.partial(varlen_kernel, causal_from="upper left")
    for kernel, right in ((varlen_kernel, True), (upper_left, False), (fails, False)):
        gpu._varlen_is_right.cache_clear()
        monkeypatch.setattr(gpu, "varlen", lambda k=kernel: k)
        found = gpu._varlen_is_right(torch.device("cpu"), torch.bfloat16, 16, windowed)
        assert found is right, kernel
    gpu._varlen_is_right.cache_clear()


def test_what_it_does_not_know_is_refused():
    tree = random_tree(1)
    tensors = inputs(tree, (2, 2, 8, 8))
    mask = tree.as_mask()
    with pytest.raises(ValueError, match="does not know attention dropout of 0.1"):
        interface.over_tree(None, *tensors[:3], mask, dropout=0.1)
    with pytest.raises(ValueError, match=r"does not know the arguments \['position_bias'\]"):
        interface.over_tree(None, *tensors[:3], mask, position_bias=tensors[0])
