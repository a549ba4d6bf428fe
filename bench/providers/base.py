"""The contenders: same inputs, same mask, same loss; each builds a closure of forward + backward.

A provider is one file here with a function ``providers(device)``, and its name in ``_FILES``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.engine.case import Case
from bench.engine.timing import Refused, Step, backward_step
from bench.engine.truth import Inputs, case_loss
from pro_kernels import backends
from pro_kernels.fused.planner import host_memory

# In the order of the tables.
_FILES = ("floor", "ours", "torch", "official", "trl", "liger", "cce", "quack", "verl")
# Of the libraries compared with.
VERSIONS = {
    "trl": "1.16",
    "liger-kernel": "0.8",
    "cut-cross-entropy": "25.1",
    "quack-kernels": "0.6",
    "verl": "0.9",
}
# How much of the free memory a case may take.
_SHARE = 0.7


@dataclass(frozen=True)
class Provider:
    name: str  # as on the command line and in the JSON
    label: str  # as in tables and plots
    # Inputs -> Step for the loss, Workload -> TrainingStep for a step; Refused where it cannot.
    build: Callable[[Any], Any]
    # Bytes held at its peak for each logit of every token, for fp32 and for 16-bit inputs; to
    # refuse a case that this machine cannot hold. 0 where it holds few.
    logit_bytes: tuple[int, int] = (0, 0)
    compiles: bool = False  # uses torch.compile (first call takes long)
    suite: str = "loss"  # or "step"
    loss_type: str = "pro"  # or "dpo", of a step; only rows of one loss are compared

    @property
    def is_floor(self) -> bool:
        return self.name.startswith("floor")

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours-")

    def label_of(self, case: Any) -> str:
        """The label in a case's table: floors of the loss say what they are there."""
        if self.suite == "step" or not self.is_floor:
            return self.label
        if case.flops is None:
            made = "gradient buffer made" if case.kind == "logits" else "log-probs copied"
            return f"floor: {made}"
        return self.label if self.name == "floor-fp32" else f"{self.label}, {case.dtype}"

    def refusal_of_size(self, case: Case) -> str | None:
        """Why a case is too large for this provider on this machine."""
        logits = case.tokens * case.V * self.logit_bytes[case.dtype != "fp32"]
        need = case.input_bytes + logits
        free = available_bytes()
        if need > _SHARE * free:
            return f"not run: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        return None


def all_providers(device: torch.device, suite: str = "loss") -> dict[str, Provider]:
    """Every provider of a suite by name, in the order of the tables."""
    modules = (importlib.import_module(f"bench.providers.{name}") for name in _FILES)
    found = (p for module in modules for p in module.providers(device))
    return {p.name: p for p in found if p.suite == suite}


def ours_name(device: torch.device) -> str:
    """Name of the provider that backend="auto" is here."""
    return "ours-" + backends.resolve("auto", device, torch.float32)


def select(
    providers: dict[str, Provider],
    only: tuple[str, ...],
    wanted: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> list[Provider]:
    """Providers of a case: its own list, narrowed to those asked for ("ours" is either's auto).

    A case may name backends that are not usable here.

    Raises:
        ValueError: a name that no provider has.
    """
    auto = next(name for name, p in providers.items() if p.is_ours)
    known = {*providers, "ours", *(f"ours-{b}" for b in backends.ORDER)}
    unknown = sorted({*only, *wanted, *without} - known)
    if unknown:
        raise ValueError(
            f"provider must be 'ours' or one of {list(providers)}, got {', '.join(unknown)}"
        )

    def resolved(names: tuple[str, ...]) -> set[str]:
        return {auto if name == "ours" else name for name in names}

    names = resolved(only) or set(providers)
    if wanted:
        names &= resolved(wanted)
    return [p for p in providers.values() if p.name in names - resolved(without)]


def available_bytes() -> int:
    """Memory that is free for use now."""
    return (torch.cuda.mem_get_info() if torch.cuda.is_available() else host_memory())[0]


def require(package: str) -> None:
    """Refuse unless ``package`` is installed in the version the comparison is made for."""
    series = VERSIONS[package]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Refused(f"not installed: pip install '{package}=={series}.*'") from None
    if not found.startswith(series + "."):
        raise Refused(f"version {found} is installed, {series}.* is compared with")


def refuse(
    inputs: Inputs, *kinds: str, softcap: bool = False, scalar: bool = False, gpu: bool = False,
    package: str = "",
) -> None:  # fmt: skip
    """Refuse what a peer cannot do: these kinds, a softcap, per-token weights, a CPU."""
    if package:
        require(package)
    case = inputs.case
    reasons = {
        "ranking": "has no ranking loss from log-probs",
        "logits": "takes hidden states and the head's weight, not logits",
        "score": "no scores without a loss",
        "ce": "no plain cross-entropy",
    }
    if case.kind in kinds:
        raise Refused(reasons[case.kind])
    if scalar and case.kind != "ce":
        raise Refused("a mean over tokens only: PRO weights every sequence differently")
    if softcap and case.softcap is not None:
        raise Refused("no softcap")
    if gpu and inputs.device.type != "cuda":
        raise Refused("its kernels need a GPU")


def logps_step(inputs: Inputs, logps: Callable[[], Tensor]) -> Step:
    """The case's loss from a peer's log-probs (B, n, T)."""
    grad = inputs.case.kind != "score"
    return backward_step(lambda: case_loss(inputs, logps()), inputs.leaves, grad=grad, logps=logps)


def scored(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states, which keep their graph, and (N,) targets of the scored positions."""
    mask = inputs.targets != -100
    assert inputs.hidden is not None
    return inputs.hidden[mask], inputs.targets[mask]


def mean_step(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """A peer's mean loss of the scored rows and their targets."""
    return backward_step(lambda: loss(*scored(inputs)), inputs.leaves)


def rows_step(inputs: Inputs, logps: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The case's loss from a peer's log-probs (N,) of the scored rows and their targets."""
    return logps_step(inputs, lambda: on_scored_rows(inputs, logps))


def on_scored_rows(inputs: Inputs, logps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Log-probs (N,) of the scored rows put where they belong, (B, n, T)."""
    mask = inputs.targets != -100
    found = logps(*scored(inputs))
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def capped(inputs: Inputs, logits: Tensor) -> Tensor:
    """The logits under the case's softcap."""
    cap = inputs.case.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
