"""A model is tried out when it is opened: is what the fused path would compute what it computes?

``probe`` finds out about its logits; then its loss is taken both ways.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.models.forward import Asked, cross_entropy
from pro_kernels.models.head import HeadInputs, unfit, widened
from pro_kernels.models.opened import Opened
from pro_kernels.models.probe import allowed, evaluating, example_inputs, probe, rms
from pro_kernels.options import IGNORE_INDEX


def try_out(opened: Opened, example: Mapping[str, Any] | None) -> None:
    """Find out what the model makes of its head's output, and whether the fused loss is its own."""
    lm = opened.lm
    inputs = example_inputs(lm) if example is None else dict(example)
    if "input_ids" not in inputs:
        raise ValueError(f"example must hold input_ids, got {sorted(inputs)}")
    inputs.pop("labels", None)
    # So that a call only exchanges it.
    lm._loss_function = opened.loss_function = getattr(lm, "loss_function", None)
    with evaluating(lm):
        opened.logits = probe(lm, opened.original, inputs)
        if "labels" in inspect.signature(type(lm).forward).parameters:
            case = {**inputs, "labels": inputs["input_ids"]}
            with torch.no_grad():
                _check_losses(opened, case)
        else:
            opened.calls_loss_function = False
    opened.watch()


def _check_losses(opened: Opened, case: dict[str, Any]) -> None:
    """Compare the model's own loss with the cross-entropy without or else with classes.

    ValueError: it is neither, or these classes cannot be had of this head.
    """
    cases = {"labels": case, "padded and partly ignored labels": _padded(opened.lm, case)}
    given, opened.classes = opened.classes, {}
    try:
        for what, labelled in cases.items():
            _check_loss(opened, what, labelled)
    except ValueError:
        if not given:
            raise
        opened.classes = given
        for what, labelled in cases.items():
            _check_loss(opened, what, labelled)
    if given:
        opened.classes = given
        _fused(opened, **case)


def _check_loss(opened: Opened, what: str, case: dict[str, Any]) -> None:
    """Raise ValueError unless the loss is the same, its own loss function called and not."""

    def run(call: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return call(**kwargs)
        except Exception as error:
            raise unfit(
                f"the loss of {opened.name} could not be tried out on {sorted(kwargs)} ({error})"
            ) from error

    def compare(what: str, theirs: float, ours: float, noise: float) -> None:
        if not abs(theirs - ours) <= allowed(noise, size, dtype):
            raise unfit(
                f"{opened.name}: the loss of {what} is {theirs:.7g}, the fused one {ours:.7g}, so "
                "the model's is not the mean cross-entropy of the next token"
            )

    out = run(opened.original, **{**case, "return_dict": True})
    labels, mean, dtype = case["labels"], float(out["loss"]), out["loss"].dtype
    exact = _log_probs(widened(out["logits"]), labels)
    size = max(rms(exact), abs(mean))
    # In fp32 PyTorch's own log_softmax of 262144 logits is 2e-5 off.
    softmax_noise = rms(exact - _log_probs(out["logits"].to(dtype), labels))
    if out.get("aux_loss") is None and not opened.classes:
        # From its own logits: the head's rounding is no excuse.
        compare(what, mean, -float(exact.mean()), softmax_noise)
    try:
        ours, noise = _fused(opened, **case)
    except Exception:  # a loss of the model's own, which met logits of width 0
        opened.calls_loss_function = False
        ours, noise = run(functools.partial(_fused, opened), **case)
    noise += softmax_noise
    compare(what, mean, ours, noise)
    if _takes_items(opened.lm):
        items = torch.full((), 2 * exact.numel() + 1, device=labels.device)
        case = {**case, "num_items_in_batch": items}
        theirs = float(run(opened.original, **case)["loss"])
        if abs(theirs - mean) <= allowed(noise, size, dtype):
            opened.divides_by_items = False
        ours = _fused(opened, **case)[0]
        compare(f"{what} over num_items_in_batch", theirs, ours, noise)


def _fused(opened: Opened, **case: Any) -> tuple[float, float]:
    """The loss, and by how much its head's rounding moves log-probs of tokens."""
    noise, labels = 0.0, case["labels"]

    def loss_of(head: HeadInputs) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal noise
        plain, exact = head.after(head.raw_logits()), head.exact_logits()
        noise = rms(_log_probs(widened(plain), labels) - _log_probs(exact, labels))
        return cross_entropy(opened, head, Asked(labels, items=case.get("num_items_in_batch")))

    return float(opened.run(loss_of, {**case, "return_dict": True}).loss), noise


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) of the labels that count, unshifted as they are."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return -nn.functional.cross_entropy(logits, labels, reduction="none")[labels != IGNORE_INDEX]


def _takes_items(lm: Any) -> bool:
    """Whether ``Trainer`` would hand the model num_items_in_batch."""
    kinds = [x.kind for x in inspect.signature(type(lm).forward).parameters.values()]
    return getattr(lm, "accepts_loss_kwargs", True) and inspect.Parameter.VAR_KEYWORD in kinds


def _padded(lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with two labels that do not count and, of ids alone, a second row half padded."""
    case = dict(inputs)
    labels = case["labels"].clone()
    labels[:, 1 : min(3, labels.shape[1] - 1)] = IGNORE_INDEX  # of three labels one still counts
    takes_mask = "attention_mask" in inspect.signature(type(lm).forward).parameters
    if takes_mask and case.keys() <= {"input_ids", "labels"}:
        ids = case["input_ids"]
        case["input_ids"] = torch.cat([ids, ids.roll(3, 1)])
        mask = torch.ones_like(case["input_ids"])
        mask[ids.shape[0] :, ids.shape[1] // 2 :] = 0
        case["attention_mask"] = mask
        labels = torch.cat([labels, case["input_ids"][ids.shape[0] :]])
    case["labels"] = labels
    return case
