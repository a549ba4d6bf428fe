"""``attach`` on every causal LM of transformers that can be made tiny: exact, or refused.

Slow. Each model is run plain and attached; a head that is not served must be refused by attach
itself, never give another number. Prints how many of each there are (``-s``).
"""

from __future__ import annotations

import collections
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import pro_kernels as pk
from tiny_models import next_logps

pytestmark = pytest.mark.slow

VOCABULARY = 99
SIZES = {
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers conv_kernel "
    "num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads num_key_value_heads linear_num_key_heads linear_num_value_heads "
    "num_local_experts num_experts n_routed_experts moe_num_experts",
    8: "qk_rope_head_dim qk_nope_head_dim state_size rotary_dim chunk_size mamba_chunk_size",
    16: "head_dim v_head_dim q_lora_rank kv_lora_rank",
    64: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim attention_hidden_size "
    "embedding_dim intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff "
    "moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size intermediate_size_mlp "
    "expert_ffn_hidden_size lru_width max_position_embeddings n_positions",
    1: "n_group topk_group bos_token_id",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
TINY |= {"is_decoder": True, "use_cache": False}
SPECIAL = {"xmod": {"default_language": "en_XX"}, "zaya": {"num_experts_per_tok": 1}}
LARGEST = 150_000_000  # parameters
EXACT = 140  # at least, of transformers 5.17


def tiny_config(config_class: type, **special: object) -> transformers.PreTrainedConfig:
    """A small config of a class, and of its text model where it has one."""
    known = set(config_class().to_dict()) | set(inspect.signature(config_class).parameters)
    known |= set(getattr(config_class, "attribute_map", {}))
    values = {k: v for k, v in TINY.items() if k in known}
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    text = getattr(config_class, "sub_configs", {}).get("text_config")
    if text is not None and hasattr(text, "model_type"):
        values["text_config"] = tiny_config(text)
    return config_class(**{**values, **special})


def tiny_model(kind: str) -> nn.Module:
    """A small random model of a model type; raises whatever its config or class raises."""
    model_class = getattr(transformers, NAMES[kind])
    config = tiny_config(CONFIG_MAPPING[kind], **SPECIAL.get(kind, {}))
    if isinstance(getattr(config, "text_config", None), model_class.config_class):
        config = config.text_config
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    return model_class(config).float().eval()


@pytest.fixture(scope="module")
def tally():
    counts: dict[str, list[str]] = collections.defaultdict(list)
    yield counts
    print()
    for what, names in counts.items():
        print(f"{what}: {len(names)}: {'; '.join(names)}")
    if sum(map(len, counts.values())) == len(NAMES):
        assert len(counts["exact"]) >= EXACT


@pytest.mark.parametrize("kind", NAMES)
def test_exact_or_refused(kind, tally):
    ids = torch.randint(3, VOCABULARY, (2, 8))
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, :3] = -100
    try:
        model = tiny_model(kind)
        if "attention_mask" in inspect.signature(model.forward).parameters:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][1, 5:] = 0  # labels under it count, as in transformers
        plain = model(**batch)
        grads = gradients(model, plain.loss)
        logits = plain.logits.detach().float()
    except Exception as error:  # of transformers: the model cannot be made or run so small
        tally["not made"].append(f"{kind} ({type(error).__name__}: {str(error)[:60]})")
        pytest.skip(f"{type(error).__name__}: {error}")
    try:
        pk.attach(model)
    except ValueError as error:
        assert "pro_kernels.linear_pro_loss" in str(error)  # the message says what to use
        tally["refused"].append(f"{kind} ({str(error)[:120]})")
        return
    tally["exact"].append(kind)
    fused = model(**batch)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(model, fused.loss), grads, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
    want = next_logps(logits, batch["labels"])
    torch.testing.assert_close(fused.token_logps[:, :-1].detach(), want, rtol=1e-5, atol=2e-5)


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """Of every parameter that the loss reaches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g for g in found if g is not None]
