"""A causal LM opened before its LM head: what is known of it, and its forward around another loss.

The model's own forward runs, with its output embedding replaced for that call by a stub that keeps
its input and returns logits of width 0. So nothing the model does around its head is repeated here:
not how hidden states are prepared, nor which auxiliary losses are added.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.distinct.row import spread_from
from pro_kernels.fused.shards import is_dtensor
from pro_kernels.models import answers  # noqa: F401  (they register themselves)
from pro_kernels.models.head import HeadInputs, gathers_itself, own_of_head, resolve, unfit
from pro_kernels.models.lazy import lazy_logits, worth
from pro_kernels.models.probe import configs_of, exchanged, only, replaced

# From what the head multiplies to the loss, a scalar, and further fields of the output.
LossOf = Callable[[HeadInputs], tuple[Tensor, dict[str, Tensor]]]
# Fields that an output has beside the model's own; all but ``token_logps`` as in ``PROOutput``.
FIELDS = ("token_logps", "scores", "logps", "lengths", "rank_losses", "sft_loss")
# Names of config values that models read at each call to scale or cap their logits.
_SCALES = re.compile("softcap|soft_cap|logit.?scale|logits_scal|multiplier")
_output_classes: dict[type, type] = {}


def base_of(model: Any) -> Any:
    """The model out of PEFT's wrapper, where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unwrapped(model: nn.Module) -> Any:
    """``base_of``; TypeError of no module, ValueError of one that is wrapped or learns a prompt."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {name}")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise unfit(
            f"{name} learns a prompt, which lengthens the batch in PEFT's own forward",
            "use LoRA or the like, or ",
        )
    lm = base_of(model)
    if hasattr(lm, "_orig_mod") or isinstance(getattr(lm, "module", None), nn.Module):
        raise ValueError(f"model is wrapped in {name}; expected the model inside it")
    return lm


def causal_lm(model: nn.Module) -> Any:
    """``unwrapped``, a transformers model with an LM head, or the same errors."""
    lm, name = unwrapped(model), type(model).__name__
    if not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise unfit(f"model must be a causal LM of transformers, got {name}")
    if lm.get_output_embeddings() is None:
        raise unfit(f"{type(lm).__name__} has no LM head (get_output_embeddings() gives None)")
    return lm


@dataclass
class Opened:
    """What ``attach`` was told of a model and found out; kept on it."""

    lm: Any  # out of PEFT's wrapper
    loss: str = "auto"  # one of LOSSES
    # Of linear_pro_loss.
    options: dict[str, Any] = field(default_factory=lambda: {"backend": "auto", "budget": None})
    classes: dict[str, Any] = field(default_factory=dict)  # of linear_cross_entropy
    process_group: Any = None  # as given; of a head that is a DTensor
    own: dict[str, Any] = field(default_factory=dict)  # what attributes that attach sets were
    hooks: list[Any] = field(default_factory=list)  # handles of attach's
    lazy: bool = False  # a call without labels returns ``LazyLogits``
    habits: dict[str, Any] = field(default_factory=dict)  # of who asks them
    rows: Any = None  # ``Distinct``, where attach began that
    loaded: bool = False  # attached by ``pro-kernels run``; who attaches it anew may
    logits: dict[str, Any] = field(default_factory=dict)  # softcap and logit_scale of HeadInputs
    calls_loss_function: bool = True  # else the loss is added to the output here
    divides_by_items: bool = True  # the model's own loss knows num_items_in_batch
    loss_function: Any = None  # the model's own
    watched: list[tuple[Any, str, Any]] = field(default_factory=list)  # config, name, value
    head_own: frozenset[Any] = frozenset()  # keys of ``own_of_head`` that the try-out ran with
    tried: bool = False  # ``attach`` is over, which ran a head that was still whole
    labels_checked: bool = False
    running: bool = False
    pending: bool = False  # a call of the ranking loss has not reached the fused forward

    def __deepcopy__(self, memo: dict) -> Opened:
        memo[id(self.process_group)] = self.process_group  # of this process, not of the model
        return Opened(**copy.deepcopy(vars(self), memo))

    def __reduce__(self) -> Any:
        """Refused: unpickled, it would have its own forward, which ignores what it is not told."""
        raise TypeError(
            "an attached model cannot be pickled; detach(model) before, or save its state_dict"
        )

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.lm).__name__

    def original(self, **kwargs: Any) -> Any:
        """The model's forward as it was."""
        forward = self.own.get("forward")
        return type(self.lm).forward(self.lm, **kwargs) if forward is None else forward(**kwargs)

    def watch(self) -> None:
        """Remember how the model was when it was tried out."""
        self.head_own = frozenset(own_of_head(self.lm.get_output_embeddings()))
        self.watched = [
            (config, name, value)
            for config in configs_of(self.lm)
            for name, value in config.to_dict().items()
            if _SCALES.search(name) and (value is None or isinstance(value, (int, float)))
        ]
        self.tried = True

    def check_unchanged(self) -> None:
        """Raise ValueError where what the probe found is no longer so."""
        changed = [
            f"config.{name} is {getattr(config, name)!r}, was {value!r}"
            for config, name, value in self.watched
            if getattr(config, name, value) != value
        ]
        if self.lm._loss_function is not self.loss_function and not self.running:
            changed.append("loss_function is another")
        if changed:
            raise ValueError(
                f"{self.name} was changed after attach(model): {'; '.join(changed)}; "
                "detach(model) and attach it again"
            )

    def _check_head(self, head: nn.Module) -> None:
        """Raise ValueError where the head got what the model was not tried out with."""
        since = [what for key, what in own_of_head(head).items() if key not in self.head_own]
        if since:
            raise ValueError(
                f"the LM head of {self.name} got {' and '.join(since)} after attach(model) or "
                "OpenModel(model), which the fused loss would leave out: remove it, or "
                "detach(model) and attach again (make the OpenModel again), which tries it out"
            )

    def run(self, loss_of: LossOf, kwargs: dict[str, Any]) -> Any:
        """The original forward around a loss: its output with ``loss`` and ``FIELDS``."""
        head = self.lm.get_output_embeddings()
        if self.tried and not self.running and not torch.compiler.is_compiling():
            self._check_head(head)
        wanted = kwargs.get("return_dict")
        as_tuple = not (getattr(self.lm.config, "return_dict", True) if wanted is None else wanted)
        if as_tuple:
            kwargs["return_dict"] = True
        captured: list[Tensor] = []
        strange: list[str] = []
        met: list[HeadInputs] = []
        extras: dict[str, Tensor] = {}

        def stub(hidden: Tensor, *args: Any, **others: Any) -> Tensor:
            captured.append(hidden)
            strange.extend(name for name, value in others.items() if value is not None)
            strange.extend("positional ones" for _ in args)
            return _no_logits(hidden)

        apart = gathers_itself(head)

        def of_head(hidden: Any) -> tuple[Tensor, dict[str, Tensor]]:
            if is_dtensor(hidden):  # of ColwiseParallel, whose ranks all need it
                if apart:
                    raise ValueError(
                        f"the LM head of {self.name} is tensor parallel and a unit of FSDP2 of its "
                        "own; leave it to the root (no fully_shard(model.lm_head))"
                    )
                hidden = hidden.full_tensor()
            inputs = resolve(head, hidden)._replace(**self.logits)
            if self.lazy and not (apart or torch.compiler.is_compiling() or is_dtensor(inputs[1])):
                met.append(inputs)
            return loss_of(inputs)

        def loss_function(*_: Any, **__: Any) -> Tensor:
            hidden = only(captured, self.lm)
            if apart:
                with replaced(head, "forward", of_head):
                    loss, more = head(hidden)
            else:
                loss, more = of_head(hidden)
            extras.update(more)
            return loss

        # A head that gathers itself is called once, for the loss: its hooks then see what needs it.
        stubbed = replaced(head, "forward", stub)
        if apart:
            found = [
                (x, name) for x in self.lm.modules() for name, y in x.named_children() if y is head
            ]
            stubbed = exchanged([(owner, name, _StandIn(head, stub)) for owner, name in found])
        labels = kwargs.pop("labels", None)
        calls: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.calls_loss_function:
            if labels is None:  # any make the model ask for its loss, which has targets of its own
                ids = kwargs.get("input_ids")
                labels = kwargs["inputs_embeds"][..., 0].long() if ids is None else ids
            kwargs["labels"] = labels
            calls = replaced(self.lm, "_loss_function", loss_function)
        else:
            kwargs.pop("num_items_in_batch", None)
        with self._alone(), stubbed, calls:
            out = self.original(**kwargs)
        if self.calls_loss_function:
            if not extras:
                raise RuntimeError(f"{self.name} did not call its loss_function")
            loss = out["loss"]
        elif out.get("aux_loss") is None:
            loss = loss_function()
        else:
            raise unfit(
                f"{self.name} has an auxiliary loss and no loss_function to which it adds it"
            )
        if strange:
            raise unfit(
                f"the LM head of {self.name} was called with more than its input ({strange}: "
                "adapters chosen row by row, say), which the fused path does not know"
            )
        values = {name: value for name, value in out.items() if name not in ("loss", "logits")}
        values["logits"] = None
        if met and out.get("logits") is not None:
            made = _no_logits(captured[0]).dtype
            values["logits"] = self._not_made(met[0], made, out["logits"].dtype)
        result = _output_class(type(out))(loss=loss, **values, **extras)
        return result.to_tuple() if as_tuple else result

    def run_without_labels(self, kwargs: dict[str, Any]) -> Any:
        """The original forward, with ``LazyLogits`` where that is known to come to the same."""
        head = self.lm.get_output_embeddings()
        if not self._stays_lazy(head, kwargs):
            return self.original(**kwargs)
        wanted = kwargs.get("return_dict")
        as_tuple = not (getattr(self.lm.config, "return_dict", True) if wanted is None else wanted)
        forward = head.forward
        calls: list[HeadInputs | None] = []  # None: made as ever
        made, places = torch.float32, None

        def stub(hidden: Tensor, *args: Any, **others: Any) -> Tensor:
            nonlocal made, places
            calls.append(None)
            if len(calls) > 1 or args or any(x is not None for x in others.values()):
                return forward(hidden, *args, **others)
            spread = spread_from(hidden)  # of distinct rows: each is multiplied once
            row, places = (hidden, None) if spread is None else spread
            try:
                inputs = resolve(head, row)._replace(**self.logits)
            except ValueError:
                return forward(hidden)
            if is_dtensor(hidden) or is_dtensor(inputs.weight):
                return forward(hidden)
            if not (self.options.get("head_dtype") or worth(*inputs[:2])):
                return forward(hidden)
            calls[0] = inputs
            left = _no_logits(hidden)
            made = left.dtype
            return left

        try:
            with self._alone(), replaced(head, "forward", stub):
                out = self.original(**{**kwargs, "return_dict": True})
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it may be the width of 0
            if not any(calls):
                raise
            out = {}
        if any(calls):
            logits, inputs = out.get("logits"), calls[0]
            assert inputs is not None
            shape = (*(inputs.hidden.shape[:-1] if places is None else places.shape), 0)
            if len(calls) > 1 or logits is None or logits.shape != shape:
                plain = self.original(**kwargs)
                self.lazy = False  # the model makes more of its logits than it returns
                return plain
            out["logits"] = self._not_made(inputs, made, logits.dtype, places)
        return out.to_tuple() if as_tuple else out

    def _not_made(self, inputs: HeadInputs, *more: Any) -> Tensor:
        names = self.options.keys() & {"backend", "budget", "head_dtype", "batch_invariant"}
        options = {name: self.options[name] for name in names}
        return lazy_logits(inputs, options, self.habits, *more)

    def _stays_lazy(self, head: nn.Module, kwargs: dict[str, Any]) -> bool:
        if not self.lazy or self.running or torch.compiler.is_compiling() or gathers_itself(head):
            return False
        if kwargs.get("past_key_values") is not None or torch.jit.is_tracing():  # it generates
            return False
        try:
            self._check_head(head)
            self.check_unchanged()
        except ValueError:
            return False
        return True

    def _alone(self) -> contextlib.AbstractContextManager:
        """One call at a time: the stub is the module's for all threads."""
        if torch.compiler.is_compiling():
            return contextlib.nullcontext()
        if self.running:
            raise RuntimeError(
                "an attached model was called within a call of its own or from two threads at once "
                "(torch.nn.DataParallel does that; use DistributedDataParallel)"
            )
        return exchanged([(self, "running", True)])


def _no_logits(hidden: Tensor) -> Tensor:
    """What a head's stub leaves: of width 0, in the dtype that the head would leave."""
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return hidden.new_empty((*hidden.shape[:-1], 0), dtype=dtype)


class _StandIn(nn.Module):
    """A module in the head's place, so that a call of it is no call of the head."""

    def __init__(self, head: nn.Module, stub: Callable[..., Tensor]):
        super().__init__()
        self.__dict__.update(head=head, forward=stub)  # no child: the head stays where it is

    def __getattr__(self, name: str) -> Any:
        """What models ask of their head: its weight's dtype, say."""
        return getattr(self.__dict__["head"], name)


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
