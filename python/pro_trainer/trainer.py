"""The training loop, top to bottom: data, model, steps, evaluation before and after, checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pro_trainer.collate import (
    Batch,
    TokenizedList,
    batches,
    num_batches,
    pad_id,
    split_held_out,
)
from pro_trainer.config import TrainConfig
from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN
from pro_trainer.evaluate import check_lengths, evaluate, load_lists
from pro_trainer.model import check_parts, load, save, tiny_llama
from pro_trainer.objective import batch_loss, choose_device, describe_backend
from pro_trainer.plot import draw_curves

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainingError(RuntimeError):
    """The run had to stop: loss or gradient is no longer a finite number."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as configured, write ``output_dir`` and return what ``metrics.json`` holds.

    Raises:
        ValueError: options, data, model or output folder that cannot be used; before any work.
        TrainingError: a loss or gradient that is NaN or infinite, naming the step.
    """
    if not (config.demo or (config.model and config.data)):
        raise ValueError("train needs --model and --data, or --demo")
    output = Path(config.output_dir)
    check_output(output, config.overwrite)
    device = choose_device(config.device)
    print(f"loss: {describe_backend(config, device)}")

    torch.manual_seed(config.seed)
    if config.model:
        model, tokenizer = load(config.model, config.tokenizer)
    else:
        model, tokenizer = tiny_llama(config.seed)
    train_lists, eval_lists = prepare_data(config, tokenizer)
    check_lengths(model, train_lists + eval_lists)
    output.mkdir(parents=True, exist_ok=True)

    model.to(device)
    result = fit(model, train_lists, eval_lists, config, pad_id(tokenizer))
    result["config"] = asdict(config)
    save_run(output, model, tokenizer, result)
    return result


def prepare_data(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenizedList], list[TokenizedList]]:
    """Training and held-out lists, with a printed report of what the files hold."""
    bundled = not config.data
    lists, report = load_lists([BUNDLED_TRAIN] if bundled else config.data, tokenizer, config)
    print(report.text())
    eval_files = config.eval_data or ([BUNDLED_EVAL] if bundled else [])
    if eval_files:
        held_out, report = load_lists(eval_files, tokenizer, config)
        print(f"held out:\n{report.text()}")
        seen = {tuple(tokens.prompt) for tokens in lists}
        if common := sum(tuple(tokens.prompt) in seen for tokens in held_out):
            print(f"warning: the prompts of {common} held-out lists are also trained on")
    else:
        lists, held_out = split_held_out(lists, config.eval_fraction, config.seed)
    print(f"training on {len(lists)} lists, {len(held_out)} held out")
    return lists, held_out


def fit(
    model: PreTrainedModel,
    train_lists: list[TokenizedList],
    eval_lists: list[TokenizedList],
    config: TrainConfig,
    pad: int,
) -> dict[str, Any]:
    """The loop. Returns ``train_loss`` of each step, ``eval`` (before, ..., after), ``seconds``."""
    device = next(model.parameters()).device
    per_epoch = num_batches(train_lists, config.batch_size)
    steps = config.num_steps(per_epoch)
    optimizer, scheduler = make_optimizer(model, config, steps)
    max_norm = config.max_grad_norm or math.inf
    first = next(batches(train_lists[:1], config, pad)).to(device)
    check_parts(model, first.input_ids, first.attention_mask)

    evals = [held_out_metrics(model, eval_lists, config, pad, step=0)] if eval_lists else []
    model.train()
    history: list[float] = []
    waiting: list[torch.Tensor] = []  # losses and gradient norms not yet read from the device
    start = time.perf_counter()
    for step, batch in zip(range(1, steps + 1), epochs(train_lists, config, pad), strict=False):
        loss = batch_loss(model, batch.to(device), config).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        waiting.append(torch.stack([loss.detach().float(), norm.detach().float()]))
        if step % config.log_every == 0 or step == steps:
            history += read_finite(waiting, first_step=len(history) + 1)
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{steps}  epoch {step / per_epoch:.2f}  "
                f"loss {sum(history[-len(waiting) :]) / len(waiting):.4f}  "
                f"lr {scheduler.get_last_lr()[0]:.2e}  {seconds / step:.3f} s/step",
                flush=True,
            )
            waiting.clear()
        if eval_lists and (step == steps or step % (config.eval_every or steps) == 0):
            evals.append(held_out_metrics(model, eval_lists, config, pad, step=step))
    seconds = time.perf_counter() - start
    return {"steps": steps, "seconds": seconds, "train_loss": history, "eval": evals}


def epochs(lists: list[TokenizedList], config: TrainConfig, pad: int) -> Iterator[Batch]:
    """Batches without end, each pass over the lists in another order."""
    for epoch in itertools.count():
        yield from batches(lists, config, pad, shuffle_seed=config.seed + epoch)


def make_optimizer(
    model: PreTrainedModel, config: TrainConfig, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on what is trainable (biases and norms are not decayed), and its schedule."""
    from transformers import get_scheduler

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate())
    scheduler = get_scheduler(
        config.schedule if config.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * steps),
        num_training_steps=steps,
    )
    return optimizer, scheduler


def held_out_metrics(
    model: PreTrainedModel, lists: list[TokenizedList], config: TrainConfig, pad: int, step: int
) -> dict[str, float]:
    """Evaluate and print one line."""
    metrics = evaluate(model, batches(lists, config, pad), config)
    print(
        f"held out, step {step}: loss {metrics['loss']:.4f}  pairwise accuracy "
        f"{metrics['pairwise_accuracy']:.3f}  top-1 {metrics['top1_accuracy']:.3f}",
        flush=True,
    )
    return {"step": step, **metrics}


def read_finite(waiting: list[torch.Tensor], first_step: int) -> list[float]:
    """Losses of the last steps, in one copy from the device; TrainingError at the first bad one."""
    values = torch.stack(waiting).tolist()
    for step, (loss, norm) in enumerate(values, first_step):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; nothing was saved. A lower --lr, "
                "a smaller --reward_scale or --dtype float32 may help"
            )
    return [loss for loss, _ in values]


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError where ``output`` is a file, or a folder with content that must stay."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output_dir {output} is not empty; --overwrite replaces the run in it")


def save_run(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    result: dict[str, Any],
) -> None:
    """Write checkpoint, metrics and plot beside their places, then rename them in."""
    partial = output / f".partial-{os.getpid()}"
    try:
        partial.mkdir()
        save(model, tokenizer, str(partial / "checkpoint"))
        (partial / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
        draw_curves(partial / "curves.png", {"run": result})
        if (output / "checkpoint").exists():
            os.replace(output / "checkpoint", partial / "replaced")
        for name in ("checkpoint", "metrics.json", "curves.png"):
            os.replace(partial / name, output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"saved {output}/checkpoint, metrics.json, curves.png")
