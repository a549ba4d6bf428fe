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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.models import causal_lm, evaluating
from pro_trainer.prepare.draws import StopAtText, TokenPicker, decode, token_uniforms, up_to
from pro_trainer.text.encode import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT_TOKENS = 16  # of the prompt, decoded with the new tokens so that these keep their spaces


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text | RankedList],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 1.0,
    top_p: float = 1.0,
    do_sample: bool = True,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
    stop_strings: Sequence[str] = (),
    max_prompt_length: int | None = None,
    encoder: Encoder | None = None,
) -> list[list[str]]:
    """``num_samples`` continuations of every prompt: the new text only, up to EOS.

    The model's modes, its generation config and the tokenizer are left as they were found.

    Args:
        model: causal LM, PEFT-wrapped or not, on its device.
        tokenizer: its tokenizer; neither a pad nor an EOS token is needed.
        prompts: strings, messages or lists (of which the first prompt), which ``encoder`` makes
            ids of.
        num_samples: continuations a prompt.
        max_new_tokens: most tokens of one.
        temperature: divides the logits, > 0; several: of the samples of a prompt in turn.
        top_p: only the likeliest tokens that reach this share together are drawn from, (0, 1].
        do_sample: False: the likeliest token at every step (``num_samples`` must be 1).
        seeds: one integer a prompt; needed where ``do_sample``.
        batch_size: sequences run together.
        stop_strings: a continuation ends before the first of these.
        max_prompt_length: tokens, to which a longer prompt is cut as in training. Default: what
            the model's context leaves.
        encoder: of the tokenizer. Default: one with the default options.

    Raises:
        ValueError: an option out of range, messages without a chat template, a model whose logits
            are not finite numbers.
    """
    temperatures = [temperature] if isinstance(temperature, (int, float)) else list(temperature)
    _check_options(prompts, num_samples, max_new_tokens, temperatures, top_p, do_sample, seeds)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ValueError(f"stop_strings: a list of strings that are not empty, got {stop_strings}")
    lm = causal_lm(model)
    limit = prompt_limit(lm, max_new_tokens, max_prompt_length)
    encoder = encoder or Encoder(tokenizer)
    encoded = [encoder.prompt(prompt, limit)[0] for prompt in prompts]
    uniforms = None
    if do_sample:
        draws = [token_uniforms(seed, num_samples, max_new_tokens) for seed in seeds]
        uniforms = torch.cat(draws) if draws else None  # (prompts * num_samples, T)
    texts: list[list[str]] = [[""] * num_samples for _ in prompts]
    # Longest first: little padding, and what does not fit in memory shows at once.
    rows = [(p, k) for p in range(len(prompts)) for k in range(num_samples)]
    rows.sort(key=lambda row: -len(encoded[row[0]]))
    with _for_generation(lm, tokenizer, max_new_tokens):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            picker = []
            if uniforms is not None:
                index = torch.tensor([p * num_samples + k for p, k in batch])
                heat = torch.tensor([[temperatures[k % len(temperatures)]] for _, k in batch],
                                    dtype=torch.float64)  # fmt: skip
                picker = [TokenPicker(uniforms[index], heat, top_p)]
            ids = [encoded[p] for p, _ in batch]
            new_texts = _continue(lm, tokenizer, ids, picker, stop_strings)
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
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    return room if max_prompt_length is None else min(room, max_prompt_length)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, of one hypothesis against one reference each (sacrebleu, 13a tokens).

    Raises:
        ValueError: not as many references as hypotheses, or none.
        ModuleNotFoundError: sacrebleu is not installed.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"BLEU needs one reference for each hypothesis, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references"
        )
    try:
        from sacrebleu import corpus_bleu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "BLEU needs sacrebleu: pip install 'pro-kernels[train]'", name="sacrebleu"
        ) from error
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


def _check_options(
    prompts: Sequence[Any],
    num_samples: int,
    max_new_tokens: int,
    temperatures: Sequence[float],
    top_p: float,
    do_sample: bool,
    seeds: Sequence[int] | None,
) -> None:
    if num_samples < 1 or max_new_tokens < 1:
        raise ValueError(
            "num_samples and max_new_tokens must be at least 1, got "
            f"{num_samples} and {max_new_tokens}"
        )
    if not temperatures:
        raise ValueError("temperature: none was given")
    for temperature in temperatures:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not do_sample and num_samples > 1:
        raise ValueError(
            f"do_sample=False gives one text a prompt, but num_samples is {num_samples}"
        )
    if do_sample and (seeds is None or len(seeds) != len(prompts)):
        given = "none" if seeds is None else len(seeds)
        raise ValueError(f"seeds: one for each of the {len(prompts)} prompts, got {given}")
