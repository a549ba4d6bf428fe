"""DPO with TRL's DPOTrainer, the same file for every version: four steps of two pairs."""

import json

import datasets
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer


class Trainer(trl.DPOTrainer):
    """Pairs in their order, and losses before they are rounded, which old versions lack."""

    losses: list[float] = []

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


args = trl.DPOConfig(
    "out", per_device_train_batch_size=2, max_steps=4, learning_rate=1e-5, warmup_steps=0,
    lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
    use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    dataloader_pin_memory=False,
)  # fmt: skip
Trainer(
    model=AutoModelForCausalLM.from_pretrained("model"),
    args=args,
    train_dataset=datasets.load_dataset("json", data_files="data/trl.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained("model"),
).train()
with open("out/logging.jsonl", "w") as file:
    file.writelines(json.dumps({"loss": loss}) + "\n" for loss in Trainer.losses)
