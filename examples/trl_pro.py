"""PRO in TRL's ``SFTTrainer`` (pip install 'trl==1.16.*'): its arguments, and lists of n."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ByT5Tokenizer
from trl import SFTConfig

import tiny
from pro_kernels.integrations.trl import RankingTrainer


def main(steps: int = 10) -> list[float]:
    """Train LoRA adapters on ranked lists and return the logged losses."""
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,  # prompts
            learning_rate=1e-2,
            logging_steps=2,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = RankingTrainer(
            tiny.model(),
            args=config,
            train_dataset=Dataset.from_list(tiny.ranked_lists()),
            processing_class=ByT5Tokenizer(extra_ids=0),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
