"""PRO on real ranked lists: how well log-probabilities rank held-out lists, before and after.

A byte-pair tokenizer and a small Llama are trained on the completions of the training lists, all of
them, whatever their reward, so that log-probabilities mean something (``pretrain``). From there PRO
runs on lists of n (``rank``): of each list the best, the worst and those evenly between them. The
held-out lists have prompts that nothing was trained on. Learning rate and the form of the SFT term
are chosen on a part of the training lists, which PRO does not train on in the runs that choose: as
a sum over tokens, the default, the term outweighs the ranking terms for long completions and long
lists.

Only numbers leave this module: no text of the data is kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pro_trainer.data.lists import read_lists
from pro_trainer.data.report import DataReport
from pro_trainer.evaluate.metrics import list_statistics
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from study.training import CROSS_ENTROPY, single_lists, small_llama, study_trainer

if TYPE_CHECKING:
    from pro_trainer.data.formats import RankedList

Record = dict[str, Any]
PER_LIST = ("pairs", "right", "top1", "kendall_tau")


@dataclass(frozen=True)
class RealSettings:
    """Sizes of this part."""

    seed: int = 1
    held_out_share: float = 0.2
    choice_share: float = 0.2  # of the training lists, held out while settings are chosen
    candidates: tuple[int, ...] = (2, 4, 8)
    choice_candidates: int = 4
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    sft_reductions: tuple[str, ...] = ("sum", "mean")
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 2
    max_length: int = 256
    max_prompt_length: int = 96
    pretrain_epochs: float = 3
    pretrain_batch: int = 16  # completions
    pretrain_rate: float = 3e-3
    epochs: float = 3
    batch: int = 8  # prompts
    sft_weight: float = 0.05
    points: int = 6  # of the curves


@dataclass(frozen=True)
class Rank:
    """One run of PRO; ``choice``: it only serves the choice of the settings."""

    candidates: int
    learning_rate: float
    sft_reduction: str
    choice: bool = False


def pretrain(settings: RealSettings, path: str, folder: Path) -> dict[str, Any]:
    """Train tokenizer and model, save them in ``folder``; facts, and how the model ranks.

    Raises:
        DataError: data that cannot be read.
        ValueError: lists without rewards, or too few.
    """
    training, held_out = read(settings, path)
    tokenizer = train_tokenizer(training, settings.vocabulary)
    size = {"hidden": settings.hidden, "layers": settings.layers}
    model = small_llama(tokenizer, **size, positions=settings.max_length, seed=settings.seed)
    lists = tokenized(settings, tokenizer, training)
    alone = single_lists((row["prompts"][0], ids) for row in lists for ids in row["completions"])
    steps = math.ceil(len(alone) * settings.pretrain_epochs / settings.pretrain_batch)
    config = {
        "steps": steps,
        "batch_size": settings.pretrain_batch,
        "learning_rate": settings.pretrain_rate,
        "seed": settings.seed,
    }
    with study_trainer(model, tokenizer, alone, **config, **CROSS_ENTROPY) as trainer:
        seconds = trainer.train().metrics["train_runtime"]
    model.save_pretrained(folder / "pretrained")
    tokenizer.save_pretrained(folder / "pretrained")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "training_lists": len(training),
        "held_out_lists": len(held_out),
        "completions": len(alone),
        "steps": steps,
        "parameters": model.num_parameters(),
        "nats_a_token": [losses[0], losses[-1]],
        "seconds": seconds,
        "tau_at_most": highest_tau(held_out),
        "by_length": rank_by_length(held_out),
    }


def rank(settings: RealSettings, path: str, run: Rank, folder: Path) -> dict[str, Any]:
    """PRO on lists of n from the pretrained model; ranking of held-out lists before and after.

    ``all`` are the held-out lists as they are, ``cut`` those with as many candidates as trained on.
    """
    training, held_out = read(settings, path)
    if run.choice:
        training, held_out = _split(training, settings.choice_share, settings.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "pretrained")
    model = LlamaForCausalLM.from_pretrained(folder / "pretrained")
    lists = tokenized(settings, tokenizer, training, run.candidates)
    measured = {
        "all": tokenized(settings, tokenizer, held_out),
        "cut": tokenized(settings, tokenizer, held_out, run.candidates),
    }
    steps = math.ceil(len(lists) * settings.epochs / settings.batch)
    config = {
        "steps": steps,
        "batch_size": settings.batch,
        "learning_rate": run.learning_rate,
        "sft_reduction": run.sft_reduction,
        "sft_weight": settings.sft_weight,
        "seed": settings.seed,
        "eval_strategy": "no" if run.choice else "steps",
        "eval_steps": max(1, steps // settings.points),
    }
    with study_trainer(model, tokenizer, lists, measured["all"], **config) as trainer:
        before = {name: per_list(trainer, part) for name, part in measured.items()}
        seconds = trainer.train().metrics["train_runtime"]
        after = {name: per_list(trainer, part) for name, part in measured.items()}
    return {
        **vars(run),
        "lists": len(lists),
        "steps": steps,
        "seconds": seconds,
        "before": before,
        "after": after,
        "summary": {name: compare(before[name], after[name]) for name in measured},
        "curve": [
            {key: entry[f"eval_{key}"] for key in ("pairwise_accuracy", "kendall_tau")}
            | {"step": entry["step"]}
            for entry in trainer.state.log_history
            if "eval_pairwise_accuracy" in entry
        ],
    }


def read(settings: RealSettings, path: str) -> tuple[list[Record], list[Record]]:
    """Training and held-out lists as records; a prompt is on one side only.

    Raises:
        DataError: data that cannot be read.
        ValueError: lists without rewards, or too few.
    """
    lists = list(read_lists([path], DataReport(), ListOptions()))
    if any(ranked.rewards is None for ranked in lists):
        raise ValueError(f"{path}: the study needs lists with rewards, some have an order only")
    return _split(list(map(_record, lists)), settings.held_out_share, settings.seed)


def train_tokenizer(records: Iterable[Record], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learnt on prompts and completions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for record in records for text in [record["prompt"], *record["completions"]])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def tokenized(
    settings: RealSettings,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    candidates: int | None = None,
) -> Any:
    """Records as a data set of token ids, with at most so many candidates a list."""
    options = ListOptions(
        num_candidates=candidates,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
    )
    return load_dataset([records], tokenizer, options)[0]


def per_list(trainer: Any, lists: Any) -> dict[str, list[float]]:
    """Statistics of each list, in order: ``PER_LIST``."""
    scores = trainer.score(lists)
    found = list_statistics(scores.ranked_by(True), scores.rewards, scores.mask)
    return {name: getattr(found, name).double().tolist() for name in PER_LIST}


def choices(settings: RealSettings) -> list[Rank]:
    """The runs that choose learning rate and ``sft_reduction``."""
    n = settings.choice_candidates
    return [
        Rank(n, rate, reduction, True)
        for reduction in settings.sft_reductions
        for rate in settings.learning_rates
    ]


def final_runs(settings: RealSettings, chosen: Sequence[dict[str, Any]]) -> list[Rank]:
    """The runs that are reported, with the settings that gave the highest accuracy."""
    best = max(chosen, key=lambda run: run["summary"]["all"]["after"]["pairwise_accuracy"][0])
    sizes = sorted(settings.candidates, reverse=True)  # the long runs first
    return [Rank(n, best["learning_rate"], best["sft_reduction"]) for n in sizes]


def highest_tau(records: Sequence[Record]) -> float:
    """Mean tau-b of the right order: below 1, since it has no ties where rewards have."""
    taus = []
    for record in records:
        rewards = record["rewards"]
        pairs = [a != b for i, a in enumerate(rewards) for b in rewards[:i]]
        taus.append(math.sqrt(sum(pairs) / len(pairs)))
    return sum(taus) / len(taus)


def rank_by_length(records: Sequence[Record]) -> dict[str, Any]:
    """What ranks the lists without any model: the longer completion (in characters) is better."""
    n = max(len(record["completions"]) for record in records)

    def padded(rows: Iterable[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([[*row, *[0.0] * (n - len(row))] for row in rows])

    lengths = padded([list(map(len, record["completions"])) for record in records])
    rewards = padded([record["rewards"] for record in records])
    present = padded([[1.0] * len(record["rewards"]) for record in records]) > 0
    found = list_statistics(lengths, rewards, present)
    own = {name: getattr(found, name).double().tolist() for name in PER_LIST}
    return compare(own, own)["after"]


def compare(
    before: dict[str, list[float]], after: dict[str, list[float]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """(value, standard error) of pairwise accuracy and mean tau: before, after, after - before.

    The error is over the lists. Accuracy is a ratio of sums over lists (of pairs in the right order
    and of pairs), whose error is that of its linearisation.
    """
    old, new = map(_tensors, (before, after))
    changed = {k: new[k] - old[k] for k in PER_LIST} | {"pairs": new["pairs"]}
    return {
        name: {
            "pairwise_accuracy": _ratio(values["right"], values["pairs"]),
            "kendall_tau": _mean(values["kendall_tau"]),
            "top1_accuracy": _mean(values["top1"][new["pairs"] > 0]),
        }
        for name, values in (("before", old), ("after", new), ("change", changed))
    }


def _tensors(lists: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()}


def _ratio(counts: torch.Tensor, pairs: torch.Tensor) -> tuple[float, float]:
    ratio = counts.sum() / pairs.sum()
    deviations = counts - ratio * pairs  # their mean is 0
    error = deviations.std() * len(pairs) ** 0.5 / pairs.sum()
    return ratio.item(), error.item()


def _mean(values: torch.Tensor) -> tuple[float, float]:
    values = values[~values.isnan()]
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def _record(ranked: RankedList) -> Record:
    (prompt,) = ranked.prompts
    return {
        "prompt": f"{prompt}\n\nAnswer:\n",
        "completions": list(ranked.completions),
        "rewards": list(ranked.rewards or ()),
    }


def _split(records: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    prompts = sorted({record["prompt"] for record in records})
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        raise ValueError(f"{len(prompts)} prompts are too few to hold out {share} of them")
    held = set(random.Random(seed).sample(prompts, count))
    kept = [record for record in records if record["prompt"] not in held]
    return kept, [record for record in records if record["prompt"] in held]
