"""From what a user hands to ``PROTrainer`` as data to tokenised lists and their collator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pro_trainer.batch.collate import PROCollator
from pro_trainer.batch.cost import SharingCost
from pro_trainer.batch.prefix import check_sharing
from pro_trainer.data.report import DataReport
from pro_trainer.models import causal_lm, pad_id
from pro_trainer.text.store import load_dataset
from pro_trainer.train.config import PROConfig
from pro_trainer.train.options import LossOptions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenized(data: Any, tokenizer: PreTrainedTokenizerBase, args: PROConfig) -> Any:
    """``data`` as a data set of token ids; files and records are read, and reported on.

    Raises:
        ValueError: unusable files or records (``DataError``), or lists that do not go together.
    """
    if data is None or is_tokenized(data):
        return data
    if isinstance(data, Mapping):
        return {name: tokenized(part, tokenizer, args) for name, part in data.items()}
    is_paths = isinstance(data, Sequence) and all(isinstance(x, (str, Path)) for x in data)
    sources = list(data) if is_paths and not isinstance(data, str) else [data]
    dataset, report = load_dataset(sources, tokenizer, args)
    if args.should_log:
        print(report.text())
    check_lists(report, args)
    return dataset


def is_tokenized(data: Any) -> bool:
    """Whether ``data`` is what ``load_dataset`` makes."""
    names = set(getattr(data, "column_names", None) or [])
    if not {"prompts", "completions"} <= names or not len(data):
        return False
    prompts = data[0]["prompts"]
    return bool(prompts) and isinstance(prompts[0], list) and isinstance(prompts[0][0], int)


def check_lists(report: DataReport, args: LossOptions) -> None:
    """Raise ValueError for lists of different kinds that the loss cannot take together.

    Lists with rewards beside lists with an order only, where the loss needs reward gaps; lists of
    different lengths for ``compat="official"``.
    """
    if args.compat == "official" and len(report.candidates) > 1:
        raise ValueError(
            f"compat='official' needs lists of one length, got {sorted(report.candidates)} "
            "candidates"
        )
    if 0 < report.with_rewards < report.lists and not args.ranks_only():
        raise ValueError(
            f"{report.with_rewards} of {report.lists} lists have rewards, the others only an "
            "order: what reward gaps mean beside mere order is not defined. Give all rewards, or "
            "set a temperature that is a number: rewards then only order"
        )


def first_list(*data: Any) -> dict[str, Any]:
    """One list to try the model on.

    Raises:
        ValueError: there is none.
    """
    for dataset in _parts(data):
        if dataset is not None and len(dataset):
            return dataset[0]
    raise ValueError("train_dataset and eval_dataset hold no lists")


def check_lengths(model: nn.Module, max_length: int, *data: Any) -> None:
    """Raise ValueError where a sequence is longer than the model's positions.

    Nothing is read where ``max_length`` tokens, to which lists are cut, fit anyway.
    """
    lm = causal_lm(model)
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if not limit or max_length <= limit:
        return
    for dataset in _parts(data):
        longest = max(map(longest_sequence, dataset))
        if longest > limit:
            raise ValueError(
                f"sequences of up to {longest} tokens, but {type(lm).__name__} has "
                f"max_position_embeddings={limit}; set max_length to {limit} or less"
            )


def longest_sequence(example: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt + completion of a list (an upper bound)."""
    return max(map(len, example["prompts"])) + max(map(len, example["completions"]))


def make_collator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PROConfig,
    example: Mapping[str, Any],
) -> PROCollator:
    """The collator for ``args``; whether the model can share prefixes is tried on ``example``.

    Raises:
        ValueError: ``prefix_sharing="on"`` or ``packing`` with a model that cannot.
    """
    pad = pad_id(tokenizer)
    if args.packing:
        check_sharing(model, [example], pad, form="packed")
    reason = None
    if args.prefix_sharing != "off":
        reason = _why_not_shared(model, example, pad)
    if reason and args.prefix_sharing == "on":
        raise ValueError(f"prefix_sharing='on': {reason}")
    if reason and args.should_log:
        print(f"prefixes are not shared: {reason}")
    unshared = "packed" if args.packing else "padded"
    form = {"on": "shared", "off": unshared, "auto": unshared if reason else "auto"}
    return PROCollator(
        pad,
        form=form[args.prefix_sharing],
        unshared=unshared,
        cost=SharingCost.from_model(model),
        official=args.compat == "official",
        ranks_only=args.ranks_only(),
        idle=example,
    )


def _why_not_shared(model: PreTrainedModel, example: Mapping[str, Any], pad: int) -> str | None:
    """Why the model cannot share prefixes; None where it just did, with the right result.

    On a GPU FlexAttention, which skips what the mask forbids, is tried before the model's own
    attention under a dense mask.
    """
    own = model.config.get_text_config()._attn_implementation
    if model.device.type == "cuda" and own != "flex_attention":
        try:
            model.set_attn_implementation("flex_attention")
            check_sharing(model, [example], pad)
            return None
        except (ValueError, ImportError):
            model.set_attn_implementation(own)
    try:
        check_sharing(model, [example], pad)
    except ValueError as error:
        return str(error)
    return None


def _parts(data: Sequence[Any]) -> Iterator[datasets.Dataset]:
    for dataset in data:
        if isinstance(dataset, Mapping):
            yield from dataset.values()
        elif dataset is not None:
            yield dataset
