"""PRO in a bare accelerate loop, in bf16 mixed precision, with accumulation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import pro_kernels as pk
import tiny


def main(epochs: int = 5) -> list[float]:
    """Train and return the losses."""
    accelerator = Accelerator(
        mixed_precision="bf16", gradient_accumulation_steps=2, cpu=not torch.cuda.is_available()
    )
    model = pk.attach(tiny.model(), loss="ranking")  # before prepare wraps it
    loader = DataLoader(tiny.ranked_lists(), batch_size=2, collate_fn=tiny.collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
