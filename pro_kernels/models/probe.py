"""What a causal LM makes of its head's output, found out by running it; and when runs agree.

Chosen logits are handed to the model in place of its head's: the largest ones come back as its
softcap, small ones multiplied by its scale. What it then does to its own is compared with that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.models.head import resolve, unfit, widened
from pro_kernels.option_types import LARGEST_SCALE, SIZES

# Two runs may be so many times the model's own noise apart; measured on two models: up to 1.1
# times (docs/attach.md, "What counts as rounding").
FACTOR = 4.0


def allowed(noise: float, size: float, *dtypes: torch.dtype) -> float:
    """By how much two runs of a model may differ: all that is compared is compared by this rule.

    ``noise`` is by how much the model's own rounding moves what is compared, of this ``size``: the
    same in fp64, or with its input off by the last bit (``last_bits_off``). Never a run that a
    fault could move as well, such as one beside other rows. One rounding is the least noise.
    """
    return FACTOR * max(noise, size * max(torch.finfo(x).eps for x in dtypes))


def rms(values: Tensor) -> float:
    """The root mean square, 0 of no values."""
    return widened(values).square().sum().div(max(1, values.numel())).sqrt().item()


@contextlib.contextmanager
def last_bits_off(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every output of a module (an embedding) multiplied by 1 + eps or 1 - eps of a dtype."""

    def off(module: Any, inputs: Any, out: Tensor) -> Tensor:
        signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        return out * (1 + torch.finfo(dtype).eps * signs).to(out, non_blocking=True)

    hook = module.register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def in_float32(lm: Any) -> Iterator[None]:
    """Weights of 16 bits as fp32; afterwards the very tensors that were there.

    Left as they are: quantised models, attention that takes 16 bits only, what does not fit.
    """
    takes = "flash" not in str(configs_of(lm)[-1]._attn_implementation)
    with contextlib.ExitStack() as stack:
        if takes and not getattr(lm, "is_quantized", False):
            narrow = [x for x in (*lm.parameters(), *lm.buffers()) if x.is_floating_point()]
            wide = ((x, "data", x.data.float()) for x in narrow if x.dtype.itemsize == 2)
            with contextlib.suppress(RuntimeError):  # of memory; a CPU's has no class of its own
                stack.enter_context(exchanged(wide))
        yield


def configs_of(lm: Any) -> list[Any]:
    """Its config, and that of its text model where that is another."""
    configs = [lm.config]
    if hasattr(lm.config, "get_text_config"):
        configs.append(lm.config.get_text_config())
    return configs[:1] if configs[0] is configs[-1] else configs


def example_inputs(lm: Any) -> dict[str, Any]:
    """Eight ordinary token ids: none that the config names for images, padding and the like."""
    special = {
        value
        for config in configs_of(lm)
        for name, value in config.to_dict().items()
        if name.endswith(("_id", "_index")) and isinstance(value, int)
    }
    weight = lm.get_input_embeddings().weight
    ids = [i for i in range(min(weight.shape[0], 64 + len(special))) if i not in special]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    return {"input_ids": torch.tensor([[ids[i] for i in order[:8]]], device=weight.device)}


def probe(lm: Any, original: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The ``softcap`` and ``logit_scale`` of a model in evaluation mode, checked on its own logits.

    Raises:
        ValueError: the model cannot be run on the inputs, or does something else to its logits.
    """
    name = type(lm).__name__
    module = lm.get_output_embeddings()
    captured: list[Tensor] = []
    dtypes = {x.dtype for x in module.parameters()}

    def run(chosen: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The model's logits, its head returning ``chosen(hidden)``; None: what it returns."""

        def head(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            captured.append(hidden)
            if chosen is not None:
                return chosen(hidden)
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
            logits = run()
        except Exception as error:
            raise unfit(
                f"{name} could not be tried out on {sorted(inputs)} ({error})",
                "give attach(model, example=...) what its forward needs, or ",
            ) from error
        hidden = captured[0]
    if not hidden.isfinite().all():
        kind = str(hidden.dtype).removeprefix("torch.")
        overflow = "its activations overflow there: use bfloat16 or float32"
        why = overflow if kind == "float16" else "are its weights?"
        raise ValueError(
            f"{name}: hidden states before its LM head are not finite in {kind}; {why}"
        )
    if hidden.dim() != 3:
        raise unfit(f"the LM head of {name} reads {tuple(hidden.shape)}, expected (B, T, H)")
    head = resolve(module, hidden)
    shape = (*hidden.shape[:-1], head.weight.shape[0])
    if tuple(logits.shape) != shape:
        raise unfit(f"{name} returns logits {tuple(logits.shape)} from a head of {shape}")
    random = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    random = random.to(hidden.device, non_blocking=True)
    floating = [x for x in lm.parameters() if x.is_floating_point()]  # frozen ones count as well
    with torch.enable_grad(), exchanged((x, "requires_grad", True) for x in floating):
        if run(lambda _: random).requires_grad:
            raise unfit(f"{name} does something with parameters of its own to its logits")
    with torch.no_grad():
        head = head._replace(**_fit(run, random))
        chosen = random * ((head.softcap or 10.0) / abs(head.logit_scale))
        theirs, exact = run(lambda _: chosen), run(lambda _: widened(chosen))
        rounding = _largest(exact - theirs)  # of the same in fp64
        what = "logits after the head"
        _compare(name, what, theirs, head.after(widened(chosen)), rounding, theirs.dtype)
        plain, exact = run(lambda hidden: resolve(module, hidden).raw_logits()), head.exact_logits()
        _compare(name, "logits", logits, exact, _largest(exact - plain), *dtypes)
    return {"softcap": head.softcap, "logit_scale": head.logit_scale}


def _fit(run: Callable[..., Tensor], random: Tensor) -> dict[str, Any]:
    """The softcap from the largest logits, the scale from small ones.

    What is neither, with numbers beyond those of ``LogitOptions``, is left to the comparison.
    """
    cap = float(widened(run(lambda _: torch.full_like(random, 1e30))).median())
    softcap = cap if SIZES[0] <= cap < 1e20 else None
    small = random if softcap is None else random * (1e-4 * softcap)  # there tanh(x) is x
    scale = float((widened(run(lambda _: small)) / widened(small)).median())
    is_scale = SIZES[0] <= abs(scale) <= LARGEST_SCALE
    if not is_scale or abs(scale - 1) <= allowed(0.0, 1.0, torch.float32):
        scale = 1.0
    return {"softcap": softcap, "logit_scale": scale}


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _compare(
    name: str, what: str, theirs: Tensor, ours: Tensor, noise: float, *dtypes: torch.dtype
) -> None:
    off, size = _largest(ours - theirs), _largest(ours)
    if not off <= allowed(noise, size, *dtypes):
        raise unfit(
            f"{name}: {what} are up to {off:.2g} off what a scale and a softcap make of the LM "
            f"head's output (largest {_largest(theirs):.2g}), so the fused loss would be wrong"
        )


def only(captured: list[Tensor], lm: Any) -> Tensor:
    """The head's one input of a forward."""
    if len(captured) != 1:
        raise unfit(
            f"{type(lm).__name__} called its LM head {len(captured)} times in a forward, expected "
            "once"
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
def exchanged(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes of things that have them, by (thing, name, value), and afterwards as they were."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for thing, name, value in changes:
            before.append((thing, name, getattr(thing, name)))
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


def evaluating(lm: Any) -> contextlib.AbstractContextManager:
    """Evaluation mode, and afterwards every module as it was."""
    return exchanged((x, "training", False) for x in lm.modules())


def agree(lm: Any, run: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[float, float]:
    """By how much two runs of a model differ, and by how much rounding lets them.

    See ``OpenModel.compare``.
    """

    def both() -> tuple[float, float]:
        # Quantised activations have 8 bits, as many as bf16's.
        dtype = torch.bfloat16 if getattr(lm, "is_quantized", False) else lm.dtype
        values = run()
        with last_bits_off(lm.get_input_embeddings(), dtype):
            noise = rms(run() - values)
        return rms(other() - values), allowed(noise, rms(values), values.dtype, dtype)

    with evaluating(lm):
        try:
            with in_float32(lm):
                return both()
        except torch.OutOfMemoryError:
            return both()
