"""How well a model ranks: no logits are held, no gradients are made.

Pairwise accuracy: share of the pairs of candidates of one prompt with different rewards whose
better one has the higher score (equal scores count as wrong). Top-1: share of the prompts whose
highest-scored candidate has the highest reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pro_trainer.collate import Batch, TokenizedList, batches, pad_id, tokenize_lists
from pro_trainer.config import EvalConfig
from pro_trainer.data import DataError, DataReport, read_lists
from pro_trainer.model import check_parts, load
from pro_trainer.objective import batch_loss, choose_device, describe_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, batches: Iterable[Batch], config: EvalConfig
) -> dict[str, float]:
    """Metrics by name, means over prompts (over pairs for ``pairwise_accuracy``).

    ``loss``, ``sft_loss``, ``pairwise_accuracy``, ``top1_accuracy``, ``pairs``, ``prompts`` and
    ``rank_loss_1`` ... for the terms of the ranking loss.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: Counter[str] = Counter()
    for batch in batches:
        output = batch_loss(model, batch.to(device), config)
        prompts = batch.rewards.shape[0]
        sums["loss"] += prompts * output.loss.item()
        sums["sft_loss"] += prompts * output.sft_loss.item()
        for k, value in enumerate(output.rank_losses.tolist(), 1):
            sums[f"rank_loss_{k}"] += prompts * value
        right, pairs, top1 = ranking_counts(
            output.scores.cpu(), batch.rewards, batch.candidate_mask
        )
        sums["right"] += right
        sums["pairs"] += pairs
        sums["top1_accuracy"] += top1
        sums["prompts"] += prompts
    model.train(was_training)
    if not sums["prompts"]:
        raise ValueError("nothing to evaluate: no lists")
    metrics = {name: value / sums["prompts"] for name, value in sums.items()}
    metrics["pairwise_accuracy"] = sums["right"] / max(1, sums["pairs"])
    metrics |= {"pairs": sums["pairs"], "prompts": sums["prompts"]}
    del metrics["right"]
    return metrics


def ranking_counts(
    scores: Tensor,  # (B, n)
    rewards: Tensor,  # (B, n)
    candidate_mask: Tensor,  # (B, n) bool
) -> tuple[int, int, int]:
    """Pairs in the right order, pairs with different rewards, prompts whose best is on top."""
    both = candidate_mask[:, :, None] & candidate_mask[:, None, :]
    better = both & (rewards[:, :, None] > rewards[:, None, :])
    right = better & (scores[:, :, None] > scores[:, None, :])
    absent = ~candidate_mask
    top = scores.masked_fill(absent, -torch.inf).argmax(1, keepdim=True)
    best = rewards.masked_fill(absent, -torch.inf).amax(1)
    top1 = rewards.gather(1, top)[:, 0] == best
    return int(right.sum()), int(better.sum()), int(top1.sum())


def load_lists(
    paths: list[str], tokenizer: PreTrainedTokenizerBase, config: EvalConfig
) -> tuple[list[TokenizedList], DataReport]:
    """Read and tokenise whole files.

    Raises:
        DataError: a file is unusable, or no list of the files can be ranked.
    """
    report = DataReport()
    stream = read_lists(
        paths,
        report,
        on_bad_line=config.on_bad_line,
        all_equal=config.all_equal,
        num_candidates=config.num_candidates,
    )
    lists = list(tokenize_lists(stream, tokenizer, config, report))
    if not lists:
        why = report.text().replace("\n", "; ")
        raise DataError(f"{', '.join(map(str, paths))}: no usable list ({why})")
    return lists, report


def check_lengths(model: PreTrainedModel, lists: Iterable[TokenizedList]) -> None:
    """Raise ValueError where a sequence is longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(tokens.prompt) + max(map(len, tokens.completions)) for tokens in lists)
    if limit and longest > limit:
        raise ValueError(
            f"sequences of up to {longest} tokens, but {type(model).__name__} has "
            f"max_position_embeddings={limit}; set --max_length {limit} or less"
        )


def evaluate_files(config: EvalConfig) -> dict[str, float]:
    """The whole of ``pro-kernels eval``: load, read, report, score."""
    if not config.model or not config.data:
        raise ValueError("eval needs --model and --data")
    device = choose_device(config.device)
    implementation = describe_backend(config, device)
    model, tokenizer = load(config.model, config.tokenizer)
    model.to(device)
    lists, report = load_lists(config.data, tokenizer, config)
    check_lengths(model, lists)
    print(report.text(), f"loss: {implementation}", sep="\n")
    first = next(batches(lists[:1], config, pad_id(tokenizer))).to(device)
    check_parts(model, first.input_ids, first.attention_mask)
    return evaluate(model, batches(lists, config, pad_id(tokenizer)), config)
