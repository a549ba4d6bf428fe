"""The authors' batches through one forward: the loss and gradients of their training step."""

from __future__ import annotations

import torch

import tiny
from pro_kernels.models.official import compute_loss


def batch() -> dict[str, torch.Tensor]:
    """A batch as the authors' collator makes it: (B, n, T), the prompt's last token unmasked."""
    items = tiny.ranked_lists()
    rows = tiny.collate(items)
    b, n = rows["rewards"].shape
    prefix = torch.zeros_like(rows["input_ids"])
    prompts = [item["prompt"] for item in items for _ in item["completions"]]
    for row, prompt in enumerate(prompts):
        prefix[row, : len(tiny.tokens(prompt)) - 1] = 1
    shaped = {k: rows[k].view(b, n, -1) for k in ("input_ids", "attention_mask")}
    return {**shaped, "prefix_mask": prefix.view(b, n, -1), "rewards": rows["rewards"]}


def main(steps: int = 20) -> tuple[float, float]:
    """Train; return the first and the last loss."""
    model, data = tiny.model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = compute_loss(model, data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
