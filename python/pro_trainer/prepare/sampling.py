"""Samples from a causal language model, the same for a prompt whatever it is batched with; BLEU.

Each sequence draws its randomness from its prompt's own seed: one uniform number a token, drawn
before the first step, picks the token by inverting the distribution's cumulative sum. Batching,
padding and the device's random state therefore change nothing but the rounding of the logits (a
token differs only where a draw falls within rounding of the border between two tokens; batches of
the same composition agree bitwise). The checkpoint's own generation settings (top-k, repetition
penalty, ...) are not applied: only ``temperature`` and ``top_p`` shape the distribution. Its end
tokens are.

Shapes: S sequences of one batch, V vocabulary, T new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.models import causal_lm, evaluating
from pro_trainer.prepare.draws import StopAtText, TokenPicker, decode, token_uniforms, up_to
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.text.encode import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT_TOKENS = 16  # of the prompt, decoded with the new tokens so that these keep their spaces


def sample(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Text | RankedList],
    options: PrepareArguments,
    seeds: Sequence[int] | None = None,
) -> list[list[str]]:
    """Continuations of every prompt, ``options.num_samples`` each: the new text only, up to EOS.

    The model's modes, its generation config and the tokenizer are left as they were found.

    Args:
        model: causal LM, PEFT-wrapped or not, on its device.
        encoder: makes the ids; its tokenizer needs neither a pad nor an EOS token.
        prompts: strings, messages or lists (of which the first prompt), cut as in training.
        options: how many, how long, from which distribution, up to which strings; several
            temperatures are those of the samples of a prompt in turn.
        seeds: one integer a prompt; None: the likeliest token at every step.

    Raises:
        ValueError: messages without a chat template, no room for a prompt, a model whose logits
            are not finite numbers.
    """
    lm, tokenizer, n = causal_lm(model), encoder.tokenizer, options.num_samples
    limit = prompt_limit(lm, options.max_new_tokens, options.max_prompt_length)
    encoded = [encoder.prompt(prompt, limit)[0] for prompt in prompts]
    draws = [token_uniforms(seed, n, options.max_new_tokens) for seed in seeds or ()]
    uniforms = torch.cat(draws) if draws else None  # (prompts * n, T)
    texts: list[list[str]] = [[""] * n for _ in prompts]
    # Longest first: little padding, and what does not fit in memory shows at once.
    rows = [(p, k) for p in range(len(prompts)) for k in range(n)]
    rows.sort(key=lambda row: -len(encoded[row[0]]))
    heats = torch.tensor(options.temperature, dtype=torch.float64)
    with _for_generation(lm, tokenizer, options.max_new_tokens):
        for start in range(0, len(rows), options.batch_size):
            batch = rows[start : start + options.batch_size]
            picker = []
            if uniforms is not None:
                index = torch.tensor([p * n + k for p, k in batch])
                heat = heats[[k % len(heats) for _, k in batch], None]
                picker = [TokenPicker(uniforms[index], heat, options.top_p)]
            ids = [encoded[p] for p, _ in batch]
            new_texts = _continue(lm, tokenizer, ids, picker, options.stop)
            for (p, k), text in zip(batch, new_texts, strict=True):
                texts[p][k] = text
    return texts


def greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> list[str]:
    """The likeliest continuation of prompts that are token ids, in one batch."""
    lm = causal_lm(model)
    with torch.no_grad(), _for_generation(lm, tokenizer, max_new_tokens):
        return _continue(lm, tokenizer, prompts, [], ())


def prompt_limit(
    model: PreTrainedModel, max_new_tokens: int, max_prompt_length: int | None = None
) -> int:
    """Most tokens of a prompt: the model's context less the new tokens, or fewer if asked for.

    Raises:
        ValueError: nothing is left for the prompt.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = 2**31 if not context or context < 0 else context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the "
            f"{context} positions of {type(model).__name__}"
        )
    return room if max_prompt_length is None else min(room, max_prompt_length)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, of hypotheses against one reference each (sacrebleu, 13a tokens)."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(list(hypotheses), [list(references)]).score


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    picker: list[TokenPicker],
    stop_strings: Sequence[str],
) -> list[str]:
    """One batch, padded on the left by hand: the tokenizer's own padding side is the caller's."""
    device = next(model.parameters()).device
    length = max(map(len, ids))
    pad = model.generation_config.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    stop = [StopAtText(tokenizer, stop_strings, length, len(ids))] if stop_strings else []
    output = model.generate(
        input_ids=input_ids, attention_mask=mask, logits_processor=picker, stopping_criteria=stop
    )
    ends = set(model.generation_config.eos_token_id or ())
    texts = []
    for row, new in enumerate(output[:, length:].tolist()):
        new = new[: stop[0].ends[row]] if stop else new
        new = new[: next((i for i, token in enumerate(new) if token in ends), None)]
        texts.append(up_to(stop_strings, _new_text(tokenizer, ids[row], new)))
    return texts


def _new_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """Text of the new tokens, decoded after some of the prompt's: a lone piece loses its space."""
    context = prompt[-_CONTEXT_TOKENS:]
    before, both = decode(tokenizer, context), decode(tokenizer, context + new)
    return both[len(before) :] if both.startswith(before) else decode(tokenizer, new)


@contextlib.contextmanager
def _for_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[None]:
    """Evaluation mode and a generation config with nothing but the ends; both are put back."""
    before = model.generation_config
    of_model = before.eos_token_id if before is not None else None
    of_model = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    ends = sorted({end for end in (*of_model, tokenizer.eos_token_id) if end is not None})
    pads = (tokenizer.pad_token_id, *ends, 0)
    # Heads are often wider than the vocabulary; what lies beyond is no text.
    beyond = range(
        max(tokenizer.get_vocab().values()) + 1, model.config.get_text_config().vocab_size
    )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the picker draws
        eos_token_id=ends or None,
        # Masked before the prompt and cut off after the end: any token will do.
        pad_token_id=next(pad for pad in pads if pad is not None),
        suppress_tokens=list(beyond) or None,
        use_cache=True,
    )
    model.generation_config = config
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = before
