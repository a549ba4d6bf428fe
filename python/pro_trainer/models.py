"""Models and tokenizers: loaded, made for the demo, checked against each other."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pro_kernels as pk
from pro_trainer.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

causal_lm = pk.OpenModel.causal_lm

# Probabilities that modules pass to functional dropout.
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout",
             "activation_dropout", "layerdrop")  # fmt: skip


def load(
    path: str, options: ModelOptions | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder (or hub name).

    A checkpoint of text and images is loaded as a whole, and runs on text.

    Args:
        path: folder or hub name of a causal LM with its LM head.
        options: how it is loaded; its ``model`` is not read.

    Raises:
        ValueError: nothing usable there, no LM head, or weights that the checkpoint lacks.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    options = options or ModelOptions()
    quantization = options.quantization()
    how = {"trust_remote_code": options.trust_remote_code}
    if os.path.exists(path):  # adapters keep it, and are found from any folder
        path = os.path.abspath(path)
    with quiet():
        try:
            kind = AutoModelForCausalLM
            with contextlib.suppress(OSError, ValueError):  # what is wrong, loading says
                config = type(AutoConfig.from_pretrained(_base(path), **how))
                both = AutoModelForImageTextToText._model_mapping
                if config in both and config not in kind._model_mapping:
                    kind = AutoModelForImageTextToText
            model, info = kind.from_pretrained(
                path,
                dtype=options.dtype,
                attn_implementation=options.attn_implementation,
                quantization_config=quantization,
                output_loading_info=True,
                **how,
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise ValueError(f"{path}: not a causal LM: {first_line(error)}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise ValueError(
                f"{path}: the checkpoint lacks weights of {type(model).__name__} ({missing}); a "
                "model saved without its LM head cannot be trained or scored"
            )
        tokenizer = load_tokenizer(options.tokenizer or path, options.trust_remote_code)
    for module in model.modules() if options.load_in_4bit else ():
        # bitsandbytes packs CPU weights at the first call without gradients, and no gradient passes
        # through packed ones.
        module.support_avx512bf16_for_cpu = False
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def _base(path: str) -> str:
    """The model that adapters in a folder (or of a hub name) are for; else the path itself."""
    from transformers.utils.peft_utils import find_adapter_config_file

    file = find_adapter_config_file(path)
    return path if file is None else json.loads(Path(file).read_text())["base_model_name_or_path"]


def base_of(path: str, recorded: str | None) -> str | None:
    """The model that the one at ``path`` was trained from, where that is known."""
    base = _base(path)
    return recorded or None if base == path else base


def merge_adapters(adapters: Path, target: Path, options: ModelOptions) -> None:
    """Write the model that adapters in a folder make of their base; ``target`` appears whole.

    ``options``: how the base is loaded, whose path ``options.model`` is.

    Raises:
        ValueError: as of ``load``.
    """
    from peft import PeftModel

    assert options.model is not None
    writing = target.with_name(target.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
    base, _ = load(options.model, options)
    merged = PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
    with quiet():
        merged.save_pretrained(writing)
        load_tokenizer(str(adapters), options.trust_remote_code).save_pretrained(writing)
    os.replace(writing, target)


def check_causal(opened: pk.OpenModel, input_ids: Tensor) -> None:
    """Raise ValueError where a later token moves what is predicted before it; ids (1, T)."""
    other = input_ids.clone()
    other[:, -1] = (other[:, -1] - 1).abs()

    def before_last(ids: Tensor) -> Tensor:
        out = opened.run(
            lambda head: (head.hidden.sum(), {"scores": head.hidden[:, :-1]}),
            input_ids=ids,
            use_cache=False,
        )
        return out.scores

    off, allowed = opened.compare(lambda: before_last(input_ids), lambda: before_last(other))
    if not off <= allowed:
        raise ValueError(
            f"{type(opened.model).__name__} attends to later tokens, so its log-probs of an answer "
            "would know the answer; a causal language model is needed"
        )


def different_ends(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> str | None:
    """A sentence where the tokenizer's EOS is none of those the model stops at.

    ``configs``: the model's generation config and its config; the first that names ends counts.
    """
    ends = next((c.eos_token_id for c in configs if getattr(c, "eos_token_id", None) is not None),
                None)  # fmt: skip
    ends = [ends] if isinstance(ends, int) else ends
    eos = tokenizer.eos_token_id
    if not ends or eos is None or eos in ends:
        return None
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    return (
        f"the tokenizer's EOS is {tokenizer.eos_token!r} ({eos}), the model's is {shown}: "
        "completions end with the tokenizer's"
    )


def ends_of_folder(
    path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> str | None:
    """``different_ends`` of a model that is not loaded; None where its folder says nothing."""
    from transformers import AutoConfig, GenerationConfig

    configs = []
    for kind, how in (
        (GenerationConfig, {}),
        (AutoConfig, {"trust_remote_code": trust_remote_code}),
    ):
        with contextlib.suppress(OSError, ValueError):
            configs.append(kind.from_pretrained(path, **how))
    return different_ends(tokenizer, *configs)


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer has more tokens than the model."""
    lm = causal_lm(model)
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    rows = getattr(weight, "ds_shape", getattr(weight, "shape", [math.inf]))[0]  # ds: ZeRO-3
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the LM head of {type(lm).__name__} only "
            f"{rows}"
        )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (or hub name).

    Raises:
        ValueError: nothing usable there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer: {first_line(error)}") from error


def tiny_llama(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 0.2 M parameters with random weights, and a byte-level tokenizer."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up the rows; padding is never attended to or scored, so any id will do."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, attention's included (which is no module of its own)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports of transformers and datasets: what matters is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    datasets = sys.modules.get("datasets")  # an optional package
    of_datasets = datasets is not None and not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if of_datasets:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if of_datasets:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]
