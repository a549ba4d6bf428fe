"""The contenders: the same lists, model and optimizer; each builds one training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pro_kernels as pk
from bench.training import pairs
from bench.training.steps import Floor, TrainingStep
from bench.training.workload import Workload

# The authors' forwards return all hidden states, of which only the dtype is read.
_AS_PUBLISHED = {"output_hidden_states": True, "use_cache": True}


@dataclass(frozen=True)
class Provider:
    """One way to make the step.

    Attributes:
        name: as on the command line and in the JSON.
        label: as in tables and plots.
        build: workload -> step.
        loss_type: "pro" or "dpo"; only rows of one loss are compared.
    """

    name: str
    label: str
    build: Callable[[Workload], TrainingStep | Floor]
    loss_type: str = "pro"

    @property
    def is_floor(self) -> bool:
        """Whether it is a bound, not a step."""
        return self.name == "floor"


def all_providers() -> dict[str, Provider]:
    """Every provider by name, in the order of the tables."""
    table = [
        Provider("floor", "floor: matmuls of the linear layers", Floor),
        Provider("official", "official procedure", _official),
        Provider(
            "official-published",
            "official, hidden states and cache kept as published",
            partial(_official, **_AS_PUBLISHED),
        ),
        Provider(
            "official-checkpointed",
            "official, gradient checkpointing",
            partial(_official, checkpointed=True),
        ),
        Provider("ours-padded", "pro_trainer, padded", partial(_ours, form="padded")),
        Provider("ours-lists", "pro_trainer, lists", partial(_ours, form="lists")),
        Provider(
            "ours-lists-checkpointed",
            "pro_trainer, lists, gradient checkpointing",
            partial(_ours, form="lists", checkpointed=True),
        ),
        Provider("trl-dpo", "DPO: TRL's DPOTrainer", pairs.trl, "dpo"),
        Provider("trl-dpo-head", "DPO: TRL, fused head", partial(pairs.trl, rows="padded"), "dpo"),
        Provider(
            "trl-dpo-distinct",
            "DPO: TRL, accelerate_trl()",
            partial(pairs.trl, rows="distinct"),
            "dpo",
        ),
        Provider(
            "ours-dpo-padded", "DPO: pro_trainer, padded", partial(pairs.ours, form="padded"), "dpo"
        ),
        Provider(
            "ours-dpo-lists", "DPO: pro_trainer, lists", partial(pairs.ours, form="lists"), "dpo"
        ),
    ]
    return {provider.name: provider for provider in table}


def select(
    only: tuple[str, ...], wanted: tuple[str, ...], without: tuple[str, ...] = ()
) -> list[Provider]:
    """Providers of a case: its own list, narrowed to those asked for and not left out.

    Raises:
        ValueError: a name that no provider has.
    """
    table = all_providers()
    unknown = sorted({*wanted, *without} - set(table))
    if unknown:
        raise ValueError(f"provider must be one of {list(table)}, got {unknown}")
    names = (set(wanted) or set(table)) & set(only) - set(without)
    return [provider for provider in table.values() if provider.name in names]


def _official(work: Workload, checkpointed: bool = False, **forward: Any) -> TrainingStep:
    from pro_trainer.train.official import official_batch, official_loss

    batch = work.on_device(official_batch(work.features, work.pad))
    forward = {"use_cache": False, **forward}
    return TrainingStep(
        lambda model: official_loss(model, batch, **forward).loss,
        work,
        checkpointed,
        lambda: official_batch(work.features, work.pad),
    )


def _ours(work: Workload, form: str, checkpointed: bool = False) -> TrainingStep:
    from pro_trainer.batch.collate import PROCollator
    from pro_trainer.train.objective import batch_loss
    from pro_trainer.train.options import LossOptions

    opened = pk.OpenModel(work.model)
    collator = PROCollator(work.pad, form=form, official=True)
    options = LossOptions(compat="official")
    batch = work.on_device(collator(work.features))
    return TrainingStep(
        lambda model: batch_loss(opened.rebind(model), batch, options).loss,
        work,
        checkpointed,
        lambda: collator(work.features),
        around=pairs.distinct(work) if form == "lists" else contextlib.nullcontext,
    )
