"""The model card of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

import pro_kernels as pk
from pro_trainer.models import causal_lm
from pro_trainer.train.callbacks import held_out_names

if TYPE_CHECKING:
    from transformers import Trainer

PRO = """@article{song2023pro,
  title={Preference Ranking Optimization for Human Alignment},
  author={Song, Feifan and Yu, Bowen and Li, Minghao and Yu, Haiyang and Huang, Fei and
          Li, Yongbin and Wang, Houfeng},
  journal={arXiv preprint arXiv:2306.17492},
  year={2023}
}"""


_HELD_OUT = ("loss", "pairwise_accuracy", "top1_accuracy", "kendall_tau")


def write(folder: Path, trainer: Trainer) -> None:
    """Write ``README.md`` into ``folder``: what was trained, how, and what to cite."""
    from huggingface_hub import ModelCardData

    args = trainer.args
    base = causal_lm(trainer.model).config._name_or_path
    is_hub_name = bool(base) and not Path(base).exists()
    data = ModelCardData(
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        base_model=base if is_hub_name else None,
        tags=["preference-optimization", "pro", "pro-kernels", args.loss_type],
    )
    is_pro = args.loss_type == "pro"
    options = {
        "loss": f"{args.loss_type}, compat {args.compat}" if is_pro else args.loss_type,
        "SFT weight": args.sft_weight if is_pro else None,
        "temperature": args.temperature if is_pro else None,
        "scores": ("mean" if args.length_normalize else "summed") + " log-probability"
        if is_pro
        else None,
        "candidates at most": args.num_candidates,
        "longest sequence": f"{args.max_length} tokens",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "lists a step": trainer.get_total_train_batch_size(args),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "versions": f"pro-kernels {pk.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
    }
    rows = "\n".join(f"| {name} | {x} |" for name, x in options.items() if x is not None)
    last = next((h for h in reversed(trainer.state.log_history) if held_out_names(h)), {})
    held_out = "\n".join(
        f"| {data.removeprefix('eval').strip('_')} {name} | {last[f'{data}_{name}']:.4f} |"
        for data in held_out_names(last)
        for name in _HELD_OUT
    )
    if held_out:
        held_out = f"\n## Held-out lists, step {last['step']}\n\n| | |\n|---|---|\n{held_out}\n"
    text = f"""---
{data.to_yaml()}
---
# {Path(args.output_dir).name}

Fine-tuned on ranked candidate responses with the {args.loss_type} loss of
pro-kernels, so that the model's ranking of the candidates follows the preference ranking.

| | |
|---|---|
{rows}
{held_out}
## Citation

```bibtex
{PRO}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
