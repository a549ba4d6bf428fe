"""SFT on the best of n against PRO on all n, under the known reward of ``task``.

Each seed has its own model, behaviour data, training lists and held-out prompts. The model is first
trained on the behaviour data, one answer a prompt (``clone``). From there both methods (``fit``)
take the same number of steps over the same prompts in the same order, with the same samples: SFT by
cross-entropy on the best of the first n, PRO on all of the first n. The learning rate of each
method and n is the one with the highest reward of greedy answers on seeds kept for that choice,
from one grid for all (``best_rates``).

Two things in PRO's loss change with n beside what is ranked. Its SFT term has a factor (n - 1)^2,
so longer lists lean towards SFT. And with temperatures from reward gaps the denominator's entries
are exp(s * gap) with s < 0, a mean log-probability: the larger the gap, the smaller the entry, so
that a longer list is mostly about candidates of nearly the same reward. ``pro_constant`` is PRO
with ``sft_weight`` divided by that factor (at n = 2 it is PRO), ``pro_order`` has in addition all
temperatures at 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import ByT5Tokenizer, LlamaForCausalLM

from pro_trainer.prepare.sampling import sample
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from study import task
from study.training import (
    CROSS_ENTROPY,
    best_of,
    mean_and_error,
    single_lists,
    small_llama,
    study_trainer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("sft", "pro", "pro_constant", "pro_order")
MEASURES = ("greedy_reward", "sampled_reward", "pairwise_accuracy", "kendall_tau")
TOKENIZER = ByT5Tokenizer(extra_ids=0)


@dataclass(frozen=True)
class KnownSettings:
    """Sizes of this part."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    choice_seeds: tuple[int, ...] = (101, 102)  # of the learning rates only
    candidates: tuple[int, ...] = (2, 3, 5)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    hidden: int = 64
    layers: int = 2
    behaviour_prompts: int = 6000
    train_prompts: int = 2000
    held_out_prompts: int = 500
    clone_steps: int = 600
    clone_rate: float = 3e-3
    clone_batch: int = 64
    steps: int = 150
    batch: int = 32  # prompts
    sft_weight: float = 0.05  # of PRO


@dataclass(frozen=True)
class Fit:
    """One training run."""

    seed: int
    method: str
    candidates: int
    learning_rate: float


@dataclass(frozen=True)
class Data:
    """What a seed trains on and is measured by; no prompt is in two of them."""

    behaviour: list[tuple[str, str]]  # (prompt, answer)
    training: list[task.Example]
    held_out: list[task.Example]

    @classmethod
    def of_seed(cls, settings: KnownSettings, seed: int) -> Data:
        """Drawn by ``seed`` alone; the first n answers of a list are the list of n."""
        sizes = settings.behaviour_prompts, settings.train_prompts, settings.held_out_prompts
        prompts = iter(task.draw_prompts(sum(sizes), seed))
        rng = random.Random(f"answers {seed}")
        longest = max(settings.candidates)
        behaviour, training, held_out = ([next(prompts) for _ in range(size)] for size in sizes)
        return cls(
            [(prompt, task.behave(prompt, rng)) for prompt in behaviour],
            [task.draw_example(prompt, longest, rng) for prompt in training],
            [task.draw_example(prompt, longest, rng) for prompt in held_out],
        )


def clone(settings: KnownSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Train the seed's model on its behaviour data, save it in ``folder`` and measure it."""
    data = Data.of_seed(settings, seed)
    size = {"hidden": settings.hidden, "layers": settings.layers, "positions": 32}
    model = small_llama(TOKENIZER, **size, seed=seed)
    end = [TOKENIZER.eos_token_id]
    pairs = [(_ids(prompt), _ids(answer) + end) for prompt, answer in data.behaviour]
    config = {
        "steps": settings.clone_steps,
        "batch_size": settings.clone_batch,
        "learning_rate": settings.clone_rate,
        "seed": seed,
    }
    with study_trainer(model, TOKENIZER, single_lists(pairs), **config, **CROSS_ENTROPY) as trainer:
        trainer.train()
        measures = measure(trainer, data.held_out, seed)
    model.save_pretrained(_saved(folder, seed))
    best = {n: fmean(max(x.rewards[:n]) for x in data.training) for n in settings.candidates}
    return {
        "seed": seed,
        "parameters": model.num_parameters(),
        "behaviour_reward": fmean(task.reward(*pair) for pair in data.behaviour),
        "best_of_n_reward": {str(n): mean for n, mean in best.items()},
        **measures,
    }


def fit(settings: KnownSettings, run: Fit, folder: Path) -> dict[str, Any]:
    """Train the seed's clone by one method on lists of n and measure it."""
    data = Data.of_seed(settings, run.seed)
    model = LlamaForCausalLM.from_pretrained(_saved(folder, run.seed))
    lists = _tokenized([example.record(run.candidates) for example in data.training])
    config: dict[str, Any] = {
        "steps": settings.steps,
        "batch_size": settings.batch,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
    }
    if run.method == "sft":
        lists, config = best_of(lists), config | CROSS_ENTROPY
    else:
        share = 1 if run.method == "pro" else (run.candidates - 1) ** 2
        config["sft_weight"] = settings.sft_weight / share
        config["temperature"] = "1" if run.method == "pro_order" else "reward"
    with study_trainer(model, TOKENIZER, lists, **config) as trainer:
        seconds = trainer.train().metrics["train_runtime"]
        measures = measure(trainer, data.held_out, run.seed)
    return {**vars(run), "lists": len(lists), "seconds": seconds, **measures}


def measure(trainer: Any, held_out: Sequence[task.Example], seed: int) -> dict[str, float]:
    """True reward of greedy and of sampled answers, and ranking, on the held-out prompts."""
    prompts = [example.prompt for example in held_out]
    longest = max(len(example.rewards) for example in held_out)
    scores = trainer.score(_tokenized([example.record(longest) for example in held_out]))
    ranking = trainer.metrics(scores)
    return {
        "greedy_reward": _reward(trainer.model, prompts, do_sample=False),
        "sampled_reward": _reward(
            trainer.model, prompts, seeds=[seed * len(prompts) + i for i in range(len(prompts))]
        ),
        "pairwise_accuracy": ranking["pairwise_accuracy"],
        "kendall_tau": ranking["kendall_tau"],
    }


def methods(candidates: int) -> tuple[str, ...]:
    """Those that differ on lists of n."""
    return tuple(name for name in METHODS if candidates > 2 or name != "pro_constant")


def choices(settings: KnownSettings) -> list[Fit]:
    """The runs that choose learning rates."""
    return [
        Fit(seed, method, n, rate)
        for seed in settings.choice_seeds
        for n in sorted(settings.candidates, reverse=True)  # the long runs first
        for method in methods(n)
        for rate in settings.learning_rates
    ]


def best_rates(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """(method, n) -> the learning rate with the highest mean reward of greedy answers."""
    rewards: dict[tuple[str, int], dict[float, list[float]]] = {}
    for run in runs:
        by_rate = rewards.setdefault((run["method"], run["candidates"]), {})
        by_rate.setdefault(run["learning_rate"], []).append(run["greedy_reward"])
    return {
        key: max(by_rate, key=lambda rate: fmean(by_rate[rate])) for key, by_rate in rewards.items()
    }


def final_fits(settings: KnownSettings, rates: dict[tuple[str, int], float]) -> list[Fit]:
    """The runs that are reported."""
    return [
        Fit(seed, method, n, rates[method, n])
        for seed in settings.seeds
        for n in sorted(settings.candidates, reverse=True)
        for method in methods(n)
    ]


def summary(
    settings: KnownSettings, clones: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for the clone and for each method and n: (mean, standard error) over the seeds."""
    groups = [({"method": "clone", "candidates": 0, "learning_rate": None}, clones)]
    for n in settings.candidates:
        for method in methods(n):
            rows = [x for x in fits if (x["method"], x["candidates"]) == (method, n)]
            rate = rows[0]["learning_rate"]
            groups.append(({"method": method, "candidates": n, "learning_rate": rate}, rows))
    return [
        {**name, **{key: mean_and_error([row[key] for row in rows]) for key in MEASURES}}
        for name, rows in groups
    ]


def advantages(settings: KnownSettings, fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method minus SFT seed by seed, which share data and clone: (mean, standard error)."""
    at = {(x["method"], x["candidates"], x["seed"]): x for x in fits}
    rows = []
    for n in settings.candidates:
        for method in methods(n)[1:]:
            row: dict[str, Any] = {"method": method, "candidates": n}
            for key in MEASURES:
                values = [at[method, n, s][key] - at["sft", n, s][key] for s in settings.seeds]
                row[key] = mean_and_error(values)
            rows.append(row)
    return rows


def _reward(model: PreTrainedModel, prompts: Sequence[str], **how: Any) -> float:
    texts = sample(
        model, TOKENIZER, prompts, max_new_tokens=task.LENGTH + 2, batch_size=len(prompts), **how
    )
    return fmean(
        task.reward(prompt, answer) for prompt, (answer,) in zip(prompts, texts, strict=True)
    )


def _tokenized(records: list[dict[str, Any]]) -> Any:
    dataset, report = load_dataset([records], TOKENIZER, ListOptions())
    if report.lists != len(records):
        raise RuntimeError(f"lists were lost on the way to the model:\n{report.text()}")
    return dataset


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def _saved(folder: Path, seed: int) -> Path:
    return folder / f"clone-{seed}"
