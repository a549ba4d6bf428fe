"""``attach(model)``: a causal LM of transformers whose loss runs through the fused path.

The model's own forward runs, with its output embedding replaced for that call by a stub that keeps
its input and returns logits of width 0. So nothing the model does around its head is repeated here:
not how hidden states are prepared, nor which auxiliary losses are added. What it does to logits
after the head (scale, softcap) is read back at attach time by handing it chosen logits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.functional import linear_pro_loss, linear_token_logps
from pro_kernels.layout import Layout
from pro_kernels.lm_head import FALLBACK, HeadInputs, gathers_itself, resolve
from pro_kernels.options import IGNORE_INDEX, PROOptions
from pro_kernels.probe import (
    LogitTransform,
    configs_of,
    evaluating,
    example_inputs,
    only,
    probe,
    replaced,
)
from pro_kernels.shards import group_of, is_dtensor

# Keyword arguments that the forward of an attached model takes beside the model's own.
RANKING = ("rewards", "num_candidates", "candidate_mask", "prompt_weights", "sft_index", "layout")
# Fields that its output has beside the model's own; all but ``token_logps`` as in ``PROOutput``.
FIELDS = ("token_logps", "scores", "logps", "lengths", "rank_losses", "sft_loss")
# Options of the two losses that are no fields of ``PROOptions``.
_KERNEL_OPTIONS = ("logits_dtype", "grad_filter", "backend", "budget")
_OPTIONS = {f.name for f in dataclasses.fields(PROOptions)} | set(_KERNEL_OPTIONS)
# No keywords of a call: models take any, and would leave these unread.
_NOT_OF_A_CALL = _OPTIONS | {
    *("process_group", "sequence_group", "softcap", "logit_scale", "shift", "bias")
}  # fmt: skip
_STATE = "_pro_kernels"
# What ``attach(loss=...)`` takes.
LOSSES = ("auto", "ranking", "cross_entropy")
# Attributes of the instance that are set; accelerate may have set a forward before.
_REPLACED = ("forward", "accepts_loss_kwargs", "_loss_function")
# Names of config values that models read at each call to scale or cap their logits.
_SCALES = re.compile("softcap|soft_cap|logit.?scale|logits_scal|multiplier")
_output_classes: dict[type, type] = {}


@dataclass
class _Attached:
    """What ``attach`` found out and was told; kept on the model."""

    loss: str  # one of LOSSES
    options: dict[str, Any]  # of linear_pro_loss
    own: dict[str, Any]  # attributes of the instance that were there before (_REPLACED)
    process_group: Any = None  # as given; of a head that is a DTensor
    transform: LogitTransform = field(default_factory=LogitTransform)
    calls_loss_function: bool = True  # else the loss is added to the output here
    divides_by_items: bool = True  # the model's own loss knows num_items_in_batch
    loss_function: Any = None  # the model's own
    watched: list[tuple[Any, str, Any]] = field(default_factory=list)  # config, name, value
    labels_checked: bool = False
    running: bool = False
    pending: bool = False  # a call of the ranking loss has not reached ``_forward``

    def __deepcopy__(self, memo: dict) -> _Attached:
        memo[id(self.process_group)] = self.process_group  # of this process, not of the model
        return _Attached(**copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> Any:
        """Refused: unpickled, it would have its own forward, which ignores what it is not told."""
        raise TypeError(
            "an attached model cannot be pickled; detach(model) before, or save its state_dict"
        )


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
    if unknown := sorted(set(options) - _OPTIONS):
        raise TypeError(f"attach got options {unknown}; there are {sorted(_OPTIONS)}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {list(LOSSES)}, got {loss!r}")
    PROOptions(**{k: v for k, v in options.items() if k not in _KERNEL_OPTIONS})
    own = {name: lm.__dict__[name] for name in _REPLACED if name in lm.__dict__}
    group_of("process_group", process_group)
    options |= {"backend": backend, "budget": budget}
    state = _Attached(loss, options, own, process_group)
    inputs = example_inputs(lm) if example is None else dict(example)
    if "input_ids" not in inputs:
        raise ValueError(f"example must hold input_ids, got {sorted(inputs)}")
    inputs.pop("labels", None)
    setattr(lm, _STATE, state)
    # So that a call only exchanges it.
    lm._loss_function = state.loss_function = getattr(lm, "loss_function", None)
    try:
        with evaluating(lm):
            state.transform, tolerance = probe(lm, _original(lm, state), inputs)
            lm.forward = MethodType(_fused_forward(_class_forward(lm)), lm)
            _check_loss(lm, state, inputs, tolerance)
        state.watched = _watched(lm)
        lm.register_forward_pre_hook(_before_call, with_kwargs=True)
        lm.register_forward_hook(_after_call)
        if loss == "ranking":
            lm.accepts_loss_kwargs = False
    except BaseException:
        _restore(lm, state)
        raise
    return model


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
    _restore(lm, getattr(lm, _STATE))
    return model


def attached_options(model: nn.Module) -> dict[str, Any] | None:
    """The options a model was attached with; None: it is not attached."""
    lm: Any = model
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    state = lm.__dict__.get(_STATE)
    return None if state is None else dict(state.options)


def _restore(lm: Any, state: _Attached) -> None:
    for name in _REPLACED:
        lm.__dict__.pop(name, None)
        if name in state.own:
            setattr(lm, name, state.own[name])
    delattr(lm, _STATE)
    for hooks in (lm._forward_pre_hooks, lm._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before_call, _after_call)]:
            del hooks[key]
            lm._forward_pre_hooks_with_kwargs.pop(key, None)
    head = lm.get_output_embeddings()
    if getattr(head.__dict__.get("forward"), "__func__", None) is type(head).forward:
        del head.forward  # torch.compile left it there (``replaced``)


def _causal_lm(model: nn.Module, attached: bool = False) -> Any:
    """The transformers model with the LM head, out of PEFT's wrapper where there is one."""
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
    if (_STATE in lm.__dict__) != attached:
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


# ---- the forward


def _class_forward(lm: Any) -> Callable[..., Any]:
    return type(lm).forward


def _original(lm: Any, state: _Attached) -> Callable[..., Any]:
    """The model's forward as it was."""
    return state.own.get("forward") or functools.partial(_class_forward(lm), lm)


@functools.cache
def _fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands in for ``original``; bound to each model, so that copies are too.

    Its signature is the original's and ``RANKING``: ``Trainer`` reads from it which columns of a
    data set to keep, and whether the model divides by ``num_items_in_batch``.
    """
    own = inspect.signature(original)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(x.name for x in own.parameters.values() if x.kind in positional)[1:]
    refused = _NOT_OF_A_CALL - own.parameters.keys()

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        if len(given) < len(args) or given.keys() & kwargs.keys():
            raise TypeError(
                f"the forward of {type(self).__name__} takes {names} by position, each once, got "
                f"{len(args)} of them and {sorted(kwargs)}"
            )
        if strange := refused & kwargs.keys():
            raise ValueError(
                f"a call of an attached model takes {RANKING}, got {sorted(strange)}; options are "
                "given to attach, and sequence_group to linear_pro_loss only"
            )
        return _forward(self, {**given, **kwargs})

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in RANKING
        if name not in own.parameters
    ]
    parameters = list(own.parameters.values())
    variadic = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    at = len(parameters) - variadic
    forward.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], *extra, *parameters[at:]]
    )
    forward._pro_kernels_original = original  # type: ignore[attr-defined]
    return forward


def _forward(self: nn.Module, kwargs: dict[str, Any]) -> Any:
    state = getattr(self, _STATE)
    state.pending = False
    original = _original(self, state)
    ranking = {name: kwargs.pop(name, None) for name in RANKING}
    ranking = {name: value for name, value in ranking.items() if value is not None}
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if labels is None and shifted is None and "layout" not in ranking:
        if ranking:
            raise ValueError(f"{sorted(ranking)} need labels (or a layout), got labels=None")
        return original(**kwargs)
    kwargs.pop("shift_labels", None)
    items = kwargs.get("num_items_in_batch")
    ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
    targets: Any = labels if shifted is None else shifted
    if shifted is None and labels is not None:
        _check_labels(state, kwargs.get("input_ids"), labels, ignore_index)
    _check_ranking(state.loss, ranking, targets, items)
    if not torch.compiler.is_compiling():
        _check_unchanged(self, state)

    def loss_of(head: HeadInputs) -> tuple[Tensor, dict[str, Tensor]]:
        shift = shifted is None
        if ranking:
            return _pro(state, head, targets, shift, ignore_index, ranking)
        return _cross_entropy(state, head, targets, shift, ignore_index, items)

    return _run(self, state, original, kwargs, loss_of)


def _run(
    lm: Any,
    state: _Attached,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
    loss_of: Callable[[HeadInputs], tuple[Tensor, dict[str, Tensor]]],
) -> Any:
    """The original forward around the fused loss: its output with ``loss`` and ``FIELDS``."""
    module = lm.get_output_embeddings()
    as_tuple = not _wants_dict(lm, kwargs)
    if as_tuple:
        kwargs["return_dict"] = True
    captured: list[Tensor] = []
    strange: list[str] = []
    extras: dict[str, Tensor] = {}

    def stub(hidden: Tensor, *args: Any, **others: Any) -> Tensor:
        captured.append(hidden)
        strange.extend(name for name, value in others.items() if value is not None)
        strange.extend("positional ones" for _ in args)
        return hidden.new_empty((*hidden.shape[:-1], 0))

    apart = gathers_itself(module)

    def of_head(hidden: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if is_dtensor(hidden):  # of ColwiseParallel, whose ranks all need it
            if apart:
                raise ValueError(
                    f"the LM head of {type(lm).__name__} is tensor parallel and a unit of FSDP2 of "
                    "its own; leave it to the root (no fully_shard(model.lm_head))"
                )
            hidden = hidden.full_tensor()
        return loss_of(resolve(module, hidden))

    def loss_function(*_: Any, **__: Any) -> Tensor:
        hidden = only(captured, lm)
        if apart:
            with replaced(module, "forward", of_head):
                loss, more = module(hidden)
        else:
            loss, more = of_head(hidden)
        extras.update(more)
        return loss

    # A head that gathers itself is called once, for the loss: its hooks then see what needs it.
    stubbed = _in_place_of(lm, module, stub) if apart else replaced(module, "forward", stub)
    labels = kwargs.pop("labels", None)
    if state.calls_loss_function:
        kwargs["labels"] = _any_labels(kwargs) if labels is None else labels
        with (
            _alone(state),
            stubbed,
            replaced(lm, "_loss_function", loss_function),
        ):
            out = original(**kwargs)
        if not extras:
            raise RuntimeError(f"{type(lm).__name__} did not call its loss_function")
        loss = out["loss"]
    else:
        kwargs.pop("num_items_in_batch", None)
        with _alone(state), stubbed:
            out = original(**kwargs)
        if out.get("aux_loss") is not None:
            raise ValueError(
                f"{type(lm).__name__} has an auxiliary loss and no loss_function to which it adds "
                f"it; {FALLBACK}"
            )
        loss = loss_function()
    if strange:
        raise ValueError(
            f"the LM head of {type(lm).__name__} was called with more than its input ({strange}: "
            f"adapters chosen row by row, say), which the fused path does not know; {FALLBACK}"
        )
    values = {name: value for name, value in out.items() if name not in ("loss", "logits")}
    result = _output_class(type(out))(loss=loss, **values, **extras)
    return result.to_tuple() if as_tuple else result


class _StandIn(nn.Module):
    """A module in the head's place, so that a call of it is no call of the head."""

    def __init__(self, head: nn.Module, stub: Callable[..., Tensor]):
        super().__init__()
        self.__dict__.update(head=head, forward=stub)  # no child: the head stays where it is

    def __getattr__(self, name: str) -> Any:
        """What models ask of their head: its weight's dtype, say."""
        return getattr(self.__dict__["head"], name)


@contextlib.contextmanager
def _in_place_of(lm: nn.Module, head: nn.Module, stub: Callable[..., Tensor]) -> Iterator[None]:
    """``_StandIn`` wherever ``lm`` has its head."""
    owners = [(x, name) for x in lm.modules() for name, y in x.named_children() if y is head]
    for owner, name in owners:
        owner._modules[name] = _StandIn(head, stub)
    try:
        yield
    finally:
        for owner, name in owners:
            owner._modules[name] = head


@contextlib.contextmanager
def _alone(state: _Attached) -> Iterator[None]:
    """One call at a time: the stub is the module's for all threads."""
    if torch.compiler.is_compiling():
        yield
        return
    if state.running:
        raise RuntimeError(
            "an attached model was called within a call of its own or from two threads at once "
            "(torch.nn.DataParallel does that; use DistributedDataParallel)"
        )
    state.running = True
    try:
        yield
    finally:
        state.running = False


def _before_call(lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook: the ranking loss is asked for."""
    state = getattr(lm, _STATE)
    state.pending = any(kwargs.get(name) is not None for name in RANKING)


def _after_call(lm: nn.Module, args: tuple, output: Any) -> None:
    """A hook: it must have been computed. Many forwards take unknown arguments without a word."""
    if getattr(lm, _STATE).pending:
        raise RuntimeError(
            f"the forward of {type(lm).__name__} was replaced after attach(model) (Trainer's "
            "use_liger_kernel does that), so the ranking loss was not computed; attach after that, "
            "or leave it out"
        )


def _any_labels(kwargs: Mapping[str, Any]) -> Tensor:
    """What makes the model ask for its loss; the loss has targets of its own."""
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"][..., 0].long() if ids is None else ids


def _wants_dict(lm: Any, kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("return_dict")
    return bool(getattr(lm.config, "return_dict", True) if wanted is None else wanted)


def _output_class(base: type) -> type:
    """The model's output class with ``FIELDS``; still an instance of it, for ``isinstance``."""
    if base not in _output_classes:  # torch.compile finds what the self-check left there
        _output_classes[base] = dataclasses.make_dataclass(
            base.__name__,
            [(name, Tensor | None, field(default=None)) for name in FIELDS],
            bases=(base,),
            namespace={"__doc__": base.__doc__, "__module__": __name__},
        )
    return _output_classes[base]


# ---- the losses


def _splits(state: _Attached, head: HeadInputs) -> Any:
    """Over which ranks the head is split: while it is attached it is still whole."""
    return state.process_group if is_dtensor(head.weight) else None


def _cross_entropy(
    state: _Attached,
    head: HeadInputs,
    targets: Tensor,
    shift: bool,
    ignore_index: int,
    items: Tensor | int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    names = [name for name in _KERNEL_OPTIONS if name in state.options]
    targets = targets.to(head.hidden.device, non_blocking=True)
    logps: Any = linear_token_logps(
        head.hidden,
        head.weight,
        targets,
        shift=shift,
        ignore_index=ignore_index,
        bias=head.bias,
        softcap=state.transform.softcap,
        logit_scale=state.transform.scale,
        process_group=_splits(state, head),
        **{name: state.options[name] for name in names},
    )
    if items is None or not state.divides_by_items:
        scored = targets[..., 1:] if shift else targets
        items = (scored != ignore_index).sum().clamp_min(1)
    elif isinstance(items, Tensor):
        items = items.to(logps.device, non_blocking=True)
    return -logps.sum() / items, {"token_logps": logps}


def _pro(
    state: _Attached,
    head: HeadInputs,
    targets: Tensor | None,
    shift: bool,
    ignore_index: int,
    ranking: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, layout = head.hidden, ranking.get("layout")
    rewards: Any = ranking.get("rewards")
    n: Any = ranking.get("num_candidates")
    if layout is None and targets is not None:
        n = n if rewards is None else rewards.shape[1]
        hidden = hidden.reshape(-1, n, *hidden.shape[-2:])
        targets = targets.reshape(-1, n, targets.shape[-1]).to(hidden.device, non_blocking=True)
    others = ("candidate_mask", "prompt_weights", "sft_index")
    options = state.options | {name: ranking.get(name) for name in others}
    out = linear_pro_loss(
        hidden.reshape(-1, hidden.shape[-1]) if layout is not None else hidden,
        head.weight,
        targets if layout is None else None,
        rewards,
        shift=shift and layout is None,
        ignore_index=ignore_index,
        layout=None if layout is None else layout.to(hidden.device, non_blocking=True),
        bias=head.bias,
        softcap=state.transform.softcap,
        logit_scale=state.transform.scale,
        process_group=_splits(state, head),
        **options,
    )
    return out.loss, {name: getattr(out, name) for name in FIELDS if name != "token_logps"}


def _check_ranking(
    loss: str, ranking: Mapping[str, Any], targets: Any, items: Tensor | int | None
) -> None:
    if not ranking:
        if loss == "ranking":
            raise ValueError(
                "the model is attached with loss='ranking', and the batch does not say which rows "
                "are candidates of one prompt: give rewards (B, n), num_candidates=n or a layout"
            )
        return
    if loss == "cross_entropy":
        raise ValueError(
            f"the model is attached with loss='cross_entropy', which has no {sorted(ranking)}"
        )
    if items is not None:
        raise ValueError(
            "the ranking loss is a mean over prompts and cannot be divided by num_items_in_batch, "
            f"got {items} (Trainer passes it to models that take it): attach(model, loss='ranking')"
        )
    layout = ranking.get("layout")
    rewards: Any = ranking.get("rewards")
    count: Any = ranking.get("num_candidates")
    if layout is not None:
        if not isinstance(layout, Layout):
            raise TypeError(f"layout must be a pro_kernels.Layout, got {type(layout).__name__}")
        return
    if rewards is None and count is None:
        raise ValueError(
            f"{sorted(ranking)} belong to the ranking loss, which needs to know the candidates of "
            "each prompt: give rewards (B, n), or num_candidates=n for rows ordered best first"
        )
    if rewards is not None and (not isinstance(rewards, Tensor) or rewards.dim() != 2):
        shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"rewards must be a tensor of shape (B, n), got {shape}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"num_candidates must be an integer >= 1, got {count!r}")
    n: Any = count if rewards is None else rewards.shape[1]
    if rewards is not None and count is not None and count != n:
        raise ValueError(f"num_candidates={count} but rewards have shape {tuple(rewards.shape)}")
    rows = 0 if targets is None else targets.shape[0]
    if n == 0 or rows % n or (rewards is not None and rows != rewards.numel()):
        expected = f"a multiple of num_candidates={n}" if rewards is None else f"{rewards.numel()}"
        raise ValueError(
            f"labels must have {expected} rows, one for each candidate, got {rows} in shape "
            f"{tuple(targets.shape) if targets is not None else None}"
        )


def _watched(lm: Any) -> list[tuple[Any, str, Any]]:
    """The values of ``_SCALES``."""
    return [
        (config, name, value)
        for config in configs_of(lm)
        for name, value in config.to_dict().items()
        if _SCALES.search(name) and (value is None or isinstance(value, (int, float)))
    ]


def _check_unchanged(lm: Any, state: _Attached) -> None:
    """Raise ValueError where what the probe found is no longer so."""
    changed = [
        f"config.{name} is {getattr(config, name)!r}, was {value!r}"
        for config, name, value in state.watched
        if getattr(config, name, value) != value
    ]
    if lm._loss_function is not state.loss_function and not state.running:
        changed.append("loss_function is another")
    if changed:
        raise ValueError(
            f"{type(lm).__name__} was changed after attach(model): {'; '.join(changed)}; "
            "detach(model) and attach it again"
        )


def _check_labels(
    state: _Attached, input_ids: Tensor | None, labels: Tensor, ignore_index: int
) -> None:
    """Raise ValueError for labels that were shifted before: each is the next token already.

    On a GPU at the first call only, because the host waits for the answer.
    """
    if input_ids is None or input_ids.shape != labels.shape or torch.compiler.is_compiling():
        return
    if labels.device.type != "cpu" and state.labels_checked:
        return
    state.labels_checked = True
    scored = labels[:, :-1] != ignore_index
    ahead = ((labels[:, :-1] == input_ids[:, 1:]) | ~scored).all()
    in_place = ((labels[:, :-1] == input_ids[:, :-1]) | ~scored).all()
    if bool(ahead & ~in_place & scored.any()):
        raise ValueError(
            "labels are shifted already: each equals the next of input_ids, and the model shifts "
            "them once more; pass the input_ids (-100 where nothing is scored), or give these as "
            "shift_labels"
        )


# ---- the self-check


def _check_loss(lm: Any, state: _Attached, inputs: dict[str, Any], tolerance: float) -> None:
    """Compare the loss both ways, with the model's own loss function called and without.

    Once on the inputs, once with padding, labels under it, and some that do not count.

    Raises:
        ValueError: the fused loss is another one.
    """
    if "labels" not in inspect.signature(_class_forward(lm)).parameters:
        state.calls_loss_function = False
        return
    name, original = type(lm).__name__, _original(lm, state)

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
            return _cross_entropy(state, head, kwargs["labels"], True, IGNORE_INDEX, items)

        more = {} if items is None else {"num_items_in_batch": items}
        return float(
            _run(lm, state, original, {**kwargs, **more, "return_dict": True}, loss_of).loss
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
    kinds = [x.kind for x in inspect.signature(_class_forward(lm)).parameters.values()]
    return getattr(lm, "accepts_loss_kwargs", True) and inspect.Parameter.VAR_KEYWORD in kinds


def _padded(lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with two labels that do not count and, of ids alone, a second row half padded."""
    case = dict(inputs)
    labels = case["labels"].clone()
    labels[:, 1:3] = IGNORE_INDEX
    takes_mask = "attention_mask" in inspect.signature(_class_forward(lm)).parameters
    if takes_mask and case.keys() <= {"input_ids", "labels"}:
        ids = case["input_ids"]
        case["input_ids"] = torch.cat([ids, ids.roll(3, 1)])
        mask = torch.ones_like(case["input_ids"])
        mask[ids.shape[0] :, ids.shape[1] // 2 :] = 0
        case["attention_mask"] = mask
        labels = torch.cat([labels, case["input_ids"][ids.shape[0] :]])
    case["labels"] = labels
    return case
