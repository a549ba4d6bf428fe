"""A causal language model in two parts, the decoder's hidden states and its LM head.

The fused loss takes them apart so that logits are never held. ``check_parts`` shows, on one short
sequence, that together they give what the whole model gives.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pro_kernels as pk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHECKED_TOKENS = 64


@dataclass(frozen=True)
class Head:
    """The LM head and what the model does to its logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def to(self, dtype: torch.dtype) -> Head:
        """The head in ``dtype``; gradients flow back through the conversion."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.softcap, self.logit_scale)


def load(
    path: str, tokenizer_path: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer from a folder (or hub name). No remote code is run.

    Raises:
        ValueError: nothing usable there, no LM head, or weights that the checkpoint lacks.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a causal LM: {_first_line(error)}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise ValueError(
                f"{path}: the checkpoint lacks weights of {type(model).__name__} ({missing}); a "
                "model saved without its LM head cannot be trained or scored"
            )
        lm_head(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{tokenizer_path or path}: no tokenizer: {_first_line(error)}"
            ) from error
    if len(tokenizer) > model.get_output_embeddings().weight.shape[0]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the LM head of {path} only "
            f"{model.get_output_embeddings().weight.shape[0]}"
        )
    return model, tokenizer


def tiny_llama(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 0.2 M parameters with random weights, and a byte-level tokenizer."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write a checkpoint (safetensors) that ``from_pretrained`` loads."""
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def lm_head(model: PreTrainedModel) -> Head:
    """The head of ``model`` and its logit transform, read from the model's config.

    Raises:
        ValueError: the model has no LM head.
    """
    module = model.get_output_embeddings()
    if module is None or not hasattr(module, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no LM head (get_output_embeddings() gives "
            f"{module and type(module).__name__}); a causal language model is needed"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    return Head(module.weight, getattr(module, "bias", None), softcap, scale)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head reads, flattened to (S * T, H)."""
    body = model.base_model
    output = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def check_parts(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Compare decoder + head with the whole model on the start of one sequence.

    Raises:
        ValueError: they differ by more than rounding, so a step in between is not known here.
    """
    ids = input_ids[:1, :_CHECKED_TOKENS]
    mask = attention_mask[:1, :_CHECKED_TOKENS]
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
    head = lm_head(model)
    hidden = hidden_states(model, ids, mask)
    model.train(was_training)
    targets = ids[0].roll(-1)
    whole = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    parts = pk.linear_token_logps(
        hidden.to(head.weight.dtype), head.weight, targets, bias=head.bias, softcap=head.softcap,
        logit_scale=head.logit_scale, backend="torch",
    )  # fmt: skip
    real = mask[0].bool()
    off = (whole - parts)[real].abs().max().item()
    rounding = torch.finfo(head.weight.dtype).eps * hidden.shape[-1]
    if not off <= rounding * max(1.0, logits[real].abs().max().item()):
        raise ValueError(
            f"{type(model).__name__}: decoder and LM head apart give log-probabilities that are "
            f"{off:.2g} off those of the whole model, so it does something to hidden states or "
            "logits that pro_trainer does not know; this model cannot be used"
        )


@contextlib.contextmanager
def _quiet():  # noqa: ANN202
    """No progress bars or load reports of transformers: what matters is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
