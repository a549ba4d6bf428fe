"""How every model of the study is made and trained: a small Llama, by ``PROTrainer``.

Plain cross-entropy goes through the same trainer, optimizer, schedule, batches and fused loss: PRO
on lists of a single candidate has no ranking terms left, only the SFT term. So two methods differ
in what they are shown of a list, and in nothing else.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pro_trainer.train.callbacks import CurvesCallback, LogLineCallback
from pro_trainer.train.config import PROConfig
from pro_trainer.train.trainer import PROTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CROSS_ENTROPY = {"sft_weight": 1.0, "sft_reduction": "mean"}  # of lists of one candidate


def small_llama(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, positions: int, seed: int
) -> PreTrainedModel:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=positions,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def single_lists(pairs: Iterable[tuple[list[int], list[int]]]) -> datasets.Dataset:
    """Token ids of (prompt, completion) as lists of one candidate each: all of it SFT."""
    return datasets.Dataset.from_list(
        [
            {"prompts": [prompt], "completions": [completion], "rewards": [0.0], "sft_index": None}
            for prompt, completion in pairs
        ]
    )


def best_of(lists: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """The best candidate of each tokenised list, alone."""
    pairs = []
    for row in lists:
        best = max(range(len(row["rewards"])), key=row["rewards"].__getitem__)
        pairs.append((row["prompts"][0], row["completions"][best]))
    return single_lists(pairs)


def options(output_dir: str, *, steps: int, batch_size: int, **others: Any) -> PROConfig:
    """What all runs share: CPU, linear warm-up over a tenth of the steps, cosine decay to 0."""
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return PROConfig(output_dir=output_dir, **(defaults | others))


@contextlib.contextmanager
def study_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lists: Any,
    held_out: Any = None,
    **config: Any,
) -> Iterator[PROTrainer]:
    """A trainer of ``model`` on ``lists`` that prints no steps; its folder goes with the context.

    ``config``: see ``options``.
    """
    with tempfile.TemporaryDirectory(prefix="pro_study_") as folder:
        trainer = PROTrainer(model, options(folder, **config), lists, held_out, tokenizer)
        trainer.remove_callback(LogLineCallback)
        trainer.remove_callback(CurvesCallback)
        yield trainer


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN for a single value."""
    data = torch.tensor(values, dtype=torch.float64)
    error = data.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
    return data.mean().item(), error.item()
