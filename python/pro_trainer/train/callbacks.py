"""What happens beside the steps: a line a log, curves at the end, samples on request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from pro_trainer.evaluate.plots import draw_curves
from pro_trainer.prepare.sampling import greedy

if TYPE_CHECKING:
    from transformers import Trainer

_SHOWN = {  # log key -> how it is printed
    "loss": "loss {:.4g}",
    "pairwise_accuracy": "accuracy {:.3f}",
    "scored_tokens_per_second": "{:.0f} tokens/s",
}
_HELD_OUT = {
    "_loss": "loss {:.4g}",
    "_pairwise_accuracy": "accuracy {:.3f}",
    "_top1_accuracy": "top-1 {:.3f}",
    "_kendall_tau": "tau {:.3f}",
}
_MOST = 0.8  # share of the loss from which on a term is worth a word
_OF_RANK = "the other ranks hardly count; --temperature 1 weighs them alike"
_OF_SFT = "the ranking hardly counts; a lower --sft_weight or --sft_reduction mean changes that"


class ProgressLine(TrainerCallback):
    """A line a log that says how a run is doing; all numbers are in ``log_history``."""

    _start = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = (state.global_step, time.monotonic())
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print it, from the first process."""
        shown, held_out = _shown(logs)
        if not state.is_world_process_zero or not (shown or held_out):
            return
        if "loss" in logs:
            shown.append(self._time_left(state))
        at = f"step {state.global_step}/{state.max_steps}  " if state.max_steps else ""
        print(at + "  ".join([*shown, *held_out]), flush=True)

    def _time_left(self, state: Any) -> str:
        step, at = self._start
        a_step = (time.monotonic() - at) / max(1, state.global_step - step)
        left = (state.max_steps - state.global_step) * a_step
        return f"{tqdm.format_interval(left)} left"


class ProgressBar(ProgressLine, ProgressCallback):
    """The same on a terminal, where it stays in place while steps are taken."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Set the line beside the bar; evaluations stay above it."""
        if self.training_bar is None:
            super().on_log(args, state, control, logs)
            return
        shown, held_out = _shown(logs)
        if shown:
            self.training_bar.set_postfix_str("  ".join(shown))
        for line in held_out:
            self.training_bar.write(f"step {state.global_step}  {line}")


def _shown(logs: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """What is shown of training, and of each held-out data set."""
    held_out = [
        f"{data}: " + "  ".join(f.format(logs[data + name]) for name, f in _HELD_OUT.items())
        for data in held_out_names(logs)
    ]
    return [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs], held_out


class TermHint(TrainerCallback):
    """A hint, once, where one term holds most of the loss: the others then hardly count."""

    def __init__(self) -> None:
        self._said = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Look at the first line of the training."""
        loss = logs.get("loss", 0)
        if self._said or not loss or not state.is_world_process_zero:
            return
        self._said = True
        ranks = {n: logs[n] for n in logs if n.startswith("rank_loss_")}
        if len(ranks) == 1:
            ranks = {}  # of pairs it is all there is to learn
        for name, value in {"sft_loss": logs.get("sft_loss", 0), **ranks}.items():
            if value > _MOST * loss:
                what, advice = f"rank term {name[10:]}", _OF_RANK
                if name == "sft_loss":
                    what, advice = "the SFT term", _OF_SFT
                print(f"{what} is {value:.4g} of a loss of {loss:.4g}: {advice}")


def held_out_names(logs: Mapping[str, Any]) -> list[str]:
    """``eval`` or, for several held-out data sets, ``eval_NAME`` of each that ``logs`` is about."""
    end = "_pairwise_accuracy"
    names = [key.removesuffix(end) for key in logs if key.startswith("eval") and key.endswith(end)]
    return [name for name in names if all(name + key in logs for key in _HELD_OUT)]


def plain(evaluation: Mapping[str, float]) -> dict[str, float]:
    """The metrics of one evaluation of the log, by their own names."""
    return {k.removeprefix("eval_"): v for k, v in evaluation.items() if k.startswith("eval_")}


class CurvesCallback(TrainerCallback):
    """``curves.png`` in the output folder when training ends, and when its end is evaluated."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw what was logged, with the end."""
        if 0 < state.max_steps == state.global_step:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw what was logged."""
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            draw_curves(Path(args.output_dir) / "curves.png", state.log_history)


class SamplesCallback(TrainerCallback):
    """Greedy answers to the first held-out prompts every ``sample_steps`` steps."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Generate and print, from the first process."""
        if state.global_step % args.sample_steps or not state.is_world_process_zero:
            return
        trainer = self._trainer
        held_out = trainer.eval_dataset
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()))
        lists = trainer.train_dataset if held_out is None else held_out
        prompts = [lists[i]["prompts"][0] for i in range(min(args.sample_prompts, len(lists)))]
        model = trainer.accelerator.unwrap_model(trainer.model)
        answers = greedy(model, trainer.processing_class, prompts, args.sample_tokens)
        for prompt, answer in zip(prompts, answers, strict=True):
            asked = trainer.processing_class.decode(prompt, skip_special_tokens=True)
            print(f"sample, step {state.global_step}: {asked!r}")
            print(f"  -> {answer!r}", flush=True)
