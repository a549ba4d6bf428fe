"""Taking models apart: head and logit transform, refusals, checkpoints."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import pro_kernels as pk
from pro_trainer.model import check_parts, hidden_states, lm_head, load, save

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


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 259, (3, 10))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_give_what_the_whole_model_gives(name):
    model, (ids, mask) = make(name), inputs()
    check_parts(model, ids, mask)
    head = lm_head(model)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        parts = pk.linear_token_logps(
            hidden_states(model, ids, mask), head.weight, ids.flatten(), bias=head.bias,
            softcap=head.softcap, logit_scale=head.logit_scale,
        )  # fmt: skip
    expected = whole.flatten(0, 1).gather(1, ids.flatten()[:, None])[:, 0]
    real = mask.flatten().bool()
    torch.testing.assert_close(parts[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "field"), [("Gemma2", "final_logit_softcapping"),
                                              ("Cohere", "logit_scale")])  # fmt: skip
def test_an_unknown_step_between_decoder_and_logits_is_refused(name, field, monkeypatch):
    model = make(name)
    original = lm_head

    def without(model):
        head = original(model)
        return type(head)(head.weight, head.bias, None, 1.0)

    monkeypatch.setattr("pro_trainer.model.lm_head", without)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM: decoder and LM head apart.*off"):
        check_parts(model, *inputs())


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


def test_checkpoint_round_trip_is_safetensors(tmp_path, tiny):
    save(*tiny, str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()
    model, tokenizer = load(str(tmp_path))
    assert all(a.equal(b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True))
    assert tokenizer("é").input_ids == tiny[1]("é").input_ids
