"""PRO in TRL's ``SFTTrainer`` (pip install 'trl==1.16.*'): its arguments, and lists of n."""

from __future__ import annotations

import tempfile

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
            **tiny.arguments(folder, steps), learning_rate=1e-2, logging_steps=2, bf16=False
        )
        trainer = RankingTrainer(
            tiny.model(),
            args=config,
            train_dataset=Dataset.from_list(tiny.ranked_lists()),
            processing_class=ByT5Tokenizer(extra_ids=0),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        return tiny.losses(trainer)


if __name__ == "__main__":
    print(main())
