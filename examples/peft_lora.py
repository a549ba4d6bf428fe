"""PRO with LoRA on the attention and on the LM head; everything else is frozen."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

import pro_kernels as pk
import tiny


def main(steps: int = 30) -> tuple[float, float]:
    """Train the adapters; return the first and the last loss."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"])
    model = pk.attach(get_peft_model(tiny.model(), config), loss="ranking")
    model.print_trainable_parameters()
    batch = tiny.collate(tiny.ranked_lists())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
