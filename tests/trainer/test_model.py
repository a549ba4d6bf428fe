"""Taking models apart: head and logit transform, refusals, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import pro_kernels as pk
from pro_trainer.models import check_parts, disable_dropout, lm_head, load, pad_id

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 259, "head_dim": 8}
CONFIGS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Mistral": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 259},
    "GPTJ": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 259, "rotary_dim": 4},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def make(name: str):
    own = CONFIGS[name] if name.startswith("GPT") else SIZES | CONFIGS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**own, **SPECIAL)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        lm_head(model).weight.mul_(20)  # logits large enough for scale and softcap to matter
        if lm_head(model).bias is not None:
            lm_head(model).bias.normal_()
    return model


def save(model, tokenizer, folder) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_give_what_the_whole_model_gives(name):
    model, ids = make(name), torch.randint(3, 259, (2, 10))
    check_parts(model, ids[0])
    head = lm_head(model)
    with torch.no_grad():
        whole = model(input_ids=ids).logits.log_softmax(-1)
        hidden = model.base_model(input_ids=ids).last_hidden_state
        parts = pk.linear_token_logps(hidden, head.weight, ids, **head.options())
    expected = whole.gather(2, ids[:, :, None])[:, :, 0]
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "field"), [("Gemma2", "final_logit_softcapping"),
                                              ("Cohere", "logit_scale")])  # fmt: skip
def test_an_unknown_step_between_decoder_and_logits_is_refused(name, field, monkeypatch):
    model = make(name)
    original = lm_head

    def without(model):
        head = original(model)
        return type(head)(head.weight, head.bias, None, 1.0)

    monkeypatch.setattr("pro_trainer.models.lm_head", without)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM: decoder and LM head apart.*off"):
        check_parts(model, torch.randint(3, 259, (10,)))


def test_model_without_lm_head_is_refused(tmp_path, tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        lm_head(model.model)
    save(model.model, tokenizer, str(tmp_path))
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM \(lm_head.weight\)"):
        load(str(tmp_path))


def test_what_is_no_causal_lm_is_refused(tmp_path, tiny):
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    save(transformers.T5EncoderModel(config), tiny[1], str(tmp_path))
    with pytest.raises(ValueError, match="not a causal LM: .*T5Config"):
        load(str(tmp_path))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: not a causal LM"):
        load(str(tmp_path / "nothing"))


def test_tokenizer_larger_than_the_head_is_refused(tmp_path, tiny):
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 100})
    save(transformers.LlamaForCausalLM(config), tiny[1], str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer has 259 tokens, the LM head of .* only 100"):
        load(str(tmp_path))


def test_load_gives_weights_tokenizer_and_dtype(tmp_path, tiny):
    save(*tiny, tmp_path)
    model, tokenizer = load(str(tmp_path))
    assert all(a.equal(b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True))
    assert tokenizer("é").input_ids == tiny[1]("é").input_ids
    assert load(str(tmp_path), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_head_that_is_more_than_its_weight_is_refused(tiny):
    from peft import LoraConfig, get_peft_model

    for target, refused in (("lm_head", True), ("q_proj", False)):
        model = get_peft_model(copy.deepcopy(tiny[0]), LoraConfig(target_modules=[target]))
        if refused:
            with pytest.raises(ValueError, match="keep LoRA and quantisation off the head"):
                lm_head(model)
        else:
            assert lm_head(model).weight.shape == (259, 96)


def test_disable_dropout_reaches_attention():
    config = transformers.LlamaConfig(**SIZES, attention_dropout=0.5)
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.arange(10)[None]
    assert not model(ids).logits.equal(model(ids).logits)
    disable_dropout(model)
    assert model(ids).logits.equal(model(ids).logits)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIGS["GPT2"])).train()
    disable_dropout(gpt2)
    assert gpt2(ids).logits.equal(gpt2(ids).logits)


def test_pad_id_falls_back_to_eos_and_zero(tiny):
    class Tokens:
        pad_token_id = None
        eos_token_id = 7

    assert pad_id(tiny[1]) == 0 and pad_id(Tokens()) == 7
    Tokens.eos_token_id = None
    assert pad_id(Tokens()) == 0
