"""What the steps of a case share: model, optimizer, lists, and what a reference model says of them.

Random token ids, random weights. The optimizer's learning rate is 0: AdamW does all of its
arithmetic and leaves the weights as they are, so every step of every provider is the same problem.

Legend: ``B`` prompts, ``n`` candidates.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from bench.training.cases import TrainingCase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Workload:
    """Model, optimizer and lists of a case, shared by its providers."""

    def __init__(self, case: TrainingCase, device: torch.device, seed: int = 0) -> None:
        """Make all of it; the same seed gives the same numbers."""
        self.case, self.device, self.seed = case, device, seed
        self.features = make_features(case, seed)
        self.model = make_model(case, seed).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    @property
    def pad(self) -> int:
        """The padding id."""
        return self.model.config.pad_token_id

    def reference_model(self):  # noqa: ANN201
        """A new frozen model of other random weights: what DPO's policy is measured against."""
        model = make_model(self.case, self.seed + 1).to(self.device)
        return model.eval().requires_grad_(False)

    @cached_property
    def reference_scores(self) -> Tensor:
        """(B, n) fp32, S of every completion under the reference model, computed in fp32.

        Of real lists in the model's own dtype, as TRL computes it: their losses would differ by
        that rounding.
        """
        if self.case.data:
            from pro_trainer.batch.collate import PROCollator
            from pro_trainer.train.objective import sequence_logps
            from pro_trainer.train.options import LossOptions

            opened = pk.OpenModel(self.reference_model())
            batch = self.on_device(PROCollator(self.pad)(self.features))
            with torch.no_grad():
                return sequence_logps(opened, batch, LossOptions(loss_type="dpo"))[0]
        with torch.no_grad():
            return plain_scores(self.reference_model().float(), self)

    def exact_model(self):  # noqa: ANN201
        """The model in fp32: itself, or a copy of its rounded weights."""
        fp32 = self.case.shape.dtype == "fp32"
        return self.model if fp32 else copy.deepcopy(self.model).float()

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the model is."""
        return {k: x.to(self.device) if hasattr(x, "to") else x for k, x in batch.items()}

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients now held."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


def make_features(case: TrainingCase, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised lists of a case: random ids, rewards descending within [0, 1]."""
    g = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, case.shape.V, (length,), generator=g).tolist()

    start = tokens(case.start)
    return [
        {
            "prompts": [start + tokens(prompt - case.start)],
            "completions": [tokens(own) for own in completions],
            "rewards": torch.rand(case.n, generator=g).sort(descending=True).values.tolist(),
            "sft_index": 0,
        }
        for prompt, completions in case.lists
    ]


def make_model(case: TrainingCase, seed: int = 0):  # noqa: ANN201
    """The case's model, random weights in its dtype, sdpa attention, ready to train."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape.V, hidden_size=shape.H, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[shape.dtype], attn_implementation="sdpa"
    ).train()


def plain_scores(model, work: Workload) -> Tensor:  # noqa: ANN001
    """(B, n), S by a forward of the whole model a candidate and ``log_softmax`` of all logits."""
    from pro_trainer.train.official import official_batch

    batch = work.on_device(official_batch(work.features, work.pad))
    scores = []
    for i in range(work.case.n):
        ids, attention = batch["input_ids"][:, i], batch["attention_mask"][:, i]
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scored = (attention == 1) & (batch["prefix_mask"][:, i] == 0)
        scores.append(logps.masked_fill(~scored[:, :-1], 0.0).sum(1))
    return torch.stack(scores, dim=1)
