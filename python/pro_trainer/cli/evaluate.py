"""``pro-kernels eval``: how well a checkpoint ranks, as tables, a plot, and files.

Every candidate is scored once, without logits; everything else is a formula on those scores
(``objective.score_metrics``, ``ranking``). On request the model also answers some of the prompts,
which a reward model scores and BLEU compares with the best completions, as the paper reports them.

Into ``output_dir`` go ``eval.json`` (all numbers and answers; null where a number is undefined),
``eval.md`` (the tables) and ``eval.png``, each replaced as a whole.

Shapes: L lists, n places for candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pro_trainer.data.lists import read_lists
from pro_trainer.data.report import DataReport
from pro_trainer.evaluate.generation import generate_answers
from pro_trainer.evaluate.metrics import (
    accuracy_by_reward_gap,
    list_statistics,
    metrics_by_candidates,
    score_by_rank,
)
from pro_trainer.evaluate.plots import draw_evaluation
from pro_trainer.evaluate.tables import evaluation_report
from pro_trainer.models import ModelOptions, causal_lm, load
from pro_trainer.options import option
from pro_trainer.prepare.output import write_atomically, write_json
from pro_trainer.prepare.sampling import prompt_limit
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from pro_trainer.train import faults
from pro_trainer.train.config import LossOptions, PROConfig
from pro_trainer.train.inputs import check_lists
from pro_trainer.train.objective import NEEDS_REFERENCE, Scores, describe_backend
from pro_trainer.train.trainer import PROTrainer


@dataclass
class EvalArguments(ModelOptions):
    """Which model is evaluated on which data; the rest is ``PROConfig``.

    Raises:
        ValueError: something needed is missing, or a number out of range.
    """

    data: list[str] = option(
        [], "Ranked lists: JSON Lines (plain, .gz, .zst), Parquet, folders, hub names[:split]."
    )
    ref_model: str | None = option(
        None, f"The reference model of the losses that have one ({', '.join(NEEDS_REFERENCE)})."
    )
    generate: int = option(
        0, "Answer the first so many prompts (greedy), and report their BLEU; 0: none."
    )
    max_new_tokens: int = option(128, "Most tokens of an answer.")
    reward_model: str | None = option(
        None, "Folder (or hub name) of a sequence classifier with one label, to score the answers."
    )

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("eval needs --model and --data")
        if self.generate < 0:
            raise ValueError(f"generate must be at least 0, got {self.generate}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.reward_model and not self.generate:
            raise ValueError(
                "reward_model scores generated answers, but generate is 0: set it to how many "
                "prompts to answer"
            )
        if self.generate and find_spec("sacrebleu") is None:
            raise ValueError("generate reports BLEU, which needs sacrebleu: pip install sacrebleu")


def evaluate_files(arguments: EvalArguments, config: PROConfig) -> dict[str, Any]:
    """Score the lists of ``arguments.data``, print the tables, write the files.

    Returns:
        What ``eval.json`` holds: ``model``, ``options``, ``data`` (the report), ``metrics``,
        ``by_candidates``, ``by_reward_gap``, ``by_rank``, and ``generation`` where asked for.

    Raises:
        ValueError: options, data, models or output folder that cannot be used, before any work.
        TrainingError: another rank failed.
    """
    with faults.shared(config.ddp_timeout):
        return _evaluate(arguments, config)


def _evaluate(arguments: EvalArguments, config: PROConfig) -> dict[str, Any]:
    output = Path(config.output_dir)
    _check_folder(output)
    _check_reference(arguments, config)
    reward_model = _reward_model(arguments)
    model, tokenizer = load(arguments.model, arguments)
    if getattr(model, "is_quantized", False) and not getattr(model, "peft_config", None):
        raise ValueError(
            f"{arguments.model}: load_in_4bit and load_in_8bit are for adapters, as train saves "
            "them; evaluate a whole model without"
        )
    ref_model = None
    if arguments.ref_model:
        same_tokenizer = replace(arguments, tokenizer=arguments.tokenizer or arguments.model)
        ref_model = load(arguments.ref_model, same_tokenizer)[0]
    if arguments.generate:
        prompt_limit(causal_lm(model), arguments.max_new_tokens)
    print(f"loss: {describe_backend(config, config.device, model.dtype)}")
    dataset, report = load_dataset(arguments.data, tokenizer, config)
    print(report.text())
    if not len(dataset):
        raise ValueError(f"{', '.join(arguments.data)}: no lists to evaluate")
    check_lists(report, config)

    trainer = PROTrainer(
        model, config, eval_dataset=dataset, processing_class=tokenizer, ref_model=ref_model
    )
    scores = trainer.score(trainer.eval_dataset)
    result = {
        "model": arguments.model,
        "options": _options(config),
        "data": report.as_dict(),
        "metrics": trainer.metrics(scores),
        **breakdown(scores, config),
    }
    if not trainer.is_world_process_zero():
        return result
    if arguments.generate:
        lists = itertools.islice(
            read_lists(arguments.data, DataReport(), config), arguments.generate
        )
        result["generation"] = generate_answers(
            trainer.model,
            Encoder(tokenizer, config),
            list(lists),
            max_new_tokens=arguments.max_new_tokens,
            batch_size=config.per_device_eval_batch_size,
            max_prompt_length=config.prompt_room(arguments.max_new_tokens),
            reward_model=reward_model,
        )
    text = evaluation_report(result)
    print(f"\n{text}")
    _write(output, result, text, scores, config)
    print(f"written: {output}/eval.json, eval.md, eval.png")
    return result


def breakdown(scores: Scores, config: LossOptions) -> dict[str, list[dict[str, float]]]:
    """``by_candidates``, ``by_reward_gap`` and ``by_rank``: rows of the tables of ``ranking``."""
    known = scores.ranked_by(config.length_normalize), scores.rewards, scores.mask
    return {
        "by_candidates": metrics_by_candidates(list_statistics(*known)),
        "by_reward_gap": accuracy_by_reward_gap(*known),
        "by_rank": score_by_rank(*known),
    }


def _check_folder(output: Path) -> None:
    """Raise ValueError where ``output`` or a part of its path is a file."""
    for part in (output, *output.parents):
        if part.exists():
            if not part.is_dir():
                raise ValueError(f"output_dir {output}: {part} is a file, not a folder")
            return


def _check_reference(arguments: EvalArguments, config: PROConfig) -> None:
    needed = config.loss_type in NEEDS_REFERENCE
    if needed and not arguments.ref_model:
        raise ValueError(f"loss_type {config.loss_type!r} compares with a model: give --ref_model")
    if arguments.ref_model and not needed:
        raise ValueError(f"loss_type {config.loss_type!r} has no reference model: drop --ref_model")


def _reward_model(arguments: EvalArguments) -> RewardModel | None:
    """Loaded first, since it may be unusable, and kept on the CPU until it is needed."""
    if not arguments.reward_model:
        return None
    return RewardModel.from_path(
        arguments.reward_model,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )


def _options(config: PROConfig) -> dict[str, Any]:
    names = [field.name for part in (LossOptions, ListOptions) for field in fields(part)]
    return {name: getattr(config, name) for name in names}


def _write(
    output: Path, result: dict[str, Any], text: str, scores: Scores, config: PROConfig
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "eval.json", result)
    ranked = scores.ranked_by(config.length_normalize)
    draw_evaluation(
        output / "eval.png",
        result["by_reward_gap"],
        result["by_rank"],
        list_statistics(ranked, scores.rewards, scores.mask).kendall_tau,
        title=f"{Path(result['model']).name}, {result['metrics']['prompts']} lists",
        score_label=(
            "mean log-probability of a token (nats)"
            if config.length_normalize
            else "log-probability (nats)"
        ),
        gap_label="difference in rank" if scores.by_order else "difference in reward",
    )
    write_atomically(output / "eval.md", [text.encode(), b"\n![plots](eval.png)\n"])
