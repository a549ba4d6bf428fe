"""A causal language model in two parts, the decoder's hidden states and its LM head.

The fused loss takes them apart so that logits are never held. ``check_parts`` shows, on one short
sequence, that together they give what the whole model gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pro_kernels as pk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHECKED_TOKENS = 64
# Probabilities that modules pass to functional dropout.
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout",
             "activation_dropout", "layerdrop")  # fmt: skip


@dataclass(frozen=True)
class Head:
    """The LM head and what the model does to its logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """All but the weight, as keyword options of the ``pro_kernels`` functions."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def load(
    path: str,
    tokenizer_path: str | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder (or hub name).

    Args:
        path: folder or hub name of a causal LM with its LM head.
        tokenizer_path: the tokenizer's; None: the model's.
        dtype: of the weights, as ``from_pretrained`` takes it ("auto": as saved).
        attn_implementation: as ``from_pretrained`` takes it; None: its default.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: nothing usable there, no LM head, or weights that the checkpoint lacks.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise ValueError(f"{path}: not a causal LM: {first_line(error)}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise ValueError(
                f"{path}: the checkpoint lacks weights of {type(model).__name__} ({missing}); a "
                "model saved without its LM head cannot be trained or scored"
            )
        lm_head(model)
        tokenizer = load_tokenizer(tokenizer_path or path, trust_remote_code)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer has more tokens than the model."""
    rows = lm_head(model).weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the LM head of "
            f"{type(causal_lm(model)).__name__} only {rows}"
        )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (or hub name).

    Raises:
        ValueError: nothing usable there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer: {first_line(error)}") from error


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


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model with the LM head, out of PEFT's wrapper where there is one.

    Raises:
        ValueError: a PEFT method that learns a prompt: its wrapper is part of the forward.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("PEFT methods that learn a prompt are not supported; use LoRA or the like")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head(model: nn.Module) -> Head:
    """The head of ``model`` and its logit transform, read from the model's config.

    Raises:
        ValueError: the model has no LM head, or one whose weight is not all there is to it (LoRA
            on the head, a quantised head).
    """
    lm = causal_lm(model)
    if not hasattr(lm, "get_output_embeddings"):
        raise ValueError(f"model must be a transformers causal LM, got {type(lm).__name__}")
    if lm.config.is_encoder_decoder:
        raise ValueError(f"{type(lm).__name__} is an encoder-decoder; a causal LM is needed")
    module = lm.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(
            f"{type(lm).__name__} has no LM head (get_output_embeddings() gives "
            f"{module and type(module).__name__}); a causal language model is needed"
        )
    if hasattr(module, "base_layer") or not weight.is_floating_point():
        raise ValueError(
            f"the LM head of {type(lm).__name__} is a {type(module).__name__} with "
            f"{weight.dtype} weight: the fused loss needs a plain floating-point weight (V, H); "
            "keep LoRA and quantisation off the head (train it whole with modules_to_save)"
        )
    config = lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    return Head(weight, getattr(module, "bias", None), softcap, scale)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up the rows; padding is never attended to or scored, so any id will do."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, attention's included (which is no module of its own)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def check_parts(model: nn.Module, input_ids: Tensor) -> None:
    """Compare decoder + head with the whole model on ``input_ids``, (length,) of one sequence.

    Raises:
        ValueError: they differ by more than rounding, so a step in between is not known here.
    """
    lm = causal_lm(model)
    ids = input_ids[None, :_CHECKED_TOKENS].to(next(model.parameters()).device)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    head = lm_head(model)
    targets = ids[0].roll(-1)
    whole = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    parts = pk.linear_token_logps(
        hidden.to(head.weight.dtype), head.weight, targets, bias=head.bias, softcap=head.softcap,
        logit_scale=head.logit_scale, backend="torch",
    )  # fmt: skip
    off = (whole - parts).abs().max().item()
    rounding = torch.finfo(head.weight.dtype).eps * hidden.shape[-1]
    if not off <= rounding * max(1.0, logits.abs().max().item()):
        raise ValueError(
            f"{type(lm).__name__}: decoder and LM head apart give log-probabilities that are "
            f"{off:.2g} off those of the whole model, so it does something to hidden states or "
            "logits that pro_trainer does not know; this model cannot be used"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]
