"""Other libraries, optional: each is asked for the same loss, or says why it cannot give it.

Each in its best configuration for the job: where it takes rows, it gets the scored ones only.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.inputs import Inputs, case_loss
from bench.losses import SFT_WEIGHT
from bench.step import Refused, Step, backward_step

VERSIONS = {
    "trl": "1.16",
    "liger-kernel": "0.8",
    "cut-cross-entropy": "25.1",
    "quack-kernels": "0.6",
    "verl": "0.9",
}


def require(package: str) -> None:
    """Refuse unless ``package`` is installed in the version the comparison is made for."""
    series = VERSIONS[package]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Refused(f"not installed: pip install '{package}=={series}.*'") from None
    if not found.startswith(series + "."):
        raise Refused(f"version {found} is installed, {series}.* is compared with")


def trl(inputs: Inputs) -> Step:
    """TRL's chunked log-probs as its trainers call them, then the plain ranking loss.

    As there, the scored positions alone are projected where Triton runs, every position elsewhere.
    From logits: its ``selective_log_softmax``.
    """
    require("trl")
    from trl.trainer import utils

    _refuse(inputs, "ranking")
    targets, case = inputs.targets, inputs.case
    compact = inputs.logits is None and utils._use_triton(inputs.device)
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def of_rows(rows: Tensor, labels: Tensor) -> Tensor:
        return utils._ChunkedLogProbFunction.apply(
            rows, inputs.weight, None, labels, 1.0, chunk, case.softcap, 1.0, ()
        )[0]

    def logps() -> Tensor:
        if inputs.logits is not None:
            return utils.selective_log_softmax(inputs.logits, targets.clamp(min=0)).float()
        if compact:
            return _on_scored_rows(inputs, of_rows)
        return of_rows(inputs.hidden.flatten(0, 2), targets.clamp(min=0).reshape(-1)).view(
            targets.shape
        )

    return _step(inputs, logps)


def cce(inputs: Inputs) -> Step:
    """CCE's per-token losses (``torch_compile`` where its kernels cannot run), plain ranking."""
    require("cut-cross-entropy")
    _refuse(inputs, "ranking", "logits")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.device.type == "cuda" else "torch_compile"
    options = {"softcap": inputs.case.softcap, "reduction": "none", "impl": impl}

    def logps() -> Tensor:
        return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, **options)

    return _step(inputs, lambda: logps().float())


def torch_linear(inputs: Inputs, chunked: bool = False, mean: bool = False) -> Step:
    """PyTorch's ``linear_cross_entropy`` on the scored rows, per token or their mean."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Refused(f"torch {torch.__version__} has no linear_cross_entropy")
    _refuse(inputs, "ranking", "logits", softcap=True, scalar=mean)
    chunks = torch.nn.LinearCrossEntropyOptions() if chunked or mean else None

    def logps() -> Tensor:
        return _on_scored_rows(
            inputs,
            lambda x, y: -function(x, inputs.weight, y, reduction="none", options=chunks).float(),
        )

    def loss() -> Tensor:
        x, y = _scored(inputs)
        return function(x, inputs.weight, y, options=chunks)

    return backward_step(loss, inputs.leaves) if mean else _step(inputs, logps)


def liger_preference(inputs: Inputs) -> Step:
    """Liger's fused linear SimPO, which for pairs of one reward gap is exactly PRO.

    n = 2, tau = r_1 - r_2 the same for every prompt: the rank term is
    ``-log sigmoid(tau (s_1 - s_2))``, SimPO with beta = tau and gamma = 0; its NLL term, a mean
    over chosen tokens, is the SFT term with alpha = w (chosen tokens) / B.
    """
    require("liger-kernel")
    case = inputs.case
    _refuse(inputs, "ranking", "logits", "score", "ce", softcap=True)
    if case.n != 2:
        raise Refused("n > 2: its fused preference losses take pairs")
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    taus = inputs.rewards[:, 0] - inputs.rewards[:, 1]
    if float(taus.max() - taus.min()) > 1e-5:
        raise Refused("its SimPO takes one reward gap for all prompts")
    chosen = int((inputs.targets[:, 0] != -100).sum())
    module = LigerFusedLinearSimPOLoss(
        beta=float(taus.mean()), gamma=0.0, alpha=SFT_WEIGHT * chosen / case.B
    )
    pairs = inputs.targets.transpose(0, 1).reshape(2 * case.B, case.T)

    def loss() -> Tensor:
        stacked = inputs.hidden.transpose(0, 1).reshape(2 * case.B, case.T, case.H)
        with torch.enable_grad():
            return module(inputs.weight, stacked, pairs)[0]

    return backward_step(loss, inputs.leaves)


def liger_ce(inputs: Inputs) -> Step:
    """Liger's fused linear cross-entropy, a mean: it has no gradient per token."""
    require("liger-kernel")
    _refuse(inputs, "ranking", "logits", "score", scalar=True, gpu=True)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(softcap=inputs.case.softcap)

    def loss() -> Tensor:
        x, y = _scored(inputs)
        return module(inputs.weight, x, y)

    return backward_step(loss, inputs.leaves)


def quack(inputs: Inputs) -> Step:
    """QuACK's cross-entropy kernel, per token, in place, behind one matmul on the scored rows."""
    require("quack-kernels")
    _refuse(inputs, "ranking", softcap=True, gpu=True)
    from quack.cross_entropy import cross_entropy

    def of_rows(x: Tensor, labels: Tensor) -> Tensor:
        logits = x @ inputs.weight.t()
        return -cross_entropy(logits, labels, reduction="none", inplace_backward=True)

    def of_logits() -> Tensor:
        flat = inputs.logits.flatten(0, 2)
        loss = cross_entropy(flat, inputs.targets.reshape(-1), reduction="none")
        return -loss.view(inputs.targets.shape)

    if inputs.logits is not None:
        return _step(inputs, of_logits)
    return _step(inputs, lambda: _on_scored_rows(inputs, of_rows))


def quack_mean(inputs: Inputs) -> Step:
    """QuACK's chunked linear cross-entropy, a mean: it has no gradient per token."""
    require("quack-kernels")
    _refuse(inputs, "ranking", "logits", "score", softcap=True, scalar=True, gpu=True)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss() -> Tensor:
        x, y = _scored(inputs)
        extra = -len(y) % 8  # it takes multiples of 8 rows
        x, y = F.pad(x, (0, 0, 0, extra)), F.pad(y, (0, extra), value=-100)
        return chunked_linear_cross_entropy(x, inputs.weight, y)

    return backward_step(loss, inputs.leaves)


def verl(inputs: Inputs) -> Step:
    """Verl's fused linear cross-entropy (Triton), per token, on the scored rows."""
    require("verl")
    _refuse(inputs, "ranking", "logits", softcap=True, gpu=True)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def of_rows(x: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, inputs.weight, labels, 1.0)[0].float()

    return _step(inputs, lambda: _on_scored_rows(inputs, of_rows))


def _step(inputs: Inputs, logps: Callable[[], Tensor]) -> Step:
    """The case's loss from a peer's log-probs (B, n, T)."""
    return backward_step(
        lambda: case_loss(inputs, logps()),
        inputs.leaves,
        grad=inputs.case.kind != "score",
        logps=logps,
    )


def _scored(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states, which keep their graph, and (N,) targets of the scored positions."""
    mask = inputs.targets != -100
    assert inputs.hidden is not None
    return inputs.hidden[mask], inputs.targets[mask]


def _on_scored_rows(inputs: Inputs, logps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Log-probs (N,) of the scored rows put where they belong, (B, n, T)."""
    mask = inputs.targets != -100
    found = logps(*_scored(inputs))
    return found.new_zeros(mask.shape).masked_scatter(mask, found)


def _refuse(
    inputs: Inputs,
    *kinds: str,
    softcap: bool = False,
    scalar: bool = False,
    gpu: bool = False,
) -> None:
    """Refuse what a peer cannot do: these kinds, a softcap, per-token weights, a CPU."""
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
