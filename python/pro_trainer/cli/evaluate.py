"""``pro-kernels eval``: how well a checkpoint ranks beside its base, as tables, a plot, and files.

Every candidate is scored once, without logits; everything else is a formula on those scores
(``objective.score_metrics``, ``ranking``). On request both models also answer some of the prompts,
which a reward model scores and BLEU compares with the best completions, as the paper reports them.

Into ``output_dir`` go ``eval.json`` (all numbers and answers; null where a number is undefined),
``eval.md`` (the tables) and ``eval.png``, each replaced as a whole.

Shapes: L lists, n places for candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pro_trainer.cli.arguments import EvalArguments
from pro_trainer.data.lists import read_lists
from pro_trainer.data.report import DataReport
from pro_trainer.evaluate.compare import as_rows, compare
from pro_trainer.evaluate.generation import generate_answers
from pro_trainer.evaluate.metrics import (
    accuracy_by_reward_gap,
    list_statistics,
    metrics_by_candidates,
    score_by_rank,
)
from pro_trainer.evaluate.plots import draw_evaluation
from pro_trainer.evaluate.tables import evaluation_report, side_by_side
from pro_trainer.models import causal_lm, load
from pro_trainer.prepare.output import write_atomically, write_json
from pro_trainer.prepare.sampling import prompt_limit
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset
from pro_trainer.train import checkpoints, faults
from pro_trainer.train.config import PROConfig
from pro_trainer.train.inputs import check_lists
from pro_trainer.train.objective import Scores, describe_backend, list_losses, score_metrics
from pro_trainer.train.options import LossOptions
from pro_trainer.train.trainer import PROTrainer

_SHOWN_ANSWERS = 4  # on the terminal; the files hold all


def evaluate_files(arguments: EvalArguments, config: PROConfig) -> dict[str, Any]:
    """Score the lists of ``arguments.data``, print the tables, write the files.

    Returns:
        What ``eval.json`` holds: ``model``, ``base``, ``options``, ``data`` (the report),
        ``metrics``, ``by_candidates``, ``by_reward_gap``, ``by_rank``; with a base also
        ``base_metrics`` and ``comparison``; where asked for ``generation``, ``base_generation``.

    Raises:
        ValueError: options, data, models or output folder that cannot be used, before any work.
        TrainingError: another rank failed.
    """
    with faults.shared(config.ddp_timeout), checkpoints.alone(config):
        return _evaluate(arguments, config)


def _evaluate(arguments: EvalArguments, config: PROConfig) -> dict[str, Any]:
    base = _base(arguments, config)
    reward_model = None
    if arguments.reward_model:  # first, since it may be unusable; on the CPU until it is needed
        how = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
        reward_model = RewardModel.from_path(arguments.reward_model, **how)
    model, tokenizer = load(arguments.model, arguments)
    if getattr(model, "is_quantized", False) and not getattr(model, "peft_config", None):
        raise ValueError(
            f"{arguments.model}: load_in_4bit and load_in_8bit are for adapters, as train saves "
            "them; evaluate a whole model without"
        )
    models = {"tuned": model}
    if base:
        same_tokenizer = replace(arguments, tokenizer=arguments.tokenizer or arguments.model)
        models["base"] = load(base, same_tokenizer)[0]
    if arguments.generate:
        prompt_limit(causal_lm(model), arguments.max_new_tokens)
    say = print if config.should_log else str  # one process speaks
    say(f"loss: {describe_backend(config, config.device, model.dtype)}")
    dataset, report = load_dataset(arguments.data, tokenizer, config)
    say(report.text())
    check_lists(report, config)

    scores, answers = {}, {}
    for name, scored in reversed(models.items()):  # the base first: it may be the reference
        trainer = PROTrainer(scored, config, eval_dataset=dataset, processing_class=tokenizer)
        scores[name] = trainer.score(trainer.eval_dataset)
        if arguments.generate and trainer.is_world_process_zero():
            answers[name] = _answers(trainer.model, tokenizer, arguments, config, reward_model)
    result = {"model": arguments.model, "base": base} | _measured(scores, report, config)
    if not trainer.is_world_process_zero():
        return result
    if answers:
        result["generation"] = answers["tuned"]
        if base:
            result["base_generation"] = answers["base"]
    _tell(result, scores["tuned"], config)
    return result


def _measured(scores: dict[str, Scores], report: DataReport, config: PROConfig) -> dict[str, Any]:
    """All numbers that follow from the scores of ``tuned`` and, where there is one, of ``base``."""
    if config.needs_reference():
        reference = scores["base"]
        for name, found in scores.items():
            kl = found.kl - reference.kl
            scores[name] = replace(found, ref_logps=reference.logps, kl=kl)
    by_mean = config.scores_are_means()
    known = {name: (x.ranked_by(by_mean), x.rewards, x.mask) for name, x in scores.items()}
    statistics = {name: list_statistics(*x) for name, x in known.items()}
    options = [field.name for part in (LossOptions, ListOptions) for field in fields(part)]
    result = {
        "options": {name: getattr(config, name) for name in options},
        "data": report.as_dict(),
        "metrics": score_metrics(scores["tuned"], config),
        "by_candidates": metrics_by_candidates(statistics["tuned"]),
        "by_reward_gap": accuracy_by_reward_gap(*known["tuned"]),
        "by_rank": score_by_rank(*known["tuned"]),
    }
    if "base" in scores:
        result["base_metrics"] = score_metrics(scores["base"], config)
        losses = list_losses(scores["base"], config), list_losses(scores["tuned"], config)
        both = statistics["base"], statistics["tuned"]
        result["comparison"] = as_rows(compare(*both, losses, scores["tuned"].weights))
    return result


def _base(arguments: EvalArguments, config: PROConfig) -> str | None:
    """The model to compare with. ValueError: the loss has a reference model, and none is known."""
    base = None if arguments.base == "none" else arguments.base
    if base and Path(base).resolve() == Path(arguments.model or "").resolve():
        base = None  # the same weights
    if config.needs_reference() and not base:
        raise ValueError(
            f"loss_type {config.loss_type!r} compares with the model that training started from: "
            "give it as --base"
        )
    return base


def _answers(
    model: Any,
    tokenizer: Any,
    arguments: EvalArguments,
    config: PROConfig,
    reward_model: RewardModel | None,
) -> dict[str, Any]:
    lists = read_lists(arguments.data, DataReport(), config)
    return generate_answers(
        model,
        Encoder(tokenizer, config),
        list(itertools.islice(lists, arguments.generate)),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=config.per_device_eval_batch_size,
        max_prompt_length=config.prompt_room(arguments.max_new_tokens),
        reward_model=reward_model,
    )


def _tell(result: dict[str, Any], scores: Scores, config: PROConfig) -> None:
    """Print the tables, and write the files."""
    output, text = Path(config.output_dir), evaluation_report(result)
    print(f"\n{text}")
    if "generation" in result:
        print(side_by_side(result, _SHOWN_ANSWERS))
        text += f"\n{side_by_side(result)}\n"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "eval.json", result)
    by_mean = config.scores_are_means()
    ranked = scores.ranked_by(by_mean)
    measure = "mean log-probability of a token" if by_mean else "log-probability"
    draw_evaluation(
        output / "eval.png",
        result["by_reward_gap"],
        result["by_rank"],
        list_statistics(ranked, scores.rewards, scores.mask).kendall_tau,
        title=f"{Path(result['model']).name}, {result['metrics']['prompts']} lists",
        score_label=f"{measure} (nats)",
        gap_label="difference in rank" if scores.by_order else "difference in reward",
    )
    write_atomically(output / "eval.md", [text.encode(), b"\n![plots](eval.png)\n"])
    print(f"written: {output}/eval.json, eval.md, eval.png")
