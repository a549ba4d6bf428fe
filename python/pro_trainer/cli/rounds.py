"""``pro-kernels rounds``: sample, score, choose, train, evaluate, and again from what was trained.

Each round is made of parts that are commands of their own: ``prepare`` samples from the current
model and ranks, ``train`` trains it on these lists, and the trained model answers the held-out
prompts as the base did. Below ``output_dir``::

    rounds.json, rounds.png      settings, the metrics of each round, which is best
    prompts.jsonl held-out.jsonl the two sides of the prompts (reference.jsonl: what is mixed in)
    base/                        answers.jsonl, metrics.json of the base
    round-1/                     sampled.jsonl (and its report), lists.jsonl, checkpoint/, and both

A part that is complete is never run again, and one that was cut short goes on by its own means: the
same command goes on from anywhere.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pro_kernels as pk
from pro_trainer import files
from pro_trainer.cli.arguments import RoundsArguments
from pro_trainer.cli.prepare import NothingRankedError
from pro_trainer.cli.round_parts import Parts
from pro_trainer.data.report import DataReport
from pro_trainer.prepare.build import build_rewards
from pro_trainer.prepare.output import file_identity, json_line, plain, write_atomically
from pro_trainer.rounds import lists, state
from pro_trainer.rounds.state import Round, draw, summary, with_best
from pro_trainer.train import checkpoints
from pro_trainer.train.config import PROConfig
from pro_trainer.train.inputs import check_lists

# Options without effect on what is computed, which may change when a run goes on.
_FREE = {
    *("rounds", "stop_if_worse", "reload_command", "launch", "trust_remote_code", "server"),
    *("api_key_env", "reward_api_key_env", "concurrency", "requests_per_second"),
    *("server_timeout", "server_retries", "server_patience", "output_dir", "overwrite"),
    *("run_name", "report_to", "project", "trackio_space_id", "disable_tqdm", "loss_impl"),
    *("budget_mb", "resume_from_checkpoint", "ddp_timeout", "local_rank"),
}
_FREE_KINDS = ("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "dataloader_")


def rounds(arguments: RoundsArguments, config: PROConfig) -> dict[str, Any]:
    """Run what is missing of all rounds, in ``config.output_dir``.

    Returns:
        What ``rounds.json`` holds: ``settings``, ``base`` and ``rounds`` (their metrics), ``best``
        (number of the best round, 0 for the base), ``checkpoint`` (where its model is), ``ended``
        (why there are no more rounds; null while there are).

    Raises:
        ValueError: options, data, models or an output folder that cannot be used, before any work.
        TrainingError: ``reload_command`` or the launcher failed, or as of ``train``.
    """
    arguments.check()
    _check_config(config)
    output = Path(config.output_dir)
    checkpoints.check_folder(output)
    with files.alone("output_dir", output, output / ".lock"):
        parts = Parts(arguments, config, output)
        settings = _begin(parts)
        try:
            return _go_on(parts, settings)
        except BaseException as error:
            vars(error)["advice"] = f"{parts.where}; the same command goes on from there"
            raise


def _check_config(config: PROConfig) -> None:
    if config.world_size > 1:
        raise ValueError(
            f"launch: rounds are run by one process, this is one of {config.world_size}; start it "
            "alone, and give the launcher of the training as --launch"
        )
    for name, usual in (("eval_strategy", "no"), ("resume_from_checkpoint", None)):
        if (value := getattr(config, name)) not in (usual, None):
            value = getattr(value, "value", value)
            raise ValueError(
                f"{name} {value!r}: rounds evaluates after each training, and goes on by itself; "
                "leave it out"
            )


def _begin(parts: Parts) -> dict[str, Any]:
    """Check all that can be checked, write the prompts, and return the settings of the run."""
    given = parts.arguments
    for source in (given.model, *given.prompts, *given.mix_reference, given.held_out):
        if source and files.lies_in(source, parts.output) and Path(source).exists():
            raise files.destroyed("output_dir", parts.output, source)
    report = DataReport()
    prompts, held_out = lists.split(given, report, parts.config.on_bad_line)
    arguments = parts.prepare_arguments(Round(parts.output, 1))
    arguments.check()
    parts.train_arguments(Round(parts.output, 1))
    if given.mix_reference:
        of_lists = DataReport(lists=1, with_rewards=1)  # as those of samples have
        reference = lists.references(
            given.mix_reference, held_out, of_lists, parts.config.on_bad_line
        )
        check_lists(of_lists, parts.config)
    settings = _settings(given, parts.config)
    for reward in build_rewards(arguments, parts.config.device, report.unused):
        settings |= reward.identity()
    if not state.check(parts.output, settings, bool(parts.config.overwrite)):
        state.clear(parts.output)
        state.write(parts.output, settings, {})
    texts = {parts.prompts: prompts, parts.held_out: held_out}
    if given.mix_reference:
        texts[parts.reference] = reference
    for path, records in texts.items():
        if not path.exists():  # prepare tells by its time whether it is the same
            write_atomically(path, (json_line(plain(record)) for record in records))
    print(f"{len(prompts)} prompts to train on, {len(held_out)} held out; all in {parts.output}")
    return settings


def _go_on(parts: Parts, settings: dict[str, Any]) -> dict[str, Any]:
    """Run what is missing; the best round is told at the end."""
    base = parts.evaluate(Round(parts.output, 0))
    found: dict[str, Any] = {"base": base, "rounds": [], "ended": None}
    for number in range(1, parts.arguments.rounds + 1):
        this = Round(parts.output, number)
        try:
            parts.sample(this)
        except NothingRankedError as error:
            found["ended"] = f"round {number} has nothing to train on: {error}"
            break
        parts.mix(this)
        parts.train(this)
        last = [base, *found["rounds"]][-1]["win_rate"]
        found["rounds"].append(parts.evaluate(this))
        now = found["rounds"][-1]["win_rate"]
        state.write(parts.output, settings, with_best(found, parts.policy))
        if now < last and parts.arguments.stop_if_worse:
            found["ended"] = f"the win rate fell in round {number}: {last:.3f} to {now:.3f}"
            break
    found["ended"] = found["ended"] or f"all {parts.arguments.rounds} rounds are done"
    found = with_best(found, parts.policy)
    state.write(parts.output, settings, found)
    draw(parts.output / "rounds.png", found)
    print(summary(found))
    return {**found, "settings": settings}


def _settings(arguments: RoundsArguments, config: PROConfig) -> dict[str, Any]:
    """All that decides what is computed, with the files behind the paths."""
    every = {**config.to_dict(), **asdict(arguments)}
    settings = {
        name: value
        for name, value in every.items()
        if name not in _FREE and not name.startswith(_FREE_KINDS)
    }
    settings |= {"device": config.device.type, "pro_kernels": pk.__version__}
    settings["samples by"] = "a server" if arguments.server else "this process"
    sources = [*arguments.prompts, *arguments.mix_reference, arguments.held_out]
    for path in [*sources, arguments.model, arguments.tokenizer, *arguments.reward_files()]:
        if path and (found := file_identity(path)):  # size and hash; when, does not matter
            settings[f"the files of {path}"] = {n: [x[0], x[2]] for n, x in found.items()}
    return settings
