"""When running a prompt once for its candidates is cheaper than running it for each of them.

In the ideal, linear layers see n(P + R) tokens without sharing and P + nR with it, and attention
n(P + R)^2 pairs of positions against P^2 + 2nPR + nR^2. FlexAttention comes near that. A dense mask
does not: ``sdpa`` and ``eager`` compute the whole square of a row, (P + nR)^2 pairs, so that long
completions can make sharing the slower one. The model here counts what is really computed, padding
included, and weighs attention by how much slower than a linear layer it runs.

The LM head is left out: it sees the scored rows alone, in every form the same.

Legend: ``P`` tokens shared, ``R`` tokens of a candidate's own, ``n`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Time of an operation of attention over that of one of a linear layer, forward and backward, the
# mask's building included. Measured on one CPU core in float32, Llamas of H = 64 to 512, rows of 64
# to 1152 tokens: sdpa 0.8 to 2.0, eager 1.4 to 2.5; the upper ends are taken, so that a wrong guess
# forgoes a gain rather than losing time. FlexAttention is taken to be no slower than sdpa.
ATTENTION_WEIGHT = {"sdpa": 2.0, "eager": 2.5, "flex_attention": 2.0}
# sdpa without a mask, for rows that all have one length, over sdpa with one: measured 0.6 to 1.0.
UNMASKED = 0.75
# Sharing must be cheaper by this much: near the break-even the error of this model would decide.
MARGIN = 0.95


@dataclass(frozen=True)
class SharingCost:
    """Cost of a batch's forward pass with and without sharing, in operations of linear layers.

    Attributes:
        token: of one token in all linear layers.
        pair: of one pair of positions in the attention of all layers, times its weight.
        dense: whether attention computes whole squares (a dense mask) or only blocks that count.
        unmasked: cost of a square, relative to others, in a batch of sequences of one length.
    """

    token: float
    pair: float
    dense: bool = True
    unmasked: float = 1.0

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> SharingCost:
        """The cost of a model: its linear layers and experts in use, and the shape of attention."""
        config = model.config.get_text_config()
        heads, head_dim = getattr(config, "num_attention_heads", 0), getattr(config, "head_dim", 0)
        width = heads * head_dim if heads and head_dim else config.hidden_size
        implementation = config._attn_implementation
        weight = ATTENTION_WEIGHT.get(implementation, max(ATTENTION_WEIGHT.values()))
        return cls(
            token=2.0 * _active_weights(model, config),
            pair=4.0 * config.num_hidden_layers * width * weight,
            dense=implementation != "flex_attention",
            unmasked=UNMASKED if implementation == "sdpa" else 1.0,
        )

    def pays(self, prompt_len: int, completion_lens: Sequence[int]) -> bool:
        """Whether to share for one prompt of P tokens and completions of R_i tokens."""
        return self.pays_for([(prompt_len, completion_lens)])

    def pays_for(self, lists: Sequence[tuple[int, Sequence[int]]], packed: bool = False) -> bool:
        """Whether to share in a batch of lists: tokens shared, tokens of each candidate's own.

        ``packed``: without sharing, sequences would stand end to end and not be padded.
        """
        return self.shared(lists) < MARGIN * self.unshared(lists, packed)

    def shared(self, lists: Sequence[tuple[int, Sequence[int]]]) -> float:
        """Cost of the batch with one row for each list, padded to the longest."""
        length = max(prefix + sum(own) for prefix, own in lists)
        if self.dense:
            pairs = len(lists) * length**2
        else:
            pairs = sum(p * p + 2 * p * sum(own) + sum(r * r for r in own) for p, own in lists) / 2
        return self.token * len(lists) * length + self.pair * pairs

    def unshared(self, lists: Sequence[tuple[int, Sequence[int]]], packed: bool = False) -> float:
        """Cost of the batch with every sequence by itself."""
        lengths = [prefix + r for prefix, own in lists for r in own]
        causal = sum(length**2 for length in lengths) / 2
        if packed:
            return self.token * sum(lengths) + self.pair * (
                sum(lengths) ** 2 if self.dense else causal
            )
        longest = max(lengths)
        square = longest**2 * (1.0 if self.dense else 0.5)
        if min(lengths) == longest:
            square *= self.unmasked
        return len(lengths) * (self.token * longest + self.pair * square)


def _active_weights(model: PreTrainedModel, config: Any) -> float:
    """Weights that one token meets in linear layers, the LM head left out."""
    experts = next(
        (
            getattr(config, name)
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if getattr(config, name, None)
        ),
        1,
    )
    in_use = min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)
    head = model.get_output_embeddings()
    left_out = set() if head is None else set(head.modules())
    total = 0.0
    for name, module in model.named_modules():
        if module in left_out or hasattr(module, "base_layer"):
            continue  # the head, and PEFT's wrappers: what they wrap counts
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            size = module.in_features * module.out_features  # right for quantised weights as well
        elif hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D
            size = module.nx * module.nf
        else:  # experts that are one stacked parameter
            own = module.named_parameters(recurse=False)
            size = sum(parameter.numel() for _, parameter in own if parameter.dim() == 3)
        routed = ".experts" in name and "shared" not in name
        total += size * (in_use if routed else 1.0)
    return total
