"""TRL's chunked log-probs, and the step of its DPOTrainer."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pro_kernels as pk
from bench.engine.step import BETA, DPO_NOTE, TrainingStep, Workload, check_pairs
from bench.engine.timing import Step
from bench.engine.truth import Inputs
from bench.providers.base import Provider, logps_step, on_scored_rows, refuse, require
from pro_kernels.models.trl import accelerate_trl, restore_trl


def providers(_: torch.device) -> list[Provider]:
    """Of the loss; and of a DPO step, with what ``accelerate_trl(rows=...)`` does and without."""
    steps = {"": ("TRL's DPOTrainer", None), "-head": ("TRL, fused head", "padded"),
             "-distinct": ("TRL, accelerate_trl()", "distinct")}  # fmt: skip
    return [
        Provider("trl", "TRL 1.16 chunked log-probs", trl),
        *(
            Provider(f"trl-dpo{end}", f"DPO: {label}", partial(dpo_step, rows=rows), suite="step",
                     loss_type="dpo")
            for end, (label, rows) in steps.items()
        ),
    ]  # fmt: skip


def trl(inputs: Inputs) -> Step:
    """TRL's chunked log-probs as its trainers call them, then the plain ranking loss.

    As there, the scored positions alone are projected where Triton runs, every position elsewhere.
    From logits: its ``selective_log_softmax``.
    """
    refuse(inputs, "ranking", package="trl")
    from trl.trainer import utils

    targets, case = inputs.targets, inputs.case
    compact = inputs.logits is None and utils._use_triton(inputs.device)
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def of_rows(rows: Tensor, labels: Tensor) -> Tensor:
        return utils._ChunkedLogProbFunction.apply(
            rows, inputs.weight, None, labels, 1.0, chunk, case.softcap, 1.0, ()
        )[0]

    def logps() -> Tensor:
        if inputs.logits is not None:
            return utils.selective_log_softmax(inputs.logits, targets.clamp(min=0)).float()
        if compact:
            return on_scored_rows(inputs, of_rows)
        return of_rows(inputs.hidden.flatten(0, 2), targets.clamp(min=0).reshape(-1)).view(
            targets.shape
        )

    return logps_step(inputs, logps)


def dpo_step(work: Workload, rows: str | None = None) -> TrainingStep:
    """``DPOTrainer.compute_loss``: TRL's own code from the batch to the loss, metrics included.

    ``rows``: with what ``accelerate_trl(rows=...)`` does; None: without.

    Its leanest configuration for the same work: reference log-probs precomputed by the trainer
    itself, no gradient checkpointing, and the chunked head that it always has.
    """
    require("trl")
    check_pairs(work)
    trainer = _trainer(work)
    pairs = list(trainer.train_dataset)
    batch = work.on_device(trainer.data_collator(pairs))
    forward = trainer.model.forward.__func__

    def loss(model: nn.Module) -> Tensor:
        fused = copy.copy(model)  # TRL replaces the forward; the others' must stay as it is
        fused.forward = types.MethodType(forward, fused)
        return trainer.compute_loss(fused, batch)

    @contextlib.contextmanager
    def accelerated() -> Iterator[None]:
        with swapped("padded"), pk.distinct_rows(work.model):
            yield

    head = contextlib.nullcontext if rows is None else partial(swapped, "padded")
    return TrainingStep(
        loss,
        work,
        collate=lambda: trainer.data_collator(pairs),
        detail=DPO_NOTE,
        around=accelerated if rows == "distinct" else head,
        around_head=head,
    )


@contextlib.contextmanager
def swapped(rows: str = "distinct") -> Iterator[None]:
    """TRL accelerated for a while."""
    accelerate_trl(rows=rows)
    try:
        yield
    finally:
        restore_trl()


def _trainer(work: Workload) -> Any:
    """A ``DPOTrainer`` of the model, with the reference model's log-probs in its data set."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, x["prompts"] + x["completions"], strict=True)) for x in work.features]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        options = DPOConfig(
            output_dir=folder, beta=BETA, max_length=None, precompute_ref_log_probs=True,
            per_device_train_batch_size=work.case.B, gradient_checkpointing=False, bf16=False,
            use_cpu=work.device.type == "cpu", report_to="none", dataloader_pin_memory=False,
        )  # fmt: skip
        # A model of its own as far as TRL changes it (forward, config); the weights are shared.
        model = copy.copy(work.model)
        model.config = copy.deepcopy(model.config)
        model.generation_config = copy.deepcopy(model.generation_config)
        trainer = Tokenized(
            model, work.reference_model(), options,
            train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(work.pad),
        )  # fmt: skip
    trainer.ref_model = None  # what it had to say is in the data set
    return trainer


def _tokenizer(pad: int) -> Any:
    """What TRL insists on; it reads no more of it than the padding id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(pad + 1)}
    model = Tokenizer(WordLevel(words, unk_token="<0>"))
    name = f"<{pad}>"
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=name, eos_token=name)
