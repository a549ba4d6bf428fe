"""``pro-kernels train``: from options to a trained, saved and evaluated model."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pro_trainer.cli.arguments import TrainArguments
from pro_trainer.cli.stop import advising
from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN
from pro_trainer.evaluate.tables import change_table
from pro_trainer.models import load, tiny_llama
from pro_trainer.prepare.output import write_json
from pro_trainer.text import show
from pro_trainer.text.encode import TokenizedList
from pro_trainer.text.store import load_dataset, split_held_out
from pro_trainer.train import checkpoints, faults
from pro_trainer.train.callbacks import plain
from pro_trainer.train.config import PROConfig
from pro_trainer.train.inputs import check_lists
from pro_trainer.train.objective import describe_backend
from pro_trainer.train.trainer import PROTrainer


def train(arguments: TrainArguments, config: PROConfig) -> dict[str, Any]:
    """Train, save model, tokenizer, card, ``metrics.json`` and ``curves.png`` in ``output_dir``.

    Returns what ``metrics.json`` holds: ``log_history``, ``before`` and ``after`` (metrics of the
    held-out lists), ``data`` (the report).

    Raises:
        ValueError: options, data, model or output folder that cannot be used, before any work; on
            every rank, ranks that disagree on any of them.
        TrainingError: a loss, gradient or weight that is not finite, or another rank failed.
    """
    with faults.shared(config.ddp_timeout), checkpoints.alone(config):
        return _train(arguments, config)


def _train(arguments: TrainArguments, config: PROConfig) -> dict[str, Any]:
    output = Path(config.output_dir)
    sources = [arguments.model, arguments.tokenizer, *arguments.data, *arguments.eval_data]
    checkpoints.check_apart(output, *sources)
    resume = _resume(config, output)
    if resume is None:
        checkpoints.check_free(output, config.overwrite)
    _check_reporting(config)
    lora = _lora(arguments) if arguments.use_peft else None
    if config.bf16_full_eval or config.fp16_full_eval:
        raise ValueError(
            "bf16_full_eval and fp16_full_eval cast the weights themselves, and training would go "
            "on with those; use bf16 or fp16, or dtype"
        )
    if arguments.model:
        model, tokenizer = load(arguments.model, arguments)
    else:
        model, tokenizer = tiny_llama(config.seed)
    if config.should_log:
        print(f"loss: {describe_backend(config, config.device, model.dtype)}")
    lists, held_out, report = read_data(arguments, config, tokenizer)
    trainer = PROTrainer(model, config, lists, held_out, tokenizer, peft_config=lora)
    trainer.data_names = [Path(x).name for x in arguments.data or [BUNDLED_TRAIN]]
    # At step 0, in the log: curves start there, and a resumed run has it in its checkpoint.
    config.eval_on_start = held_out is not None and resume is None
    with advising(lambda: _how_to_go_on(trainer, output)):
        trainer.train(resume_from_checkpoint=resume)
        before = _logged(trainer, 0)
        after = None if held_out is None else _of_final_weights(trainer)
        trainer.save_model()
        result = {
            "data": report,
            "before": before,
            "after": after,
            "log_history": trainer.state.log_history,
        }
        if trainer.is_world_process_zero():
            write_json(output / "metrics.json", result)
            if before and after:
                print(f"\n{change_table(plain(before), plain(after))}\n")
            print(f"saved {output}: model, README.md, metrics.json, curves.png")
    return result


def _logged(trainer: PROTrainer, step: int) -> dict[str, float] | None:
    """The evaluation of a step, where the log holds one."""
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return next((entry for entry in reversed(found) if entry["step"] == step), None)


def _of_final_weights(trainer: PROTrainer) -> dict[str, float]:
    """The evaluation of the weights as they are now; nothing is evaluated twice."""
    state = trainer.state
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return _logged(trainer, state.best_global_step if best else state.global_step) or (
        trainer.evaluate()
    )


def _how_to_go_on(trainer: PROTrainer, output: Path) -> str:
    whole = [c.name for c in checkpoints.checkpoints(output) if checkpoints.sealed(c)]
    at = f"at step {trainer.state.global_step}"
    if not whole or trainer.args.save_only_model:
        return f"{at}; nothing was saved to go on from"
    return f"{at}; --resume_from_checkpoint auto goes on from {whole[-1]}"


def read_data(
    arguments: TrainArguments, config: PROConfig, tokenizer: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Training lists, held-out lists or None, and the report, which is printed."""
    say = print if config.should_log else str  # one process speaks
    lists, report = load_dataset(arguments.data or [BUNDLED_TRAIN], tokenizer, config)
    say(report.text())
    check_lists(report, config)
    first = TokenizedList(**{f.name: lists[0][f.name] for f in fields(TokenizedList)})
    shown = show.as_text(first, tokenizer, sys.stdout.isatty())
    say(f"=== the first list (pro-kernels inspect shows more)\n{shown}\n===")
    eval_files = arguments.eval_data or ([] if arguments.data else [BUNDLED_EVAL])
    held_out = None
    if eval_files:
        held_out, held_report = load_dataset(eval_files, tokenizer, config)
        say(f"held out:\n{held_report.text()}")
        check_lists(held_report, config)
    elif arguments.eval_fraction:
        lists, held_out = split_held_out(lists, arguments.eval_fraction, config.seed)
    say(f"training on {len(lists)} lists, {0 if held_out is None else len(held_out)} held out")
    return lists, held_out, report.as_dict()


def _resume(config: PROConfig, output: Path) -> str | None:
    """The checkpoint to go on from, or None for a fresh run."""
    given = config.resume_from_checkpoint
    say = print if config.should_log else str
    if given == "auto":
        found = checkpoints.last_whole(output, say)
        return str(found) if found else None
    resume = {"true": True, "last": True, "false": None}.get(str(given).lower(), given)
    return str(checkpoints.find(output, resume, say)) if resume else None


def _check_reporting(config: PROConfig) -> None:
    """Raise ValueError where ``report_to`` names what cannot report; ``Trainer`` tells late."""
    for name in set(config.report_to) - set(get_available_reporting_integrations()):
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"report_to {name}: {error}") from None


def _lora(arguments: TrainArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("use_peft needs the package peft (extra 'train')") from None
    targets = arguments.lora_target_modules or ["all-linear"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=arguments.lora_modules_to_save or None,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
    )
