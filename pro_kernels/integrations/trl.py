"""TRL's ``SFTTrainer`` on ranked lists: PRO in place of the cross-entropy.

    from pro_kernels.integrations.trl import RankingTrainer

    trainer = RankingTrainer(model, args=SFTConfig(...), train_dataset=lists)
    trainer.train()

TRL tokenises, cuts and masks each candidate as the completion of its prompt. Then the candidates of
a prompt are put together again, and a batch holds all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pro_kernels.integrations.lists import Row, collate_lists, list_metrics, why_unusable
from pro_kernels.models.attach import attach

# What of TRL's speaks of another loss, or of rows that are no candidates; None: any value.
_REFUSED: dict[str, Any] = {
    "loss_type": "dft",
    "completion_only_loss": False,
    "packing": True,
    "eval_packing": True,
    "padding_free": True,
    "label_smoothing_factor": None,
    "compute_loss_func": None,
    "formatting_func": None,
    "skip_prepare_dataset": True,
}
_LIST, _PLACE, _REWARD = "_list", "_place", "_reward"  # of a row: which list, where in it, and how


class RankingTrainer(SFTTrainer):
    """``SFTTrainer``, with the same arguments, on ranked lists.

    A batch is counted in prompts. The log has the loss, its terms (``rank_loss``, ``sft_loss``) and
    the metrics of TRL's DPO over the pairs of each list.

    Args:
        model: as ``SFTTrainer`` takes it.
        args: likewise. Options of another loss are refused (``loss_type="dft"``, packing, ...).
        train_dataset: rows of ``prompt``, ``completions`` (a list) and ``rewards`` (higher is
            better); without rewards completions stand best first. All strings or all conversations.
        eval_dataset: likewise, or a dict of them.
        loss_options: options of ``pro_kernels.attach``, such as ``{"sft_weight": 0.1}`` or
            ``{"rows": "distinct"}``.
        more: further arguments of ``SFTTrainer``.

    Raises:
        TypeError, ValueError: data or options that cannot be used.
    """

    # A mean over prompts: Trainer divides by the accumulation steps.
    loss_is_scaled_for_ga: Any = False

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        args = SFTConfig() if args is None else copy.copy(args)
        _check(args, more)
        if args.loss_type == "chunked_nll":  # of TRL before 1.16: the model would have that loss
            args.loss_type = "nll"
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: one_a_row(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = one_a_row(eval_dataset)
        if train_dataset is not None:
            train_dataset = one_a_row(train_dataset)
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **more
        )
        self.model_accepts_loss_kwargs = False
        made: Any = self.model
        attach(made, loss="ranking", **(loss_options or {}))
        self.data_collator = _Collator(self.data_collator)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Lists:
        if isinstance(dataset, Lists):
            return dataset
        rows = one_a_row(dataset)
        return Lists(super()._prepare_dataset(rows, *args, **kwargs), rows)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """PRO of the batch, as the attached model returns it."""
        out = model(**inputs, use_cache=False)
        found = list_metrics(out, inputs)
        values = self.accelerator.gather(torch.stack(list(found.values()))[None]).mean(0).tolist()
        logged = self._metrics["train" if model.training else "eval"]
        for name, value in zip(found, values, strict=True):
            logged[name].append(value)
        return (out.loss, out) if return_outputs else out.loss


class Lists(torch.utils.data.Dataset):
    """Prepared rows by list: an item is the rows of its candidates, and their rewards.

    ``rows`` are what is left of ``given`` after TRL prepared them.
    """

    def __init__(self, rows: Dataset, given: Dataset) -> None:
        if "completion_mask" in rows.column_names:  # TRL before 1.16 leaves this to us
            rows = rows.filter(lambda row: any(row["completion_mask"]))
        places = defaultdict(list)
        columns = zip(rows[_LIST], rows[_PLACE], rows[_REWARD], strict=True)
        for at, (number, place, reward) in enumerate(columns):
            places[number].append((place, at, reward))
        kept = []
        dropped: Counter[str] = Counter()
        for found in places.values():
            _, order, rewards = zip(*sorted(found), strict=True)
            if why := why_unusable(rewards):
                dropped[why] += 1
            else:
                kept.append((order, rewards))
        dropped["nothing is left of them within max_length"] = len(set(given[_LIST])) - len(places)
        for why, count in (+dropped).items():
            warnings.warn(f"{count} lists are left out: {why}", stacklevel=2)
        if lost := len(given) - len(rows):
            warnings.warn(
                f"{lost} candidates are left out: their prompts fill max_length", stacklevel=2
            )
        if not kept:
            raise ValueError(f"no list can be ranked: {dict(+dropped)}")
        self.lists = kept
        self.rows = rows.remove_columns(
            [name for name in rows.column_names if name in given.column_names]
        )

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: int) -> tuple[list[Row], tuple[float | None, ...]]:
        order, rewards = self.lists[index]
        return [self.rows[at] for at in order], rewards


class _Collator:
    """A collator of rows as one of lists."""

    def __init__(self, of_rows: Any) -> None:
        self.of_rows = of_rows

    def __call__(self, items: Sequence[tuple[list[Row], Sequence[float | None]]]) -> dict[str, Any]:
        lists, rewards = zip(*items, strict=True)
        return collate_lists(self.of_rows, lists, rewards)


def one_a_row(dataset: Dataset) -> Dataset:
    """Lists as rows of ``prompt`` and ``completion``, which say where they come from.

    Raises:
        TypeError: no ``datasets.Dataset``.
        ValueError: a column is missing, or rewards do not match the completions.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"lists must be a datasets.Dataset, got {type(dataset).__name__}")
    names = set(dataset.column_names)
    if _LIST in names:
        return dataset
    if missing := {"prompt", "completions"} - names:
        raise ValueError(
            f"ranked lists need the columns prompt, completions and, unless these stand best "
            f"first, rewards: {sorted(missing)} are not among {sorted(names)}"
        )
    return dataset.map(
        _rows_of, batched=True, with_indices=True, remove_columns=dataset.column_names
    )


def _rows_of(lists: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
    rows: dict[str, list] = defaultdict(list)
    for at, number in enumerate(numbers):
        own = {name: lists[name][at] for name in lists}
        completions, rewards = own.pop("completions"), own.pop("rewards", None)
        rewards = [None] * len(completions) if rewards is None else rewards
        if len(rewards) != len(completions):
            raise ValueError(
                f"list {number} has {len(completions)} completions and {len(rewards)} rewards"
            )
        for place, (completion, reward) in enumerate(zip(completions, rewards, strict=True)):
            row = {**own, "completion": completion, _LIST: number, _PLACE: place, _REWARD: reward}
            for name, value in row.items():
                rows[name].append(value)
    return rows


def _check(args: Any, more: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for what the ranking would leave unread."""
    if not isinstance(args, SFTConfig):
        raise TypeError(f"args must be an SFTConfig, got {type(args).__name__}")
    about_data: Any = args.dataset_kwargs or {}
    given = {**vars(args), **more, **about_data}
    for name, bad in _REFUSED.items():
        value = given.get(name)
        if value == bad if bad is not None else value:
            raise ValueError(f"{name}={value!r} has no place where lists are ranked with PRO")
