"""verl's fused log-probs and entropies on the fused kernels, whichever backend it is told to use.

With ``use_fused_kernels`` verl's actors score through ``FusedLinearForPPO`` (``impl_backend:
torch`` and ``liger``) or ``linear_cross_entropy`` (``impl_backend: triton``, and Megatron).
``apply()`` puts ours in the place of both. ``verl_workers`` calls it where verl's workers are.

Source: verl 0.9, ``verl.utils.experimental.torch_functional`` and
``verl.utils.kernel.linear_cross_entropy``.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from pro_kernels.api import linear_token_stats
from pro_kernels.integrations.switch import Switch
from pro_kernels.models.head import head_for

_switch = Switch(__name__, "verl", "verl's log-probs are computed here")


def fused_linear_for_ppo(
    self: Any,
    hidden_states: Tensor,  # (..., H)
    vocab_weights: Tensor,  # (V, H)
    input_ids: Tensor,  # (...)
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``FusedLinearForPPO.forward``: log-probs and entropies (...), fp32, both differentiable."""
    weight, _ = head_for(hidden_states, vocab_weights)
    stats = linear_token_stats(hidden_states, weight, input_ids, logit_scale=1 / temperature)
    return stats.logps, stats.entropy


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """As verl's of that name: log-probs and entropies (N,) of all positions in a row, fp32.

    A weight that is split over several ranks and other reductions stay verl's own, with a warning.
    """
    split = dist_process_group is not None and torch.distributed.get_world_size(dist_process_group)
    if split > 1 or reduction != "none":
        why = f"reduction={reduction!r}" if reduction != "none" else f"a head over {split} ranks"
        warnings.warn(f"linear_cross_entropy with {why} is computed by verl itself", stacklevel=2)
        args = (hidden, weight, labels, temperature, reduction, dist_process_group)
        ((theirs, _),) = _switch.pairs
        return theirs(*args)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return fused_linear_for_ppo(None, rows, weight, labels.reshape(-1), temperature)


def apply() -> None:
    """Compute verl's fused log-probs here, in this process; ``restore()`` undoes it.

    Raises:
        ImportError: verl is missing, or has no such functions.
        ValueError: it was called before, or verl's functions take other arguments.
    """
    functional, kernel = _switch.modules(
        "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
    )
    module, function = functional.FusedLinearForPPO, kernel.LinearCrossEntropy
    for theirs, ours, first in (
        (module.forward, fused_linear_for_ppo, 0),
        (function.forward, linear_cross_entropy, 1),  # after ctx
    ):
        found = list(inspect.signature(theirs).parameters)[first:]
        if found != (known := list(inspect.signature(ours).parameters)):
            raise ValueError(
                f"verl's {theirs.__qualname__} takes {found}, and what is known here is {known}"
            )
    _switch.put(module, "forward", fused_linear_for_ppo)
    # An object of its own: whoever holds it has it from there.
    _switch.exchange([(kernel.linear_cross_entropy, functools.partial(linear_cross_entropy))])


def restore() -> None:
    """Undo ``apply``; nothing happens where it was not called."""
    _switch.restore()
