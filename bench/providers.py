"""The contenders: same inputs, same mask, same loss; each builds a closure of forward + backward.

Legend: ``B`` prompts, ``n`` candidates, ``T`` positions, ``N`` scored tokens, ``H`` hidden, ``V``
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import pro_kernels as pk
from bench import peers
from bench.cases import Case
from bench.inputs import Inputs
from bench.losses import official_loss, plain_loss
from bench.step import Refused, Step, backward_step
from pro_kernels import backends


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

    def label_of(self, case: Case) -> str:
        """The label in a case's table: floors say what they are there."""
        if self.is_floor and case.kind == "logits":
            return "floor: the gradient buffer made"
        return f"{self.label}, {case.dtype}" if self.name == "floor" else self.label

    def refusal_of_size(self, case: Case) -> str | None:
        """Why a case is too large for this provider on this machine."""
        need = case.tokens * case.V * self.logit_bytes[case.dtype != "fp32"]
        free = available_bytes()
        if need > 0.7 * free:
            return f"not run: needs about {need / 1e9:.0f} GB for logits, {free / 1e9:.0f} are free"
        return None


def all_providers(device: torch.device) -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    usable = [b for b in backends.ORDER if _times_well(b, device)]
    ours = [Provider(f"ours-{b}", f"pro_kernels ({b})", partial(_ours, backend=b)) for b in usable]
    auto = ours_name(device).removeprefix("ours-")
    ours.append(
        Provider(
            "ours-trained-head",
            f"pro_kernels ({auto}), head trained",
            partial(_ours, backend=auto, train_head=True),
        )
    )
    table = [
        Provider("floor", "floor: head matmuls", _floor),
        Provider("floor-fp32", "floor: head matmuls, fp32 operands", partial(_floor, upcast=True)),
        *ours,
        Provider("plain-fp32", "plain PyTorch, fp32 log_softmax", _plain, (16, 16)),
        Provider("official", "official formulation", _official, (12, 6)),
        Provider(
            "official-compiled",
            "official, torch.compile",
            partial(_official, compiled=True),
            (12, 6),
            compiles=True,
        ),
        Provider("trl", "TRL 1.16 chunked log-probs", peers.trl),
        Provider("liger", "Liger 0.8 fused linear preference", peers.liger, compiles=True),
        Provider("cce", "CCE 25.1", peers.cce, (12, 8), compiles=True),
    ]
    return {p.name: p for p in table}


def ours_name(device: torch.device) -> str:
    """Name of the provider that backend="auto" is here."""
    return "ours-" + backends.resolve("auto", device, torch.float32)


def select(
    providers: dict[str, Provider], only: tuple[str, ...], wanted: tuple[str, ...]
) -> list[Provider]:
    """Providers of a case: its own list, narrowed to those asked for ("ours" is either's auto).

    Raises:
        ValueError: a name that no provider has.
    """
    auto = next(name for name in providers if name.startswith("ours-"))

    def resolved(names: tuple[str, ...]) -> set[str]:
        found = {auto if name == "ours" else name for name in names}
        if found - set(providers):
            raise ValueError(
                f"provider must be 'ours' or one of {list(providers)}, got "
                f"{sorted(found - set(providers))}"
            )
        return found

    names = resolved(only) if only else set(providers) - {"ours-trained-head"}
    if wanted:
        names &= resolved(wanted)
    return [p for p in providers.values() if p.name in names]


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


def _floor(inputs: Inputs, upcast: bool = False) -> Step:
    """The matmuls that no exact method avoids, on the scored rows; for logits the bytes moved."""
    case = inputs.case
    if upcast and (case.dtype == "fp32" or case.kind == "logits"):
        raise Refused("the same as the floor here")
    if inputs.logits is not None:
        return _copy_floor(inputs)
    dtype = torch.float32 if upcast else case.torch_dtype
    assert inputs.weight is not None
    x, w = inputs.scored_hidden().to(dtype), inputs.weight.detach().to(dtype)

    def run() -> tuple[Tensor, ...]:
        logits = torch.mm(x, w.t())
        if case.kind == "score":
            return (logits,)
        d_hidden = torch.mm(logits, w)
        if case.kind == "frozen":
            return logits, d_hidden
        return logits, d_hidden, torch.mm(logits.t(), x)

    return Step(run)


def _copy_floor(inputs: Inputs) -> Step:
    """A gradient buffer made: scored rows read once and written, the others zeroed."""
    assert inputs.logits is not None
    logits = inputs.logits.detach().flatten(0, 1)
    live = (inputs.targets != -100).flatten(0, 1)
    starts = live.to(torch.int8).argmax(1).tolist()  # one completion a row, without holes
    ends = [a + m for a, m in zip(starts, live.sum(1).tolist(), strict=True)]

    def run() -> Tensor:
        out = torch.empty_like(logits)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[i, :start].zero_()
            out[i, start:end].copy_(logits[i, start:end])
            out[i, end:].zero_()
        return out

    return Step(run)


def _ours(inputs: Inputs, backend: str, train_head: bool = False) -> Step:
    case, options = inputs.case, {"backend": backend}
    if inputs.logits is not None:
        return backward_step(
            lambda: pk.pro_loss(inputs.logits, inputs.targets, inputs.rewards, **options).loss,
            inputs.leaves,
        )
    hidden, weight, leaves = inputs.hidden, inputs.weight, inputs.leaves
    if train_head:
        weight = weight.detach().requires_grad_()
        leaves = (hidden, weight)

    def loss() -> Tensor:
        return pk.linear_pro_loss(
            hidden, weight, inputs.targets, inputs.rewards, budget=case.budget, **options
        ).loss

    return backward_step(loss, leaves, grad=case.kind != "score")


def _plain(inputs: Inputs) -> Step:
    def loss() -> Tensor:
        logits = inputs.logits
        if logits is None:
            logits = inputs.hidden @ inputs.weight.t()
        return plain_loss(logits, inputs.targets, inputs.rewards)

    return backward_step(loss, inputs.leaves, grad=inputs.case.kind != "score")


def _official(inputs: Inputs, compiled: bool = False) -> Step:
    def function(hidden, weight, logits, targets, rewards) -> Tensor:  # noqa: ANN001
        if logits is None:
            return official_loss(lambda i: hidden[:, i] @ weight.t(), targets, rewards)
        return official_loss(lambda i: logits[:, i], targets, rewards)

    if compiled:
        function = torch.compile(function, dynamic=False)
    arguments = (inputs.hidden, inputs.weight, inputs.logits, inputs.targets, inputs.rewards)
    return backward_step(
        lambda: function(*arguments), inputs.leaves, grad=inputs.case.kind != "score"
    )
