"""``pro-kernels run`` within a process: models are attached as they are loaded, and counted.

``hook/sitecustomize.py`` calls ``attach_loaded``. At its end the process leaves a report, and the
command adds up those of all processes. Plugins of frameworks call it too, and say what became of a
model.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pro_kernels.models import COUNTS
from pro_kernels.models.attach import attach, detach
from pro_kernels.models.forward import STATE
from pro_kernels.models.opened import base_of

Say = Callable[[str], object]
# How many models are attached, of which class; how often which sentence is true of others.
_attached: Counter[str] = Counter()
_said: Counter[str] = Counter()


def attach_loaded(model: Any, rows: str | None = None, say: Say | None = None) -> None:
    """Attach a causal LM that was just loaded, or keep the reason why not; pass over others.

    Without ``rows`` and ``say`` (a sentence on what became of it) as ``pro-kernels run`` was told.
    """
    lm = base_of(model)
    head = getattr(lm, "get_output_embeddings", lambda: None)()
    if head is None or getattr(lm.config, "is_encoder_decoder", False):
        return
    _begin()
    _attach(lm, rows or os.environ.get("PRO_KERNELS_RUN_ROWS", "padded"), say or _explain)
    write_report()  # there should be one of a process that is killed


def _attach(model: Any, rows: str, say: Say) -> None:
    name = type(model).__name__
    again = STATE in vars(model)  # by ``pro-kernels run``
    try:
        _check_ranks()
        with torch.device("cpu"):  # whatever the program's default is
            attach(model, rows=rows)
    except Exception as error:
        known = isinstance(error, (TypeError, ValueError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        reason = reason.removeprefix(f"{name}: ").rstrip(".")
        if rows == "padded":
            _say(f"{name} was not attached: {reason}.", say)
            return
        _attach(model, "padded", say)
        if STATE in vars(model):
            _say(f"{name} runs padded rows: {reason}.", say)
        return
    getattr(model, STATE).loaded = True
    _attached[name] += not again
    say(f"{name} is attached.")


def _check_ranks() -> None:
    """Raise ValueError where this rank may hold zeros in place of weights: ranks must agree."""
    from transformers.integrations import is_fsdp_enabled

    if is_fsdp_enabled():
        raise ValueError(
            "only rank 0 loads its weights (FSDP_CPU_RAM_EFFICIENT_LOADING), and attach has to run "
            "it; set fsdp_cpu_ram_efficient_loading to false"
        )


def _say(sentence: str, say: Say) -> None:
    _said[" ".join(sentence.split())] += 1
    say(sentence)


def _explain(sentence: str) -> None:
    if os.environ.get("PRO_KERNELS_EXPLAIN"):
        print(f"pro-kernels run: {sentence}", file=sys.stderr)


@functools.cache
def _begin() -> None:
    """Before the first model, once: reports will be written, and DataParallel gets plain models."""
    atexit.register(write_report)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)
    init = nn.DataParallel.__init__

    @functools.wraps(init)
    def with_plain_models(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        for lm in module.modules():
            if getattr(vars(lm).get(STATE), "loaded", False):
                with contextlib.suppress(ValueError):  # its forward was wrapped
                    detach(lm)
                    _attached[type(lm).__name__] -= 1
                    _say(
                        f"{type(lm).__name__} was detached: torch.nn.DataParallel runs it in "
                        "threads; start one process for each GPU (torchrun).",
                        _explain,
                    )
        init(self, module, *args, **kwargs)

    nn.DataParallel.__init__ = with_plain_models  # type: ignore[method-assign]


def _forget() -> None:
    for numbers in (_attached, _said, COUNTS):
        numbers.clear()


def report_of_process() -> dict[str, dict[str, int]]:
    """The numbers of this process, which those of others are added to.

    ``tokens``: ``padded`` and ``run`` of batches that ran distinct rows. ``logits``: ``rows`` that
    needed none unless somebody looked at them, and for how many of these they were ``made``.
    """
    return {
        "attached": dict(+_attached),
        "said": dict(_said),
        "tokens": {"padded": COUNTS["padded_tokens"], "run": COUNTS["run_tokens"]},
        # A row may be made more than once.
        "logits": {
            "rows": COUNTS["lazy_rows"],
            "made": min(COUNTS["made_rows"], COUNTS["lazy_rows"]),
        },
    }


def write_report() -> None:
    """Leave the numbers where ``pro-kernels run`` looks for them, if it still does."""
    path = Path(os.environ.get("PRO_KERNELS_RUN", os.devnull), f"{os.getpid()}.json")
    with contextlib.suppress(OSError):
        path.with_suffix(".new").write_text(json.dumps(report_of_process()))
        path.with_suffix(".new").replace(path)
