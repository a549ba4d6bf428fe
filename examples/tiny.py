"""What the examples train, a small random Llama on bytes and ranked lists, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 259  # bytes and three special tokens, as ByT5 counts them
PROMPTS = ("count", "spell", "greet", "sum up")
ANSWERS = (" well done", " so so", " no", " ?")  # best first
PAD, EOS = 0, 1


def model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 0.1 M parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tokens(text: str) -> list[int]:
    """One token a byte."""
    return [byte + 3 for byte in text.encode()]


def ranked_lists(n: int = 3) -> list[dict]:
    """Items of one prompt, its n completions and their rewards."""
    return [
        {
            "prompt": p,
            "completions": list(ANSWERS[:n]),
            "rewards": [1.0 - 0.7 * i for i in range(n)],
        }
        for p in PROMPTS
    ]


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of n candidates a prompt, one prompt after another, right-padded; rewards (B, n)."""
    rows, labels = [], []
    for item in items:
        prompt = tokens(item["prompt"])
        for completion in item["completions"]:
            answer = [*tokens(completion), EOS]
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
    length = max(map(len, rows))

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([x + [value] * (length - len(x)) for x in lists])

    return {
        "input_ids": padded(rows, PAD),
        "attention_mask": padded([[1] * len(x) for x in rows], 0),
        "labels": padded(labels, -100),
        "rewards": torch.tensor([item["rewards"] for item in items]),
    }


def arguments(folder: str, steps: int) -> dict[str, Any]:
    """Of a ``Trainer``, for a short run that saves nothing."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 2,  # prompts
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
    }


def losses(trainer: Any) -> list[float]:
    """Train, and return the logged losses."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fit(loss_of: Callable[[], Any], model: torch.nn.Module, steps: int, rate: float) -> list[float]:
    """Take steps of AdamW, and return their losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f}")
    return found
