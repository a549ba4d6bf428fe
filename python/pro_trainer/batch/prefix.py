"""Prefix sharing on a given model: which models can, what they are fed, and the proof.

A prompt runs once for its n candidates, all in one row: each candidate attends to the prompt and to
itself only, and its positions go on from the prompt's. No cache of keys and values is involved, so
gradients reach the prompt from every candidate, with gradient checkpointing as without.

What a model does along the row other than attend under the mask given breaks this: recurrence,
convolution, positions taken from the index in the row. ``sharing_refusal`` names what is known from
the model's config and class; ``check_sharing`` runs the model and compares.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pro_trainer.batch.collate import PROCollator
from pro_trainer.batch.cost import SharingCost
from pro_trainer.batch.masks import FULL, IMPLEMENTATIONS, SLIDING, attention_masks
from pro_trainer.models import causal_lm, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "SharingCost",
    "check_sharing",
    "model_inputs",
    "packing_refusal",
    "sharing_refusal",
]

_CHECKED_LISTS, _CHECKED_CANDIDATES = 2, 3
_CHECKED_PROMPT, _CHECKED_COMPLETION = 64, 32
_RECURRENT = "layers that carry a state along the row: candidates would see each other"


def model_inputs(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """What the decoder is given for a batch, on the batch's device; to be run without a cache.

    ``input_ids``; the 2-D ``attention_mask`` of a padded batch; ``position_ids`` alone of a packed
    one (without a cache, transformers sees in them where sequences begin); of a shared one
    ``position_ids`` and the masks its attention takes (``prefix_masks``). ``model``: the causal LM,
    in its PEFT wrapper or not.
    """
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if "segments" in batch:
        inputs["attention_mask"] = attention_masks(
            batch["segments"], batch["position_ids"], model.config.get_text_config(), model.dtype
        )
    return inputs


def sharing_refusal(model: PreTrainedModel) -> str | None:
    """Why this model cannot share prefixes, as far as its class and config tell; None: it may."""
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    reason = _row_refusal(model)
    if reason is not None:
        return reason
    if getattr(config, "output_router_logits", False):
        return "its router's auxiliary loss (output_router_logits) takes a mask of two dimensions"
    if getattr(config, "alibi", False):
        return "ALiBi biases go by the index in the row, not by position"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention goes by the index in the row, not by position"
    if implementation not in IMPLEMENTATIONS:
        return (
            f"attention implementation {implementation!r} takes no mask of its own; load the model "
            f"with attn_implementation one of {', '.join(IMPLEMENTATIONS)}"
        )
    return None


def packing_refusal(model: PreTrainedModel) -> str | None:
    """Why sequences cannot stand end to end in one row of this model; None: they may."""
    return _row_refusal(model)


def check_sharing(
    model: PreTrainedModel,
    features: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    *,
    form: str = "shared",
) -> None:
    """Run a short sample in the shared (or packed) form and in the padded one, and compare.

    The log-probs of tokens may differ by rounding, which is measured: by how much those of the
    padded batch move when every embedding is off by its last bit. A model of 16 bits is compared in
    fp32 where that fits: its own rounding is as large as what one token too many in a mask does.

    Raises:
        ValueError: the model cannot run this form (with the reason), or log-probs differ.
    """
    name = type(model).__name__
    doing = "share prefixes" if form == "shared" else "run packed sequences"
    reason = sharing_refusal(model) if form == "shared" else packing_refusal(model)
    if reason is not None:
        raise ValueError(f"{name} cannot {doing}: {reason}")
    sample = [_shorten(feature) for feature in features[:_CHECKED_LISTS]]
    if not sample:
        raise ValueError(f"no list to check with whether {name} can {doing}")
    try:
        try:
            plain, other, allowed = _both(model, sample, pad_token_id, form, wide=True)
        except torch.OutOfMemoryError:
            plain, other, allowed = _both(model, sample, pad_token_id, form, wide=False)
    except _Fails as error:
        raise ValueError(f"{name} cannot {doing}: it fails with {error}") from error
    off = _rms(other - plain)
    if not off <= allowed:
        raise ValueError(
            f"{name} cannot {doing}: its token log-probs differ from those of the padded batch by "
            f"{off:.2g} (root mean square), and rounding accounts for {allowed:.2g}"
        )


class _Fails(Exception):
    """What a model raised in a form that it does not take."""


def _both(
    model: PreTrainedModel,
    sample: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    form: str,
    wide: bool,
) -> tuple[Tensor, Tensor, float]:
    """Log-probs of a padded batch and of the form, and by how much (rms) they may differ."""
    padded = PROCollator(pad_token_id)(sample)
    with evaluating(model), torch.no_grad(), _in_float32(model, wide):
        plain = _token_logps(model, padded)
        with _last_bits_off(model):
            rounding = _rms(_token_logps(model, padded) - plain)
        try:
            other = _token_logps(model, PROCollator(pad_token_id, form=form)(sample))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _Fails(f"{type(error).__name__}: {error}") from error
        rounding = math.hypot(rounding, torch.finfo(model.dtype).eps * _rms(plain))
        # In 16 bits the smallest planted faults are near rounding, in fp32 1000 times as large.
        return plain, other, rounding * (16 if model.dtype.itemsize >= 4 else 2)


def _row_refusal(model: PreTrainedModel) -> str | None:
    """Why a row cannot hold several sequences, whatever the attention implementation."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        return "an encoder-decoder has no prompt in the row of its completion"
    if getattr(model, "_is_stateful", False):
        return _RECURRENT
    types = set(getattr(config, "layer_types", None) or ())
    if types & {"chunked_attention"} or getattr(config, "attention_chunk_size", None):
        return "chunked attention goes by the index in the row, not by position"
    if types & {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba"}:
        return f"{', '.join(sorted(types))}: {_RECURRENT}"
    if types - {FULL, SLIDING}:
        return f"layers of type {', '.join(sorted(types - {FULL, SLIDING}))} take no such mask"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "a PEFT method that learns a prompt puts tokens of its own before each row"
    if "position_ids" not in inspect.signature(causal_lm(model).base_model.forward).parameters:
        return "its decoder takes no position_ids: positions are the index in the row"
    return None


def _token_logps(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """(N,) log-probs of the scored tokens, by the whole model."""
    device = next(model.parameters()).device
    layout = batch["layout"].to(device)
    tensors = {key: x.to(device) for key, x in batch.items() if isinstance(x, Tensor)}
    with torch.autocast(device.type, enabled=False):
        # Past a forward on the instance: accelerate leaves one there that turns autocast on.
        out = type(model).forward(model, **model_inputs(tensors, model), use_cache=False)
    logits = out.logits
    logits = logits.reshape(layout.num_rows, -1)[layout.rows]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -torch.nn.functional.cross_entropy(wide, layout.targets, reduction="none")


def _shorten(feature: Mapping[str, Any]) -> dict[str, Any]:
    """The start of a list: few candidates, few tokens of each."""
    prompts = [prompt[:_CHECKED_PROMPT] for prompt in feature["prompts"]]
    completions = [end[:_CHECKED_COMPLETION] for end in feature["completions"]]
    return {
        "prompts": prompts[:_CHECKED_CANDIDATES],
        "completions": completions[:_CHECKED_CANDIDATES],
    }


@contextlib.contextmanager
def _in_float32(model: PreTrainedModel, wide: bool) -> Iterator[None]:
    """Weights of 16 bits as fp32 where ``wide``; afterwards the very tensors that were there.

    Left as they are: quantised models, attention that takes 16 bits only, what does not fit.
    """
    takes = model.config.get_text_config()._attn_implementation in IMPLEMENTATIONS
    kept: list[tuple[Tensor, Tensor]] = []

    def put_back() -> None:
        for x, narrow in kept:
            x.data = narrow
        kept.clear()

    try:
        if wide and takes and not getattr(model, "is_quantized", False):
            try:
                for x in (*model.parameters(), *model.buffers()):
                    if x.is_floating_point() and x.dtype.itemsize == 2:
                        kept.append((x, x.data))
                        x.data = x.data.float()
            except RuntimeError:  # of memory; a CPU's has no class of its own
                put_back()
        yield
    finally:
        put_back()


@contextlib.contextmanager
def _last_bits_off(model: PreTrainedModel) -> Iterator[None]:
    """Every embedding of a token multiplied by 1 + eps or 1 - eps."""

    def off(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, embedded.shape, generator=generator) * 2.0 - 1
        return embedded * (1 + torch.finfo(embedded.dtype).eps * signs).to(embedded)

    hook = model.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
