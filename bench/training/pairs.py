"""DPO on pairs: TRL's step and ours, against frozen reference log-probs made once, before timing.

Another loss than PRO's, so these rows are compared with each other and with plain PyTorch only.

Legend: ``B`` prompts.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pro_kernels as pk
from bench.peers import require
from bench.step import Refused
from bench.training.steps import TrainingStep
from bench.training.workload import Workload, plain_scores
from pro_kernels.models import trl as swap

BETA = 0.1
NOTE = "another loss: DPO; reference log-probs precomputed"


def plain_loss(model: nn.Module, work: Workload) -> Tensor:
    """DPO's loss of a batch of pairs, written from the paper: -log sigmoid of the margin, mean."""
    gains = plain_scores(model, work) - work.reference_scores  # (B, 2)
    return -torch.nn.functional.logsigmoid(BETA * (gains[:, 0] - gains[:, 1])).mean()


def ours(work: Workload, form: str) -> TrainingStep:
    """pro_trainer's step with ``loss_type="dpo"``, given the reference log-probs."""
    from pro_trainer.batch.collate import PROCollator
    from pro_trainer.train.objective import batch_loss
    from pro_trainer.train.options import LossOptions

    _check_pairs(work)
    opened = pk.OpenModel(work.model)
    collator = PROCollator(work.pad, form=form)
    batch = work.on_device(collator(work.features))
    options = LossOptions(loss_type="dpo", beta=BETA)
    reference = work.reference_scores
    return TrainingStep(
        lambda model: batch_loss(opened.rebind(model), batch, options, reference).loss,
        work,
        collate=lambda: collator(work.features),
        detail=NOTE,
        around=distinct(work) if form == "lists" else contextlib.nullcontext,
    )


def distinct(work: Workload) -> Callable[[], contextlib.AbstractContextManager]:
    """What a step on distinct rows has around it; the others share the model."""
    return lambda: pk.distinct_rows(work.model)


def trl(work: Workload, rows: str | None = None) -> TrainingStep:
    """``DPOTrainer.compute_loss``: TRL's own code from the batch to the loss, metrics included.

    ``rows``: with what ``accelerate_trl(rows=...)`` does; None: without.

    Its leanest configuration for the same work: reference log-probs precomputed by the trainer
    itself, no gradient checkpointing, and the chunked head that it always has.
    """
    require("trl")
    _check_pairs(work)
    trainer = _trainer(work)
    pairs = list(trainer.train_dataset)
    batch = work.on_device(trainer.data_collator(pairs))
    forward = trainer.model.forward.__func__

    def loss(model: nn.Module) -> Tensor:
        fused = copy.copy(model)  # TRL replaces the forward; the others' must stay as it is
        fused.forward = types.MethodType(forward, fused)
        return trainer.compute_loss(fused, batch)

    @contextlib.contextmanager
    def fused_head() -> Iterator[None]:
        swap.accelerate_trl(rows="padded")
        try:
            yield
        finally:
            swap.restore_trl()

    @contextlib.contextmanager
    def accelerated() -> Iterator[None]:
        with fused_head(), pk.distinct_rows(work.model):
            yield

    head = contextlib.nullcontext if rows is None else fused_head
    return TrainingStep(
        loss,
        work,
        collate=lambda: trainer.data_collator(pairs),
        detail=NOTE,
        around=accelerated if rows == "distinct" else head,
        around_head=head,
    )


def _check_pairs(work: Workload) -> None:
    if work.case.n != 2:
        raise Refused("n > 2: DPO is measured on pairs")


def _trainer(work: Workload) -> Any:
    """A ``DPOTrainer`` of the model, with the reference model's log-probs in its data set."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already

    rows = [
        {"prompt_ids": f["prompts"][0], "chosen_ids": chosen, "rejected_ids": rejected}
        for f in work.features
        for chosen, rejected in [f["completions"]]
    ]
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
