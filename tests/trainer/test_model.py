"""Taking models apart: head and logit transform, refusals, checkpoints."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from trainer_runs import losses, trained, trainer_for

import pro_kernels as pk
import tiny_models
from pro_trainer.models import (
    ModelOptions,
    causal_lm,
    check_causal,
    different_ends,
    disable_dropout,
    load,
    pad_id,
)

VOCABULARY = 259  # of the demo's tokenizer
SIZES = tiny_models.SIZES | {"vocab_size": VOCABULARY}


def token_losses(head):
    """The logits of the rows, by plain PyTorch, as the loss that ``OpenModel`` is given."""
    z = (head.hidden @ head.weight.t() + (0 if head.bias is None else head.bias)) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z.logsumexp(-1).sum(), {"logps": z.log_softmax(-1)}


@pytest.mark.parametrize("name", ["Llama tied", "Gemma2", "Granite", "GPTJ"])
def test_an_open_model_gives_what_the_whole_model_gives(name):
    model, ids = tiny_models.make(name), torch.randint(3, tiny_models.V, (2, 10))
    opened = pk.OpenModel(model)
    out = opened.run(token_losses, input_ids=ids)
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(out.logps, whole.log_softmax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, whole.logsumexp(-1).sum())
    found = (tiny_models.grads(model, x) for x in (out.loss, whole.logsumexp(-1).sum()))
    tiny_models.assert_same_grads(*found)
    assert out.logits is None and model(input_ids=ids).logits.equal(whole)


def test_an_open_model_may_be_attached_copied_and_adapted(tiny):
    ids = torch.randint(3, VOCABULARY, (2, 10))
    model = pk.attach(copy.deepcopy(tiny[0]))
    opened = pk.OpenModel(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    logps = opened.rebind(other).run(token_losses, input_ids=ids).logps
    torch.testing.assert_close(logps, other(ids).logits.log_softmax(-1))
    assert not opened.run(token_losses, input_ids=ids).logps.allclose(logps)
    lora = LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(tiny[0]), lora)
    out = pk.OpenModel(adapted).run(token_losses, input_ids=ids)
    torch.testing.assert_close(out.logps, adapted(ids).logits.log_softmax(-1))


T5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
SMALL_HEAD = transformers.LlamaConfig(**SIZES | {"vocab_size": 100})


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (lambda tiny: tiny.model, r"lacks weights of LlamaForCausalLM \(lm_head.weight\)"),
        (lambda _: transformers.T5EncoderModel(T5), "not a causal LM: .*T5Config"),
        (lambda _: transformers.LlamaForCausalLM(SMALL_HEAD), "259 tokens, the LM head.* only 100"),
        (None, "model: not a causal LM"),
    ],
)
def test_a_folder_without_a_causal_lm_is_refused(build, wrong, tmp_path, tiny):
    folder = tmp_path / "model"
    folder.mkdir()
    if build:
        build(tiny[0]).save_pretrained(folder)
        tiny[1].save_pretrained(folder)
    with pytest.raises(ValueError, match=wrong):
        load(str(folder))
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        causal_lm(tiny[0].model)


def test_load_gives_weights_tokenizer_and_dtype(tiny_folder, tiny):
    model, tokenizer = load(tiny_folder)
    assert all(a.equal(b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True))
    assert tokenizer("é").input_ids == tiny[1]("é").input_ids
    assert load(tiny_folder, ModelOptions(dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_ends_that_differ_are_named_with_both_and_padding_is_any_token():
    tokens = SimpleNamespace(eos_token_id=7, eos_token="</s>", convert_ids_to_tokens="<{}>".format)
    assert different_ends(tokens, SimpleNamespace(eos_token_id=[1, 106])) == (
        "the tokenizer's EOS is '</s>' (7), the model's is '<1>' (1), '<106>' (106): completions "
        "end with the tokenizer's"
    )
    assert different_ends(tokens, None, SimpleNamespace(eos_token_id=7)) is None
    assert different_ends(tokens, SimpleNamespace(eos_token_id=None)) is None
    for ids, pad in (((3, 7), 3), ((None, 7), 7), ((None, None), 0)):
        assert pad_id(SimpleNamespace(pad_token_id=ids[0], eos_token_id=ids[1])) == pad


@pytest.mark.parametrize("name", ["Llama", "GPT2"])  # of attention, of all layers
def test_dropout_is_disabled(name):
    model = tiny_models.make(name, **({"attention_dropout": 0.5} if name == "Llama" else {}))
    ids = torch.arange(10)[None]
    assert not model.train()(ids).logits.equal(model(ids).logits)
    disable_dropout(model)
    assert model(ids).logits.equal(model(ids).logits)


TEXT = {**SIZES, "num_hidden_layers": 2, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN_VISION = {"depth": 1, "out_hidden_size": 16, "num_heads": 2, "fullatt_block_indexes": [0]}
QWEN_TOKENS = {"image_token_id": 258, "video_token_id": 257, "vision_start_token_id": 256}
SIGLIP = {"model_type": "siglip_vision_model"}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16}
WITH_IMAGES = {  # options of the text's config, the vision's and the whole one's
    "Gemma3": ({"sliding_window": 8}, SIGLIP, {"mm_tokens_per_image": 4}),
    "Llava": ({"model_type": "llama"}, CLIP, {}),
    "PaliGemma": ({"model_type": "gemma"}, SIGLIP, {"projection_dim": 16}),
    "Qwen2_5_VL": ({"rope_parameters": ROPE}, QWEN_VISION, QWEN_TOKENS),
}


def with_images(name: str):
    """A tiny model of text and images; the last token ids stand for images."""
    text, vision, whole = WITH_IMAGES[name]
    parts = {"text_config": TEXT | text, "vision_config": VISION | vision}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**parts, image_token_index=258, **whole)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize("name", ["Gemma3", "Llava", "Qwen2_5_VL"])
def test_a_model_of_text_and_images_trains_on_text_and_its_adapters_load_again(
    name, tmp_path, tiny_folder
):
    folder, how = str(tmp_path / "model"), ModelOptions(tokenizer=tiny_folder)
    with_images(name).save_pretrained(folder)
    found = []
    for impl, batching in (("auto", "auto"), ("reference", "padded")):
        options = {"loss_impl": impl, "batching": batching, "max_steps": 2}
        found.append(losses(trained(tmp_path / impl, load(folder, how)[0], **options)))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][1] != found[0][0]

    lora = LoraConfig(target_modules=["q_proj"])
    get_peft_model(load(folder, how)[0], lora).save_pretrained(tmp_path / "lora")
    loaded = load(str(tmp_path / "lora"), how)[0]
    assert type(loaded).__name__ == f"{name}ForConditionalGeneration"


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PaliGemma.* attends to later tokens"):
        trainer_for(tmp_path, model=with_images("PaliGemma"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_look_ahead(dtype):
    """Experts round otherwise beside other tokens; a hundredth of a later one is told from it."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}
    config = transformers.MixtralConfig(
        **SIZES | experts | tiny_models.SPECIAL, initializer_range=0.3
    )
    ids = torch.arange(3, 20)[None]
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.MixtralForCausalLM(config).to(dtype)
        check_causal(pk.OpenModel(model), ids)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: out + 0.01 * out.roll(-1, 1)
    )
    with pytest.raises(ValueError, match="attends to later tokens"):
        check_causal(pk.OpenModel(model), ids)


def test_a_model_that_cannot_run_lists_is_named_or_runs_padded_rows(tmp_path, capsys):
    config = transformers.MambaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match="batching='lists': Mamba.* cannot run distinct rows"):
        trainer_for(tmp_path, model=model, batching="lists")
    trainer = trainer_for(tmp_path, model=model, max_steps=1)
    assert "lists run as padded rows: MambaForCausalLM cannot" in capsys.readouterr().out
    assert trainer.data_collator.form == "padded"
    trainer.train()


@pytest.mark.parametrize(
    ("fault", "said"),
    [("fails", "fails with RuntimeError: a mask of"), ("differs", "makes another thing of a list")],
)
def test_a_whole_model_that_makes_another_thing_of_a_list(
    fault, said, tmp_path, capsys, monkeypatch
):
    """Its decoder does it right, and what the model does around it does not."""
    plain = pk.OpenModel.run

    def other(self, loss_of, **inputs):
        if inputs.get("attention_mask", torch.zeros(0)).dim() == 4:
            if fault == "fails":
                raise RuntimeError("a mask of four dimensions")
            inputs["position_ids"] = inputs["position_ids"] // 2
        return plain(self, loss_of, **inputs)

    monkeypatch.setattr(pk.OpenModel, "run", other)
    trainer = trainer_for(tmp_path, max_steps=1)
    assert "lists run as padded rows: LlamaForCausalLM" in (out := capsys.readouterr().out)
    assert said in out and trainer.data_collator.form == "padded"
    assert trainer.model.config._attn_implementation == "sdpa"
