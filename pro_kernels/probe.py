"""What a causal LM makes of its head's output, found out by running it.

Chosen logits are handed to the model in place of its head's: the largest ones come back as its
softcap, small ones multiplied by its scale. What it then does to its own is compared with that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.lm_head import FALLBACK, resolve

_COLUMNS = 16384  # of the head multiplied in fp32 at a time


@dataclass
class LogitTransform:
    """``softcap(scale * z)``, what the model makes of the raw logits z."""

    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """The transform in plain PyTorch."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def configs_of(lm: Any) -> list[Any]:
    """Its config, and that of its text model where that is another."""
    configs = [lm.config]
    if hasattr(lm.config, "get_text_config"):
        configs.append(lm.config.get_text_config())
    return configs[:1] if configs[0] is configs[-1] else configs


def example_inputs(lm: Any) -> dict[str, Any]:
    """Eight ordinary token ids: none that the config names for images, padding and the like."""
    special = set()
    for one in configs_of(lm):
        for name, value in one.to_dict().items():
            if name.endswith(("_id", "_index")) and isinstance(value, int):
                special.add(value)
    rows = lm.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(rows, 64 + len(special))) if i not in special]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [ids[i] for i in order[:8]]
    device = lm.get_input_embeddings().weight.device
    return {"input_ids": torch.tensor([chosen], device=device)}


def probe(
    lm: Any, original: Callable[..., Any], inputs: dict[str, Any]
) -> tuple[LogitTransform, float]:
    """What the model makes of its head's output, checked against its own logits.

    Args:
        lm: the model, in evaluation mode.
        original: its forward.
        inputs: keyword arguments of it.

    Returns:
        The transform, and the relative error that the head's own rounding explains.

    Raises:
        ValueError: the model cannot be run on the inputs, or does something else to its logits.
    """
    name = type(lm).__name__
    module = lm.get_output_embeddings()
    captured: list[Tensor] = []
    dtypes = {x.dtype for x in module.parameters()}

    def run(chosen: Tensor | None) -> Tensor:
        """The model's logits, its head returning ``chosen``; None: what the head returns."""

        def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            captured.append(hidden)
            if chosen is not None:
                return chosen
            z = own(hidden, *args, **kwargs)
            dtypes.add(z.dtype)  # under autocast another than the weight's
            return z

        own = module.forward
        captured.clear()
        with replaced(module, "forward", head):
            out = original(**inputs)
        only(captured, lm)
        return out["logits"] if isinstance(out, Mapping) else out[0]

    with torch.no_grad():
        try:
            logits = run(None)
        except Exception as error:
            raise ValueError(
                f"{name} could not be tried out on {sorted(inputs)} ({error}); give "
                f"attach(model, example=...) what its forward needs, or {FALLBACK}"
            ) from error
        hidden = captured[0]
    if not hidden.isfinite().all():
        kind = str(hidden.dtype).removeprefix("torch.")
        why = "its activations overflow there: use bfloat16 or float32"
        raise ValueError(
            f"{name}: hidden states before its LM head are not finite in {kind}; "
            + (why if hidden.dtype == torch.float16 else "are its weights?")
        )
    if hidden.dim() != 3:
        raise ValueError(
            f"the LM head of {name} reads {tuple(hidden.shape)}, expected (B, T, H); {FALLBACK}"
        )
    weight = resolve(module, hidden).weight
    shape = (*hidden.shape[:-1], weight.shape[0])
    if tuple(logits.shape) != shape:
        raise ValueError(
            f"{name} returns logits {tuple(logits.shape)} from a head of {shape}; {FALLBACK}"
        )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator).to(hidden.device, non_blocking=True)
    with torch.enable_grad(), _all_trainable(lm):
        if run(noise).requires_grad:
            raise ValueError(
                f"{name} does something with parameters of its own to its logits; {FALLBACK}"
            )
    with torch.no_grad():
        transform = _fit(run, noise)
        largest = transform.softcap or 10.0
        chosen = noise * (largest / abs(transform.scale))
        _compare(name, "logits after the head", run(chosen), transform(chosen), 1e-5)
        h, w, b, *_ = resolve(module, hidden)
        wide = torch.promote_types(w.dtype, torch.float32)
        ours = torch.cat(  # a block of columns at a time: a wide copy of all may be too large
            [nn.functional.linear(h.to(wide), part.to(wide)) for part in w.split(_COLUMNS)], -1
        )
        ours = ours if b is None else ours + b.to(wide)
        tolerance = max(1e-5, *(4 * torch.finfo(x).eps for x in dtypes if x.itemsize < 4), 0.0)
        _compare(name, "logits", logits, transform(ours), tolerance)
    return transform, tolerance


@contextlib.contextmanager
def _all_trainable(lm: Any) -> Iterator[None]:
    """Frozen parameters count as well, and afterwards are frozen as before."""
    frozen = [x for x in lm.parameters() if x.is_floating_point() and not x.requires_grad]
    for x in frozen:
        x.requires_grad_(True)
    try:
        yield
    finally:
        for x in frozen:
            x.requires_grad_(False)


def _fit(run: Callable[[Tensor], Tensor], noise: Tensor) -> LogitTransform:
    """The softcap from the largest logits, the scale from small ones."""
    top = run(torch.full_like(noise, 1e30)).float()
    cap = float(top.double().median())
    softcap = cap if cap < 1e20 else None
    small = noise if softcap is None else noise * (1e-4 * softcap)  # there tanh(x) is x
    scale = float((run(small).double() / small.double()).median())
    return LogitTransform(softcap, 1.0 if abs(scale - 1) < 1e-6 else scale)


def _compare(name: str, what: str, theirs: Tensor, ours: Tensor, tolerance: float) -> None:
    theirs, ours = theirs.double(), ours.double()
    off = (theirs - ours).abs().max().item()
    if not off <= tolerance * max(theirs.abs().max().item(), 1e-6):
        raise ValueError(
            f"{name}: {what} are up to {off:.2g} off what a scale and a softcap make of the LM "
            f"head's output (largest {theirs.abs().max().item():.2g}), so the fused loss would be "
            f"wrong; {FALLBACK}"
        )


def only(captured: list[Tensor], lm: Any) -> Tensor:
    """The head's one input of a forward."""
    if len(captured) != 1:
        raise ValueError(
            f"{type(lm).__name__} called its LM head {len(captured)} times in a forward, expected "
            f"once; {FALLBACK}"
        )
    return captured[0]


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, and afterwards as it was."""
    there, before = name in module.__dict__, getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        # torch.compile plays back a deletion where the graph has set nothing; so the instance then
        # keeps what its class gave it.
        if there or torch.compiler.is_compiling():
            setattr(module, name, before)
        else:
            delattr(module, name)


@contextlib.contextmanager
def evaluating(lm: Any) -> Iterator[None]:
    """Evaluation mode, and afterwards every module as it was."""
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
