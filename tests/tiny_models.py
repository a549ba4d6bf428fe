"""Causal LMs of transformers that are small enough for any test, and how two runs are compared."""

from __future__ import annotations

import torch
import transformers
from torch import nn

V = 67
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"hidden_size": 16, "intermediate_size": 32, "vocab_size": V, "head_dim": 8}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": V}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
CONFIGS = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Mistral": {},
    "Phi": {},
    "Phi3": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Gemma3Text": {"final_logit_softcapping": None},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 7.0},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "Falcon": {"num_kv_heads": 2, "ffn_hidden_size": 32},
    "Mixtral": EXPERTS | {"router_aux_loss_coef": 0.5},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 4},
    "GPTNeoX": {},
}


def make(name: str = "Llama", **extra) -> nn.Module:
    kind = name.split()[0]
    own = CONFIGS[name] if kind in ("GPT2", "GPTJ") else SIZES | CONFIGS[name]
    if kind == "Falcon":
        own = {k: v for k, v in own.items() if k != "head_dim"}  # a property of it
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**own | SPECIAL | extra)
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)  # logits large enough for scale and softcap to matter
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def next_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, T - 1): of the next label at each position, 0 where it does not count."""
    targets = labels[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])
    return log_p[..., 0] * (targets >= 0)


def grads(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(ours: dict, theirs: dict, rtol: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        off = (ours[name] - want).norm() / want.norm().clamp_min(1e-12)
        assert off < rtol or (ours[name] - want).abs().max() < 1e-7, (name, float(off))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
