"""From what a user hands to ``PROTrainer`` as data to tokenised lists and their collator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

import pro_kernels as pk
from pro_trainer.batch.collate import PROCollator
from pro_trainer.data.report import DataReport
from pro_trainer.models import causal_lm, pad_id
from pro_trainer.text.store import load_dataset
from pro_trainer.train.config import PROConfig
from pro_trainer.train.objective import run_rows
from pro_trainer.train.options import LossOptions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


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

    Lists without rewards, or lists with rewards beside such, where the loss needs them; lists of
    different lengths for ``compat="official"``.
    """
    if report.marked and "desirable" not in args.loss().defaults:
        raise ValueError(
            f"{report.marked} lists have a column 'desirable', which loss_type={args.loss_type!r} "
            "does not use: take loss_type='kto', or leave the column out"
        )
    if args.compat == "official" and len(report.candidates) > 1:
        raise ValueError(
            f"compat='official' needs lists of one length, got {sorted(report.candidates)} "
            "candidates"
        )
    if report.with_rewards < report.lists and "rewards" in args.loss().needs(**args.given()):
        raise ValueError(
            f"loss_type={args.loss_type!r} needs rewards, and {report.lists - report.with_rewards} "
            f"of {report.lists} lists have an order only"
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
    for dataset in filter(len, _parts(data)):
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
        sizes = ([max(map(len, one[k])) for k in ("prompts", "completions")] for one in dataset)
        longest = max(map(sum, sizes))  # at most: the longest prompt may have a short completion
        if longest > limit:
            raise ValueError(
                f"sequences of up to {longest} tokens, but {type(lm).__name__} has "
                f"max_position_embeddings={limit}; set max_length to {limit} or less"
            )


def make_collator(
    opened: pk.OpenModel,
    models: Sequence[nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    args: PROConfig,
    example: Mapping[str, Any],
) -> PROCollator:
    """The collator for ``args``; whether all models can run distinct rows is tried out.

    ``models``: that which is opened, and the reference model where there is one.

    Raises:
        ValueError: ``batching="lists"`` with a model that cannot.
    """
    reason = "" if args.batching != "padded" else "batching='padded'"
    with contextlib.ExitStack() as entered:
        try:
            if args.neftune_noise_alpha:
                raise ValueError("NEFTune's noise goes by the length of a row")
            for model in () if reason else models:
                entered.enter_context(pk.distinct_rows(model))
            if not reason:
                _check_lists(opened, example, pad_id(tokenizer))
        except ValueError as error:
            reason = str(error)
        if args.world_size > 1:  # ranks that differ would deal out other batches
            reason = next(filter(None, gather_object([reason])), "")
        if not reason:
            entered.pop_all()  # they stay so
    if reason and args.batching == "lists":
        raise ValueError(f"batching='lists': {reason}")
    if reason and args.batching == "auto" and args.should_log:
        print(f"lists run as padded rows: {reason}")
    return PROCollator(
        pad_id(tokenizer),
        form="padded" if reason else "lists",
        official=args.compat == "official",
        ranks_only=args.ranks_only(),
        kl_length=args.max_length if args.loss_type == "kto" and args.kto_kl != "batch" else None,
        idle=example,
    )


def _check_lists(opened: pk.OpenModel, example: Mapping[str, Any], pad: int) -> None:
    """Raise ValueError where the whole model makes another thing of a short list than of its rows.

    ``distinct_rows`` tried its decoder, and a model may do something of its own before that.
    """
    prompts, completions = ([x[:32] for x in example[k]][:3] for k in ("prompts", "completions"))
    short = {"prompts": prompts, "completions": completions, "rewards": None, "sft_index": None}

    def hidden(form: Literal["padded", "lists"]) -> Tensor:
        batch = PROCollator(pad, form=form)([short])
        rows = batch["layout"].rows.to(opened.model.device)
        inputs = {k: x.to(rows.device) for k, x in batch.items() if isinstance(x, Tensor)}
        out = run_rows(
            opened, {**batch, **inputs}, lambda h: (h.hidden.sum(), {"scores": h.hidden[rows]})
        )
        return out.scores

    def in_one_row() -> Tensor:
        try:
            return hidden("lists")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} cannot run a list as one row: it fails with {type(error).__name__}: "
                f"{error}"
            ) from error

    name = type(opened.model).__name__
    off, allowed = opened.compare(lambda: hidden("padded"), in_one_row)
    if not off <= allowed:
        raise ValueError(
            f"{name} makes another thing of a list in one row: hidden states differ by {off:.2g}, "
            f"and rounding accounts for {allowed:.2g}"
        )


def _parts(data: Sequence[Any]) -> Iterator[datasets.Dataset]:
    for dataset in data:
        if isinstance(dataset, Mapping):
            yield from dataset.values()
        elif dataset is not None:
            yield dataset
