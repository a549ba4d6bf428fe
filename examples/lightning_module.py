"""PRO as a LightningModule (pip install lightning)."""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader

import pro_kernels as pk
import tiny


class PRO(lightning.LightningModule):
    """The attached model; ``training_step`` has nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = pk.attach(tiny.model(), loss="ranking")

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        """The loss of one batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["rewards"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on everything."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 5) -> float:
    """Train and return the last loss."""
    module = PRO()
    loader = DataLoader(tiny.ranked_lists(), batch_size=2, collate_fn=tiny.collate)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(main())
