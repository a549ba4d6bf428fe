"""What a model with the fused loss carries, and how its forward runs: the losses behind ``attach``.

The model's own forward runs, with its output embedding replaced for that call by a stub that keeps
its input and returns logits of width 0. So nothing the model does around its head is repeated here:
not how hidden states are prepared, nor which auxiliary losses are added.
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
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.functional import linear_pro_loss, linear_token_logps
from pro_kernels.layout import Layout
from pro_kernels.lm_head import FALLBACK, HeadInputs, gathers_itself, resolve
from pro_kernels.options import IGNORE_INDEX, PROOptions
from pro_kernels.probe import LogitTransform, configs_of, only, replaced
from pro_kernels.shards import is_dtensor

# Keyword arguments that the forward of an attached model takes beside the model's own.
RANKING = ("rewards", "num_candidates", "candidate_mask", "prompt_weights", "sft_index", "layout")
# Fields that its output has beside the model's own; all but ``token_logps`` as in ``PROOutput``.
FIELDS = ("token_logps", "scores", "logps", "lengths", "rank_losses", "sft_loss")
# Options of the two losses that are no fields of ``PROOptions``.
KERNEL_OPTIONS = ("logits_dtype", "grad_filter", "backend", "budget")
OPTIONS = {f.name for f in dataclasses.fields(PROOptions)} | set(KERNEL_OPTIONS)
# No keywords of a call: models take any, and would leave these unread.
_NOT_OF_A_CALL = OPTIONS | {
    *("process_group", "sequence_group", "softcap", "logit_scale", "shift", "bias")
}  # fmt: skip
STATE = "_pro_kernels"
# Attributes of the instance that are set; accelerate may have set a forward before.
REPLACED = ("forward", "accepts_loss_kwargs", "_loss_function")
# Names of config values that models read at each call to scale or cap their logits.
_SCALES = re.compile("softcap|soft_cap|logit.?scale|logits_scal|multiplier")
_output_classes: dict[type, type] = {}


@dataclass
class Attached:
    """What ``attach`` found out and was told; kept on the model."""

    loss: str  # one of LOSSES
    options: dict[str, Any]  # of linear_pro_loss
    own: dict[str, Any]  # attributes of the instance that were there before (REPLACED)
    process_group: Any = None  # as given; of a head that is a DTensor
    transform: LogitTransform = field(default_factory=LogitTransform)
    calls_loss_function: bool = True  # else the loss is added to the output here
    divides_by_items: bool = True  # the model's own loss knows num_items_in_batch
    loss_function: Any = None  # the model's own
    watched: list[tuple[Any, str, Any]] = field(default_factory=list)  # config, name, value
    head_own: frozenset[Any] = frozenset()  # keys of ``own_of_head`` that the try-out ran with
    tried: bool = False  # ``attach`` is over, which ran a head that was still whole
    labels_checked: bool = False
    running: bool = False
    pending: bool = False  # a call of the ranking loss has not reached ``_forward``

    def __deepcopy__(self, memo: dict) -> Attached:
        memo[id(self.process_group)] = self.process_group  # of this process, not of the model
        return Attached(**copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> Any:
        """Refused: unpickled, it would have its own forward, which ignores what it is not told."""
        raise TypeError(
            "an attached model cannot be pickled; detach(model) before, or save its state_dict"
        )


# ---- the forward


def class_forward(lm: Any) -> Callable[..., Any]:
    """The forward of the model's class."""
    return type(lm).forward


def original_forward(lm: Any, state: Attached) -> Callable[..., Any]:
    """The model's forward as it was."""
    return state.own.get("forward") or functools.partial(class_forward(lm), lm)


@functools.cache
def fused_forward(original: Callable[..., Any]) -> Callable[..., Any]:
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
    state = getattr(self, STATE)
    state.pending = False
    original = original_forward(self, state)
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
        return cross_entropy(state, head, targets, shift, ignore_index, items)

    return run_fused(self, state, original, kwargs, loss_of)


def run_fused(
    lm: Any,
    state: Attached,
    original: Callable[..., Any],
    kwargs: dict[str, Any],
    loss_of: Callable[[HeadInputs], tuple[Tensor, dict[str, Tensor]]],
) -> Any:
    """The original forward around the fused loss: its output with ``loss`` and ``FIELDS``."""
    module = lm.get_output_embeddings()
    if state.tried and not state.running and not torch.compiler.is_compiling():
        _check_head(lm, module, state)
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
        head = resolve(module, hidden)
        softcap, scale = state.transform.softcap, state.transform.scale
        return loss_of(head._replace(softcap=softcap, logit_scale=scale))

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
def _alone(state: Attached) -> Iterator[None]:
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


def before_call(lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook: the ranking loss is asked for."""
    state = getattr(lm, STATE)
    state.pending = any(kwargs.get(name) is not None for name in RANKING)


def after_call(lm: nn.Module, args: tuple, output: Any) -> None:
    """A hook: it must have been computed. Many forwards take unknown arguments without a word."""
    if getattr(lm, STATE).pending:
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


def _splits(state: Attached, head: HeadInputs) -> Any:
    """Over which ranks the head is split.

    Raises:
        ValueError: the model was attached with a process group and its head is whole.
    """
    if is_dtensor(head.weight):
        return state.process_group
    if state.tried and state.process_group is not None:
        raise ValueError(
            "the model is attached with a process_group, and its head is no DTensor: split it with "
            "parallelize_module(model, mesh, {'lm_head': ColwiseParallel()}), or attach without"
        )
    return None


def cross_entropy(
    state: Attached,
    head: HeadInputs,
    targets: Tensor,
    shift: bool,
    ignore_index: int,
    items: Tensor | int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's own loss of these targets, and the log-probs it is made of."""
    names = [name for name in KERNEL_OPTIONS if name in state.options]
    targets = targets.to(head.hidden.device, non_blocking=True)
    logps: Any = linear_token_logps(
        head.hidden,
        head.weight,
        targets,
        shift=shift,
        ignore_index=ignore_index,
        process_group=_splits(state, head),
        **head.options(),
        **{name: state.options[name] for name in names},
    )
    if items is None or not state.divides_by_items:
        scored = targets[..., 1:] if shift else targets
        items = (scored != ignore_index).sum().clamp_min(1)
    elif isinstance(items, Tensor):
        items = items.to(logps.device, non_blocking=True)
    return -logps.sum() / items, {"token_logps": logps}


def _pro(
    state: Attached,
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
        process_group=_splits(state, head),
        **head.options(),
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


def watched(lm: Any) -> list[tuple[Any, str, Any]]:
    """The values of ``_SCALES``."""
    return [
        (config, name, value)
        for config in configs_of(lm)
        for name, value in config.to_dict().items()
        if _SCALES.search(name) and (value is None or isinstance(value, (int, float)))
    ]


def own_of_head(head: nn.Module) -> dict[Any, str]:
    """What would change the output of the head beside its class, which the fused path leaves out.

    Hooks of FSDP, tensor parallel and DeepSpeed move weights and outputs about, and are not meant.
    """
    found: dict[Any, str] = {}
    for name, module in head.named_modules():
        hooks = dict(module._forward_hooks)
        if name:  # a part, which the loss reads and does not call
            hooks |= module._forward_pre_hooks
        for key, hook in hooks.items():
            if not _origin(hook).startswith(("torch.distributed.", "deepspeed.")):
                found[key] = f"a forward hook ({getattr(hook, '__qualname__', hook)})"
        forward = module.__dict__.get("forward")
        forward = getattr(forward, "__func__", forward)
        if forward is not None and forward is not type(module).forward:
            found[forward] = f"another forward ({getattr(forward, '__qualname__', forward)})"
    return found


def _origin(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(getattr(hook, "__func__", hook), "__module__", type(hook).__module__)


def _check_head(lm: Any, head: nn.Module, state: Attached) -> None:
    """Raise ValueError where the head got what the model was not tried out with."""
    since = [what for key, what in own_of_head(head).items() if key not in state.head_own]
    if since:
        raise ValueError(
            f"the LM head of {type(lm).__name__} got {' and '.join(since)} after attach(model) or "
            "OpenModel(model), which the fused loss would leave out: remove it, or detach(model) "
            "and attach again (make the OpenModel again), which tries it out"
        )


def _check_unchanged(lm: Any, state: Attached) -> None:
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
    state: Attached, input_ids: Tensor | None, labels: Tensor, ignore_index: int
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
