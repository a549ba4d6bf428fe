"""Checks of user input, before any work; messages name the argument and show its value.

What only types and shapes say is checked everywhere. Values are looked at on the CPU, and queued as
asynchronous assertions on a GPU or left alone there, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pro_kernels.option_types import LARGEST_SCALE, SIZES, OptionType
from pro_kernels.ranking import exact, last_where_not

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


# Options


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    largest: float = SIZES[1],
) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is 0 or in range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # By comparisons alone, which ``torch.compile`` knows of numbers that change between calls.
    if value != 0 and not SIZES[0] <= abs(value) <= largest:
        zero = "0 or " if at_least == 0 else ""
        sizes = f"[{SIZES[0]:g}, {largest:g}]"
        raise ValueError(f"{name} must be {zero}of a size in {sizes}, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be > {above}, got {value!r}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value!r}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name} must be <= {at_most}, got {value!r}")


def check_option(name: str, value: object, kind: OptionType) -> None:
    """Raise TypeError or ValueError unless ``value`` is what the option's type says."""
    if value is None and kind.optional or value in kind.choices:
        return
    if not kind.kinds:
        check_choice(name, value, (None, *kind.choices) if kind.optional else kind.choices)
    elif isinstance(value, str) and kind.choices:
        raise ValueError(f"{name} must be a number or one of {list(kind.choices)}, got {value!r}")
    elif bool in kind.kinds:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
    elif float in kind.kinds:
        check_number(name, value, **kind.limits._asdict())
    else:
        _check_integer(name, value, kind)


def _check_integer(name: str, value: object, kind: OptionType) -> None:
    above, least, most, _ = kind.limits
    limits = ((">", above), (">=", least), ("<=", most))
    expected = " and ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)
    wrong = f"{name} must be {'None or ' * kind.optional}an integer {expected}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{wrong}, got {value!r}")
    inside = (above is None or value > above) and (least is None or value >= least)
    if not inside or (most is not None and value > most):
        raise ValueError(f"{wrong}, got {value!r}")


def check_grad_filter(tau: float | str | None) -> None:
    """Raise TypeError or ValueError unless ``tau`` is None, "auto" or a number in (0, 1)."""
    if tau is None or tau == "auto":
        return
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f'grad_filter must be a number in (0, 1), "auto" or None, got {tau!r}')
    if not 0 < tau < 1:
        raise ValueError(f"grad_filter must lie in (0, 1), got {tau!r}")


def check_budget(budget: int) -> int:
    """The budget, if it is a positive number of bytes."""
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an integer number of bytes or None, got {budget!r}")
    if budget <= 0:
        raise ValueError(f"budget must be > 0 bytes, got {budget}")
    return budget


# Tensors: types, shapes, devices


def check_tensor(name: str, value: object) -> Tensor:
    """The value, if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: its to_local(), say")
    return value


def check_float(name: str, value: object) -> Tensor:
    """The tensor, if it is one of a floating dtype the kernels know."""
    value = check_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    return value


def check_real(name: str, value: object) -> Tensor:
    """The tensor, if it holds real numbers."""
    value = check_tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")
    return value


def check_mask(name: str, value: object) -> Tensor:
    """The tensor, if it is a bool one."""
    value = check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype}")
    return value


def check_top(k: object, vocab: int) -> None:
    """Raise unless ``k``, of ``return_topk``, is None or a number of tokens of the vocabulary."""
    if k is None:
        return
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"return_topk must be None or an integer, got {k!r}")
    if not 1 <= k <= vocab:
        raise ValueError(f"return_topk must lie in [1, {vocab}], got {k}")


def check_targets(targets: object, name: str = "targets") -> None:
    """Raise TypeError unless ``targets`` is an integer tensor."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(targets).__name__}")
    if targets.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, got dtype {targets.dtype}")


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Both tensors on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {value.device}"
        )


def check_same_shape(name: str, value: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """``value`` has ``shape``, described by ``legend``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {legend} = {shape}, got {tuple(value.shape)}")


def check_targets_of(targets: object, like_name: str, like: Tensor, legend: str) -> None:
    """An integer target of each row of ``like`` (..., D); ``legend`` of all but D."""
    check_targets(targets)
    check_same_shape("targets", targets, tuple(like.shape[:-1]), legend)  # type: ignore[arg-type]
    check_device("targets", targets, like_name, like)  # type: ignore[arg-type]


def check_candidate_mask(mask: object, shape: tuple[int, ...]) -> None:
    """A bool mask of ``shape`` (B, n)."""
    check_same_shape("candidate_mask", check_mask("candidate_mask", mask), shape, "(B, n)")


def check_candidates(
    shape: tuple[int, int],  # B, n
    rewards: object,
    prompt_weights: object,
    sft_index: object,
) -> None:
    """What is said of candidates and prompts, each None or (B, n), (B,) and (B,)."""
    if rewards is not None:
        given = check_tensor("rewards", rewards)
        check_same_shape("rewards", given, shape, "(B, n)")
        if given.is_complex():
            raise TypeError(f"rewards must be real numbers, got {given.dtype}")
    if prompt_weights is not None:
        weights = check_float("prompt_weights", prompt_weights)
        check_same_shape("prompt_weights", weights, shape[:1], "(B,)")
    if sft_index is not None:
        check_targets(sft_index, "sft_index")
        check_same_shape("sft_index", sft_index, shape[:1], "(B,)")  # type: ignore[arg-type]


def check_head(
    hidden: object, weight: object, bias: object, head_dtype: str | None
) -> tuple[torch.dtype, torch.dtype]:
    """Check ``hidden[..., H]``, ``weight[V, H]``, ``bias[V]``; the dtypes of matmuls and logits.

    Those are autocast's, else that of all three, which must be one. An fp32 head leaves operands of
    one dtype as they are, and multiplies those of two in fp32.
    """
    hidden = check_float("hidden", hidden)
    weight = check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, H), got {tuple(weight.shape)}")
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape (..., H) with H = {weight.shape[1]} as in weight "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}"
        )
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        bias = check_float("bias", bias)
        check_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype} as weight, "
                f"got {tuple(bias.shape)} and {bias.dtype}"
            )
    compute = hidden.dtype
    if head_dtype is not None:
        if torch.float64 in (compute, weight.dtype):
            raise ValueError(
                f"head_dtype must be None for float64 hidden or weight, got {head_dtype!r}"
            )
        return compute if compute == weight.dtype else torch.float32, torch.float32
    if torch.is_autocast_enabled(hidden.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(hidden.device.type)
    elif compute != weight.dtype:
        raise ValueError(
            "hidden and weight must have one dtype outside autocast and without "
            f'head_dtype="float32", got {compute} and {weight.dtype}'
        )
    return compute, compute


def check_row_scale(
    scale: object,
    like_name: str,
    like: Tensor,
    bias: object,
    rows: Tensor | None,  # that are scored; None: those with a target
    targets: Tensor,
) -> None:
    """None, or a ``logit_scale`` of each row of ``like`` (..., D); its values only on the CPU."""
    if scale is None:
        return
    scale = check_float("logit_scale", scale)
    legend = f"{like_name}.shape[:-1]"
    check_same_shape("logit_scale", scale, tuple(like.shape[:-1]), legend)
    check_device("logit_scale", scale, like_name, like)
    if bias is not None:
        raise ValueError(
            "logit_scale must be a number where there is a bias, which a factor of each row would "
            f"have to multiply too, got a tensor of shape {tuple(scale.shape)}"
        )
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "logit_scale must be a constant, got a tensor that requires a gradient: detach it"
        )
    if readable(scale):
        flat, (low, high) = scale.detach().reshape(-1), (SIZES[0], LARGEST_SCALE)
        flat = torch.where(targets < 0, 1.0, flat) if rows is None else flat[rows]
        text = f"logit_scale must be of a size in [{low:g}, {high:g}] in every row"
        good = (flat.abs() >= low) & (flat.abs() <= high)
        check_all(text, good, lambda i: f", got {flat[i]}")


# Values


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU (no device sync) and not while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_all(text: str, good: Tensor, found: Callable[..., str]) -> None:
    """Raise ValueError unless all are good: ``text``, ``found`` of the first bad one's indices.

    On a GPU the text alone, queued.
    """
    if good.device.type != "cpu":
        torch._assert_async(good.all(), text)
    elif not good.all():
        raise ValueError(text + found(*(~good).nonzero()[0].tolist()))


def check_finite(name: str, value: Tensor, mask: Tensor | None) -> None:
    """``value`` (B, n) is finite where ``mask`` holds (None: everywhere); queued on a GPU."""
    good = torch.isfinite(value)
    if mask is not None:
        good = good | ~mask
    check_all(
        f"{name} must be finite",
        good,
        lambda b, i: f", got {value[b, i]} for prompt {b} candidate {i}",
    )


def check_of_prompts(
    prompt_weights: Tensor | None,  # (B,)
    sft_index: Tensor | None,  # (B,)
    n: int,
    dtype: torch.dtype,
    present: Tensor | None,  # (B,) bool, prompts with a candidate; None: not known on the host
) -> None:
    """Weights are finite, >= 0 and add up in ``dtype``; indices are columns."""
    if prompt_weights is not None:
        good = prompt_weights.isfinite() & (prompt_weights >= 0)
        text = "prompt_weights must be finite and >= 0"
        check_all(text, good, lambda _: f", got {prompt_weights.tolist()}")
        if present is not None and prompt_weights.device.type == "cpu":
            check_total(prompt_weights * present, dtype)
    if sft_index is not None:
        good = (sft_index >= 0) & (sft_index < n)
        check_all(f"sft_index must lie in [0, {n})", good, lambda _: f", got {sft_index.tolist()}")


def check_total(given: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where prompt weights lose their sum in ``dtype``; for CPU tensors."""
    limits, total = torch.finfo(dtype), given.to(dtype).sum()
    if given.any() and not limits.tiny <= total <= limits.max:
        raise ValueError(
            f"prompt_weights must be 0 or add up to a number in [{limits.tiny:.2g}, "
            f"{limits.max:.2g}], what {dtype} holds, got {given.tolist()}"
        )


def gap_fault(gap: float, reward_scale: float = 1.0) -> str | None:
    """Why PRO cannot take rewards whose largest gap is this; None of one that it can, or of 0."""
    smallest, largest = SIZES
    if gap == 0 or smallest <= gap * reward_scale <= largest:
        return None
    how = "close together" if gap > 0 and gap * reward_scale < smallest else "far apart"
    return (
        f"too {how}: the largest gap is {gap:g}, which times reward_scale={reward_scale:g} must "
        f"lie in [{smallest:g}, {largest:g}]"
    )


def check_gaps(
    rewards: Tensor,  # (B, n)
    valid: Tensor,  # (B, n) bool
    reward_scale: float,
    *,
    may_be_equal: bool,
    instead: str = "",
) -> None:
    """Rewards are finite, and the largest gap of two or more is one to rank by; for CPU tensors.

    The error for equal ones goes on with what to do ``instead``.
    """
    values = exact(rewards)
    low, high = -last_where_not(valid, -values).amax(1), last_where_not(valid, values).amax(1)
    gap = (high - low).double()
    smallest, largest = SIZES
    scaled = gap * reward_scale
    if ((scaled >= smallest) & (scaled <= largest)).all():  # what nearly every batch is
        return
    check_finite("rewards", rewards, valid)
    several = valid.sum(1) > 1
    for b in several.nonzero()[:, 0].tolist():
        if fault := gap_fault(gap[b].item(), reward_scale):
            raise ValueError(f"rewards of prompt {b} are {fault}")
    equal = several & (gap == 0)
    if equal.any() and not may_be_equal:
        raise ValueError(
            f"rewards are all equal in prompts {equal.nonzero()[:, 0].tolist()}: their order says "
            "nothing; drop them, or rank them by column with rewards=None or temperature=1.0"
            + instead
        )
