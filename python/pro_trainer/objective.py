"""The loss of one batch: the fused one with the chosen backend, or the plain PyTorch reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import pro_kernels as pk
from pro_trainer.collate import Batch
from pro_trainer.config import EvalConfig
from pro_trainer.model import hidden_states, lm_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def batch_loss(model: PreTrainedModel, batch: Batch, config: EvalConfig) -> pk.PROOutput:
    """Decoder, then ``linear_pro_loss`` on the scored rows. Under ``no_grad`` it only scores."""
    dtype = getattr(torch, config.dtype)
    device = batch.input_ids.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = hidden_states(model, batch.input_ids, batch.attention_mask)
    head = lm_head(model).to(dtype)
    temperature = config.fixed_temperature()
    if temperature is None:
        temperature = 1.0 if batch.by_order else "reward"
    options = {
        "layout": batch.layout,
        "candidate_mask": batch.candidate_mask,
        "bias": head.bias,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "length_normalize": config.length_normalize,
        "temperature": temperature,
        "reward_scale": config.reward_scale,
        "ties": config.ties,
        "eps": config.eps,
        "sft_weight": config.sft_weight,
        "sft_reduction": config.sft_reduction,
    }
    hidden = hidden.to(dtype)
    if config.loss_impl == "reference":
        return pk.reference.linear_pro_loss(hidden, head.weight, None, batch.rewards, **options)
    return pk.linear_pro_loss(
        hidden, head.weight, None, batch.rewards, backend=config.loss_impl, **options
    )


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from None


def describe_backend(config: EvalConfig, device: torch.device) -> str:
    """Which implementation serves the run, and why those before it in the list do not.

    Raises:
        ValueError: an explicit choice that cannot serve.
    """
    if config.loss_impl == "reference":
        return "plain PyTorch reference"
    dtype = getattr(torch, config.dtype)
    chosen = pk.backends.resolve(config.loss_impl, device, dtype)
    refused = {}
    if config.loss_impl == "auto":
        before = pk.backends.ORDER[: pk.backends.ORDER.index(chosen)]
        refused = {name: pk.backends.refusal(name, device, dtype) for name in before}
    return f"fused, backend {chosen}" + "".join(f"; not {k}: {v}" for k, v in refused.items())
