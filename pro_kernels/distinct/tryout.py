"""Whether a decoder makes the same of distinct rows as of padded ones, found out by running it.

A few short rows are run both ways, with their gradients, and compared within the model's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pro_kernels.distinct import interface, states
from pro_kernels.distinct.row import Row, run_row
from pro_kernels.distinct.tree import TokenTree
from pro_kernels.models.probe import agree, example_inputs, exchanged, rms

Run = Callable[..., Any]  # a decoder's own forward
# Types of layers that carry no state along the row.
_KNOWN = {"full_attention", "sliding_attention", "moe", "mlp"}


def cannot(lm: Any, why: str) -> ValueError:
    """What is raised for a model that is refused."""
    return ValueError(f"{type(lm).__name__} cannot run distinct rows: {why}")


def refusal(lm: Any, decoder: Any) -> str | None:
    """Why it cannot, as far as a short run would not show."""
    config = decoder.config
    if decoder is lm:
        return "it has no decoder of its own below its head"
    if getattr(config, "attention_chunk_size", None):
        return "its attention goes by chunks of the row"
    if getattr(config, "alibi", False):
        return "ALiBi biases go by the index in the row, not by position"
    if any(hasattr(x, "ds_id") and not x.numel() for x in decoder.parameters()):
        return (
            "its weights are partitioned (DeepSpeed ZeRO-3), and it has to be run: call "
            "within deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )
    return None


def carriers(lm: Any, decoder: Any, run: Run) -> list[nn.Module]:
    """The modules of its layers that carry a state along the row.

    Raises:
        ValueError: layers of a kind that is not known, or a module whose forward was replaced.
    """
    types = list(getattr(decoder.config, "layer_types", None) or ())
    others = set(types) - _KNOWN
    if not others:
        return []
    try:
        found = states.find(decoder, _sample(lm)[1]["input_ids"], run)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"and fails with a cache: {type(error).__name__}: {error}"
        raise cannot(lm, f"it has layers of type {', '.join(sorted(others))}, {why}") from error
    layers = {i: set(x.modules()) for i, x in enumerate(getattr(decoder, "layers", ()))}
    idle = {kind for i, kind in enumerate(types) if not layers.get(i, set()) & set(found)} & others
    if idle:
        raise cannot(lm, f"it has layers of type {', '.join(sorted(idle))}")
    if replaced := {type(x).__name__ for x in found if "forward" in vars(x)}:
        raise cannot(lm, f"somebody replaced the forward of its {', '.join(sorted(replaced))}")
    return found


def try_out(lm: Any, decoder: Any, run: Run, implementation: str) -> bool:
    """Compare a model's decoder, whose forward is ``run``; its config then names our attention.

    Returns:
        Whether positions that all lie further on change nothing (RoPE).

    Raises:
        ValueError: it fails, or the two differ by more than the model's rounding.
    """
    config, ours = decoder.config, interface.registered(implementation)
    tree, inputs = _sample(lm)
    measure = _Measure(lm, decoder, inputs["attention_mask"].bool())
    windows: list[int | None] = []
    row = Row.of(tree, *inputs.values())
    setattr(row.segments, interface.WINDOWS, windows)

    def named(which: str, out: Callable[[], Any]) -> Callable[[], Tensor]:
        def numbers() -> Tensor:
            with exchanged([(config, "_attn_implementation", which)]):
                return measure(out)

        return numbers

    def padded() -> Any:
        return run(**inputs, use_cache=False, return_dict=True)

    def differ(out: Callable[[], Any]) -> tuple[float, float]:
        return agree(lm, named(implementation, padded), named(ours, out))

    def distinct(row: Row) -> tuple[float, float]:
        return differ(lambda: run_row(run, row, inputs))

    training = exchanged((x, "training", True) for x in decoder.modules())
    try:
        found = {"its padded batch": differ(padded), "distinct rows": distinct(row)}
        off, allowed = distinct(Row.of(tree.shifted(3), *inputs.values()))
        relative = off <= allowed
        config._attn_implementation = ours
        with torch.no_grad(), torch.random.fork_rng(), training:
            run_row(run, row, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise cannot(lm, f"it fails with {type(error).__name__}: {error}") from error
    for what, (off, allowed) in found.items():
        if not off <= allowed:
            raise cannot(
                lm,
                f"hidden states and gradients of {what} differ from those of the padded batch by "
                f"{off:.2g} of their size, and rounding accounts for {allowed:.2g}",
            )
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and any("sliding" in x for x in types) and window not in windows:
        raise cannot(lm, f"its attention is not told of sliding_window={window}")
    return relative


def _sample(lm: Any) -> tuple[TokenTree, dict[str, Tensor]]:
    """Four rows, three of which begin alike, as a tree and padded on the right."""
    ids = example_inputs(lm)["input_ids"][0].tolist()
    a, b, c, d, e, f, g, h = (ids * 8)[:8]
    start = [a, b, c, d, e, f, g, h, c, a]
    rows = [[*start, f, b, e], [*start, d], [g, *start[:6]], [*start, f, h]]
    device = lm.get_input_embeddings().weight.device

    def padded(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)

    return TokenTree.from_sequences(rows), {
        "input_ids": padded([torch.tensor(row) for row in rows]),
        "attention_mask": padded([torch.ones(len(row), dtype=torch.long) for row in rows]),
    }


class _Measure:
    """Numbers of a run: hidden states, and gradients of a random sum of them.

    Gradients are those of a factor on the embeddings and of norms and biases. Each of the three is
    in the size that it had at the first run.
    """

    def __init__(self, lm: Any, decoder: Any, real: Tensor) -> None:
        self.embeddings, self.decoder, self.real = lm.get_input_embeddings(), decoder, real
        self.sizes: list[float] = []

    def __call__(self, out: Callable[[], Any]) -> Tensor:
        device = self.real.device
        width = self.embeddings.weight.shape[-1]
        factor = torch.ones(width, device=device, requires_grad=True)
        hook = self.embeddings.register_forward_hook(lambda _, __, x: x * factor.to(x.dtype))
        try:
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                hidden = out().last_hidden_state[self.real].float()
                by = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
                vectors = [p for p in self.decoder.parameters() if p.dim() == 1 and p.requires_grad]
                gradients = torch.autograd.grad(
                    (hidden * by.to(device)).sum(), [factor, *vectors], allow_unused=True
                )
        finally:
            hook.remove()
        # Norms and biases as one: keys' biases, say, have no gradient but rounding.
        rest = [x.float() for x in gradients[1:] if x is not None]
        found = [hidden.detach().flatten(), gradients[0], *([torch.cat(rest)] if rest else [])]
        if not self.sizes:
            self.sizes = [max(rms(x), 1e-30) for x in found]
        return torch.cat([x / size for x, size in zip(found, self.sizes, strict=True)])
