"""The official procedure: against the authors' outputs, and the trainer's step against it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import pro_kernels as pk
import tiny_models
from pro_trainer.batch.collate import PROCollator
from pro_trainer.train.objective import batch_loss
from pro_trainer.train.official import loss_of_logits, official_batch, official_loss
from pro_trainer.train.options import LossOptions

DATA = Path(__file__).parent.parent / "data"
BUNDLED, ALL = ["n2_f64", "n3_f32"], ["n3_ties_f64", "n5_f64", "n8_f32"]
PAD = 1


def official_targets(batch: dict) -> torch.Tensor:
    names = ("input_ids", "attention_mask", "prefix_mask")
    return pk.reference.official_targets(*(batch[name] for name in names))


@pytest.mark.parametrize(
    "name", [*BUNDLED, *(pytest.param(x, marks=pytest.mark.shared) for x in ALL)]
)
def test_outputs_of_the_official_code(name, request):
    folder = DATA if name in BUNDLED else request.getfixturevalue("shared") / "golden"
    arrays = np.load(folder / f"{name}.npz").items()
    d = {k: torch.from_numpy(v) if v.shape else float(v) for k, v in arrays}
    tolerance = 1e-9 if d["logits"].dtype == torch.float64 else 1e-5
    logits = d["logits"].requires_grad_()
    given = official_targets(d), d["rewards"], d["sft_index"], d["sft_weight"]
    out = loss_of_logits(lambda i: logits[:, i], *given)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(d["loss"], rel=tolerance)
    assert out.sft_loss.item() == pytest.approx(d["sft_loss"], rel=tolerance)
    torch.testing.assert_close(out.rank_losses.double(), d["rank_losses"], rtol=tolerance, atol=0)
    error = (logits.grad - d["grad_logits"]).norm() / d["grad_logits"].norm()
    assert error <= tolerance


UNTIED = {"tie_word_embeddings": False}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama tied", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 untied": ("Qwen2", UNTIED),
    "gpt2": ("GPT2", NO_DROPOUT),
    "gpt2 untied": ("GPT2", NO_DROPOUT | UNTIED),
}


@pytest.fixture(scope="module")
def models():
    """Tiny models by name, in fp32, with random biases and without dropout."""
    made = {
        name: tiny_models.make(kind, num_hidden_layers=2, **more).train()
        for name, (kind, more) in MODELS.items()
    }
    for model in made.values():
        for parameter in model.parameters():  # far from the flat start, biases not 0
            torch.nn.init.normal_(parameter, mean=0.1 * (parameter.dim() == 1), std=0.2)
    return made


def make_features(num_prompts: int, n: int, ties: bool = False, seed: int = 0) -> list[dict]:
    """Lists of uneven lengths, rewards descending; with ``ties`` neighbours share a reward."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return rng.choices(range(2, tiny_models.V), k=rng.randint(least, most))

    def one() -> dict:
        rewards = sorted((rng.random() for _ in range(n)), reverse=True)
        rewards = [rewards[i // 2 * 2] for i in range(n)] if ties else rewards
        completions = [tokens(1, 7) for _ in range(n)]
        return {"prompts": [tokens(3, 9)], "completions": completions, "rewards": rewards}

    return [{**one(), "sft_index": 0} for _ in range(num_prompts)]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def every_case() -> dict[str, tuple[str, list[dict], float]]:
    """A model, lists and a weight of the SFT term, by what is hard about them."""
    common = make_features(1, 3)[0]["prompts"][0]
    own_prompts, alike, unpadded, unsorted = (make_features(2, 3) for _ in range(4))
    own_prompts[0]["prompts"] = [common, [*common, 5, 6], [*common[:2], 7]]
    alike[1]["completions"] = [[5, 6, 7, 8], [5, 6, 9], [5]]
    for feature in unpadded:
        feature |= {"prompts": [[4, 5, 6]], "completions": [[7 + i, 8, 9 + i] for i in range(3)]}
    unsorted[0]["sft_index"] = 1
    unsorted[1] |= {"sft_index": 2, "rewards": [0.2, 0.7, 0.4]}
    sizes = itertools.product(MODELS, (1, 3), (2, 3, 5))
    return {
        **{f"{x}: {b} x {n}": (x, make_features(b, n), 0.05) for x, b, n in sizes},
        "all rewards equal: only the SFT term": ("llama", make_features(2, 2, ties=True), 0.05),
        **{f"ties of {n}": ("llama", make_features(2, n, ties=True), 0.05) for n in (3, 4, 5)},
        **{f"{x} without SFT": (x, make_features(3, 4), 0.0) for x in ("llama", "gpt2")},
        "another sft_index, unsorted rewards": ("qwen2", unsorted, 0.05),
        "a prompt for each candidate": ("llama", own_prompts, 0.05),
        "completions that begin alike": ("llama", alike, 0.05),
        "no row is padded": ("llama", unpadded, 0.05),
    }


CASES = every_case()


@pytest.mark.parametrize("name", CASES)
def test_the_trainers_step_equals_the_official_one(models, name):
    """In each form: loss, every gradient."""
    model, features, sft_weight = models[CASES[name][0]], *CASES[name][1:]
    official = official_loss(model, official_batch(features, PAD), sft_weight)
    expected = gradients(model, official.loss)
    config = LossOptions(compat="official", sft_weight=sft_weight)
    for form in ("padded", "lists"):
        batch = PROCollator(PAD, form=form, official=True)(features)
        with pk.distinct_rows(model) if form == "lists" else contextlib.nullcontext():
            ours = batch_loss(pk.OpenModel(model), batch, config).loss
            found = gradients(model, ours)
        assert ours.item() == pytest.approx(official.loss.item(), rel=1e-5), form
        for name, grad in found.items():
            error = (grad - expected[name]).norm() / expected[name].norm()
            assert error <= 1e-5, f"{form}: {name}: {error:.1e}"


def test_batch_is_laid_out_as_the_authors_collator_does():
    features = [
        {"prompts": [[5, 6, 7]], "completions": [[8, 9], [10]], "rewards": [1.0, 0.5],
         "sft_index": None},
        {"prompts": [[11], [12, 13]], "completions": [[14, 15, 16, 17], [18]],
         "rewards": [0.5, 2.0], "sft_index": 1},
    ]  # fmt: skip
    batch = official_batch(features, PAD)
    assert batch["input_ids"].tolist() == [
        [[5, 6, 7, 8, 9], [5, 6, 7, 10, PAD]],
        [[11, 14, 15, 16, 17], [12, 13, 18, PAD, PAD]],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [[5, 4], [5, 3]]
    assert batch["prefix_mask"].sum(-1).tolist() == [[2, 2], [0, 1]]
    for name in ("attention_mask", "prefix_mask"):  # ones, then zeros
        assert (batch[name].diff(dim=-1) <= 0).all()
    assert batch["rewards"].dtype == torch.float32 and batch["sft_index"].tolist() == [0, 1]
    scored = (official_targets(batch) != -100).sum(-1)
    # Every completion token; in a padded row the position after the last one too.
    assert scored.tolist() == [[2, 2], [4, 2]]


def test_terms_are_cast_to_the_hidden_states_dtype_and_forward_arguments_change_nothing(models):
    batch, model = official_batch(make_features(2, 3), PAD), models["llama"]
    exact = official_loss(model, batch, use_cache=False)
    published = official_loss(model, batch, use_cache=True, output_hidden_states=True)
    assert exact.loss == published.loss and exact.loss.dtype == torch.float32
    one = official_loss(model, official_batch(make_features(3, 1), PAD))
    assert one.loss == 0 and one.rank_losses.numel() == 0  # nothing is ranked
    rounded = official_loss(copy.deepcopy(model).bfloat16(), batch)
    assert rounded.loss.dtype == rounded.rank_losses.dtype == torch.bfloat16
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.clear(), "features must hold a list"),
        (lambda f: f[1]["completions"].pop(), r"lists of one length n, got features of n = \[3, 2"),
        (lambda f: f[1].update(rewards=None), r"features\[1\] must have a reward for each"),
        (lambda f: f[0].update(prompts=[[]]), "list 0 of the batch: a prompt must be one or more"),
        (lambda f: f[0].update(sft_index=3), r"sft_index in \[0, 3\), got 3"),
    ],
)
def test_lists_that_the_official_procedure_cannot_take(change, said):
    features = make_features(2, 3)
    change(features)
    with pytest.raises(ValueError, match=said):
        official_batch(features, PAD)
