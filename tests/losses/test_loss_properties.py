"""Invariances of the losses, on drawn batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import random_batch

from pro_kernels.losses import LOSSES

SEEDS = st.integers(0, 10**6)
QUICK = settings(max_examples=12, deadline=None)
NO_SFT = {
    "pro": {"sft_weight": 0.0},
    "cpo": {"cpo_alpha": 0.0},
    "rrhf": {"sft_weight": 0.0},
    "slic": {"sft_weight": 0.0},
}
SUM_SCORED = {"dpo", "dpo_pl", "s_dpo", "cpo", "slic", "lipo_lambda"}


def value_and_grad(name, batch, **options):
    logps = batch.logps.clone().requires_grad_()
    loss, _ = LOSSES[name](logps, batch.lengths, **batch.inputs(), **options)
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(seed=SEEDS, n=st.integers(1, 6))
def test_permuting_candidates_with_their_rewards(name, seed, n):
    batch = random_batch(seed, n=n)
    loss, grad = value_and_grad(name, batch)
    torch.manual_seed(seed)
    permutation = torch.argsort(torch.rand(batch.logps.shape), dim=1)
    for field in ("logps", "lengths", "rewards", "ref_logps", "mask"):
        setattr(batch, field, getattr(batch, field).gather(1, permutation))
    permuted_loss, permuted_grad = value_and_grad(name, batch)
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted_grad, grad.gather(1, permutation), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_shifting_a_prompts_rewards(name, seed, shift):
    options = {"gain": "linear"} if name == "lipo_lambda" else {}
    batch = random_batch(seed)
    loss, grad = value_and_grad(name, batch, **options)
    batch.rewards = batch.rewards + shift
    shifted_loss, shifted_grad = value_and_grad(name, batch, **options)
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"orpo", "pro"}))
@QUICK
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_shifting_a_prompts_scores(name, seed, shift):
    batch = random_batch(seed)
    options = NO_SFT.get(name, {})
    loss, grad = value_and_grad(name, batch, **options)
    batch.logps = batch.logps + (shift if name in SUM_SCORED else shift * batch.lengths.double())
    shifted_loss, shifted_grad = value_and_grad(name, batch, **options)
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(seed=SEEDS, extra=st.integers(1, 3), first=st.booleans())
def test_absent_columns_change_nothing(name, seed, extra, first):
    batch = random_batch(seed)
    loss, grad = value_and_grad(name, batch)
    prompts, n = batch.logps.shape
    fillers = {
        "logps": torch.nan,
        "lengths": 9,
        "rewards": torch.inf,
        "ref_logps": 1.0,
        "mask": False,
    }
    for field, filler in fillers.items():
        old = getattr(batch, field)
        blocks = [torch.full((prompts, extra), filler, dtype=old.dtype), old]
        setattr(batch, field, torch.cat(blocks if first else blocks[::-1], dim=1))
    wide_loss, wide_grad = value_and_grad(name, batch)
    kept = wide_grad[:, extra:] if first else wide_grad[:, :n]
    added = wide_grad[:, :extra] if first else wide_grad[:, n:]
    torch.testing.assert_close(wide_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept, grad, rtol=1e-9, atol=1e-12)
    assert (added == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(seed=SEEDS)
def test_batch_is_the_mean_of_its_prompts(name, seed):
    batch = random_batch(seed)
    loss, _ = LOSSES[name](batch.logps, batch.lengths, **batch.inputs())
    singles = []
    for b in range(len(batch.logps)):
        row = slice(b, b + 1)
        inputs = {k: v[row] for k, v in batch.inputs().items()}
        one, _ = LOSSES[name](batch.logps[row], batch.lengths[row], **inputs)
        if (batch.mask & (batch.lengths > 0))[b].any():
            singles.append(one)
        else:
            assert one == 0
    torch.testing.assert_close(loss, torch.stack(singles).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"listnet", "pro", "lipo_lambda"}))
@QUICK
@given(seed=SEEDS)
def test_rewards_only_order_the_candidates(name, seed):
    batch = random_batch(seed)
    loss, _ = value_and_grad(name, batch)
    batch.rewards = torch.exp(3 * batch.rewards)
    reshaped_loss, _ = value_and_grad(name, batch)
    torch.testing.assert_close(reshaped_loss, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_raising_the_best_candidate_lowers_the_loss(name):
    options = {"beta": 0.05} if name == "ipo" else {}
    batch = random_batch(1, n=4)  # prompt 0: every candidate valid, distinct rewards
    batch.logps[0] = torch.tensor([-40.0, -8.0, -9.0, -10.0])
    batch.rewards[0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    batch.lengths[0], batch.ref_logps[0] = 4, -10.0
    _, grad = value_and_grad(name, batch, **options)
    assert grad[0, 0] < 0
