"""``PROTrainer``: transformers' ``Trainer`` with the fused loss on ranked lists.

The path of a step: the collator's batch (``batch.collate``) -> the model's forward up to its head
(``pro_kernels.OpenModel``) -> fused loss (``objective``) -> ``Trainer``'s backward, clipping and
optimizer. What a step scored stays on the device until the next log line; only there anything is
waited for.

Resuming, accumulation, mixed precision, gradient checkpointing, evaluation strategy, reporting and
distributed launch are ``Trainer``'s.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing.util
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

import pro_kernels as pk
from pro_trainer.batch.collate import Preferences
from pro_trainer.batch.sampler import TokenBatches, dealt
from pro_trainer.errors import TrainingError
from pro_trainer.files import appearing
from pro_trainer.models import (
    causal_lm,
    check_causal,
    check_vocabulary,
    different_ends,
    disable_dropout,
    evaluating,
    load,
    load_tokenizer,
    quiet,
)
from pro_trainer.prepare.output import write_json
from pro_trainer.train import card, checkpoints, faults, reference
from pro_trainer.train.callbacks import (
    CurvesCallback,
    ProgressBar,
    ProgressLine,
    SamplesCallback,
    TermHint,
)
from pro_trainer.train.config import PROConfig
from pro_trainer.train.distributed import (
    call_through,
    check_agreement,
    check_zero3_saves,
    facts,
    gathered,
)
from pro_trainer.train.inputs import check_lengths, first_list, make_collator, tokenized
from pro_trainer.train.objective import (
    Scores,
    batch_loss,
    describe_backend,
    label_columns,
    predicted_scores,
    score_metrics,
    sequence_logps,
)
from pro_trainer.train.reference import SyncReference
from pro_trainer.train.usage import Activations, Usage

_RUNNING = "running.json"  # of a checkpoint, where the loss keeps a mean
_TRIED_TOKENS = 64  # of the first list, on which the model is tried out


class PROTrainer(Trainer):
    """Train a causal LM so that its ranking of n candidates follows the preference ranking.

    PRO (arXiv 2306.17492) or any other loss of ``pro_kernels.losses.LOSSES``, through the fused
    kernels; each distinct token of a batch is run once, where the model can.

    Args:
        model: a transformers causal LM, a PEFT model, or the folder or hub name of one.
        args: options; default ``PROConfig()``.
        train_dataset: ranked lists: files, folders or hub names (one or several), records (a
            ``datasets.Dataset`` or a list of dicts in any format of ``records``), or what
            ``load_dataset`` made of them.
        eval_dataset: held-out lists, likewise, or a dict of them by name.
        processing_class: the tokenizer; default: the model's.
        peft_config: a ``peft`` config; the model is wrapped by it.
        ref_model: the reference model of losses that have one (dpo, ipo, s_dpo, dpo_pl). Default:
            the model without its adapters, or a frozen copy of it as it is now.
        compute_metrics: further metrics of an evaluation, as in ``Trainer``: a function of an
            ``EvalPrediction`` with ``predictions`` (S (L, n), m (L, n)[, reference S]) and
            ``label_ids`` (``objective.label_columns``); ``objective.predicted_scores`` reads both.
        callbacks: as in ``Trainer``.
        optimizers: as in ``Trainer``.

    Raises:
        TypeError, ValueError: a model, tokenizer, option or data set that cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: PROConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        ref_model: nn.Module | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = PROConfig() if args is None else args
        if not isinstance(args, PROConfig):
            raise TypeError(f"args must be a PROConfig, got {type(args).__name__}")
        if isinstance(model, str):
            model, tokenizer = load(model)
            processing_class = processing_class or tokenizer
        lm = causal_lm(model)
        if processing_class is None:
            name = lm.config._name_or_path
            if not name:
                raise ValueError(
                    "processing_class (the tokenizer) is needed: the model has no name"
                )
            processing_class = load_tokenizer(name)
        check_vocabulary(model, processing_class)
        checkpoints.check_folder(Path(args.output_dir))
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process a GPU (torchrun, accelerate "
                "launch), or show it one (CUDA_VISIBLE_DEVICES)"
            )
        describe_backend(args, args.device, lm.dtype)
        adapted = peft_config is not None or hasattr(model, "disable_adapter")
        reference.check(args, ref_model, adapted)
        if isinstance(train_dataset, Mapping):
            raise ValueError(
                f"train_dataset must be one data set, got a dict of {sorted(train_dataset)}"
            )
        names = _names(train_dataset)
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, args) for data in (train_dataset, eval_dataset)
        )
        example = first_list(train_dataset, eval_dataset)
        check_lengths(model, args.max_length, train_dataset, eval_dataset)
        if not (args.deepspeed or args.fsdp or getattr(lm, "is_quantized", False)):
            model.to(args.device)  # what follows is tried where it will run
        if peft_config is not None:
            model = _with_peft(model, peft_config, args)
        # What is only scored is not compared with itself.
        self._referring = args.needs_reference() and not (
            ref_model is None and train_dataset is None
        )
        if self._referring and not adapted and not args.precompute_ref_log_probs:
            ref_model = ref_model or copy.deepcopy(model)
        if args.disable_dropout:
            disable_dropout(model)
        with gathered(model):
            ids = torch.tensor([example["prompts"][0] + example["completions"][0]])
            some = ids[:, :_TRIED_TOKENS].to(lm.device)
            self._opened = pk.OpenModel(model, example={"input_ids": some})
            check_causal(self._opened, some)
            models = [model] if ref_model is None else [model, ref_model]
            collator = make_collator(self._opened, models, processing_class, args, example)
        said = different_ends(processing_class, lm.generation_config, lm.config)
        if said and args.should_log:
            print(said)
        if args.dataloader_num_workers:  # else those that are killed leave folders behind
            multiprocessing.util.get_temp_dir()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._metrics_of_predictions,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is scaled by the lists of a whole step
        self._usage = Usage(self.accelerator.device)
        self._activations = Activations(
            self.accelerator.device, args.should_log and not args.gradient_checkpointing
        )
        # One entry a batch since the last log line; None: a batch that counts for nothing.
        self._waiting: list[tuple[Tensor, Tensor, Preferences, Tensor | None] | None] = []
        self._not_finite = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        # Of a loss that keeps a mean from batch to batch (bco), each process its own.
        self._running = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        self._running_of_all = self._running[None]
        self._own_metrics = compute_metrics
        self.data_names = names  # for the model card
        for shown_by_transformers in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown_by_transformers)
        on_terminal = sys.stderr.isatty() and not args.disable_tqdm
        progress = ProgressBar() if on_terminal else ProgressLine()
        for callback in (progress, TermHint(), CurvesCallback()):
            self.add_callback(callback)
        if args.sample_steps:
            self.add_callback(SamplesCallback(self))
        self.ref_model = None
        if ref_model is not None:
            ref_model.eval().requires_grad_(False)
            self._opened_ref = pk.OpenModel(ref_model)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
            if args.sync_ref_model:
                self.add_callback(SyncReference(model, ref_model))
        if args.world_size > 1:
            check_agreement(facts(args, causal_lm(self.model), train_dataset, eval_dataset))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """``Trainer.train``; what is resumed must be a whole checkpoint of the same run.

        Raises:
            ValueError: no whole checkpoint to resume from, one of a run with other options or
                data, or, without resuming, an ``output_dir`` that holds another run's checkpoints
                and no ``overwrite``.
            TrainingError: loss, gradient or weights that are not finite; nothing is saved then. Or
                another rank failed (``faults.RankError``).
        """
        with faults.shared(self.args.ddp_timeout), checkpoints.alone(self.args):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        run = checkpoints.run_identity(self.args, causal_lm(self.model), self.train_dataset)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("the model has no trainable parameter (a frozen model or adapter?)")
        check_zero3_saves(self.accelerator)
        folder = Path(self.args.output_dir)
        checkpoints.check_apart(folder, causal_lm(self.model).config._name_or_path)
        resumed = checkpoints.prepare_output(folder, resume_from_checkpoint, run, self.args)
        if self.args.world_size > 1:
            check_agreement({"the checkpoint resumed": str(resumed and Path(resumed).name)})
        self._run_identity = run
        self._precompute_reference()
        if resumed and self.args.sync_ref_model:
            moved = type(self.ref_model).from_pretrained(Path(resumed) / reference.FOLDER)
            self.ref_model.load_state_dict(moved.state_dict())
        self._waiting.clear()
        self._not_finite.zero_()
        self._running.zero_()
        if resumed and (kept := Path(resumed) / _RUNNING).is_file():
            means = self._running.new_tensor(json.loads(kept.read_text()))
            same = len(means) == self.args.world_size
            self._running += means[self.args.process_index] if same else means.mean(0)
        self._usage.restart()
        if self.model_wrapped is self.model:
            # An evaluation before training marks the model as prepared, and accelerate would then
            # leave it without DistributedDataParallel: each process would train a model of its own.
            vars(self.model).pop("_is_accelerate_prepared", None)
        if resumed and not (self.args.deepspeed or self.args.fsdp):
            state = TrainerState.load_from_json(str(Path(resumed) / "trainer_state.json"))
            if 0 < self.args.max_steps <= state.global_step:  # Trainer would take one step more
                self._load_from_checkpoint(resumed)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {"train_runtime": 0.0})
        return super().train(resume_from_checkpoint=resumed, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, weighted as its share of the lists of the whole step."""
        preferences, layout = inputs["preferences"], inputs["layout"]
        ref_logps = self._reference_logps(model, inputs)
        running = None if preferences.idle else self._running
        with self._activations.measured(self._module(), inputs):
            result = self._run(
                model, lambda: batch_loss(self._opened, inputs, self.args, ref_logps, running)
            )
        loss = result.loss
        if num_items_in_batch is not None:
            items = num_items_in_batch + (num_items_in_batch == 0)  # all lists may weigh nothing
            lists = preferences.total_weight / items
            loss = loss * (lists * self.accelerator.num_processes)
        if self.model.training and self.args.logging_strategy != "no":
            self._not_finite |= ~loss.detach().isfinite()
            if preferences.idle:
                self._waiting.append(None)
            else:
                self._waiting.append((result.logps, result.lengths, preferences, ref_logps))
                self._usage.count(layout.num_tokens, preferences.num_positions)
        return (loss, result) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Weight of the lists of one optimizer step, over its micro-batches and processes."""
        lists = sum(batch["preferences"].total_weight for batch in batch_samples)
        if self.args.world_size == 1:
            return lists or None
        return self.accelerator.gather(torch.tensor([float(lists)], device=device)).sum()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """S and m of a batch, and what they are compared with; the loss is made of them later."""
        preferences = inputs["preferences"]
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            ref_logps = self._reference_logps(model, inputs)
            logps, lengths = self._run(
                model, lambda: sequence_logps(self._opened, inputs, self.args)
            )
        made = (logps, lengths) if ref_logps is None else (logps, lengths, ref_logps)
        return None, made, tuple(x.to(logps.device) for x in label_columns(preferences))

    def score(self, dataset: Any) -> Scores:
        """S and m of every candidate of ``dataset``, in its order, on the host (of all processes).

        Raises:
            ValueError: nothing to score.
        """
        of_scores, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.evaluation_loop(self.get_eval_dataloader(dataset), "Scoring")
        finally:
            self.compute_metrics = of_scores
        return predicted_scores(output.predictions, output.label_ids)

    def get_train_dataloader(self) -> Any:
        """``Trainer``'s; several processes take what one would take, no list twice."""
        args, batches = self.args, None
        if args.tokens_per_batch is not None:
            batches = TokenBatches(
                self.train_dataset,
                args.tokens_per_batch,
                padded=self.data_collator.form == "padded",
                seed=args.seed if args.data_seed is None else args.data_seed,
            )
        return dealt(super().get_train_dataloader(), batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """``Trainer``'s, of files and records too."""
        if eval_dataset is not None and not (
            isinstance(eval_dataset, str) and isinstance(self.eval_dataset, Mapping)
        ):
            eval_dataset = tokenized(eval_dataset, self.processing_class, self.args)
            vars(self).get("_eval_dataloaders", {}).clear()  # kept by name, whatever the data
        return super().get_eval_dataloader(eval_dataset)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Loss and ranking metrics of ``scores``; see ``score_metrics``."""
        return score_metrics(scores, self.args)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``Trainer.evaluate``: ``score_metrics`` of the held-out lists, as ``eval_...``."""
        self._precompute_reference()
        with self._usage.paused():
            return super().evaluate(*args, **kwargs)

    def _metrics_of_predictions(self, predictions: Any) -> dict[str, float]:
        scores = predicted_scores(predictions.predictions, predictions.label_ids)
        if not scores.logps.isfinite().all():
            raise TrainingError(
                f"step {self.state.global_step}: log-probabilities of the held-out lists are not "
                "finite; stopped"
            )
        own = self._own_metrics(predictions) if self._own_metrics else {}
        return {**self.metrics(scores), **own}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError:
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is none of "
                f"{', '.join(sorted(metrics))}"
            ) from None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last line scored; stop where the loss is not finite."""
        if "loss" in logs and self._waiting:
            self._check_finite(logs)
            parts = [Scores.of_batch(*waiting) for waiting in self._waiting if waiting]
            self._waiting.clear()
            parts = gather_object(parts) if self.args.world_size > 1 else parts
            metrics = score_metrics(Scores.cat(parts), self.args)
            del metrics["loss"], metrics["prompts"], metrics["pairs"]
            logs |= metrics | self._usage.take(self.accelerator)
        super().log(logs, start_time)

    def _check_finite(self, logs: Mapping[str, float]) -> None:
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(logs["loss"]) or not (self.args.fp16 or math.isfinite(norm)):
            raise TrainingError(
                f"steps up to {self.state.global_step}: mean loss {logs['loss']}, last gradient "
                f"norm {norm}{self._ranks_not_finite()}; stopped. A lower learning_rate, a smaller "
                "reward_scale or float32 may help"
            )

    def _ranks_not_finite(self) -> str:
        """Which ranks' losses were not finite: a sum over ranks does not say."""
        if self.args.world_size == 1:
            return ""
        bad = self.accelerator.gather(self._not_finite[None]).nonzero().flatten().tolist()
        return f", losses that are not finite on ranks {bad}" if bad else ""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # see rotate
        self._running_of_all = self.accelerator.gather(self._running[None])  # one process saves
        with self._usage.paused():
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.seal(folder, self.args.save_only_model)
            except BaseException:
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                checkpoints.rotate(run, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        # FSDP and DeepSpeed give what they gathered; one process alone could not gather it here.
        named = self.model.named_parameters() if state_dict is None else state_dict.items()
        bad = [n for n, p in named if not p.isfinite().all()]
        if bad:
            raise TrainingError(
                f"step {self.state.global_step}: {len(bad)} weights are not finite ({bad[0]}, "
                "...); stopped, and nothing saved"
            )
        with quiet(), appearing(folder) as writing:
            super()._save(str(writing), state_dict)
            card.write(writing, self)
            if self.args.sync_ref_model and "checkpoint-" in folder.name:
                self.ref_model.save_pretrained(writing / reference.FOLDER)
            if "running" in self.args.loss().defaults and "checkpoint-" in folder.name:
                (writing / _RUNNING).write_text(json.dumps(self._running_of_all.tolist()))
            if hasattr(self, "_run_identity"):
                write_json(writing / checkpoints.IDENTITY, self._run_identity)
            checkpoints.remove_model(folder)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with quiet():  # a tied head is named as missing
            super()._load_from_checkpoint(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card (README.md) into ``output_dir``."""
        if self.is_world_process_zero():
            card.write(Path(self.args.output_dir), self)

    def _module(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _run(self, model: nn.Module, function: Any) -> Any:
        """Call ``function`` inside the model's forward, under its autocast."""
        with self.accelerator.autocast():
            return call_through(model, self._module(), function)

    def _precompute_reference(self) -> None:
        """Score all lists by the reference model, once, where that was asked for."""
        if not (self.args.precompute_ref_log_probs and self._referring):
            return
        folder = Path(self.args.output_dir)
        about = reference.fingerprint(self.model if self.ref_model is None else self.ref_model)

        def score(dataset: Any) -> Tensor:
            if self.ref_model is not None:
                return self.score(dataset).ref_logps
            self._referring = False  # the model itself, as it is before training, is what scores
            adapted = getattr(self._module(), "disable_adapter", contextlib.nullcontext)
            try:
                with adapted():
                    return self.score(dataset).logps
            finally:
                self._referring = True

        def scored(dataset: Any, name: str) -> Any:
            if isinstance(dataset, Mapping):
                return {key: scored(part, f"{name}-{key}") for key, part in dataset.items()}
            if dataset is None or reference.COLUMN in dataset.column_names:
                return dataset
            file = folder / f"ref_log_probs-{name}.safetensors"
            return reference.with_log_probs(dataset, file, about, score, self.args.should_save)

        self.train_dataset = scored(self.train_dataset, "train")
        self.eval_dataset = scored(self.eval_dataset, "eval")
        self.ref_model = None

    def _reference_logps(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        known = inputs["preferences"].ref_logps
        if known is not None or not self._referring:
            return None if known is None else known.to(self.accelerator.device)
        if self.ref_model is None and not hasattr(self._module(), "disable_adapter"):
            raise ValueError(
                "these lists have no log-probs of the reference model: precompute_ref_log_probs "
                "scored train_dataset and eval_dataset, and let the model go"
            )
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                return sequence_logps(self._opened_ref, inputs, self.args)[0]
            module = self._module()
            with module.disable_adapter(), evaluating(module):
                logps, _ = call_through(
                    model, module, lambda: sequence_logps(self._opened, inputs, self.args)
                )
                return logps


def _names(data: Any) -> list[str]:
    """Of the files that a data set is read from, where it is given as such."""
    data = [data] if isinstance(data, (str, Path)) else data
    is_list = isinstance(data, (list, tuple))
    return [Path(x).name for x in data if isinstance(x, (str, Path))] if is_list else []


def _with_peft(model: nn.Module, peft_config: Any, args: PROConfig) -> nn.Module:
    """The model with new adapters."""
    if hasattr(model, "peft_config"):
        raise ValueError("model is a PEFT model already; give it without peft_config")
    from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft config, got {type(peft_config).__name__}")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, args.gradient_checkpointing)
    elif args.gradient_checkpointing:
        model.enable_input_require_grads()  # else no gradient enters the checkpointed layers
    return get_peft_model(model, peft_config)
