"""``make demo``: the fused loss and the plain PyTorch reference train the same tiny model.

Same seed, same data, same order. A third run, the reference again with every initial weight off by
one unit in the last place, shows what rounding alone does to a trajectory: each step carries on and
amplifies the errors of the last. The fused run must stay as close to the reference as that.

Prints the trajectories, held-out ranking accuracy before and after, and the time in the loss;
writes ``demo-output/``. The exit code is 1 where the fused run departs by more than rounding or the
accuracy does not rise.
"""

from __future__ import annotations

import statistics
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN
from pro_trainer.evaluate.plots import draw_runs
from pro_trainer.models import tiny_llama
from pro_trainer.train.callbacks import ProgressLine, held_out_names
from pro_trainer.train.config import PROConfig
from pro_trainer.train.objective import describe_backend
from pro_trainer.train.trainer import PROTrainer

STEPS = 150
ROUNDING_FACTOR = 30  # the fused run may depart this many times as far as the third run
ACCURACY_AFTER = 0.9
REAL_HEAD = (512, 32000)  # H, V of a second timing: a byte-level vocabulary is small


def demo_config(output_dir: str, steps: int = STEPS, **options: Any) -> PROConfig:
    """The options of all three runs: every step is logged, no checkpoint is written."""
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 25,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "overwrite": True,
    }
    return PROConfig(output_dir=output_dir, **(defaults | options))


def main(output_dir: str = "demo-output", steps: int | None = None) -> int:
    """Run the comparison; returns the exit code."""
    config = demo_config(output_dir, steps or STEPS)
    plain = demo_config(output_dir, steps or STEPS, loss_impl="reference")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for so small a model, and steady on a busy machine
    print("== fused loss ==")
    fused, trainer = run(config)
    trainer.save_model()
    print("\n== reference, same seed ==")
    reference, _ = run(plain)
    print("\n== reference, initial weights off by one unit in the last place ==")
    disturbed, _ = run(plain, disturb=True)
    histories = {"fused": fused["log_history"], "reference": reference["log_history"]}
    draw_runs(Path(output_dir) / "curves.png", histories)

    torch.set_num_threads(threads)
    apart, rounding = print_table(fused, reference, disturbed)
    device, dtype = config.device, torch.float32
    print(f"\nloss of the fused run: {describe_backend(config, device, dtype)}")
    for name in pk.backends.ORDER:
        print(f"  backend {name}: {pk.backends.passed_over(name, device, dtype) or 'usable'}")
    print_times(trainer)
    print(f"\nplot: {output_dir}/curves.png   model: {output_dir}")
    same = apart <= max(ROUNDING_FACTOR * rounding, 1e-5 * losses(fused)[0])
    before, after = (fused[when]["eval_pairwise_accuracy"] for when in ("before", "after"))
    rises = after >= ACCURACY_AFTER or steps is not None
    print(f"same trajectory within rounding: {'yes' if same else 'NO'}")
    print(f"held-out pairwise accuracy {before:.3f} -> {after:.3f}{'' if rises else ': TOO LOW'}")
    return 0 if same and rises else 1


class _EvaluationLines(ProgressLine):
    """Every step is logged, for the comparison; only evaluations are printed."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if held_out_names(logs):
            super().on_log(args, state, control, logs)


def run(config: PROConfig, disturb: bool = False) -> tuple[dict[str, Any], PROTrainer]:
    """Train the tiny model on the bundled lists; metrics before and after, and every log."""
    model, tokenizer = tiny_llama(config.seed)
    if disturb:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
    trainer = PROTrainer(model, config, BUNDLED_TRAIN, BUNDLED_EVAL, tokenizer)
    trainer.remove_callback(ProgressLine)
    trainer.add_callback(_EvaluationLines())
    before = trainer.evaluate()
    trainer.train()
    result = {"before": before, "after": trainer.evaluate()}
    return result | {"log_history": trainer.state.log_history}, trainer


def losses(result: dict[str, Any]) -> list[float]:
    """The training loss of each step."""
    return [entry["loss"] for entry in result["log_history"] if "loss" in entry]


def print_table(
    fused: dict[str, Any], reference: dict[str, Any], disturbed: dict[str, Any]
) -> tuple[float, float]:
    """The trajectories side by side; the largest differences: fused, and by rounding alone."""
    runs = [losses(result) for result in (fused, reference, disturbed)]
    apart = [abs(a - b) for a, b in zip(runs[0], runs[1], strict=True)]
    rounding = [abs(a - b) for a, b in zip(runs[2], runs[1], strict=True)]
    print(f"\n{'step':>6}{'fused loss':>13}{'reference':>13}{'|difference|':>14}{'rounding':>11}")
    for step in sorted({1, len(apart), *range(10, len(apart) + 1, 10)}):
        i = step - 1
        print(
            f"{step:>6}{runs[0][i]:>13.6f}{runs[1][i]:>13.6f}{apart[i]:>14.1e}{rounding[i]:>11.1e}"
        )
    print(f"{'largest of all steps':<32}{max(apart):>14.1e}{max(rounding):>11.1e}")
    print(f"\n{'held out':<28}{'fused':>10}{'reference':>11}")
    for when in ("before", "after"):
        for name in ("pairwise_accuracy", "top1_accuracy", "kendall_tau", "loss"):
            pair = [result[when][f"eval_{name}"] for result in (fused, reference)]
            print(f"{name + ', ' + when:<28}{pair[0]:>10.4f}{pair[1]:>11.4f}")
    return max(apart), max(rounding)


def print_times(trainer: PROTrainer) -> None:
    """Seconds of the loss alone, forward and backward, on a demo batch and at a real vocabulary."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    device = trainer.args.device
    title = "seconds in the loss, forward + backward"
    print(f"\n{title:<44}{'fused':>9}{'reference':>11}{'speedup':>9}")
    config = trainer.model.config
    own = (config.hidden_size, config.vocab_size)
    for title, (hidden_size, vocab) in (("this model", own), ("a real head", REAL_HEAD)):
        hidden = torch.randn(batch["input_ids"].numel(), hidden_size, device=device)
        weight = torch.randn(vocab, hidden_size, device=device) * hidden_size**-0.5
        ours, theirs = seconds_in(hidden, weight, batch)
        name = f"{title} (H {hidden_size}, V {vocab}, {batch['layout'].num_tokens} tokens)"
        print(f"{name:<44}{ours:>9.4f}{theirs:>11.4f}{theirs / ours:>8.2f}x")


def seconds_in(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> list[float]:
    """Median seconds of the fused and of the reference loss, in turns after a warm-up."""
    preferences, layout = batch["preferences"], batch["layout"].to(hidden.device)
    given = hidden.requires_grad_(), weight.requires_grad_(), None, preferences.rewards

    def step(loss_function: Callable[..., Any]) -> None:
        hidden.grad = weight.grad = None
        out = loss_function(*given, layout=layout, candidate_mask=preferences.mask)
        out.loss.backward()
        weight.grad[0, 0].item()  # waits for a device

    both = [partial(step, x.linear_pro_loss) for x in (pk, pk.reference)]
    rounds = [[timeit.timeit(x, number=1) for x in both] for _ in range(4)]
    return [statistics.median(taken) for taken in zip(*rounds[1:], strict=True)]


if __name__ == "__main__":
    sys.exit(main())
