"""The contenders: same inputs, same mask, same loss; each builds a closure of forward + backward.

What they do is in ``formulations`` (floors, ours, plain PyTorch, the authors') and ``peers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench import formulations, peers
from bench.cases import Case
from bench.inputs import Inputs
from bench.step import Step
from pro_kernels import backends

# How much of the free memory a case may take.
_SHARE = 0.7


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes:
        name: as on the command line and in the JSON.
        label: as in tables and plots.
        build: inputs -> Step; raises Refused where it does not apply.
        logit_bytes: bytes it holds at its peak for each logit of every token, for fp32 and for
            16-bit inputs; to refuse a case that this machine cannot hold. 0 where it holds few.
        compiles: uses torch.compile (first call takes long).
    """

    name: str
    label: str
    build: Callable[[Inputs], Step]
    logit_bytes: tuple[int, int] = (0, 0)
    compiles: bool = False

    @property
    def is_floor(self) -> bool:
        """Whether it is a bound, not a loss."""
        return self.name.startswith("floor")

    @property
    def is_ours(self) -> bool:
        """Whether it is pro_kernels."""
        return self.name.startswith("ours-")

    def label_of(self, case: Case) -> str:
        """The label in a case's table: floors say what they are there."""
        if self.is_floor and case.flops is None:
            made = "gradient buffer made" if case.kind == "logits" else "log-probs copied"
            return f"floor: {made}"
        return f"{self.label}, {case.dtype}" if self.name == "floor" else self.label

    def refusal_of_size(self, case: Case) -> str | None:
        """Why a case is too large for this provider on this machine."""
        logits = case.tokens * case.V * self.logit_bytes[case.dtype != "fp32"]
        need = case.input_bytes + logits
        free = available_bytes()
        if need > _SHARE * free:
            return f"not run: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        return None


def all_providers(device: torch.device) -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    usable = [b for b in backends.ORDER if _times_well(b, device)]
    auto = ours_name(device).removeprefix("ours-")
    ours = {f"ours-{b}": (f"pro_kernels ({b})", {"backend": b}) for b in usable}
    for name, what, more in (
        ("T2", "tier T2", {"tier": "T2"}),
        ("T3", "tier T3, least memory", {"tier": "T3"}),
        ("layout", "layout made before", {"with_layout": True}),
        ("trained-head", "head trained", {"train_head": True}),
    ):
        ours[f"ours-{name}"] = (f"pro_kernels ({auto}), {what}", {"backend": auto, **more})
    f = formulations
    table = [
        Provider("floor", "floor: head matmuls", f.floor),
        Provider("floor-fp32", "floor: head matmuls, fp32 operands", partial(f.floor, upcast=True)),
        *(Provider(n, label, partial(f.ours, **more)) for n, (label, more) in ours.items()),
        Provider("plain-fp32", "plain PyTorch, fp32 log_softmax", f.plain, (16, 16)),
        Provider("plain-compiled", "plain PyTorch, torch.compile", partial(f.plain, compiled=True),
                 (16, 16), compiles=True),
        Provider("official", "official formulation", f.official, (12, 6)),
        Provider("official-compiled", "official, torch.compile", partial(f.official, compiled=True),
                 (12, 6), compiles=True),
        Provider("trl", "TRL 1.16 chunked log-probs", peers.trl),
        Provider("liger", "Liger 0.8 fused linear preference", peers.liger_preference,
                 compiles=True),
        Provider("liger-ce", "Liger 0.8 fused linear CE (mean)", peers.liger_ce),
        Provider("cce", "CCE 25.1", peers.cce, (12, 8), compiles=True),
        Provider("quack", "QuACK 0.6 cross-entropy", peers.quack, (0, 2), compiles=True),
        Provider("quack-mean", "QuACK 0.6 linear CE (mean)", peers.quack_mean, compiles=True),
        Provider("verl", "verl 0.9 fused linear CE", peers.verl, compiles=True),
        Provider("torch-lce", "PyTorch linear_cross_entropy", peers.torch_linear, (12, 6)),
        Provider("torch-lce-chunked", "PyTorch linear_cross_entropy, chunked",
                 partial(peers.torch_linear, chunked=True)),
        Provider("torch-lce-mean", "PyTorch linear_cross_entropy, chunked (mean)",
                 partial(peers.torch_linear, mean=True)),
    ]  # fmt: skip
    return {p.name: p for p in table}


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
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as f:
            line = next(x for x in f if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 1 << 62


def _times_well(name: str, device: torch.device) -> bool:
    """Usable here, and not through an interpreter, whose time says nothing."""
    interpreted = name == "triton" and device.type != "cuda"
    return not interpreted and backends.refusal(name, device, torch.float32) is None
