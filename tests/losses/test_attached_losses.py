"""``attach(model, loss=...)`` with every loss: value and gradients of the plain model's."""

from __future__ import annotations

import pytest
import torch

import pro_kernels as pk
from pro_kernels.losses import LOSSES
from tiny_models import V, assert_close, assert_same_grads, grads, make, next_logps

B, N, T = 2, 3, 7
REWARDS = torch.tensor([[0.5, 2.0, 1.0], [3.0, 1.0, 1.0]])


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (B * N, T), generator=generator)
    labels = ids.clone()
    labels[:, :2] = labels[1, 5:] = -100
    return {"input_ids": ids, "labels": labels}


def plain_scores(model, inputs):
    logps = next_logps(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
    return logps.sum(1).view(B, N), (inputs["labels"][:, 1:] >= 0).sum(1).view(B, N)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"pro"}))
def test_every_loss(name, inputs):
    model, loss = make(), LOSSES[name]
    logps, lengths = plain_scores(model, inputs)
    given = {"rewards": REWARDS, "prompt_weights": torch.tensor([1.0, 2.0])}
    if "ref_logps" in loss.needs():
        given["ref_logps"] = logps.detach() - torch.rand(B, N)
    options = {"sft_weight": 0.3} | ({"beta": 0.7} if "beta" in loss.defaults else {})
    expected, metrics = loss(logps, lengths, **given, **options)
    want = grads(model, expected)
    pk.attach(model, loss=name, **options)
    assert not model.accepts_loss_kwargs
    out = model(**inputs, **given)
    assert_close(out.loss, expected)
    assert_close(out.logps, logps.detach(), 1e-4)
    assert_close(out.sft_loss, metrics["sft_loss"])
    assert_same_grads(grads(model, out.loss), want)
    assert out.lengths.equal(lengths) and out.rank_losses is None


@pytest.mark.parametrize("dense", [True, False])
def test_candidates_of_a_layout_marks_and_a_mask(dense, inputs):
    model = make()
    logps, lengths = plain_scores(model, inputs)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    given = {"desirable": torch.rand(B, N) < 0.5, "ref_logps": torch.zeros(B, N)}
    expected, _ = LOSSES["kto"](logps, lengths, rewards=REWARDS, mask=mask, **given)
    want = grads(model, expected)
    targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    make_layout = pk.Layout.dense if dense else pk.Layout.from_padded
    layout = make_layout(targets.view(B, N, T))
    pk.attach(model, loss="kto")
    out = model(
        input_ids=inputs["input_ids"], layout=layout, rewards=REWARDS, candidate_mask=mask, **given
    )
    assert_close(out.loss, expected)
    assert_same_grads(grads(model, out.loss), want)


def test_what_does_not_go_together(inputs):
    model = pk.attach(make(), loss="dpo", beta=0.3)
    for more, message in (
        ({}, "attached with loss='dpo', and the batch does not say which rows"),
        ({"rewards": REWARDS}, "dpo needs ref_logps: expected"),
        ({"rewards": REWARDS, "sft_index": torch.zeros(B)}, r"does not use \['sft_index'\]"),
        ({"rewards": REWARDS, "desirable": REWARDS > 1}, r"does not use \['desirable'\]"),
        ({"rewards": REWARDS, "beta": 0.1}, r"got \['beta'\]; options are given to attach"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **more)
    with pytest.raises(TypeError, match="ref_logps must be a tensor, got list"):
        model(**inputs, rewards=REWARDS, ref_logps=REWARDS.tolist())
    with pytest.raises(ValueError, match=r"loss='ranking', which does not use \['ref_logps'\]"):
        pk.attach(make(), loss="pro")(**inputs, rewards=REWARDS, ref_logps=REWARDS)
    with pytest.raises(TypeError, match=r"options \['ties'\]; there are .*'beta'"):
        pk.attach(make(), loss="dpo", ties="skip")
    with pytest.raises(ValueError, match="beta must be > 0, got -1"):
        pk.attach(make(), loss="dpo", beta=-1)
    with pytest.raises(ValueError, match=r"loss must be one of \['auto', .*'dpo'"):
        pk.attach(make(), loss="nothing")
