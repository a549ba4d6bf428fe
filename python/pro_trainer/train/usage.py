"""What training costs: scored tokens per second, share of positions scored, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pro_trainer.models import causal_lm

if TYPE_CHECKING:
    from accelerate import Accelerator

_MUCH = 0.25  # share of the memory from which on activations are worth a word


class Usage:
    """Counts on the host between two log lines; evaluation and saving are left out of the time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._depth = 0
        self.restart()

    def restart(self) -> None:
        """Forget what was counted and start the clock."""
        self._scored = self._positions = 0
        self._start = time.perf_counter()

    def count(self, scored: int, positions: int) -> None:
        """Add a batch: tokens scored, and real tokens (no padding) that went into the model."""
        self._scored += scored
        self._positions += positions

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begin, self._depth = time.perf_counter(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:  # an evaluation of several data sets calls itself
                self._start += time.perf_counter() - begin

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics since the last call, over all processes (memory: the largest)."""
        seconds = time.perf_counter() - self._start
        every = torch.tensor([[self._scored, self._positions, peak_memory_mb(self._device)]])
        if accelerator.num_processes > 1:
            every = accelerator.gather(every.to(self._device)).cpu()
        self.restart()
        scored, positions = every[:, 0].sum().item(), every[:, 1].sum().item()
        return {
            "scored_tokens_per_second": scored / seconds,
            "scored_share": scored / max(1.0, positions),
            "peak_memory_mb": every[:, 2].max().item(),
        }


class Activations:
    """Measures what the first batch keeps for its backward; tells where checkpointing would help.

    Checkpointing keeps the input of each layer, and one layer's activations while it runs again.
    """

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self._device = device
        self._done = not wanted

    @contextlib.contextmanager
    def measured(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Count the bytes kept of the first training batch; a line, where they are many."""
        if self._done or not model.training:
            yield
            return
        self._done = True
        kept: dict[int, int] = {}
        own = {_storage(p).data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = _storage(tensor)
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        config = causal_lm(model).config.get_text_config()
        layers = getattr(config, "num_hidden_layers", None)
        total, size = sum(kept.values()), memory_size(self._device)
        if layers and total > _MUCH * size:
            width = torch.get_autocast_dtype(self._device.type).itemsize
            inputs_of_layers = inputs["input_ids"].numel() * config.hidden_size * width * layers
            saved = total - total / layers - inputs_of_layers
            print(
                f"the activations of a batch take {total / 1e9:.1f} of {size / 1e9:.1f} GB: "
                f"--gradient_checkpointing true would save about {max(0, saved) / 1e9:.1f} GB, "
                "for one more forward a step"
            )


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """What a tensor, or this rank's part of a DTensor (FSDP2), is stored in."""
    return getattr(tensor, "to_local", lambda: tensor)().untyped_storage()


def memory_size(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory_mb(device: torch.device) -> float:
    """MB: most that tensors took on a GPU; on a CPU the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
