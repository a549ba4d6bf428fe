"""Invariances of the losses, on drawn batches."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import OF_GAINS, random_batch

from pro_kernels.losses import LOSSES

SEEDS = st.integers(0, 10**6)
QUICK = settings(max_examples=12, deadline=None)
FIELDS = ("logps", "lengths", "rewards", "ref_logps", "mask")
# Scores are means over tokens.
MEANS = {"plackett_luce", "simpo", "ipo", "rrhf", "listnet", "sigmoid_norm", *OF_GAINS}
# Candidates are compared with the model, not only with each other.
ABSOLUTE = {"orpo", "pro", "kto", "nca", "apo_zero", "apo_down", "sppo_hard"}
ORDER_ONLY = {name for name, loss in LOSSES.items() if not loss.uses_gaps()}


def value_and_grad(name, batch, **options):
    logps = batch.logps.clone().requires_grad_()
    loss, _ = LOSSES[name](logps, batch.lengths, **batch.inputs(), **options)
    loss.backward()
    return loss.detach(), logps.grad


# Each changes a batch and says where the old gradient stands in the new one.


def permute_candidates(name, batch):
    permutation = torch.argsort(torch.rand(batch.logps.shape), dim=1)
    for field in FIELDS:
        setattr(batch, field, getattr(batch, field).gather(1, permutation))
    return lambda grad: grad.scatter(1, permutation, grad)


def shift_rewards(name, batch):
    batch.rewards = batch.rewards + 10 * torch.rand(()).item() - 5
    return lambda grad: grad


def shift_scores(name, batch):
    shift = 10 * torch.rand(()).item() - 5
    batch.logps = batch.logps + (shift * batch.lengths.double() if name in MEANS else shift)
    return lambda grad: grad


def reshape_rewards(name, batch):
    batch.rewards = torch.exp(3 * batch.rewards)
    return lambda grad: grad


def add_absent_columns(name, batch):
    extra = int(torch.randint(1, 4, ()))
    first = bool(torch.rand(()) < 0.5)
    for field, filler in zip(FIELDS, (torch.nan, 9, torch.inf, 1.0, False), strict=True):
        values = getattr(batch, field)
        blocks = [torch.full((len(values), extra), filler, dtype=values.dtype), values]
        setattr(batch, field, torch.cat(blocks if first else blocks[::-1], dim=1))

    column = torch.arange(batch.logps.shape[1])
    old = column >= extra if first else column < len(column) - extra

    def back(grad):
        assert not grad[:, ~old].any()
        return grad[:, old]

    return back


CHANGES = {
    permute_candidates: set(LOSSES),
    shift_rewards: set(LOSSES) - OF_GAINS - {"lire"},
    shift_scores: set(LOSSES) - ABSOLUTE,
    reshape_rewards: ORDER_ONLY,
    add_absent_columns: set(LOSSES),
}


@pytest.mark.parametrize(
    ("change", "name"), [(f, x) for f, names in CHANGES.items() for x in sorted(names)]
)
@QUICK
@given(seed=SEEDS, n=st.integers(1, 6))
def test_nothing_changes_with(change, name, seed, n):
    options = {"sft_weight": 0.0} if change is shift_scores else {}
    if name == "lipo_lambda" and change is shift_rewards:
        options = {"gain": "linear"}
    batch = random_batch(seed, n=n, name=name)
    loss, grad = value_and_grad(name, batch, **options)
    torch.manual_seed(seed)
    back = change(name, batch)
    changed_loss, changed_grad = value_and_grad(name, batch, **options)
    rounds = change in (shift_rewards, shift_scores)
    atol, of_grads = (1e-9, 1e-8) if rounds else (1e-12, 1e-9)
    torch.testing.assert_close(changed_loss, loss, rtol=atol, atol=atol)
    torch.testing.assert_close(back(changed_grad), grad, rtol=of_grads, atol=atol)


@pytest.mark.parametrize("name", LOSSES)
@QUICK
@given(seed=SEEDS)
def test_batch_is_the_mean_of_its_prompts(name, seed):
    of_batch = {"kto": {"kl": torch.tensor(0.4)}, "bco": {"delta": 0.3}}.get(name, {})
    loss_of = functools.partial(LOSSES[name], **of_batch)
    batch = random_batch(seed, name=name)
    loss, _ = loss_of(batch.logps, batch.lengths, **batch.inputs())
    singles = []
    for b in range(len(batch.logps)):
        row = slice(b, b + 1)
        inputs = {k: v[row] for k, v in batch.inputs().items()}
        one, _ = loss_of(batch.logps[row], batch.lengths[row], **inputs)
        if (batch.mask & (batch.lengths > 0))[b].any():
            singles.append(one)
        else:
            assert one == 0
    torch.testing.assert_close(loss, torch.stack(singles).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - OF_GAINS - {"apo_down"}))
def test_raising_the_best_candidate_lowers_the_loss(name):
    """But for APO-down, which lowers it, and smooth ranks, which are flat this far from a swap."""
    options = {"beta": 0.05} if name == "ipo" else {}
    batch = random_batch(1, n=4, name=name)  # prompt 0: every candidate valid, distinct rewards
    batch.logps[0] = torch.tensor([-40.0, -8.0, -9.0, -10.0])
    batch.rewards[0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    batch.lengths[0], batch.ref_logps[0] = 4, -10.0
    _, grad = value_and_grad(name, batch, **options)
    assert grad[0, 0] < 0
