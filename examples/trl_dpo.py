"""TRL's DPO trainer on the fused kernels (pip install 'trl==1.16.*'): one line before training."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from transformers import ByT5Tokenizer
from trl import DPOConfig, DPOTrainer

import tiny
from pro_kernels.models.trl import accelerate_trl, restore_trl


def main(steps: int = 4) -> list[float]:
    """Train and return the logged losses."""
    pairs = [
        {"prompt": x["prompt"], "chosen": x["completions"][0], "rejected": x["completions"][-1]}
        for x in tiny.ranked_lists()
    ]
    accelerate_trl()
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                **tiny.arguments(folder, steps), learning_rate=1e-3, logging_steps=1, bf16=False
            )
            trainer = DPOTrainer(
                tiny.model(),
                ref_model=tiny.model(),
                args=config,
                train_dataset=Dataset.from_list(pairs),
                processing_class=ByT5Tokenizer(extra_ids=0),
            )
            return tiny.losses(trainer)
    finally:
        restore_trl()


if __name__ == "__main__":
    print(main())
