"""PRO in a bare PyTorch loop: one line attaches the fused loss to the model."""

from __future__ import annotations

import torch

import pro_kernels as pk
import tiny


def main(steps: int = 30) -> float:
    """Train and return the share of candidate pairs in the right order."""
    model = pk.attach(tiny.model(), loss="ranking", sft_weight=0.05)
    batch = tiny.collate(tiny.ranked_lists())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {out.loss.item():.3f}")
    scores = model(**batch).scores  # (B, n), best candidate first
    ordered = (scores[:, :-1] > scores[:, 1:]).float().mean().item()
    print(f"neighbours in the right order: {ordered:.0%}")
    return ordered


if __name__ == "__main__":
    main()
