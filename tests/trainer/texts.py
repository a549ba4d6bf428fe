"""Messages, preference pairs, a chat tokenizer and saved models, shared by the trainer's tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
Help.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def system(text: object) -> dict:
    return {"role": "system", "content": text}


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: object, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def pair(prompt: object = "Hi", chosen: object = "yes", rejected: object = "no", **more: object):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def row(*values: object, **options: object) -> tuple:
    """A row of a table of cases, its options the last value."""
    return (*values, options)


def bytes_tokenizer(*special: str, **options: object) -> PreTrainedTokenizerFast:
    """A token for each of the special texts, then one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def chat_tokenizer(template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """The special tokens of ChatML and its template, or BOS before each text."""
    tokenizer = bytes_tokenizer(
        *("<bos>", "<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
        bos_token="<bos>" if bos else "<|im_start|>",
    )
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def records(path: Path | str) -> list[dict]:
    """Those of a file of JSON lines."""
    data = Path(path).read_bytes()
    data = gzip.decompress(data) if str(path).endswith(".gz") else data
    return [json.loads(line) for line in data.splitlines()]


def save(folder: Path, model: PreTrainedModel, tokenizer: object) -> str:
    """Write a model and its tokenizer; the folder's path."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(vocabulary: int, labels: int = 1, **more) -> LlamaForSequenceClassification:
    """A tiny sequence classifier: a reward model where it has one label."""
    options = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "initializer_range": 0.5, "num_labels": labels},
        **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1},
    }
    torch.manual_seed(1)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=vocabulary, **options | more))
