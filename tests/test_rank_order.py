"""Candidates are put in rank order alike on the host and by operations on tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import pro_kernels as pk
from pro_kernels.fused import rank_order
from pro_kernels.options import PROOptions

# Prompts of 3, 1, 2 and 0 candidates; the first one's second and the third one's are not scored.
COUNTS = [3, 1, 2, 0]
ENDS = [0, 2, 2, 5, 6, 6, 6]
LAYOUTS = {
    "ragged": pk.Layout.from_packed(torch.arange(6), torch.tensor(ENDS), COUNTS),
    "full": pk.Layout.from_padded(torch.arange(24).view(4, 3, 2)),
    "empty": pk.Layout.from_padded(torch.full((4, 3, 2), -100)),
    "no prompts": pk.Layout.from_padded(torch.empty(0, 3, 2, dtype=torch.int64)),
}
REWARDS = {
    dtype: torch.tensor([[1, 9, 2], [5, 0, 0], [-1, -1, 3], [4, 4, 1]], dtype=dtype)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16)
}
REWARDS[torch.float64][3, 1] += 1e-12
OPTIONS = [{}, {"temperature": 2.0}, {"reward_scale": 0.3}]


def ranked(limit: int, layout, rewards, options, dtype, monkeypatch) -> list[torch.Tensor | None]:
    monkeypatch.setattr(rank_order, "_HOST_CANDIDATES", limit)
    given = None if rewards is None else rewards[: layout.shape[0]]
    found = rank_order.rank_candidates(layout, given, PROOptions(**options), None, None, dtype)
    return list(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rewards", [*REWARDS, None], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_ranks_as_tensors_do(layout, rewards, options, dtype, monkeypatch):
    args = (LAYOUTS[layout], REWARDS.get(rewards), options, dtype, monkeypatch)
    expected = ranked(0, *args)
    # Else the host might leave all of this to the tensors.
    monkeypatch.setattr(rank_order, "_check_values", lambda *_: pytest.fail("not on the host"))
    found = ranked(1 << 30, *args)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.stride() == b.stride()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, torch.nan, 2.0], "finite"),
        ([torch.inf, 1.0, 2.0], "finite"),
        ([torch.inf, -torch.inf, 2.0], "finite"),
        ([3e38, -3e38, 0.0], "too far apart"),
        ([2.0, 2.0, 2.0], "all equal"),
    ],
)
def test_the_host_hides_no_error(row, message, monkeypatch):
    rewards = torch.tensor([[1.0, 2.0, 3.0], row] * 2)
    for limit in (0, 1 << 30):
        with pytest.raises(ValueError, match=message):
            ranked(limit, LAYOUTS["full"], rewards, {}, torch.float32, monkeypatch)


@pytest.mark.parametrize("capturing", [False, True])
def test_a_graph_being_captured_has_no_copy_from_the_host(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    layout = SimpleNamespace(
        device=torch.device("cuda"), candidate_tokens=((1, 1),), sequences=torch.zeros(1, 2)
    )
    assert rank_order._known_on_host(layout, None) is not capturing


def test_outputs_of_a_full_batch_are_the_callers(monkeypatch):
    layout = LAYOUTS["full"]
    sums, per_rank = torch.randn(12), torch.randn(3)
    args = (sums.sum(), per_rank, sums, layout, PROOptions())
    found = rank_order.make_output(*args)
    monkeypatch.setattr(rank_order, "_rectangular", lambda _: False)
    torch.testing.assert_close(list(found[:-1]), list(rank_order.make_output(*args)[:-1]))
    found.lengths.zero_()
    assert layout.lengths.tolist() == [2] * 12
