"""``python -m bench attach``: what ``attach`` costs, and what the swap under TRL saves.

- *attach*: a training step (forward, ranking loss, backward) of an attached model beside the same
  decoder with ``linear_pro_loss`` called on its hidden states.
- *TRL*: the head of TRL's trainers, from hidden states and labels to log-probs and gradients
  (``add_fused_lm_head``), with its own function and after ``accelerate_trl()``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pro_kernels as pk
from bench.engine.record import facts
from bench.engine.run import collect
from bench.engine.timing import Refused, Step, Timer, backward_step, paired, quartiles, timed
from bench.providers.base import require
from bench.providers.trl import swapped

PROMPTS, CANDIDATES, LENGTH, MASKED = 4, 2, 128, 0.6
ROUNDS = 7
HEADS = ((896, 151936), (1024, 32000))


def run(path: Path, rounds: int = ROUNDS) -> dict:
    """Measure into the JSON file ``path``; returns its content."""
    parts = [
        lambda head=head: [attach_overhead(*head, rounds), trl_head(*head, rounds)]
        for head in HEADS
    ]
    return collect("attach", parts, path, _line, **facts(torch.device("cpu"), rounds=rounds))


def attach_overhead(width: int, vocab: int, rounds: int) -> dict:
    """An attached model against its decoder and the functional loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids, labels = _tokens(vocab)
    rewards = torch.randn(PROMPTS, CANDIDATES)
    attached = pk.attach(model, loss="ranking")

    def functional() -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        shape = (PROMPTS, CANDIDATES, LENGTH)
        return pk.linear_pro_loss(
            hidden.view(*shape, -1), model.lm_head.weight, labels.view(shape), rewards, shift=True
        ).loss

    def through_attach() -> Tensor:
        return attached(input_ids=ids, labels=labels, rewards=rewards, use_cache=False).loss

    both = {"plain": functional, "ours": through_attach}
    sides = {side: backward_step(loss, tuple(model.parameters())) for side, loss in both.items()}
    return _row(f"attach, H={width} V={vocab}", sides, rounds, "<= 1.02x")


def trl_head(width: int, vocab: int, rounds: int) -> dict:
    """TRL's head, its own function against ours."""
    name = f"TRL's head, H={width} V={vocab}"
    try:
        require("trl")
    except Refused as error:
        return {"name": name, "note": str(error)}
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    head = nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=width**-0.5)
    hidden = torch.randn(PROMPTS * CANDIDATES, LENGTH, width, dtype=torch.bfloat16)
    model = _Head(hidden.requires_grad_(), head)
    add_fused_lm_head(model)
    _, labels = _tokens(vocab)
    upstream = torch.randn(labels.shape[0], LENGTH - 1)

    def loss() -> Tensor:
        return (model(labels=labels, fused_lm_head=True).log_probs * upstream).sum()

    def ours() -> Tensor:
        with swapped():
            return plain.run()

    plain = backward_step(loss, tuple(model.parameters()))
    return _row(name, {"plain": plain, "ours": replace(plain, run=ours)}, rounds, "<= 0.33x")


class _Head(nn.Module):
    """What ``add_fused_lm_head`` sees of a model: a decoder that is done, and the LM head."""

    def __init__(self, hidden: Tensor, head: nn.Module) -> None:
        super().__init__()
        self.hidden, self.head = nn.Parameter(hidden), head
        text = SimpleNamespace()
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self) -> None:  # TRL puts its own here
        raise NotImplementedError


def _tokens(vocab: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, vocab, (PROMPTS * CANDIDATES, LENGTH))
    labels = ids.clone()
    labels[:, : int(MASKED * LENGTH)] = -100
    return ids, labels


def _row(name: str, sides: dict[str, Step], rounds: int, wanted: str) -> dict:
    losses = {}
    for side, step in sides.items():  # which warms them up
        losses[side] = step.run().item()
        step.clear()
    times = timed(sides, rounds, Timer(torch.device("cpu")), warm=0)
    return {
        "name": name, "wanted": wanted, "seconds": {k: quartiles(v) for k, v in times.items()},
        "ratio": paired(times["ours"], times["plain"]), "losses": losses,
    }  # fmt: skip


def _line(row: dict) -> str:
    return f"{row['name']}: {row['note'] if 'note' in row else round(row['ratio'], 3)}"
