"""The cost model: what it counts, and what follows for `auto`."""

from __future__ import annotations

import pytest
import torch
import transformers

from pro_trainer.batch.collate import PROCollator
from pro_trainer.batch.cost import MARGIN, SharingCost

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = 32 * 32 * 2 + 32 * 16 * 2


def llama(**options) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))


def test_from_model_counts_the_weights_a_token_meets():
    cost = SharingCost.from_model(llama())
    assert cost.token == 2 * 3 * (ATTENTION + 3 * 32 * 48)  # no embedding, no head
    assert cost.pair == 4 * 3 * 32 * 2.0 and cost.dense
    assert SharingCost.from_model(llama(attn_implementation="eager")).pair == 4 * 3 * 32 * 2.5
    assert not SharingCost.from_model(llama(attn_implementation="flex_attention")).dense
    wide = SharingCost.from_model(llama(head_dim=16))  # heads wider together than the model
    assert wide.pair == 2 * cost.pair
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)
    cost = SharingCost.from_model(transformers.GPT2LMHeadModel(gpt2))
    assert cost.token == 2 * 3 * 12 * 32 * 32


def test_from_model_counts_the_experts_in_use():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    cost = SharingCost.from_model(transformers.MixtralForCausalLM(config))
    experts = 2 * 3 * 32 * 48
    assert cost.token == pytest.approx(2 * 3 * (ATTENTION + experts), rel=0.02)  # and the router


def test_from_model_sees_through_lora():
    peft = pytest.importorskip("peft")
    plain = SharingCost.from_model(llama())
    config = peft.LoraConfig(r=1, target_modules="all-linear", modules_to_save=["lm_head"])
    lora = SharingCost.from_model(peft.get_peft_model(llama(), config))
    assert plain.token < lora.token < 1.15 * plain.token and lora.pair == plain.pair


def test_recurrent_models_have_a_cost_as_well():
    """It is never asked (they cannot share), but is made before that is known."""
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64)
    assert SharingCost.from_model(transformers.MambaForCausalLM(config)).token > 0


def test_sparse_attention_has_the_ideal_ratios():
    n, p, r = 8, 512, 64
    lists = [(p, [r] * n)]
    linear = SharingCost(token=1.0, pair=0.0, dense=False)
    assert linear.unshared(lists) / linear.shared(lists) == n * (p + r) / (p + n * r)
    attention = SharingCost(token=0.0, pair=1.0, dense=False)
    expected = n * (p + r) ** 2 / (p**2 + 2 * n * p * r + n * r**2)
    assert attention.unshared(lists) / attention.shared(lists) == expected


def test_a_dense_mask_costs_whole_squares_and_padding_counts():
    cost = SharingCost(token=1.0, pair=1.0)
    lists = [(3, [2, 1]), (1, [1])]
    assert cost.shared(lists) == 2 * 6 + 2 * 36
    assert cost.unshared(lists) == 3 * 5 + 3 * 25
    assert cost.unshared(lists, packed=True) == 11 + 11**2
    sparse = SharingCost(token=1.0, pair=1.0, dense=False)
    assert sparse.unshared(lists, packed=True) == 11 + (25 + 16 + 4) / 2
    same = SharingCost(token=0.0, pair=1.0, unmasked=0.75)
    assert same.unshared([(3, [2, 2])]) == 0.75 * 2 * 25  # one length: no mask is needed


def test_when_sharing_pays():
    """Long prompts always, long completions in small models never (measured so on a CPU)."""
    small = SharingCost.from_model(llama(num_hidden_layers=2))
    for n in (2, 4, 8):
        assert small.pays(512, [64] * n)
    assert not small.pays(128, [128] * 8) and not small.pays(128, [256] * 8)
    assert not small.pays(512, [64]) and not small.pays(0, [64, 64])  # nothing to share
    large = SharingCost(token=2 * 12 * 4096**2, pair=4 * 4096 * 2.0)
    assert large.pays(128, [128] * 8)
    sparse = SharingCost.from_model(llama(attn_implementation="flex_attention"))
    assert sparse.pays(128, [128] * 8)
    assert small.shared([(64, [64] * 2)]) > MARGIN * small.unshared([(64, [64] * 2)])


def test_the_collator_decides_for_each_batch():
    collator = PROCollator(0, form="auto", cost=SharingCost.from_model(llama()))
    packing = PROCollator(
        0, form="auto", unshared="packed", cost=SharingCost(token=1.0, pair=0.1, dense=False)
    )

    def feature(prompt: int, completions: list[int]) -> dict:
        ends = [[5] * m for m in completions]
        return {"prompts": [[4] * prompt], "completions": ends, "rewards": None, "sft_index": None}

    long_prompt, long_ends = feature(200, [20, 24, 30]), feature(8, [200, 190, 180])
    assert "segments" in collator([long_prompt])
    assert "attention_mask" in collator([long_ends])
    assert "segments" in collator([long_prompt] * 2)
    assert "segments" in packing([long_prompt])
    nothing_shared = {**long_prompt, "prompts": [[3] * 9, [4] * 9, [5] * 9]}
    batch = packing([nothing_shared])
    assert batch.keys() == {"input_ids", "position_ids", "layout", "preferences"}
    assert isinstance(batch["input_ids"], torch.Tensor) and batch["input_ids"].shape == (1, 101)
