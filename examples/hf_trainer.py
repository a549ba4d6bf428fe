"""PRO under transformers' ``Trainer``: the attached model returns its own loss."""

from __future__ import annotations

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import pro_kernels as pk
import tiny


def main(steps: int = 20) -> list[float]:
    """Train and return the logged losses."""
    model = pk.attach(tiny.model(), loss="ranking")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,  # prompts
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=5,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,  # the collator reads all of them
        )
        trainer = Trainer(
            model, arguments, train_dataset=tiny.ranked_lists(), data_collator=tiny.collate
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
