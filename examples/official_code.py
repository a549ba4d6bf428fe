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


def main(steps: int = 20) -> list[float]:
    """Train and return the losses."""
    model, data = tiny.model(), batch()
    return tiny.fit(lambda: compute_loss(model, data).loss, model, steps, rate=3e-3)


if __name__ == "__main__":
    main()
