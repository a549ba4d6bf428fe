"""``make demo``: the fused loss and the plain PyTorch reference train the same tiny model.

Same seed, same data, same order. A third run, the reference again with every initial weight off by
one unit in the last place, shows what rounding alone does to a trajectory: each step carries on and
amplifies the errors of the last. The fused run must stay as close to the reference as that.

Prints the trajectories, held-out ranking accuracy before and after, and the time in the loss;
writes ``demo-output/``. The exit code is 1 where the fused run departs by more than rounding or the
accuracy does not rise.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from pro_trainer.collate import Batch, batches, pad_id
from pro_trainer.config import TrainConfig
from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN
from pro_trainer.evaluate import load_lists
from pro_trainer.model import tiny_llama
from pro_trainer.objective import choose_device, describe_backend
from pro_trainer.plot import draw_curves
from pro_trainer.trainer import fit, train

ROUNDING_FACTOR = 30  # the fused run may depart this many times as far as the third run
ACCURACY_AFTER = 0.9
REAL_HEAD = (512, 32000)  # H, V of a second timing: a byte-level vocabulary is small


def main(output_dir: str = "demo-output", steps: int | None = None) -> int:
    """Run the comparison; returns the exit code."""
    config = TrainConfig(
        demo=True, output_dir=output_dir, overwrite=True, steps=steps, log_every=50, eval_every=25
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for so small a model, and steady on a busy machine
    print("== fused loss ==")
    fused = train(config)
    plain = dataclasses.replace(config, loss_impl="reference")
    print("\n== reference, same seed ==")
    reference = train_reference(plain)
    print("\n== reference, initial weights off by one unit in the last place ==")
    disturbed = train_reference(plain, disturb=True)
    draw_curves(Path(output_dir) / "curves.png", {"fused": fused, "reference": reference})

    torch.set_num_threads(threads)
    apart, rounding = print_table(fused, reference, disturbed)
    device = choose_device(config.device)
    print(f"\nloss of the fused run: {describe_backend(config, device)}")
    print_refusals(device)
    print_times(config, device)
    print(f"\nplot: {output_dir}/curves.png   checkpoint: {output_dir}/checkpoint")
    same = apart <= max(ROUNDING_FACTOR * rounding, 1e-5 * fused["train_loss"][0])
    before, after = (fused["eval"][i]["pairwise_accuracy"] for i in (0, -1))
    rises = after >= ACCURACY_AFTER or steps is not None
    print(f"same trajectory within rounding: {'yes' if same else 'NO'}")
    print(f"held-out pairwise accuracy {before:.3f} -> {after:.3f}{'' if rises else ': TOO LOW'}")
    return 0 if same and rises else 1


def train_reference(config: TrainConfig, disturb: bool = False) -> dict[str, Any]:
    """The same run through the reference loss, without writing anything."""
    torch.manual_seed(config.seed)
    model, tokenizer = tiny_llama(config.seed)
    train_lists, _ = load_lists([BUNDLED_TRAIN], tokenizer, config)
    eval_lists, _ = load_lists([BUNDLED_EVAL], tokenizer, config)
    if disturb:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
    model.to(choose_device(config.device))
    return fit(model, train_lists, eval_lists, config, pad_id(tokenizer))


def print_table(
    fused: dict[str, Any], reference: dict[str, Any], disturbed: dict[str, Any]
) -> tuple[float, float]:
    """The trajectories side by side; the largest differences: fused, and by rounding alone."""
    runs = [run["train_loss"] for run in (fused, reference, disturbed)]
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
    for when, i in (("before", 0), ("after", -1)):
        for name in ("pairwise_accuracy", "top1_accuracy", "loss"):
            pair = fused["eval"][i][name], reference["eval"][i][name]
            print(f"{name + ', ' + when:<28}{pair[0]:>10.4f}{pair[1]:>11.4f}")
    return max(apart), max(rounding)


def print_refusals(device: torch.device) -> None:
    """Which backends could serve here, and why the others cannot."""
    for name in pk.backends.ORDER:
        reason = pk.backends.refusal(name, device, torch.float32)
        print(f"  backend {name}: {'usable' if reason is None else reason}")


def print_times(config: TrainConfig, device: torch.device) -> None:
    """Seconds of the loss alone, forward and backward, on a demo batch and at a real vocabulary."""
    model, tokenizer = tiny_llama(config.seed)
    lists, _ = load_lists([BUNDLED_TRAIN], tokenizer, config)
    batch = next(batches(lists, config, pad_id(tokenizer))).to(device)
    title = "seconds in the loss, forward + backward"
    print(f"\n{title:<44}{'fused':>9}{'reference':>11}{'speedup':>9}")
    own = (model.config.hidden_size, model.config.vocab_size)
    for title, (hidden_size, vocab) in (("this model", own), ("a real head", REAL_HEAD)):
        hidden = torch.randn(batch.input_ids.numel(), hidden_size, device=device)
        weight = torch.randn(vocab, hidden_size, device=device) * hidden_size**-0.5
        ours, theirs = time_losses(hidden, weight, batch)
        name = f"{title} (H {hidden_size}, V {vocab}, {batch.layout.num_tokens} tokens)"
        print(f"{name:<44}{ours:>9.4f}{theirs:>11.4f}{theirs / ours:>8.2f}x")


def time_losses(hidden: Tensor, weight: Tensor, batch: Batch, repeats: int = 3) -> list[float]:
    """Median seconds of the fused and of the reference loss, taken in turns after a warm-up."""
    hidden.requires_grad_()
    weight.requires_grad_()
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for taken, loss_function in zip(
            seconds, (pk.linear_pro_loss, pk.reference.linear_pro_loss), strict=True
        ):
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            output = loss_function(hidden, weight, None, batch.rewards, layout=batch.layout)
            output.loss.backward()
            weight.grad[0, 0].item()  # waits for a device
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


if __name__ == "__main__":
    sys.exit(main())
