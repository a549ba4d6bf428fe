"""The forward of an attached model: what a call may ask for, and the losses it can have.

How the model itself runs: ``opened.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pro_kernels.api import linear_pro_loss, linear_token_logps
from pro_kernels.cross_entropy import token_losses
from pro_kernels.fused.shards import is_dtensor
from pro_kernels.layout import Layout
from pro_kernels.losses import LOSSES, get_loss
from pro_kernels.models.head import HeadInputs
from pro_kernels.models.opened import FIELDS, Opened
from pro_kernels.options import IGNORE_INDEX, CallOptions, CrossEntropyOptions, Options, PROOptions
from pro_kernels.validate import check_tensor

STATE = "_pro_kernels"  # the attribute of an attached model that holds its ``Opened``
# Keyword arguments that the forward of an attached model takes beside the model's own.
_AS_GIVEN = ("candidate_mask", "prompt_weights", "sft_index")
_OF_SCORES = ("ref_logps", "desirable")  # of losses other than PRO
RANKING = ("rewards", "num_candidates", *_AS_GIVEN, *_OF_SCORES, "layout")
# Options of ``attach``: of ``linear_pro_loss``, of either function, of ``linear_cross_entropy``.
_GIVEN_ELSEWHERE = ("ignore_index", "shift", "inplace_backward", "process_group", "sequence_group")
LOSS_OPTIONS, KERNEL_OPTIONS = Options(PROOptions, CallOptions, without=_GIVEN_ELSEWHERE).names
(_CLASSES,) = Options(CrossEntropyOptions, without=("reduction",)).names
CLASS_OPTIONS = ("class_weight", *_CLASSES)
OPTIONS = {*LOSS_OPTIONS, *KERNEL_OPTIONS, *CLASS_OPTIONS}
# No keywords of a call: models take any, and would leave these unread.
_NOT_OF_A_CALL = OPTIONS | inspect.signature(linear_pro_loss).parameters.keys()
_NOT_OF_A_CALL -= {*RANKING, "ignore_index"}


class Asked(NamedTuple):
    """What a call asks for."""

    targets: Any  # (rows, T)
    shift: bool = True  # they are labels
    ignore_index: int = IGNORE_INDEX
    items: Tensor | int | None = None  # num_items_in_batch
    ranking: Mapping[str, Any] = {}  # those of RANKING that are given


def _candidates(asked: Asked) -> Any:  # no property: torch 2.10 cannot trace one of a tuple
    """How many of them are each prompt's; None: it does not say."""
    rewards = asked.ranking.get("rewards")
    return asked.ranking.get("num_candidates") if rewards is None else rewards.shape[1]


@functools.cache
def fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands in for ``original``; bound to each model, so that copies are too.

    Its signature is the original's and ``RANKING``: ``Trainer`` reads from it which columns of a
    data set to keep, and whether the model divides by ``num_items_in_batch``.
    """
    own = inspect.signature(original)
    parameters = list(own.parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(x.name for x in parameters if x.kind in positional)[1:]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        if len(given) < len(args) or given.keys() & kwargs.keys():
            raise TypeError(
                f"the forward of {type(self).__name__} takes {names} by position, each once, got "
                f"{len(args)} of them and {sorted(kwargs)}"
            )
        loss = getattr(self, STATE).loss
        of_loss = LOSSES[loss].defaults.keys() if loss in LOSSES else ()
        strange = _NOT_OF_A_CALL.union(of_loss).difference(RANKING, own.parameters)
        if strange := strange.intersection(kwargs):
            raise ValueError(
                f"a call of an attached model takes {RANKING}, got {sorted(strange)}; options are "
                "given to attach, and sequence_group to linear_pro_loss only"
            )
        return _forward(getattr(self, STATE), {**given, **kwargs})

    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in RANKING
        if name not in own.parameters
    ]
    forward.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward._pro_kernels_original = original  # type: ignore[attr-defined]
    return forward


def _forward(opened: Opened, kwargs: dict[str, Any]) -> Any:
    opened.pending = False
    ranking = {name: kwargs.pop(name, None) for name in RANKING}
    ranking = {name: value for name, value in ranking.items() if value is not None}
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if opened.loaded and labels is not None and not (ranking or torch.is_grad_enabled()):
        return opened.original(**kwargs)  # metrics look at logits
    if labels is None and shifted is None and "layout" not in ranking:
        if ranking:
            raise ValueError(f"{sorted(ranking)} need labels (or a layout), got labels=None")
        return opened.run_without_labels(kwargs)
    kwargs.pop("shift_labels", None)
    targets = labels if shifted is None else shifted
    ignored, items = kwargs.get("ignore_index", IGNORE_INDEX), kwargs.get("num_items_in_batch")
    asked = Asked(targets, shifted is None, ignored, items, ranking)
    if asked.shift and labels is not None:
        _check_labels(opened, kwargs.get("input_ids"), asked)
    _check_loss(opened, asked)
    if not torch.compiler.is_compiling():
        opened.check_unchanged()
    loss = cross_entropy
    if ranking:
        loss = ranking_loss if opened.loss in ("auto", "ranking") else loss_of_scores
    return opened.run(lambda head: loss(opened, head, asked), kwargs)


def before_call(lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook: the ranking loss is asked for."""
    getattr(lm, STATE).pending = any(kwargs.get(name) is not None for name in RANKING)


def after_call(lm: nn.Module, args: tuple, output: Any) -> None:
    """A hook: it must have been computed. Many forwards take unknown arguments without a word."""
    if getattr(lm, STATE).pending:
        raise RuntimeError(
            f"the forward of {type(lm).__name__} was replaced after attach(model) (Trainer's "
            "use_liger_kernel does that), so the ranking loss was not computed; attach after that, "
            "or leave it out"
        )


# ---- the losses


def _of_both(opened: Opened, head: HeadInputs, asked: Asked) -> dict[str, Any]:
    """Arguments of either loss; ValueError with a process group and a head that is whole."""
    split = is_dtensor(head.weight)
    if opened.tried and opened.process_group is not None and not split:
        raise ValueError(
            "the model is attached with a process_group, and its head is no DTensor: split it with "
            "parallelize_module(model, mesh, {'lm_head': ColwiseParallel()}), or attach without"
        )
    group = opened.process_group if split else None
    return {"ignore_index": asked.ignore_index, "process_group": group, **head.options()}


def _of_kernels(opened: Opened, head: HeadInputs, asked: Asked) -> dict[str, Any]:
    """The same with the options that are no loss's."""
    own = {name: opened.options[name] for name in KERNEL_OPTIONS if name in opened.options}
    return {**_of_both(opened, head, asked), **own}


def _own_options(opened: Opened) -> dict[str, Any]:
    """Of the loss in ``LOSSES`` that the model is attached with."""
    own = get_loss(opened.loss).defaults
    return {name: x for name, x in opened.options.items() if name in own}


def cross_entropy(
    opened: Opened, head: HeadInputs, asked: Asked
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these targets, the model's own but for ``opened.classes``, and log-probs."""
    device = head.hidden.device
    classes: dict[str, Any] = {
        name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        for name, x in opened.classes.items()
    }
    how = {"shift": asked.shift, **classes, **_of_kernels(opened, head, asked)}
    targets = asked.targets.to(device, non_blocking=True)
    found = token_losses(head.hidden, head.weight, targets, **how)
    logps, items = {"token_logps": found.stats["logps"]}, asked.items
    if items is None or not opened.divides_by_items:
        return found.reduced("mean")[0], logps
    if isinstance(items, Tensor):
        items = items.to(device, non_blocking=True)
    return found.reduced("sum")[0] / (items + (items == 0)), logps


def ranking_loss(
    opened: Opened, head: HeadInputs, asked: Asked
) -> tuple[Tensor, dict[str, Tensor]]:
    """PRO of candidates that are the rows, or a layout's."""
    hidden, targets, layout = head.hidden, asked.targets, asked.ranking.get("layout")
    if layout is None:
        n = _candidates(asked)
        hidden = hidden.reshape(-1, n, *hidden.shape[-2:])
        targets = targets.reshape(-1, n, targets.shape[-1]).to(hidden.device, non_blocking=True)
    else:
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), None
        layout = layout.to(hidden.device, non_blocking=True)
    given = {name: asked.ranking.get(name) for name in ("rewards", *_AS_GIVEN)}
    how = {"shift": asked.shift and layout is None, **_of_both(opened, head, asked)}
    how |= opened.options
    out = linear_pro_loss(hidden, head.weight, targets, layout=layout, **given, **how)
    return out.loss, {name: getattr(out, name) for name in FIELDS if name != "token_logps"}


def loss_of_scores(
    opened: Opened, head: HeadInputs, asked: Asked
) -> tuple[Tensor, dict[str, Tensor]]:
    """Any loss of ``losses.LOSSES``, of candidates as in ``ranking_loss``."""
    given, hidden = asked.ranking, head.hidden
    layout, how = given.get("layout"), _of_kernels(opened, head, asked)
    if layout is not None:
        layout = layout.to(hidden.device, non_blocking=True)
        rows = hidden.reshape(-1, hidden.shape[-1])
        rows = rows if layout.rows is None else rows.index_select(0, layout.rows)
        found: Any = linear_token_logps(rows, head.weight, layout.targets, **how)
        logps, lengths = layout.candidate_sums(found)
    else:
        targets = asked.targets.to(hidden.device, non_blocking=True)
        found = linear_token_logps(hidden, head.weight, targets, shift=asked.shift, **how)
        scored = (targets[:, 1:] if asked.shift else targets) != asked.ignore_index
        logps, lengths = (x.sum(1).view(-1, _candidates(asked)) for x in (found, scored))
    loss = get_loss(opened.loss)
    inputs = {
        "mask" if name == "candidate_mask" else name: x.to(logps.device, non_blocking=True)
        for name, x in given.items()
        if name not in ("num_candidates", "layout")
    }
    value, metrics = loss(logps, lengths, **inputs, **_own_options(opened))
    logps = logps.detach()
    sft = metrics.get("sft_loss")
    return value, {
        "scores": logps / lengths.clamp_min(1),
        "logps": logps,
        "lengths": lengths,
        **({} if sft is None else {"sft_loss": sft}),
    }


# ---- what a call may ask for


def _check_loss(opened: Opened, asked: Asked) -> None:
    """Raise TypeError or ValueError unless the call says what the model's loss needs, and fits."""
    loss, ranking = opened.loss, asked.ranking
    if not ranking:
        if loss not in ("auto", "cross_entropy"):
            raise ValueError(
                f"the model is attached with loss={loss!r}, and the batch does not say which rows "
                "are candidates of one prompt: give rewards (B, n), num_candidates=n or a layout"
            )
        return
    taken = {*RANKING} - {*_OF_SCORES}
    if loss in LOSSES:
        taken = {*RANKING} - {"sft_index"} - ({"desirable"} - LOSSES[loss].defaults.keys())
    if strange := sorted(ranking.keys() - taken):
        raise ValueError(f"the model is attached with loss={loss!r}, which does not use {strange}")
    if loss == "cross_entropy":
        raise ValueError(
            f"the model is attached with loss='cross_entropy', which has no {sorted(ranking)}"
        )
    if asked.items is not None:
        raise ValueError(
            "the ranking loss is a mean over prompts and cannot be divided by num_items_in_batch, "
            f"got {asked.items} (Trainer passes it to models that take it): attach(model, "
            "loss='ranking')"
        )
    layout = ranking.get("layout")
    if layout is None:
        _check_candidates(asked)
    elif not isinstance(layout, Layout):
        raise TypeError(f"layout must be a pro_kernels.Layout, got {type(layout).__name__}")
    if loss in LOSSES:
        for name in ranking.keys() - {"num_candidates", "layout"}:
            check_tensor(name, ranking[name])
        LOSSES[loss].check_needs(ranking, _own_options(opened))


def _check_candidates(asked: Asked) -> None:
    rewards, n = asked.ranking.get("rewards"), asked.ranking.get("num_candidates")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"num_candidates must be an integer >= 1, got {n!r}")
    if rewards is not None:
        if not isinstance(rewards, Tensor) or rewards.dim() != 2:
            what = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(f"rewards must be a tensor of shape (B, n), got {what}")
        if n not in (None, rewards.shape[1]):
            raise ValueError(f"num_candidates={n} but rewards have shape {tuple(rewards.shape)}")
    n = _candidates(asked)
    if n is None:
        raise ValueError(
            f"{sorted(asked.ranking)} belong to the ranking loss, which needs to know the "
            "candidates of each prompt: give rewards (B, n), or num_candidates=n for rows ordered "
            "best first"
        )
    shape = tuple(asked.targets.shape)
    rows = shape[0] if shape else 0
    if n == 0 or rows % n or (rewards is not None and rows != rewards.numel()):
        expected = f"a multiple of num_candidates={n}" if rewards is None else f"{rewards.numel()}"
        raise ValueError(
            f"labels must have {expected} rows, one for each candidate, got {rows} in shape {shape}"
        )


def _check_labels(opened: Opened, input_ids: Tensor | None, asked: Asked) -> None:
    """Raise ValueError for labels that were shifted before: each is the next token already.

    On a GPU at the first call only, because the host waits for the answer.
    """
    labels = asked.targets
    if input_ids is None or input_ids.shape != labels.shape or torch.compiler.is_compiling():
        return
    if labels.device.type != "cpu" and opened.labels_checked:
        return
    opened.labels_checked = True
    scored = labels[:, :-1] != asked.ignore_index
    ahead = ((labels[:, :-1] == input_ids[:, 1:]) | ~scored).all()
    in_place = ((labels[:, :-1] == input_ids[:, :-1]) | ~scored).all()
    if bool(ahead & ~in_place & scored.any()):
        raise ValueError(
            "labels are shifted already: each equals the next of input_ids, and the model shifts "
            "them once more; pass the input_ids (-100 where nothing is scored), or give these as "
            "shift_labels"
        )
