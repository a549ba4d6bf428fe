"""Other libraries, optional: each is asked for the same loss, or says why it cannot give it."""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.losses import SFT_WEIGHT, loss_of_logps
from bench.step import Refused, Step, backward_step

VERSIONS = {"trl": "1.16", "liger-kernel": "0.8", "cut-cross-entropy": "25.1"}


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

    targets, rewards = inputs.targets, inputs.rewards
    mask = targets != -100

    def of_logits() -> Tensor:
        logps = utils.selective_log_softmax(inputs.logits, targets.clamp(min=0))
        return loss_of_logps(logps.float(), targets, rewards)

    def of_hidden() -> Tensor:
        compact = utils._use_triton(inputs.device)
        hidden = inputs.hidden
        rows = hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1])
        labels = targets[mask] if compact else targets.clamp(min=0).reshape(-1)
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        logps = utils._ChunkedLogProbFunction.apply(
            rows, inputs.weight, None, labels, 1.0, chunk, None, 1.0, ()
        )[0]
        if compact:
            logps = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        return loss_of_logps(logps.view(mask.shape), targets, rewards)

    loss = of_hidden if inputs.logits is None else of_logits
    return backward_step(loss, inputs.leaves, grad=inputs.case.kind != "score")


def cce(inputs: Inputs) -> Step:
    """CCE's per-token losses (``torch_compile`` where its kernels cannot run), plain ranking."""
    require("cut-cross-entropy")
    if inputs.logits is not None:
        raise Refused("takes hidden states and the head's weight, not logits")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.device.type == "cuda" else "torch_compile"

    def loss() -> Tensor:
        nll = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.targets, reduction="none", impl=impl
        )
        return loss_of_logps(-nll.float(), inputs.targets, inputs.rewards)

    return backward_step(loss, inputs.leaves, grad=inputs.case.kind != "score")


def liger(inputs: Inputs) -> Step:
    """Liger's fused linear SimPO, which for pairs of one reward gap is exactly PRO.

    n = 2, tau = r_1 - r_2 the same for every prompt: the rank term is
    ``-log sigmoid(tau (s_1 - s_2))``, SimPO with beta = tau and gamma = 0; its NLL term, a mean
    over chosen tokens, is the SFT term with alpha = w (chosen tokens) / B.
    """
    require("liger-kernel")
    case = inputs.case
    if inputs.logits is not None:
        raise Refused("takes hidden states and the head's weight, not logits")
    if case.n != 2:
        raise Refused("n > 2: its fused preference losses take pairs")
    if case.kind == "score":
        raise Refused("no scores without a loss")
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
