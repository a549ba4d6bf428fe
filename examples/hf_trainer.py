"""PRO under transformers' ``Trainer``: the attached model returns its own loss."""

from __future__ import annotations

import tempfile

from transformers import Trainer, TrainingArguments

import pro_kernels as pk
import tiny


def main(steps: int = 20) -> list[float]:
    """Train and return the logged losses."""
    model = pk.attach(tiny.model(), loss="ranking")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **tiny.arguments(folder, steps),
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=5,
            remove_unused_columns=False,  # the collator reads all of them
        )
        trainer = Trainer(
            model, arguments, train_dataset=tiny.ranked_lists(), data_collator=tiny.collate
        )
        return tiny.losses(trainer)


if __name__ == "__main__":
    print(main())
