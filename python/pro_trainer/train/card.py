"""The model card of a trained model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import pro_kernels as pk
from pro_trainer.models import causal_lm
from pro_trainer.text.options import ListOptions
from pro_trainer.train.callbacks import held_out_names
from pro_trainer.train.checkpoints import step_size
from pro_trainer.train.options import LossOptions

if TYPE_CHECKING:
    from transformers import Trainer

PRO = """@article{song2023pro,
  title={Preference Ranking Optimization for Human Alignment},
  author={Song, Feifan and Yu, Bowen and Li, Minghao and Yu, Haiyang and Huang, Fei and
          Li, Yongbin and Wang, Houfeng},
  journal={arXiv preprint arXiv:2306.17492},
  year={2023}
}"""


_HELD_OUT = ("pairwise_accuracy", "top1_accuracy", "kendall_tau", "ndcg", "loss")


def write(folder: Path, trainer: Trainer) -> None:
    """Write ``README.md`` into ``folder``: what was trained, how, and what to cite."""
    from huggingface_hub import ModelCardData

    args = trainer.args
    base = causal_lm(trainer.model).config._name_or_path
    is_hub_name = bool(base) and not Path(base).exists()
    peft = getattr(trainer.model, "peft_config", {}).get("default")
    data = ModelCardData(
        library_name="transformers" if peft is None else "peft",
        base_model=base if is_hub_name else None,
        tags=["preference-optimization", "pro", "pro-kernels", args.loss_type],
    )
    kind, size = next(iter(step_size(args).items()))
    facts = {
        "base model": base if is_hub_name else Path(base).name or "random weights",
        "data": ", ".join(trainer.data_names) or None,
        "loss": args.loss_type,
        **_not_default(ListOptions, args, ()),
        **_not_default(LossOptions, args, ("loss_type", "loss_impl", "budget_mb")),
        "LoRA": None if peft is None else _lora(peft),
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        f"{kind} a step": size,
        "steps": _step(trainer),
        "seed": args.seed,
        "versions": f"pro-kernels {pk.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }
    rows = "\n".join(f"| {name} | {x} |" for name, x in facts.items() if x is not None)
    text = f"""---
{data.to_yaml()}
---
# {Path(args.output_dir).name}

Fine-tuned on ranked candidate responses with the {args.loss_type} loss of
pro-kernels, so that the model's ranking of the candidates follows the preference ranking.

```python
{_snippet(Path(args.output_dir).name, bool(trainer.processing_class.chat_template))}
```

| | |
|---|---|
{rows}
{_held_out(trainer.state.log_history, _step(trainer))}
## Citation

```bibtex
{PRO}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _not_default(kind: type, args: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """The options of ``kind`` that were changed, by name."""
    return {
        f.name: getattr(args, f.name)
        for f in fields(kind)
        if f.name not in without and getattr(args, f.name) != f.default
    }


def _lora(peft: Any) -> str:
    targets = peft.target_modules
    named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    return f"r {peft.r}, alpha {peft.lora_alpha}, dropout {peft.lora_dropout}, on {named}"


def _snippet(name: str, chat: bool) -> str:
    """Code that loads the model (adapters with their base) and answers a question."""
    asked: Any = "What is a preference ranking?"
    asked = [{"role": "user", "content": asked}] if chat else asked
    return f"""from transformers import pipeline

generate = pipeline("text-generation", model="{name}")  # this folder
asked = {json.dumps(asked)}
print(generate(asked, max_new_tokens=64, return_full_text=False)[0]["generated_text"])"""


def _step(trainer: Trainer) -> int:
    """The step of the weights: the last one, or the best where that was loaded at the end."""
    state = trainer.state
    ended = 0 < state.max_steps <= state.global_step
    best = ended and trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return state.best_global_step if best else state.global_step


def _held_out(history: list[dict[str, Any]], step: int) -> str:
    """The first evaluation of each held-out data set, and the last one of these weights."""
    lines = []
    for data in sorted({name for entry in history for name in held_out_names(entry)}):
        found = [entry for entry in history if data in held_out_names(entry)]
        entries = [entry for entry in found if entry["step"] <= step] or found
        first, last = entries[0], entries[-1]
        title = f"Held-out lists {data.removeprefix('eval').strip('_')}".strip()
        lines += ["", f"## {title}", ""]
        lines += [f"| | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        lines += [
            f"| {n} | {first[f'{data}_{n}']:.4f} | {last[f'{data}_{n}']:.4f} |" for n in _HELD_OUT
        ]
    return "\n".join([*lines, ""])
