"""The loss of one batch, and what the scores of many batches say.

One number S a candidate (its summed log-prob) and m (its scored tokens) is all that leaves the
model; loss and metrics are formulas on those. ``batch_loss`` is the differentiable way through the
fused kernels, ``score_metrics`` the same formula again on the host, over any number of lists: for
the training log and for evaluation alike.

Legend: ``B`` prompts of a batch, ``L`` lists, ``n`` candidates, ``N`` scored tokens, ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pro_kernels as pk
from pro_trainer.batch.collate import Lists, Preferences, best_candidates
from pro_trainer.evaluate.metrics import ranking_metrics
from pro_trainer.train.options import LossOptions

Head = Any  # pro_kernels' HeadInputs: hidden (R, H), weight (V, H) and what comes after it
OFFICIAL_EPS = 1e-10  # inside the log of the authors' code


class BatchLoss(NamedTuple):
    """The loss (scalar, differentiable), S and m of the candidates ((B, n), detached)."""

    loss: Tensor
    logps: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Scores(Lists):
    """What is known of L lists that were scored, on the host.

    Attributes:
        logps: (L, n) fp32, S; 0 where a candidate is absent.
        lengths: (L, n) int64, m.
        kl: (L,) fp32, S less the reference model's (where there is one) of another prompt's
            completion, NaN where that was not scored.
    """

    logps: Tensor
    lengths: Tensor
    kl: Tensor | None = None

    def ranked_by(self, length_normalize: bool) -> Tensor:
        """(L, n), S / m or S."""
        return self.logps / self.lengths.clamp_min(1) if length_normalize else self.logps

    @classmethod
    def of_batch(
        cls, logps: Tensor, lengths: Tensor, preferences: Preferences, ref_logps: Tensor | None
    ) -> Scores:
        """The scores of one batch; waits for the device they are on."""
        return cls(
            **_of_lists(preferences),
            by_order=preferences.by_order,
            ref_logps=None if ref_logps is None else ref_logps.cpu(),
            logps=logps.cpu(),
            lengths=lengths.cpu(),
            kl=_kl(logps, ref_logps, preferences.kl_index).cpu(),
        )

    @classmethod
    def cat(cls, parts: Sequence[Scores]) -> Scores:
        """Lists one after another, padded to the largest n."""
        n = max(part.logps.shape[1] for part in parts)

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                return None
            if tensors[0].dim() == 1:
                return torch.cat(tensors)
            pad = torch.nn.functional.pad
            return torch.cat([pad(x, (0, n - x.shape[1])) for x in tensors])

        return cls(**{name: joined(name) for name in _TENSORS}, by_order=parts[0].by_order)


_COLUMNS = ("rewards", "mask", "sft_index", "weights", "desirable", "by_order", "kl_index")
_TENSORS = tuple(field.name for field in fields(Scores) if field.name != "by_order")


def _of_lists(preferences: Preferences) -> dict[str, Tensor]:
    """What is known of lists that are not scored, by the names of ``Scores``; nothing is None."""
    rewards, mask = preferences.rewards, preferences.mask
    weights, desirable = preferences.weights, preferences.desirable
    return {
        "rewards": rewards,
        "mask": mask,
        "sft_index": preferences.sft_index,
        "weights": torch.ones(len(rewards), dtype=torch.float64) if weights is None else weights,
        "desirable": best_candidates(rewards, mask) if desirable is None else desirable,
    }


def _kl(logps: Tensor, ref_logps: Tensor | None, index: Tensor | None) -> Tensor:
    """Log-ratios (B,) of the candidates at ``index`` (B,); NaN where it is None or negative.

    Without a reference model, their log-probs.
    """
    if index is None:
        return logps.new_full(logps.shape[:1], torch.nan)
    at = index.to(logps.device, non_blocking=True)[:, None]
    ratios = logps.detach() if ref_logps is None else logps.detach() - ref_logps
    return torch.where(at < 0, torch.nan, ratios.gather(1, at.clamp_min(0)))[:, 0]


def batch_loss(
    model: pk.OpenModel,
    batch: Mapping[str, Any],
    config: LossOptions,
    ref_logps: Tensor | None = None,  # (B, n)
    running: Tensor | None = None,  # (2,)
) -> BatchLoss:
    """The model's forward up to its head, then the fused loss on the scored rows.

    ``running`` is that of a loss which keeps one (bco) from batch to batch, and is changed. Under
    ``no_grad`` nothing is kept.
    """
    preferences = batch["preferences"]

    def loss_of(head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        if config.loss_type == "pro":
            out = _pro_loss(head, batch, config)
            return out.loss, {"logps": out.logps, "lengths": out.lengths}
        logps, lengths = _sequence_logps(head, batch, config)
        loss = _loss_on_scores(logps, lengths, preferences, config, ref_logps, running)
        return loss, {"logps": logps.detach(), "lengths": lengths}

    out = run_rows(model, batch, loss_of)
    return BatchLoss(out.loss, out.logps, out.lengths)


def sequence_logps(
    model: pk.OpenModel, batch: Mapping[str, Any], config: LossOptions
) -> tuple[Tensor, Tensor]:
    """S and m of the candidates, (B, n) each; 0 where a candidate is absent."""

    def scores(head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = _sequence_logps(head, batch, config)
        return logps.new_zeros(()), {"logps": logps, "lengths": lengths}

    out = run_rows(model, batch, scores)
    return out.logps, out.lengths


def run_rows(
    model: pk.OpenModel,
    batch: Mapping[str, Any],
    loss_of: Callable[[Head], tuple[Tensor, dict[str, Tensor]]],
) -> Any:
    """The model on a batch as ``OpenModel.run`` runs it; ``hidden`` is rows, (R * T, H)."""

    def of_rows(head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = head.hidden.flatten(0, 1)
        if not torch.is_autocast_enabled(hidden.device.type):  # there the kernels cast both
            hidden = hidden.to(head.weight.dtype)
        return loss_of(head._replace(hidden=hidden))

    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if "tree" in batch:
        inputs["attention_mask"] = batch["tree"].as_mask()
    return model.run(of_rows, **inputs, use_cache=False)


def _pro_loss(head: Head, batch: Mapping[str, Any], config: LossOptions) -> pk.PROOutput:
    preferences = batch["preferences"]
    official = config.compat == "official"
    return _function(config, "linear_pro_loss")(
        head.hidden,
        head.weight,
        None,
        preferences.rewards,
        layout=batch["layout"],
        prompt_weights=preferences.weights,
        candidate_mask=preferences.mask,
        sft_index=preferences.sft_index,
        compat="official" if official else None,
        final_dtype=head.hidden.dtype if official else None,
        **_options(config, preferences.by_order),
        **head.options(),
    )


def _loss_on_scores(
    logps: Tensor,  # (B, n)
    lengths: Tensor,  # (B, n)
    preferences: Preferences,
    config: LossOptions,
    ref_logps: Tensor | None,  # (B, n)
    running: Tensor | None,  # (2,)
) -> Tensor:
    own = {"desirable": preferences.desirable, "running": running}
    own = {name: x for name, x in own.items() if name in config.loss().defaults}
    if preferences.kl_index is not None:
        own["kl"] = _kl(logps, ref_logps, preferences.kl_index).mean()
    loss, _ = config.loss()(
        logps,
        lengths,
        rewards=None if preferences.by_order else preferences.rewards.to(logps.device),
        ref_logps=ref_logps,
        mask=preferences.mask.to(logps.device),
        prompt_weights=_on(preferences.weights, logps),
        **{name: _on(x, logps) for name, x in own.items()},
        **config.given(),
    )
    return loss


def _on(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.device, non_blocking=True)


def score_metrics(scores: Scores, config: LossOptions) -> dict[str, float]:
    """Loss, its terms and ranking metrics of L lists, means over lists.

    ``loss``; for ``pro`` also ``sft_loss`` and ``rank_loss_1`` ...; TRL's ``rewards/chosen``,
    ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen`` and
    ``logps/rejected`` over the pairs of a list; and those of ``ranking_metrics``.
    With ``compat="official"`` lists are taken in the order of their rewards.
    """
    loss, terms = _loss_of(scores, config)
    metrics = {"loss": loss.item()}
    for k, term in enumerate(terms.pop("rank_losses", torch.zeros(0)).tolist(), 1):
        metrics[f"rank_loss_{k}"] = term
    metrics |= {name: value.item() for name, value in terms.items()}
    ranked = scores.ranked_by(config.scores_are_means())
    return {**ranking_metrics(ranked, scores.rewards, scores.mask), **metrics}


def list_losses(scores: Scores, config: LossOptions) -> Tensor:
    """(L,) the loss of each list, whatever it weighs; NaN where it has no candidate.

    The loss is their mean, so each is the mean and what its weight adds to it. What a loss takes
    from all lists (BCO's shift, KTO's KL) is that of all.
    """
    present = (scores.mask & (scores.lengths > 0)).any(1)
    weights = torch.ones(len(present), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        loss, _ = _loss_of(replace(scores, logps=scores.logps.double(), weights=weights), config)
        (gains,) = torch.autograd.grad(loss, weights)
    losses = loss.detach() + gains * present.sum()
    return losses.masked_fill(~present, torch.nan)


def _loss_of(scores: Scores, config: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    loss, options = config.loss(), config.given()
    inputs = {
        "sft_index": scores.sft_index,
        "equal_rewards": "keep",
        "desirable": scores.desirable,
    }
    if scores.kl is not None and not scores.kl.isnan().all():
        inputs["kl"] = scores.kl.nanmean()
    options |= {name: value for name, value in inputs.items() if name in loss.defaults}
    if config.compat == "official":
        options |= {"eps": OFFICIAL_EPS, "sft_reduction": options.get("sft_reduction", "sum")}
    return loss(
        scores.logps,
        scores.lengths,
        rewards=None if scores.by_order else scores.rewards,
        ref_logps=scores.ref_logps,
        mask=scores.mask,
        prompt_weights=scores.weights,
        **options,
    )


def label_columns(preferences: Preferences) -> tuple[Tensor, ...]:
    """What ``Trainer``'s evaluation loop gathers as labels, each (B, n) or (B, 1)."""
    index, of_all = preferences.kl_index, torch.ones_like(preferences.sft_index)
    known = {
        **_of_lists(preferences),
        "by_order": of_all * preferences.by_order,
        "kl_index": -of_all if index is None else index,
    }
    columns = (known[name] for name in _COLUMNS)
    columns = (x.long() if x.dtype == torch.bool else x for x in columns)
    return tuple(x[:, None] if x.dim() == 1 else x for x in columns)


def predicted_scores(predictions: Sequence[Any], labels: Sequence[Any]) -> Scores:
    """``Scores`` of the arrays that loop collected: (S, m[, reference S]), ``label_columns``.

    Raises:
        ValueError: no list at all, or lists with rewards beside lists without.
    """
    known = dict(zip(_COLUMNS, map(torch.as_tensor, labels), strict=True))
    mask = known["mask"] == 1  # the loop pads to the largest n with -100
    scored = [torch.as_tensor(x) for x in predictions]
    logps, lengths, *ref_logps = (x.where(mask, 0) for x in scored)
    if known["by_order"].unique().numel() != 1:
        raise ValueError("the lists of a data set must all have rewards or all have none")
    return Scores(
        rewards=known["rewards"].where(mask, 0),
        mask=mask,
        sft_index=known["sft_index"][:, 0],
        by_order=bool(known["by_order"][0, 0]),
        weights=known["weights"][:, 0],
        desirable=mask & (known["desirable"] == 1),
        ref_logps=ref_logps[0] if ref_logps else None,
        logps=logps,
        lengths=lengths,
        # Of a candidate that is outside the mask.
        kl=_kl(scored[0], scored[2] if ref_logps else None, known["kl_index"][:, 0]),
    )


def describe_backend(config: LossOptions, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation serves the run, and why those before it in the list do not.

    Raises:
        ValueError: an explicit choice that cannot serve.
    """
    if config.loss_impl == "reference":
        return "plain PyTorch reference"
    chosen = pk.backends.resolve(config.loss_impl, device, dtype)
    refused = {}
    if config.loss_impl == "auto":
        before = pk.backends.ORDER[: pk.backends.ORDER.index(chosen)]
        refused = {name: pk.backends.passed_over(name, device, dtype) for name in before}
    return f"fused, backend {chosen}" + "".join(f"; not {k}: {v}" for k, v in refused.items())


def _sequence_logps(
    head: Head, batch: Mapping[str, Any], config: LossOptions
) -> tuple[Tensor, Tensor]:
    layout = batch["layout"]
    rows = head.hidden.index_select(0, layout.rows)
    function = _function(config, "linear_token_logps")
    logps = function(rows, head.weight, layout.targets, **head.options())
    return layout.candidate_sums(logps)


def _function(config: LossOptions, name: str) -> Callable[..., Any]:
    """The fused function of that name, or the reference's, and how it is to run."""
    if config.loss_impl == "reference":
        return partial(getattr(pk.reference, name), head_dtype=config.head_dtype)
    how = {"backend": config.loss_impl, "head_dtype": config.head_dtype}
    if config.budget_mb is not None:
        how["budget"] = config.budget_mb << 20
    if config.grad_filter is not None:
        how["grad_filter"] = config.grad_filter
    return partial(getattr(pk, name), **how)


def _options(config: LossOptions, by_order: bool) -> dict[str, Any]:
    """What the loss is told; lists without rewards have no differences to divide by."""
    options = config.given()
    if by_order and options.get("temperature", "reward") == "reward":
        options["temperature"] = 1.0
    return options
