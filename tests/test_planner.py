"""The planner: which tier, how large, and that it never looks at data."""

from __future__ import annotations

import pytest
import torch

from pro_kernels.fused import planner
from pro_kernels.fused.planner import make_plan

CPU = torch.device("cpu")
MB = 1 << 20


def plan(rows=1000, hidden=256, vocab=32000, dtype=torch.float32, budget=1 << 30, **options):
    options = {"need_hidden": True, "need_weight": True, **options}
    return make_plan(rows, (vocab, hidden, dtype), CPU, budget=budget, **options)


THREE = {"prompt_tokens": (400, 300, 300)}
# 32000 x 2048 x 4 = 250 MB of an fp32 accumulator.
LOW = {"rows": 12000, "prompt_tokens": (600,) * 20, "hidden": 2048, "dtype": torch.bfloat16}
FILTERED = {"rows": 920, "hidden": 4096, "vocab": 128256, "dtype": torch.bfloat16, "filtered": True}
COPY = 4096 * 128256 * 2
OF_PROMPTS = {"rows": 2000, "prompt_tokens": (500,) * 4, "dtype": torch.bfloat16}
# An fp32 dW and 600 rows, beside the matmuls' scratch.
OF_PROMPTS["budget"] = (32000 * 256 * 4 + 600 * (32000 * 2 + 4 * 256 * 4) + MB) * 8 // 7 + 1


@pytest.mark.parametrize(
    ("options", "tiers"),
    [
        ({"need_hidden": False, "need_weight": False}, ("T0",)),
        ({}, ("T1",)),
        ({"need_weight": False}, ("T1f",)),
        ({"budget": 120 * MB, **THREE}, ("T2",)),
        ({"budget": 100 * MB}, ("T3",)),
        ({"budget": 100 * MB, "prompt_tokens": (1000,)}, ("T3",)),
        # The accumulator of low-precision weights counts.
        ({"budget": 300 * MB, **LOW}, ("T3",)),
        ({"budget": 500 * MB, **LOW}, ("T2",)),
        # What a call takes in any tier comes off the budget.
        ({"budget": 200 * MB}, ("T1",)),
        ({"budget": 200 * MB, "fixed": 100 * MB}, ("T3",)),
        # A filter counts the copies that a tier makes and no more.
        ({"budget": 6 << 30, **FILTERED}, ("T1",)),
        ({"budget": 4 * COPY + (400 << 20), **FILTERED, "grad_size": 2}, ("T1",)),
        ({"budget": 3 * COPY, **FILTERED, "grad_size": 2}, ("T3",)),
        ({"budget": 2 << 30, "need_weight": False, **FILTERED}, ("T1f",)),
        # With chunks of prompts it counts an fp32 copy.
        (OF_PROMPTS, ("T2",)),
        ({"filtered": True, **OF_PROMPTS}, ("T1", "T3")),
    ],
)
def test_tiers(options, tiers):
    found = plan(**options)
    assert found.tier in tiers
    if found.tier == "T1f":
        assert found.chunk == options.get("rows", 1000)


def test_t1_keeps_everything_and_t3_what_fits():
    assert plan().retained == 1000
    small = plan(budget=100 * MB)
    assert 0 < small.retained < 1000
    assert (small.retained + small.chunk) * 32000 * 4 <= 100 * MB
    # A filter leaves less for the chunks, but more without a gradient of the weight.
    low = {"rows": 4000, "budget": 100 * MB, "dtype": torch.bfloat16}
    both, bias = plan(**low, filtered=True), plan(**low, filtered=True, grad_size=0)
    assert both.tier == bias.tier == "T3"
    assert both.retained < min(bias.retained, plan(**low).retained)


@pytest.mark.parametrize("budget", [1, MB, 10 * MB, 100 * MB, 1 << 30])
@pytest.mark.parametrize("rows", [0, 1, 63, 1000, 100_000])
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
def test_any_budget_gives_a_plan_that_fits_it(budget, rows, needs):
    p = plan(rows=rows, budget=budget, need_hidden=needs[0], need_weight=needs[1])
    assert p.chunk >= 1 and 0 <= p.retained <= rows
    held = p.retained if p.tier == "T1" else p.retained + p.chunk
    assert held * 32000 * 4 <= max(budget, planner.MIN_ROWS * 32000 * 4)
    if budget >= 100 * MB and rows < 100_000:  # else the thin sides of so many rows exceed it
        assert held * 32000 * 4 <= p.taken <= budget


def test_what_a_plan_counts_on_by_hand():
    row = 4 * (32000 + 3 * 256)  # logits; X, w X and dZ0 W
    scratch = 16 * MB
    assert plan().taken == scratch + 1000 * row
    assert plan(fixed=5).taken == scratch + 5 + 1000 * row
    frozen = plan(need_weight=False)
    assert frozen.taken == scratch + frozen.chunk * row + 1000 * 256 * 4
    assert plan(need_hidden=False, need_weight=False).taken == scratch + 1000 * row
    small = plan(budget=100 * MB)  # a scratch of an eighth; the sides of all rows are kept
    sides = 1000 * 4 * 256 * 3
    assert small.taken == 100 * MB // 8 + (small.chunk + small.retained) * row + sides
    summed = plan(budget=120 * MB, prompt_tokens=(400, 300, 300))
    held = (32000 + 1000) * 256 * 4
    assert summed.tier == "T2" and summed.taken == 15 * MB + held + summed.chunk * row
    assert plan(entropy=True).taken == scratch + 1000 * (row + 32000 * 4)


def test_t2_groups_whole_prompts():
    tokens = (100, 400, 0, 500, 300, 250)
    p = plan(rows=sum(tokens), budget=120 * MB, prompt_tokens=tokens)
    assert p.tier == "T2" and sum(p.prompt_chunks) == len(tokens)
    start = 0
    for count in p.prompt_chunks:
        assert sum(tokens[start : start + count]) <= p.chunk
        start += count


@pytest.fixture
def no_default(monkeypatch):
    """No budget is known, before and after the test."""
    planner._default_budget.cache_clear()
    monkeypatch.delenv("PRO_KERNELS_BUDGET", raising=False)
    yield
    planner._default_budget.cache_clear()


def test_default_budget_is_stable_and_can_be_set(no_default, monkeypatch):
    assert planner.default_budget(CPU) == planner.default_budget(CPU)
    assert planner.default_budget(CPU).bit_count() == 1
    planner._default_budget.cache_clear()
    monkeypatch.setenv("PRO_KERNELS_BUDGET", "12345")
    assert planner.default_budget(CPU) == 12345
    planner._default_budget.cache_clear()
    monkeypatch.setenv("PRO_KERNELS_BUDGET", "lots")
    with pytest.raises(ValueError, match="PRO_KERNELS_BUDGET must be a number of bytes > 0"):
        planner.default_budget(CPU)


def test_memory_cached_for_nobody_counts_as_free(no_default, monkeypatch):
    numbers = {"mem_get_info": (1 << 30, 80 << 30), "memory_reserved": 41 << 30}
    numbers["memory_allocated"] = 10 << 30
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda index, value=value: value)
    assert planner.default_budget(torch.device("cuda", 0)) == 8 << 30  # of 80; half of 32 is free


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError)])
def test_bad_budget(budget, error):
    with pytest.raises(error, match="budget must be"):
        plan(budget=budget)


def gpu_plan(rows, budget=16 << 30, vocab=128256, **options):
    options = {"need_hidden": True, "need_weight": True, **options}
    device = torch.device("cuda", 0)
    return make_plan(rows, (vocab, 4096, torch.bfloat16), device, budget=budget, **options)


def test_few_large_equal_chunks_on_a_gpu():
    frozen = gpu_plan(20_000, need_weight=False)
    assert frozen.tier == "T1f" and frozen.chunk == 6912  # 3 chunks, in tiles of 256 rows
    assert frozen.chunk % planner.GPU_TILE_ROWS == 0
    assert gpu_plan(5000, need_weight=False).chunk == 5000
    summed = gpu_plan(200_000, prompt_tokens=(1000,) * 200)
    assert summed.tier == "T2" and max(summed.prompt_chunks) == planner.GPU_SUMMED_ROWS // 1000


@pytest.mark.parametrize("rows", [1, 255, 257, 8191, 8193, 70_001])
def test_chunks_on_a_gpu_keep_to_the_budget(rows):
    p = gpu_plan(rows, budget=1 << 30, need_weight=False)
    assert 1 <= p.chunk <= rows and p.chunk * 128256 * 2 <= 1 << 30


def test_the_fp32_side_of_a_gpu_counts():
    """A budget that 16-bit sides would fit, and fp32 ones do not."""
    rows, width, vocab = 1000, 4096, 32000
    low = rows * (2 * vocab + 3 * 2 * width)
    for room, tier in ((low, "T3"), (low + rows * 2 * width, "T1")):
        budget = room * 8 // 7 + 1  # beside the matmuls' scratch
        assert gpu_plan(rows, budget, vocab).tier == tier


def test_the_matmuls_scratch_is_part_of_the_budget():
    """An eighth, at most what a blocked matmul takes."""
    row = 32000 * 4 + 3 * 256 * 4
    for budget, scratch in ((80 * MB, 10 * MB), (400 * MB, planner.workspace("cpu"))):
        fits = (budget - scratch) // row
        assert plan(rows=fits, budget=budget).tier == "T1"
        assert plan(rows=fits + 1, budget=budget).tier == "T3"


@pytest.mark.parametrize(
    ("need_hidden", "grad_size", "copies"),
    [
        (True, 2, {"T1": 8, "T2": 4, "T3": 8}),
        (False, 2, {"T1": 8, "T2": 4, "T3": 8}),
        (True, 4, {"T1": 4, "T2": 4, "T3": 4}),  # an fp32 weight under autocast
        (True, 0, {"T1": 2, "T2": 2, "T3": 2}),  # the weight is frozen
        (False, 0, {"T1": 0, "T2": 0, "T3": 2}),  # a bias alone
    ],
)
def test_a_filter_copies_what_is_needed(need_hidden, grad_size, copies):
    """Bytes for each number of a bf16 weight: what is alive at the same time."""
    assert planner._filter_copies(1, 2, need_hidden, grad_size) == copies
