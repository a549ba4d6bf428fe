"""TRL's trainers on the fused kernels.

Newer releases of TRL (1.16) score tokens under DPO, KTO, GRPO, RLOO and SFT through one autograd
Function, ``ChunkedLogProbFunction``. ``accelerate_trl()`` puts another in its place, with the same
arguments and the same outputs: three head matmuls instead of four, and none for positions that are
not scored (TRL itself scores every position where it has no Triton kernel). Trainers that work on
logits, those of older releases among them, have their models attached while they run
(``LazyLogits``). And every trainer of TRL then runs its models on distinct rows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from pro_kernels.api import linear_token_logps, linear_token_stats
from pro_kernels.distinct.decoder import Distinct, distinct_rows
from pro_kernels.integrations.switch import Switch
from pro_kernels.models.attach import attach, attached_options, detach
from pro_kernels.models.head import head_for
from pro_kernels.models.opened import base_of
from pro_kernels.validate import check_choice

_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_switch = Switch("accelerate_trl", "TRL", "TRL is accelerated", "restore_trl")
_REFUSED = "_pro_kernels_refused"  # the attribute of a trainer that says what models cannot
_RUNS = ("train", "evaluate", "predict")  # methods of a trainer that run its models


class FusedLogProbs:
    """Stands in for ``ChunkedLogProbFunction``; ``apply`` is all that TRL calls."""

    backend = "auto"
    budget: int | None = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-probs and entropies (N,), both differentiable; log sum p^2, mean logit, top-1.

        What is not in ``outputs`` is None. ``chunk_size`` is TRL's; here the budget decides.
        """
        if hasattr(weight, "ds_id"):  # of DeepSpeed ZeRO-3: TRL gathers it again in its backward
            from trl.kernels import ChunkedLogProbFunction

            return ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        weight, bias = head_for(hidden, weight, bias)
        options: dict[str, Any] = {"bias": bias, "backend": cls.backend, "budget": cls.budget}
        options["logit_scale"] = logit_scale / temperature
        if final_logit_softcapping is not None:  # cap(z) / T = (c / T) tanh((z / T) / (c / T))
            options["softcap"] = final_logit_softcapping / temperature
        wanted = [name in outputs for name in _OUTPUTS]
        if not any(wanted):
            logps: Any = linear_token_logps(hidden, weight, targets, **options)
            return logps, *[None] * 4
        stats = linear_token_stats(hidden, weight, targets, extra=any(wanted[1:]), **options)
        rest = (x if keep else None for keep, x in zip(wanted, stats[1:], strict=True))
        return stats.logps, *rest


_ARGUMENTS = tuple(inspect.signature(FusedLogProbs.apply).parameters)


def accelerate_trl(
    *, rows: str = "distinct", backend: str = "auto", budget: int | None = None
) -> None:
    """Run TRL's trainers on the fused kernels and on distinct rows, in this process.

    Models, trainers and their arguments stay as they are; call it before training. Padding is not
    run, and what several rows of a batch begin with is run once; the end of the training says how
    much that left out.

    Args:
        rows: "distinct", or "padded" to run batches as TRL makes them. A model that cannot run
            distinct rows runs padded ones, and it is said why.
        backend: "auto" or a backend's name.
        budget: bytes a call may take beyond the inputs' gradients; None for a default.

    Raises:
        ImportError: TRL is missing, or has no trainer that the others are made from (before 0.24).
        ValueError: TRL is accelerated already, or ``rows`` is neither.
    """
    check_choice("rows", rows, ("distinct", "padded"))
    trainer, utils = _parts_of_trl()
    FusedLogProbs.backend, FusedLogProbs.budget = backend, budget
    if utils is not None:
        _switch.put(utils, "_ChunkedLogProbFunction", FusedLogProbs)
        _switch.put(utils, "_use_triton", lambda device: True)
    for name in _RUNS:
        _switch.put(trainer, name, _on_kernels(getattr(trainer, name), rows))


def restore_trl() -> None:
    """Undo ``accelerate_trl``; nothing happens where it was not called."""
    _switch.restore()


def _on_kernels(method: Callable[..., Any], rows: str) -> Callable[..., Any]:
    """A method of a trainer, whose models are attached and run distinct rows meanwhile."""

    @functools.wraps(method)
    def run(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        say = print if trainer.is_world_process_zero() else lambda _: None
        refused = trainer.__dict__.setdefault(_REFUSED, set())  # which are not tried again
        with contextlib.ExitStack() as stack:
            begun: Distinct | None = None
            for name in ("model", "ref_model"):
                model = getattr(trainer, name, None)
                if model is None:
                    continue
                model = trainer.accelerator.unwrap_model(model)
                if _works_on_logits(model) and (name, "logits") not in refused:
                    try:
                        attach(model, backend=FusedLogProbs.backend, budget=FusedLogProbs.budget)
                        stack.callback(_detach, model)
                    except ValueError as reason:
                        refused.add((name, "logits"))
                        say(f"pro_kernels: the logits of {name} are made: {reason}")
                if rows == "padded" or (name, "rows") in refused:
                    continue
                try:
                    if why := _no_distinct_rows(trainer):
                        raise ValueError(why)
                    distinct = distinct_rows(model)
                except ValueError as reason:
                    refused.add((name, "rows"))
                    say(f"pro_kernels: {name} runs padded rows: {reason}")
                    continue
                stack.enter_context(distinct)
                begun = distinct if name == "model" and distinct.users == 1 else begun
            result = method(trainer, *args, **kwargs)
            if begun is not None:
                say(_sentence(begun))
            return result

    return run


def _sentence(begun: Distinct) -> str:
    """What distinct rows left out of a training."""
    if begun.padded_tokens:
        share = f"{begun.run_tokens} of {begun.padded_tokens} tokens were run"
        return f"pro_kernels: {share} ({begun.saved:.0%} saved)"
    why = f": {'; '.join(sorted(begun.refused))}" if begun.refused else ""
    return f"pro_kernels: no batch ran distinct rows{why}"


def _works_on_logits(model: Any) -> bool:
    """Whether a trainer will ask the model for logits; TRL's own function replaces the forward."""
    lm = base_of(model)
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    return head is not None and "forward" not in vars(lm) and attached_options(model) is None


def _detach(model: Any) -> None:
    with contextlib.suppress(ValueError):  # accelerate wrapped its forward meanwhile
        detach(model)


def _no_distinct_rows(trainer: Any) -> str | None:
    """Why the models of a trainer cannot run distinct rows, whatever they are."""
    if trainer.args.n_gpu > 1:
        return "torch.nn.DataParallel splits batches; start one process a GPU"
    split = getattr(trainer.accelerator, "parallelism_config", None)
    if split is not None and (split.cp_enabled or split.sp_enabled):
        return "context and sequence parallelism split rows over ranks"
    return None


def _parts_of_trl() -> tuple[Any, ModuleType | None]:
    """The class of all trainers, and the module with the function to replace, if there is one."""
    trl, utils = _switch.modules("trl", "trl.trainer.utils")
    try:
        base: Any = importlib.import_module("trl.trainer.base_trainer")
    except ImportError as error:
        raise ImportError(
            f"TRL {trl.__version__} has no trainer that all others are made from, as 0.24 and "
            "later have; pk.attach(model, rows='distinct') before the trainer is made does the same"
        ) from error
    trainer = getattr(base, "_BaseTrainer", None) or base.BaseTrainer
    names = ("_ChunkedLogProbFunction", "_use_triton")
    if not all(hasattr(utils, name) for name in names):
        return trainer, None
    found = tuple(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)[1:]
    if found != _ARGUMENTS:
        warnings.warn(
            f"TRL {trl.__version__} computes token log-probs with the arguments {found}, which "
            f"accelerate_trl does not know (it knows {_ARGUMENTS}); that function stays TRL's own",
            stacklevel=3,
        )
        return trainer, None
    return trainer, utils
