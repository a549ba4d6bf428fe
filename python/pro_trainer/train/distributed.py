"""Several processes: what they must agree on, our forward inside a wrapped model, the end."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainingArguments

# A rank's own: its place, its folders, and what only says how fast or how loud it is.
_OWN = ("local_rank", "output_dir", "logging_dir", "run_name", "log_level", "log_level_replica",
        "dataloader_num_workers", "dataloader_prefetch_factor", "use_cpu", "no_cuda")  # fmt: skip


def several() -> bool:
    """Whether this process is one of several of a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def set_timeout(seconds: float) -> None:
    """Give the process group's collectives this timeout, where there is a group.

    transformers does so on accelerators only.
    """
    if several():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def check_zero3_saves(accelerator: Accelerator) -> None:
    """Raise ValueError for a ZeRO-3 configuration under which no weights would be saved.

    DeepSpeed then leaves shards for a script of its own, and transformers only warns.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    name = "stage3_gather_16bit_weights_on_model_save"
    if plugin is None or not plugin.hf_ds_config.is_zero3():
        return
    if not plugin.hf_ds_config.get_value(f"zero_optimization.{name}", False):
        raise ValueError(
            f"zero_optimization.{name} must be true in DeepSpeed's configuration for ZeRO-3, or no "
            "model would be saved, got false or nothing"
        )


def gathered(model: nn.Module) -> contextlib.AbstractContextManager:
    """The whole weights of a model that was loaded partitioned (DeepSpeed ZeRO-3)."""
    parameters = list(model.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def facts(
    args: TrainingArguments, model: PreTrainedModel, *data: datasets.Dataset | Mapping | None
) -> dict[str, str]:
    """What all ranks of a run must have the same, by name; reads all of the data."""
    found = {k: repr(v) for k, v in args.to_dict().items() if k not in _OWN}
    found["model"] = f"{type(model).__name__}, {model.num_parameters()} parameters"
    for kind, dataset in zip(("train_dataset", "eval_dataset"), data, strict=True):
        parts = dataset if isinstance(dataset, Mapping) else {"": dataset}
        for name, part in parts.items():
            if part is not None:
                found[f"{kind} {name}".strip()] = describe_lists(part)
    return found


def describe_lists(dataset: datasets.Dataset) -> str:
    """How many lists, and a hash of all of them."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return f"{len(dataset)} lists, sha256 {digest.hexdigest()[:16]}"


def check_agreement(mine: Mapping[str, str]) -> None:
    """Compare ``mine`` over ranks.

    Raises:
        ValueError: on every rank, with each difference, if any rank's are other than the first's.
    """
    every = gather_object([dict(mine)])
    differ = []
    for name in sorted(set().union(*every)):
        by_value: dict[str | None, list[int]] = {}
        for rank, found in enumerate(every):
            by_value.setdefault(found.get(name), []).append(rank)
        if len(by_value) > 1:
            shown = ", ".join(f"{value} on ranks {ranks}" for value, ranks in by_value.items())
            differ.append(f"{name}: {shown}")
    if differ:
        raise ValueError(f"the ranks of this run disagree on {'; '.join(differ)}")


def leave(code: int) -> NoReturn:
    """End this process of several with ``code``, once all are done if it is 0.

    The interpreter's own end, with the threads of gloo in it, now and then aborts ("terminate
    called without an active exception"), which would mark a finished run as failed. So exit
    functions run and output is flushed here, and the system closes the process group's sockets.
    """
    if code == 0:
        with contextlib.suppress(RuntimeError):  # another failed after this one was done: it says
            dist.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """Call ``function`` in the place of ``module``'s forward, through ``wrapper``.

    DistributedDataParallel does its work around the wrapped model's forward, FSDP2 in hooks of the
    model's own. The fused loss runs the decoder and reads the head's weight, which is not that
    forward; this runs it where the forward is expected to be, once.
    """
    if wrapper is module and not isinstance(module, FSDPModule):
        return function()
    own = vars(module).get("forward")  # accelerate puts one on the instance, for autocast

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    def forward(*args: Any) -> Any:
        restore()
        return function()

    module.forward = forward
    try:
        return wrapper(())  # a wrapper may expect an argument; it is not used
    finally:
        restore()
