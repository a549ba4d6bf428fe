"""How ``generation`` picks a token and ends a sequence, as transformers' ``generate`` calls it.

Shapes: S sequences of one batch, V vocabulary, T new tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import is_transcript

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Samples = tuple[list[str], Counter[str]]  # of a prompt, and counts of what befell them


def list_seed(seed: int, generator: str, index: int) -> int:
    """A seed of 63 bits for one list and generator, far from those of its neighbours."""
    digest = hashlib.blake2b(f"{seed} {generator} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def token_uniforms(seed: int, num_samples: int, steps: int) -> Tensor:
    """A prompt's random numbers, (num_samples, steps) float64 in [0, 1), the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_samples, steps, generator=generator, dtype=torch.float64)


class TokenPicker(LogitsProcessor):
    """Leaves one token per sequence: that of the step's uniform number."""

    def __init__(self, uniforms: Tensor, temperature: float | Tensor, top_p: float) -> None:
        """Take ``uniforms``, (S, T) float64 in [0, 1), and temperatures, (S, 1), on the host."""
        self.uniforms = uniforms
        self.temperature = torch.as_tensor(temperature, dtype=torch.float64)
        self.top_p = top_p
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (S, V) to 0 at the drawn token, -inf elsewhere; ValueError if not finite."""
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        uniform = self.uniforms[:, self.step, None].to(scores.device, wide)  # (S, 1)
        self.step += 1
        heat = self.temperature.to(scores.device, wide)
        probabilities = (scores.to(wide) / heat).softmax(-1)  # (S, V)
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(-1)
        if bool(cumulative[:, -1].isnan().any()):
            raise ValueError(
                f"the model's logits at new token {self.step} are not finite numbers; try a wider "
                "dtype (float32)"
            )
        kept = torch.full_like(uniform, scores.shape[-1], dtype=torch.long)
        if order is not None:
            kept = (cumulative - probabilities < self.top_p).sum(-1, keepdim=True)  # (S, 1), >= 1
        mass = cumulative.gather(1, kept - 1)
        place = torch.searchsorted(cumulative, uniform * mass, right=True)
        token = torch.minimum(place, kept - 1)
        if order is not None:
            token = order.gather(1, token)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class StopAtText(StoppingCriteria):
    """Ends a sequence once its new text holds a stop string, and remembers where."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str],
        prompt_length: int,
        sequences: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.prompt_length = prompt_length
        # No token is shorter than a byte; a little more for a character begun before the tail.
        self.tail = max(len(stop.encode()) for stop in stop_strings) + 8
        self.ends: list[int | None] = [None] * sequences

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which sequences are done, (S,) bool."""
        length = input_ids.shape[1]
        tails = input_ids[:, max(self.prompt_length, length - self.tail) :].tolist()
        for row, ids in enumerate(tails):
            if self.ends[row] is None:
                text = decode(self.tokenizer, ids)
                if any(stop in text for stop in self.stop_strings):
                    self.ends[row] = length - self.prompt_length
        done = [end is not None for end in self.ends]
        return torch.tensor(done, device=input_ids.device)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text without special tokens, its spaces as they are."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def up_to(stops: Sequence[str], text: str) -> str:
    """A text before the first of these strings."""
    cuts = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(cuts, default=None)]


def as_replies(ranked: RankedList, texts: list[str]) -> list[str]:
    """What a chat model said, as the replies of a transcript begin where the prompt is one."""
    return [f" {x.strip()}" for x in texts] if is_transcript(ranked.prompts[0]) else texts
