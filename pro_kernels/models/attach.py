"""``attach(model)``: a causal LM of transformers whose loss runs through the fused path.

How the attached forward works: ``opened.py`` and ``forward.py``. What the model does to logits
after its head (scale, softcap) is read back at attach time by handing it chosen logits; then it is
run both ways, and what the fused path would not repeat is refused (``tryout.py``).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.distinct.decoder import distinct_rows
from pro_kernels.fused.shards import group_of
from pro_kernels.losses import LOSSES
from pro_kernels.models import forward
from pro_kernels.models.forward import STATE
from pro_kernels.models.head import unfit
from pro_kernels.models.opened import LossOf, Opened, base_of, causal_lm
from pro_kernels.models.probe import agree
from pro_kernels.models.tryout import try_out
from pro_kernels.options import CrossEntropyOptions, PROOptions
from pro_kernels.validate import check_choice

# What ``attach(loss=...)`` takes beside the names of ``losses.LOSSES``.
_LOSSES = ("auto", "ranking", "cross_entropy")
# Attributes of the instance that are set; accelerate may have set a forward before.
_REPLACED = ("forward", "accepts_loss_kwargs", "_loss_function")


def attach(
    model: nn.Module,
    *,
    loss: str = "auto",
    example: Mapping[str, Any] | None = None,
    backend: str = "auto",
    budget: int | None = None,
    process_group: Any = None,
    rows: str = "padded",
    lazy_logits: bool = True,
    **options: Any,
) -> nn.Module:
    """Give a causal LM of transformers the fused loss; everything else of it stays as it was.

    A call with ``labels`` then builds no logits and returns the model's own output class with

    - with ``rewards`` (B, n), ``num_candidates=n`` or ``layout``: ``loss`` and the other fields of
      ``PROOutput``, candidates being the rows, n of each prompt after another
      (``labels`` (B n, T)). It is PRO's, or that which ``loss`` names, of which ``ref_logps``
      (B, n) may be given, too;
    - else ``loss``, the cross-entropy as the model computes it (a mean over the tokens, or their
      sum over ``num_items_in_batch``), and ``token_logps`` (B, T), fp32, differentiable: position t
      holds the log-prob of ``labels[:, t + 1]``, or 0.

    A batch with nothing scored has loss 0 and gradients 0, with either loss, where the plain model
    gives NaN, its mean over no tokens: an empty micro-batch must not poison a run.

    Labels are unshifted, as transformers has them; ``shift_labels`` are taken as they are. What the
    model adds to its loss (a router's auxiliary loss) is added as before. Under ``no_grad`` no
    gradient work is done.

    ``logits``, of calls with labels and without, are not made yet (``LazyLogits``): what trainers
    make of them (``gather``, ``log_softmax``, ``logsumexp``, ``cross_entropy``, ...) is answered by
    the fused path, everything else by the real ones. ``generate``, a compiled model, a head that
    FSDP2 or ZeRO-3 gathers by itself, and a few rows without gradient have plain logits (with
    labels, where those are not wanted, None).

    Attach before the model is wrapped by DDP, FSDP, ``torch.compile`` or accelerate; PEFT may come
    before or after. A deep copy is attached too; pickling is refused.

    Args:
        model: a causal LM of transformers (or PEFT's wrapper of one) with a linear LM head.
        loss: "ranking" (PRO), "cross_entropy", the name of a loss of ``losses.LOSSES``, or "auto":
            PRO or the cross-entropy, as each call asks for. Under ``Trainer`` name it: all but
            these two make ``Trainer`` divide by the accumulation steps itself
            (``accepts_loss_kwargs = False``), since such a loss is a mean over prompts, and refuse
            batches that do not say which rows belong together.
        example: keyword arguments for the forward that try the model out, ``input_ids`` among them;
            None: eight token ids. Give one where a model needs more than ``input_ids``.
        backend: "auto" or a backend's name.
        budget: bytes a call may take beyond the inputs' gradients; None for a default.
        process_group: the ranks, or that dimension of a DeviceMesh, over which the head will be
            split (``ColwiseParallel``), so that each computes its columns only. None: a head that
            is a DTensor is gathered.
        rows: "distinct" runs only the distinct tokens of each padded batch, as ``distinct_rows``
            does until ``detach``; "padded" runs batches as they are.
        lazy_logits: False: a call without labels returns plain logits, one with labels None.
        options: of the loss (``linear_pro_loss``'s, or those of ``LOSSES[loss]``): ``sft_weight``,
            ``temperature``, ``beta``, ...; of ``linear_cross_entropy``, unless a ranking loss is
            named: ``class_weight``, ``label_smoothing``, ``z_loss``, which the cross-entropy of
            labels then has, whether the model's own loss has them or not; and of any:
            ``grad_filter``, ``batch_invariant``, and ``head_dtype``, with which the ``logits`` are
            fp32, too (but not those of ``generate``).

    Returns:
        The same model.

    Raises:
        TypeError: not a module, or an option that there is not.
        ValueError: the model is attached already, has no linear LM head, is wrapped, on the meta
            device or moved about by accelerate, or does something to its logits or loss that the
            fused path would not repeat: it was run both ways and the two differ. The message names
            what to use instead.
    """
    lm = causal_lm(model)
    if STATE in lm.__dict__:
        if not getattr(lm, STATE).loaded:
            raise ValueError(f"{type(lm).__name__} is attached already; detach(model) first")
        detach(lm)
    _check_whole(lm)
    check_choice("loss", loss, (*_LOSSES, *LOSSES))
    loss = "ranking" if loss == "pro" else loss
    of_scores = None if loss in _LOSSES else LOSSES[loss]
    there = forward.OPTIONS.difference(forward.CLASS_OPTIONS if loss == "ranking" else ())
    if of_scores is not None:
        there = {*forward.KERNEL_OPTIONS, *of_scores.types}
    if unknown := sorted(set(options) - there):
        raise TypeError(f"attach got options {unknown}; there are {sorted(there)}")
    check_choice("rows", rows, ("padded", "distinct"))
    check_choice("lazy_logits", lazy_logits, (True, False))
    group_of("process_group", process_group)
    classes = {}
    if of_scores is None:
        loss_options(options)
        names = [name for name in forward.CLASS_OPTIONS if name in options]
        classes = {name: options.pop(name) for name in names}
    else:
        of_scores.check({name: x for name, x in options.items() if name in of_scores.types})
    CrossEntropyOptions(**{name: x for name, x in classes.items() if name != "class_weight"})
    options |= {"backend": backend, "budget": budget}
    own = {name: lm.__dict__[name] for name in _REPLACED if name in lm.__dict__}
    opened = Opened(lm, loss, options, classes, process_group, own)
    setattr(lm, STATE, opened)
    try:
        try_out(opened, example)
        lm.forward = MethodType(forward.fused_forward(type(lm).forward), lm)
        opened.hooks.append(lm.register_forward_pre_hook(forward.before_call, with_kwargs=True))
        opened.hooks.append(lm.register_forward_hook(forward.after_call))
        if loss not in ("auto", "cross_entropy"):
            lm.accepts_loss_kwargs = False
        if rows == "distinct":
            opened.rows = distinct_rows(lm)
        opened.lazy = lazy_logits
    except BaseException:
        _restore(opened)
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
        model: the model itself, out of PEFT's wrapper (``causal_lm``).

    Raises:
        TypeError, ValueError: as ``attach``.
    """

    causal_lm = staticmethod(causal_lm)

    def __init__(self, model: nn.Module, *, example: Mapping[str, Any] | None = None) -> None:
        self.model = causal_lm(model)
        _check_whole(self.model)
        self._opened = Opened(self.model)
        try_out(self._opened, example)

    def rebind(self, model: nn.Module) -> OpenModel:
        """The same of a copy of the model, which is not tried out again."""
        other = copy.copy(self)
        other.model = causal_lm(model)
        other.model._loss_function = self._opened.loss_function
        other._opened = dataclasses.replace(self._opened, lm=other.model)
        return other

    def run(self, loss_of: LossOf, **inputs: Any) -> Any:
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
        return self._opened.run(loss_of, {**inputs, "return_dict": True})

    @torch.no_grad()
    def compare(
        self, run: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> tuple[float, float]:
        """By how much two runs of the model differ, and by how much rounding lets them.

        The model's rounding is what moves the first run when every embedding is off by its last
        bit; a small multiple of that is allowed. Both are root mean squares. A model of 16 bits is
        compared in fp32 where that fits: its own rounding is as large as what a token too many in
        an attention mask does.

        Args:
            run: runs the model, which is in evaluation mode, and gives numbers it makes.
            other: the same numbers, got in another way.
        """
        return agree(self.model, run, other)


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``: the model is as it was before. Returns it.

    Raises:
        ValueError: the model is not attached, or its forward was wrapped since.
    """
    lm = causal_lm(model)
    if STATE not in lm.__dict__:
        raise ValueError(f"{type(lm).__name__} is not attached")
    current = lm.__dict__.get("forward")
    if not hasattr(getattr(current, "__func__", None), "_pro_kernels_original"):
        raise ValueError(
            f"the forward of {type(lm).__name__} was wrapped after attach(model), so removing it "
            "would remove the wrapper too; undo that first (accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False))"
        )
    _restore(getattr(lm, STATE))
    return model


def attached_options(model: nn.Module) -> dict[str, Any] | None:
    """The options a model was attached with; None: it is not attached."""
    opened = base_of(model).__dict__.get(STATE)
    return None if opened is None else dict(opened.options)


def loss_options(options: Mapping[str, Any]) -> PROOptions:
    """Those of ``attach``'s options that say which loss it is, checked."""
    return PROOptions(
        **{name: value for name, value in options.items() if name in forward.LOSS_OPTIONS}
    )


def _restore(opened: Opened) -> None:
    lm = opened.lm
    for name in _REPLACED:
        lm.__dict__.pop(name, None)
        if name in opened.own:
            setattr(lm, name, opened.own[name])
    delattr(lm, STATE)
    for hook in opened.hooks:
        hook.remove()
    if opened.rows is not None:
        opened.rows.close()
    head = lm.get_output_embeddings()
    if getattr(head.__dict__.get("forward"), "__func__", None) is type(head).forward:
        del head.forward  # torch.compile left it there (``replaced``)


def _check_whole(lm: Any) -> None:
    """Raise ValueError where the head's weights are not there to be multiplied."""
    name, head = type(lm).__name__, lm.get_output_embeddings()
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; a causal LM is needed")
    if hasattr(head, "_hf_hook"):
        raise unfit(
            f"the LM head of {name} is moved about by accelerate (a device_map over several "
            "devices or with offloading), which the fused path would miss"
        )
    for x in head.parameters():
        if x.is_meta:
            raise ValueError(f"{name} is on the meta device; load its weights first")
        if hasattr(x, "ds_id") and not x.numel():
            raise ValueError(
                f"{name} was loaded partitioned (DeepSpeed ZeRO-3), and attach runs it: attach "
                "within deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if type(x.data) is not Tensor:
            raise unfit(
                f"the LM head of {name} holds a {type(x.data).__name__}",
                "sharded or quantised heads are not supported: attach(model) before, or ",
            )
