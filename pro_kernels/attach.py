"""``attach(model)``: a causal LM of transformers whose loss runs through the fused path.

How the attached forward works: ``attached.py``. What the model does to logits after its head
(scale, softcap) is read back at attach time by handing it chosen logits; then it is run both ways,
and what the fused path would not repeat is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.attached import (
    KERNEL_OPTIONS,
    OPTIONS,
    REPLACED,
    STATE,
    Attached,
    after_call,
    before_call,
    class_forward,
    cross_entropy,
    fused_forward,
    original_forward,
    own_of_head,
    run_fused,
    watched,
)
from pro_kernels.lm_head import FALLBACK, HeadInputs
from pro_kernels.options import IGNORE_INDEX, PROOptions
from pro_kernels.probe import evaluating, example_inputs, probe
from pro_kernels.shards import group_of

# What ``attach(loss=...)`` takes.
LOSSES = ("auto", "ranking", "cross_entropy")


def attach(
    model: nn.Module,
    *,
    loss: str = "auto",
    example: Mapping[str, Any] | None = None,
    backend: str = "auto",
    budget: int | None = None,
    process_group: Any = None,
    **options: Any,
) -> nn.Module:
    """Give a causal LM of transformers the fused loss; everything else of it stays as it was.

    A call with ``labels`` then builds no logits and returns the model's own output class with
    ``logits=None`` and

    - with ``rewards`` (B, n), ``num_candidates=n`` or ``layout``: ``loss`` and the other fields of
      ``PROOutput``, candidates being the rows, n of each prompt after another
      (``labels`` (B n, T));
    - else ``loss``, the cross-entropy as the model computes it (a mean over the tokens, or their
      sum over ``num_items_in_batch``; 0 without any), and ``token_logps`` (B, T), fp32,
      differentiable: position t holds the log-prob of ``labels[:, t + 1]``, or 0.

    Labels are unshifted, as transformers has them; ``shift_labels`` are taken as they are. What the
    model adds to its loss (a router's auxiliary loss) is added as before. A call without labels,
    ``generate`` among them, runs the original forward. Under ``no_grad`` no gradient work is done.

    Attach before the model is wrapped by DDP, FSDP, ``torch.compile`` or accelerate; PEFT may come
    before or after. A deep copy is attached too; pickling is refused.

    Args:
        model: a causal LM of transformers (or PEFT's wrapper of one) with a linear LM head.
        loss: "ranking", "cross_entropy", or "auto": as each call asks for. Under ``Trainer`` name
            it: "ranking" makes ``Trainer`` divide by the accumulation steps itself
            (``accepts_loss_kwargs = False``), since that loss is a mean over prompts, and refuses
            batches that do not say which rows belong together.
        example: keyword arguments for the forward that try the model out, ``input_ids`` among them;
            None: eight token ids. Give one where a model needs more than ``input_ids``.
        backend: "auto" or a backend's name.
        budget: bytes a call may take beyond the inputs' gradients; None for a default.
        process_group: the ranks, or that dimension of a DeviceMesh, over which the head will be
            split (``ColwiseParallel``), so that each computes its columns only. None: a head that
            is a DTensor is gathered.
        options: of ``linear_pro_loss``: ``sft_weight``, ``temperature``, ``ties``, ...,
            ``logits_dtype``, ``grad_filter``. The last two count for the cross-entropy too.

    Returns:
        The same model.

    Raises:
        TypeError: not a module, or an option that there is not.
        ValueError: the model is attached already, has no linear LM head, is wrapped, on the meta
            device or moved about by accelerate, or does something to its logits or loss that the
            fused path would not repeat: it was run both ways and the two differ. The message names
            what to use instead.
    """
    lm = _causal_lm(model)
    if unknown := sorted(set(options) - OPTIONS):
        raise TypeError(f"attach got options {unknown}; there are {sorted(OPTIONS)}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {list(LOSSES)}, got {loss!r}")
    PROOptions(**{k: v for k, v in options.items() if k not in KERNEL_OPTIONS})
    own = {name: lm.__dict__[name] for name in REPLACED if name in lm.__dict__}
    group_of("process_group", process_group)
    options |= {"backend": backend, "budget": budget}
    state = Attached(loss, options, own, process_group)
    inputs = _example(lm, example)
    setattr(lm, STATE, state)
    try:
        _try_out(lm, state, inputs)
        lm.forward = MethodType(fused_forward(class_forward(lm)), lm)
        lm.register_forward_pre_hook(before_call, with_kwargs=True)
        lm.register_forward_hook(after_call)
        if loss == "ranking":
            lm.accepts_loss_kwargs = False
    except BaseException:
        _restore(lm, state)
        raise
    return model


class OpenModel:
    """A causal LM taken apart before its LM head, for a loss of one's own.

    The model's own forward runs, as under ``attach``, and builds no logits; ``loss_of`` gets what
    the head would multiply. The model keeps its forward, and everything else but that its
    ``loss_function`` is looked up once.

        head = pk.OpenModel(model)
        out = head.run(loss_of, input_ids=ids, attention_mask=mask)

    Args:
        model: as ``attach`` takes it; it may be attached already.
        example: as in ``attach``.

    Attributes:
        model: the model itself, out of PEFT's wrapper.

    Raises:
        TypeError, ValueError: as ``attach``.
    """

    def __init__(self, model: nn.Module, *, example: Mapping[str, Any] | None = None) -> None:
        self.model = _causal_lm(model, attached=None)
        self._state = Attached("auto", {"backend": "auto", "budget": None}, {})
        _try_out(self.model, self._state, _example(self.model, example))

    def rebind(self, model: nn.Module) -> OpenModel:
        """The same of a copy of the model, which is not tried out again."""
        other = copy.copy(self)
        other.model = _causal_lm(model, attached=None)
        other.model._loss_function = self._state.loss_function
        return other

    def run(
        self, loss_of: Callable[[HeadInputs], tuple[Tensor, dict[str, Tensor]]], **inputs: Any
    ) -> Any:
        """The output of the model's forward on ``inputs``, with ``loss_of``'s loss.

        Args:
            loss_of: from ``HeadInputs`` (``hidden`` of shape (B, T, H), ``weight`` (V, H), ...)
                to the loss, a scalar, and further fields of the output, of the names ``attach``
                adds. Called once, where the head's weight is whole (FSDP2, ZeRO-3).
            inputs: keyword arguments of the model's forward.

        Returns:
            The model's output class without logits. What the model adds to its loss (a router's
            auxiliary loss) is added.
        """
        original = original_forward(self.model, self._state)
        return run_fused(
            self.model, self._state, original, {**inputs, "return_dict": True}, loss_of
        )


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``: the model is as it was before. Returns it.

    Raises:
        ValueError: the model is not attached, or its forward was wrapped since.
    """
    lm = _causal_lm(model, attached=True)
    current = lm.__dict__.get("forward")
    if not hasattr(getattr(current, "__func__", None), "_pro_kernels_original"):
        raise ValueError(
            f"the forward of {type(lm).__name__} was wrapped after attach(model), so removing it "
            "would remove the wrapper too; undo that first (accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False))"
        )
    _restore(lm, getattr(lm, STATE))
    return model


def attached_options(model: nn.Module) -> dict[str, Any] | None:
    """The options a model was attached with; None: it is not attached."""
    lm: Any = model
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    state = lm.__dict__.get(STATE)
    return None if state is None else dict(state.options)


def _restore(lm: Any, state: Attached) -> None:
    for name in REPLACED:
        lm.__dict__.pop(name, None)
        if name in state.own:
            setattr(lm, name, state.own[name])
    delattr(lm, STATE)
    for hooks in (lm._forward_pre_hooks, lm._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (before_call, after_call)]:
            del hooks[key]
            lm._forward_pre_hooks_with_kwargs.pop(key, None)
    head = lm.get_output_embeddings()
    if getattr(head.__dict__.get("forward"), "__func__", None) is type(head).forward:
        del head.forward  # torch.compile left it there (``replaced``)


def _example(lm: Any, example: Mapping[str, Any] | None) -> dict[str, Any]:
    inputs = example_inputs(lm) if example is None else dict(example)
    if "input_ids" not in inputs:
        raise ValueError(f"example must hold input_ids, got {sorted(inputs)}")
    inputs.pop("labels", None)
    return inputs


def _causal_lm(model: nn.Module, attached: bool | None = False) -> Any:
    """The transformers model with the LM head, out of PEFT's wrapper where there is one.

    ``attached``: whether it must be; None: it may.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"{name} learns a prompt, which lengthens the batch in PEFT's own forward; use LoRA or "
            f"the like, or {FALLBACK}"
        )
    lm: Any = model
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    if hasattr(lm, "_orig_mod") or isinstance(getattr(lm, "module", None), nn.Module):
        raise ValueError(f"model is wrapped in {name}; attach(model) before it is wrapped")
    if not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise ValueError(f"model must be a causal LM of transformers, got {name}; else {FALLBACK}")
    if attached is not None and (STATE in lm.__dict__) != attached:
        is_not = "not attached" if attached else "attached already; detach(model) first"
        raise ValueError(f"{type(lm).__name__} is {is_not}")
    if attached:
        return lm
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(lm).__name__} has no LM head (get_output_embeddings() gives None); {FALLBACK}"
        )
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(lm).__name__} is an encoder-decoder; a causal LM is needed")
    if hasattr(head, "_hf_hook"):
        raise ValueError(
            f"the LM head of {type(lm).__name__} is moved about by accelerate (a device_map over "
            f"several devices or with offloading), which the fused path would miss; {FALLBACK}"
        )
    for x in head.parameters():
        if x.is_meta:
            raise ValueError(f"{type(lm).__name__} is on the meta device; load its weights first")
        if hasattr(x, "ds_id") and not x.numel():
            raise ValueError(
                f"{type(lm).__name__} was loaded partitioned (DeepSpeed ZeRO-3), and attach runs "
                "it: attach within deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if type(x.data) is not Tensor:
            raise ValueError(
                f"the LM head of {type(lm).__name__} holds a {type(x.data).__name__}; sharded or "
                f"quantised heads are not supported: attach(model) before, or {FALLBACK}"
            )
    return lm


# ---- the self-check


def _try_out(lm: Any, state: Attached, inputs: dict[str, Any]) -> None:
    """Find out what the model makes of its head's output, and whether the fused loss is its own."""
    # So that a call only exchanges it.
    lm._loss_function = state.loss_function = getattr(lm, "loss_function", None)
    with evaluating(lm):
        state.transform, tolerance = probe(lm, original_forward(lm, state), inputs)
        _check_loss(lm, state, inputs, tolerance)
    state.head_own = frozenset(own_of_head(lm.get_output_embeddings()))
    state.watched, state.tried = watched(lm), True


def _check_loss(lm: Any, state: Attached, inputs: dict[str, Any], tolerance: float) -> None:
    """Compare the loss both ways, with the model's own loss function called and without.

    Once on the inputs, once with padding, labels under it, and some that do not count.

    Raises:
        ValueError: the fused loss is another one.
    """
    if "labels" not in inspect.signature(class_forward(lm)).parameters:
        state.calls_loss_function = False
        return
    name, original = type(lm).__name__, original_forward(lm, state)

    def run(call: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return call(**kwargs)
        except Exception as error:
            raise ValueError(
                f"the loss of {name} could not be tried out on {sorted(kwargs)} ({error}); "
                f"{FALLBACK}"
            ) from error

    def fused(items: Tensor | None = None, **kwargs: Any) -> float:
        def loss_of(head: HeadInputs) -> tuple[Tensor, dict[str, Tensor]]:
            return cross_entropy(state, head, kwargs["labels"], True, IGNORE_INDEX, items)

        more = {} if items is None else {"num_items_in_batch": items}
        return float(
            run_fused(lm, state, original, {**kwargs, **more, "return_dict": True}, loss_of).loss
        )

    def compare(what: str, theirs: float, ours: float, within: float) -> None:
        if not abs(theirs - ours) <= within * max(1.0, abs(theirs)):
            raise ValueError(
                f"{name}: the loss of {what} is {theirs:.7g}, the fused one {ours:.7g}, so the "
                f"model's is not the mean cross-entropy of the next token; {FALLBACK}"
            )

    plain = {**inputs, "labels": inputs["input_ids"]}
    for what, case in (("labels", plain), ("padded and partly ignored labels", _padded(lm, plain))):
        with torch.no_grad():
            out = run(original, **{**case, "return_dict": True})
            theirs, labels = out["loss"], case["labels"]
            if out.get("aux_loss") is None:  # from its own logits: the head's rounding is no excuse
                z = out["logits"][:, :-1].flatten(0, 1)
                mine = nn.functional.cross_entropy(z.float(), labels[:, 1:].flatten())
                own = 4 * torch.finfo(theirs.dtype).eps if theirs.dtype.itemsize < 4 else 1e-5
                compare(what, float(theirs), float(mine), own)
            try:
                ours = fused(**case)
            except Exception:  # a loss of the model's own, which met logits of width 0
                state.calls_loss_function = False
                ours = run(fused, **case)
            compare(what, float(theirs), ours, tolerance)
            if _takes_items(lm):
                items = torch.tensor(3, device=labels.device)
                mean, theirs = (
                    float(theirs),
                    run(original, **case, num_items_in_batch=items)["loss"],
                )
                if abs(float(theirs) - mean) < 1e-3 * abs(mean):
                    state.divides_by_items = False
                compare(f"{what} / 3", float(theirs), fused(items, **case), tolerance)


def _takes_items(lm: Any) -> bool:
    """Whether ``Trainer`` would hand the model num_items_in_batch."""
    kinds = [x.kind for x in inspect.signature(class_forward(lm)).parameters.values()]
    return getattr(lm, "accepts_loss_kwargs", True) and inspect.Parameter.VAR_KEYWORD in kinds


def _padded(lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with two labels that do not count and, of ids alone, a second row half padded."""
    case = dict(inputs)
    labels = case["labels"].clone()
    labels[:, 1:3] = IGNORE_INDEX
    takes_mask = "attention_mask" in inspect.signature(class_forward(lm)).parameters
    if takes_mask and case.keys() <= {"input_ids", "labels"}:
        ids = case["input_ids"]
        case["input_ids"] = torch.cat([ids, ids.roll(3, 1)])
        mask = torch.ones_like(case["input_ids"])
        mask[ids.shape[0] :, ids.shape[1] // 2 :] = 0
        case["attention_mask"] = mask
        labels = torch.cat([labels, case["input_ids"][ids.shape[0] :]])
    case["labels"] = labels
    return case
