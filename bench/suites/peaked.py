"""Batches whose next-token distributions are peaked: what ``grad_filter`` is for.

``real``: hidden states, head and targets of a pretrained model on real ranked lists.

``zipf``: logits are a shared Zipf law over a random order of the vocabulary, plus noise, plus one
token of each position lifted by 6 to 18. ``trained``: hidden states and head of a small Llama,
trained here on a random Markov chain with Zipf-distributed successors. Targets are drawn from the
distributions themselves, so a row is as uncertain as its target is surprising.

Legend: ``N`` positions, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.engine import lists

_EXPONENT, _MASKED = 1.5, 0.55


@dataclass
class Peaked:
    name: str  # the model's, "zipf" or "trained"
    hidden: Tensor  # (B, n, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (B, n, T), -100 where not scored
    rewards: Tensor  # (B, n)
    top1: float  # mean largest probability of the scored positions


def zipf(B: int, n: int, T: int, H: int, V: int) -> Peaked:
    g = torch.Generator().manual_seed(0)
    law = _law(V)
    order = torch.randperm(V, generator=g)
    weight = torch.randn(V, H, generator=g) * 0.6 * H**-0.5
    weight[:, 0] = 0
    lifted = order[torch.multinomial(law.sqrt(), B * n * T, replacement=True, generator=g)]
    towards = weight[lifted]
    height = 6 + 12 * torch.rand(B * n * T, 1, generator=g)
    hidden = torch.randn(B * n * T, H, generator=g)
    hidden += towards / towards.square().sum(1, keepdim=True) * height
    hidden[:, 0] = 1
    weight[order, 0] = law.log() - law.log().mean()
    return _batch("zipf", hidden, weight, (B, n, T), g)


def trained(B: int, n: int, T: int, H: int, V: int, steps: int) -> Peaked:
    """A small Llama after ``steps`` steps of 1024 tokens each."""
    import transformers

    import pro_kernels as pk

    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=2 * H, num_hidden_layers=1,
        num_attention_heads=max(1, H // 64), num_key_value_heads=max(1, H // 64),
        max_position_embeddings=max(128, T),
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    weight = model.get_output_embeddings().weight
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    successors = torch.multinomial(_law(V), V, replacement=True, generator=g)
    for _ in range(steps):
        ids = _walk(successors, 8, 128, V, g)
        hidden = model.model(input_ids=ids).last_hidden_state
        logps = pk.linear_token_logps(hidden[:, :-1], weight, ids[:, 1:])
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        hidden = model.model(input_ids=_walk(successors, B * n, T, V, g)).last_hidden_state
    return _batch("trained", hidden.reshape(-1, H), weight.detach(), (B, n, T), g)


def real(model: str, data: str, rows: int, dtype: torch.dtype) -> Peaked:
    """The first lists of an entry of ``lists.json`` with ``rows`` scored rows or more."""
    entry = lists.load()[data]
    totals = list(itertools.accumulate(map(sum, entry.completions)))
    count = min(bisect.bisect_left(totals, rows) + 1, len(totals))
    hidden, weight, targets = lists.hidden_states(data, model, count)
    scored = hidden[targets >= 0].split(256)
    top1 = torch.cat([(x @ weight.t()).softmax(1).amax(1) for x in scored]).mean().item()
    rewards = torch.tensor(entry.head(count).unit_rewards)
    name = lists.MODELS[model].label
    return Peaked(name, hidden.to(dtype), weight.to(dtype), targets, rewards, top1)


def _law(vocab: int) -> Tensor:
    law = torch.arange(1, vocab + 1, dtype=torch.float32) ** -_EXPONENT
    return law / law.sum()


def _walk(successors: Tensor, rows: int, length: int, vocab: int, g: torch.Generator) -> Tensor:
    """Four times in five the successor of the token before, else a token of the Zipf law."""
    ids = torch.multinomial(_law(vocab), rows * length, replacement=True, generator=g)
    ids = ids.view(rows, length)
    follow = torch.rand(rows, length, generator=g) < 0.8
    for t in range(1, length):
        ids[:, t] = torch.where(follow[:, t], successors[ids[:, t - 1]], ids[:, t])
    return ids


def _batch(
    name: str, hidden: Tensor, weight: Tensor, shape: tuple[int, int, int], g: torch.Generator
) -> Peaked:
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    scored = torch.rand(len(hidden), generator=g) >= _MASKED
    targets = torch.full((len(hidden),), -100)
    largest = []
    for rows in scored.nonzero()[:, 0].split(256):
        p = (hidden[rows].float() @ weight.float().t()).softmax(1)
        largest.append(p.amax(1))
        targets[rows] = torch.multinomial(p, 1, generator=g)[:, 0]
    rewards, top1 = torch.rand(shape[:2], generator=g), torch.cat(largest).mean().item()
    return Peaked(name, hidden.view(*shape, -1), weight, targets.view(shape), rewards, top1)
