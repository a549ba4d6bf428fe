"""TRL's trainers on the fused kernels.

TRL 1.16 scores tokens under DPO, KTO, GRPO, RLOO and SFT through one autograd Function,
``ChunkedLogProbFunction``. ``accelerate_trl()`` puts another in its place, with the same arguments
and the same outputs: three head matmuls instead of four, and none for positions that are not scored
(TRL itself scores every position where it has no Triton kernel).
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pro_kernels.functional import linear_token_logps, linear_token_stats

OLDEST = (1, 16)
_ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_saved: dict[str, Any] = {}  # what stood in trl.trainer.utils; empty: nothing was replaced


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
        cap = final_logit_softcapping
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        options: dict[str, Any] = {
            "bias": bias,
            # softcap(z) / T = (c / T) tanh((z / T) / (c / T))
            "logit_scale": logit_scale / temperature,
            "softcap": None if cap is None else cap / temperature,
            "backend": cls.backend,
            "budget": cls.budget,
        }
        wanted = [name in outputs for name in _OUTPUTS]
        if not any(wanted):
            logps: Any = linear_token_logps(hidden, weight, targets, **options)
            return logps, *[None] * 4
        stats = linear_token_stats(hidden, weight, targets, extra=any(wanted[1:]), **options)
        rest = (x if keep else None for keep, x in zip(wanted, stats[1:], strict=True))
        return stats.logps, *rest


def accelerate_trl(*, backend: str = "auto", budget: int | None = None) -> None:
    """Run the token log-probs of TRL's trainers through the fused kernels, in this process.

    Models, trainers and their arguments stay as they are; call it before training. Positions that
    are not scored leave the head matmul on every device.

    Args:
        backend: "auto" or a backend's name.
        budget: bytes a call may take beyond the inputs' gradients; None for a default.

    Raises:
        ImportError: TRL is missing, or of a version whose function has other arguments.
        ValueError: TRL is accelerated already.
    """
    utils = _trl_utils()
    if _saved:
        raise ValueError("TRL is accelerated already; call restore_trl() first")
    FusedLogProbs.backend, FusedLogProbs.budget = backend, budget
    new = {"_ChunkedLogProbFunction": FusedLogProbs, "_use_triton": lambda device: True}
    _saved.update({name: getattr(utils, name) for name in new})
    for name, value in new.items():
        setattr(utils, name, value)


def restore_trl() -> None:
    """Undo ``accelerate_trl``; nothing happens where it was not called."""
    if _saved:
        utils = _trl_utils()
        for name, value in _saved.items():
            setattr(utils, name, value)
        _saved.clear()


def _trl_utils() -> ModuleType:
    """``trl.trainer.utils``, checked to be the one this module was written for."""
    try:
        import trl
        import trl.trainer.utils as utils
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise ImportError(
            f"accelerate_trl needs TRL >= {'.'.join(map(str, OLDEST))} (pip install trl): {error}"
        ) from error
    version = tuple(int(x) for x in trl.__version__.split(".")[:2])
    found = tuple(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:]
    names = ("_ChunkedLogProbFunction", "_use_triton")
    if version < OLDEST or found != _ARGUMENTS or not all(hasattr(utils, x) for x in names):
        raise ImportError(
            f"TRL {trl.__version__} computes token log-probs in another way than 1.16, for which "
            f"accelerate_trl was written (arguments {_ARGUMENTS}, found {found}); install trl==1.16"
        )
    return utils
