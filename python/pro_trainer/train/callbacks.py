"""What happens beside the steps: a line a log, curves at the end, samples on request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from pro_trainer.evaluate.plots import draw_curves

if TYPE_CHECKING:
    from transformers import Trainer

_SHOWN = {  # log key -> how it is printed
    "loss": "loss {:.4f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "pairwise_accuracy": "pairwise accuracy {:.3f}",
    "scored_tokens_per_second": "{:.0f} scored tokens/s",
}
_HELD_OUT = {
    "_loss": "loss {:.4f}",
    "_pairwise_accuracy": "pairwise accuracy {:.3f}",
    "_top1_accuracy": "top-1 {:.3f}",
    "_kendall_tau": "tau {:.3f}",
}


class LogLineCallback(TrainerCallback):
    """Print the numbers that say how a run is doing; all of them are in ``log_history``."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line, from the first process."""
        shown = [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]
        for data in held_out_names(logs):
            values = [f.format(logs[data + name]) for name, f in _HELD_OUT.items()]
            shown.append(f"{data}: " + "  ".join(values))
        if shown and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown), flush=True)


def held_out_names(logs: Mapping[str, Any]) -> list[str]:
    """``eval`` or, for several held-out data sets, ``eval_NAME`` of each that ``logs`` is about."""
    end = "_pairwise_accuracy"
    return [key.removesuffix(end) for key in logs if key.startswith("eval") and key.endswith(end)]


class CurvesCallback(TrainerCallback):
    """``curves.png`` in the output folder when training ends."""

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
        for i in range(min(args.sample_prompts, len(lists))):
            prompt = lists[i]["prompts"][0]
            print(f"sample, step {state.global_step}: {self._decode(prompt)!r}")
            print(f"  -> {self._decode(self._answer(prompt, args.sample_tokens))!r}", flush=True)

    def _decode(self, ids: list[int]) -> str:
        return self._trainer.processing_class.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def _answer(self, prompt: list[int], tokens: int) -> list[int]:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        training = model.training
        model.eval()
        try:
            ids = torch.tensor([prompt], device=model.device)
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=self._trainer.data_collator.pad_token_id,
            )
        finally:
            model.train(training)
        return made[0, len(prompt) :].tolist()
