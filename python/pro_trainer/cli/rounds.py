"""``pro-kernels rounds``: sample, score, choose, train, evaluate, and again from what was trained.

Each round is made of parts that are commands of their own: ``prepare`` samples from the current
model and ranks, ``train`` trains it on these lists, and the trained model answers the held-out
prompts as the base did. Below ``output_dir``::

    rounds.json                  settings, the metrics of each round, which is best
    prompts.jsonl held-out.jsonl the two sides of the prompts (reference.jsonl: what is mixed in)
    base/                        answers.jsonl, metrics.json of the base
    round-1/                     sampled.jsonl (and its report), lists.jsonl, checkpoint/, and both

A part that is complete is never run again, and one that was cut short goes on by its own means: the
same command goes on from anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import pro_kernels as pk
from pro_trainer import files
from pro_trainer.cli.arguments import PrepareArguments, RoundsArguments, TrainArguments
from pro_trainer.cli.prepare import NothingRankedError, prepare
from pro_trainer.cli.recipe import recipe_of, rewards_of, try_out_servers
from pro_trainer.cli.train import train
from pro_trainer.data.report import DataReport
from pro_trainer.errors import TrainingError
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.output import (
    PartialFile,
    file_identity,
    write_atomically,
    write_json,
)
from pro_trainer.rounds import answers, lists, state
from pro_trainer.rounds.state import Round
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
        run = _Rounds(arguments, config, output)
        run.begin()
        try:
            return run.go_on()
        except BaseException as error:
            vars(error)["advice"] = f"{run.where}; the same command goes on from there"
            raise


def _check_config(config: PROConfig) -> None:
    if config.world_size > 1:
        raise ValueError(
            f"launch: rounds are run by one process, this is one of {config.world_size}; start it "
            "alone, and give the launcher of the training as --launch"
        )
    for name, plain in (("eval_strategy", "no"), ("resume_from_checkpoint", None)):
        if (value := getattr(config, name)) not in (plain, None):
            value = getattr(value, "value", value)
            raise ValueError(
                f"{name} {value!r}: rounds evaluates after each training, and goes on by itself; "
                "leave it out"
            )


class _Rounds:
    """The parts of all rounds; each returns at once where it is complete.

    Attributes:
        where: which part is run, for messages.
    """

    def __init__(self, arguments: RoundsArguments, config: PROConfig, output: Path) -> None:
        self.arguments, self.config, self.output = arguments, config, output
        self.prompts = output / "prompts.jsonl"
        self.held_out = output / "held-out.jsonl"
        self.reference = output / "reference.jsonl"
        self.where = "before the first round"
        self.serves: int | None = None  # the round whose model the server was told to load

    def begin(self) -> None:
        """Check all that can be checked, and write the prompts.

        Raises:
            ValueError: as of ``rounds``.
        """
        given = self.arguments
        for source in (given.model, *given.prompts, *given.mix_reference, given.held_out):
            if source and files.lies_in(source, self.output) and Path(source).exists():
                raise files.destroyed("output_dir", self.output, source)
        report = DataReport()
        prompts, held_out = lists.split(given, report, self.config.on_bad_line)
        arguments = self._prepare_arguments(Round.of(self.output, 1))
        arguments.check()
        self._train_arguments(Round.of(self.output, 1))
        if given.mix_reference:
            of_lists = DataReport(lists=1, with_rewards=1)  # as those of samples have
            reference = lists.references(
                given.mix_reference, held_out, of_lists, self.config.on_bad_line
            )
            check_lists(of_lists, self.config)
        rewards = rewards_of(arguments, self.config.device)
        for reward in rewards:
            reward.columns([name for name in report.unused if "[]." not in name])
        settings = _settings(given, self.config)
        for reward in rewards:
            settings |= reward.identity()
        if not state.check(self.output, settings, bool(self.config.overwrite)):
            state.clear(self.output)
            state.write(self.output, settings, {})
        self.settings = settings
        texts = {self.prompts: prompts, self.held_out: held_out}
        if given.mix_reference:
            texts[self.reference] = reference
        for path, records in texts.items():
            if not path.exists():  # prepare tells by its time whether it is the same
                write_atomically(path, map(lists.as_line, records))
        print(f"{len(prompts)} prompts to train on, {len(held_out)} held out; all in {self.output}")

    def go_on(self) -> dict[str, Any]:
        """Run what is missing; the best round is told at the end."""
        base = self.evaluate(Round.of(self.output, 0))
        found: dict[str, Any] = {"base": base, "rounds": [], "ended": None}
        for number in range(1, self.arguments.rounds + 1):
            this = Round.of(self.output, number)
            try:
                self.sample(this)
            except NothingRankedError as error:
                found["ended"] = f"round {number} has nothing to train on: {error}"
                break
            self.mix(this)
            self.train(this)
            last = [base, *found["rounds"]][-1]["win_rate"]
            found["rounds"].append(self.evaluate(this))
            now = found["rounds"][-1]["win_rate"]
            state.write(self.output, self.settings, _with_best(found, self))
            if now < last and self.arguments.stop_if_worse:
                found["ended"] = f"the win rate fell in round {number}: {last:.3f} to {now:.3f}"
                break
        found["ended"] = found["ended"] or f"all {self.arguments.rounds} rounds are done"
        found = _with_best(found, self)
        state.write(self.output, self.settings, found)
        print(_summary(found))
        return {**found, "settings": self.settings}

    def policy(self, number: int) -> str:
        """The model after so many rounds."""
        return str(Round.of(self.output, number).checkpoint) if number else self.arguments.model

    def sample(self, this: Round) -> None:
        """Ranked lists of the current model's samples."""
        if this.sampled.exists():
            return
        with self._part(this, "sampling and scoring"):
            self._serve(this.number - 1)
            prepare(self._prepare_arguments(this))

    def mix(self, this: Round) -> None:
        """The lists to train on."""
        if this.lists.exists():
            return
        before = [Round.of(self.output, n).sampled for n in range(1, this.number)]
        reference = [self.reference] if self.arguments.mix_reference else []
        shares = self.arguments.mix_previous, self.arguments.reference_share()
        pools = list(zip((before, reference), shares, strict=True))
        seed = f"{self.config.seed} {this.number}"
        lines, (own, earlier, yours) = lists.mixed(this.sampled, pools, seed)
        write_atomically(this.lists, lines)
        if earlier or yours:
            print(f"lists of round {this.number}: {own} new, {earlier} of earlier rounds, "
                  f"{yours} of the reference")  # fmt: skip

    def train(self, this: Round) -> None:
        """The model of the last round, trained on the lists of this one."""
        if not this.trained:
            with self._part(this, "training"):
                config = copy.copy(self.config)
                config.output_dir = str(this.checkpoint)
                config.run_name = config.run_name and f"{config.run_name}-{this.number}"
                config.resume_from_checkpoint, config.overwrite = "auto", True
                if self.arguments.launch:
                    self._launch(this, config)
                else:
                    train(self._train_arguments(this), config)
        for folder in checkpoints.checkpoints(this.checkpoint):  # only for going on in the middle
            shutil.rmtree(folder)

    def evaluate(self, this: Round) -> dict[str, Any]:
        """Metrics of the round's model on the held-out prompts."""
        if this.metrics.exists():
            return json.loads(this.metrics.read_bytes())
        base = None
        if this.number:
            base = _lines(Round.of(self.output, 0).answers)
        if not this.answers.exists():
            with self._part(this, "answering the held-out prompts"):
                self._serve(this.number)
                self._answer(this, base)
        found = answers.metrics(own := _lines(this.answers), base or own)
        write_json(this.metrics, found)
        print(_told(f"round {this.number}" if this.number else "base", found))
        return found

    def _answer(self, this: Round, base: list[dict[str, Any]] | None) -> None:
        arguments = self._prepare_arguments(this, held_out=True)
        this.folder.mkdir(parents=True, exist_ok=True)
        report = DataReport()
        held_out = list(lists.read_prompts([str(self.held_out)], report))
        rewards = rewards_of(arguments, self.config.device)
        for reward in rewards:
            reward.columns([name for name in report.unused if "[]." not in name])
        servers = try_out_servers(arguments) if arguments.server else None
        partial = PartialFile(
            this.answers,
            {"model": self.policy(this.number), "base": bool(base)},
            group_size=arguments.batch_size,
            keys=answers.KEYS,
            overwrite=True,
        )
        with contextlib.closing(partial):
            if partial.done < len(held_out):
                with recipe_of(arguments, self.config.device, servers, rewards) as recipe:
                    answers.fill(partial, recipe, held_out, base, arguments.batch_size)
            partial.finish(partial.lines())

    def _prepare_arguments(self, this: Round, held_out: bool = False) -> PrepareArguments:
        """What ``prepare`` is told: the options that it shares with ``rounds``, and the policy."""
        given, config = self.arguments, self.config
        found = {
            field.name: getattr(given if hasattr(given, field.name) else config, field.name)
            for field in fields(PrepareArguments)
            if hasattr(given, field.name) or hasattr(config, field.name)
        }
        local = not given.server
        model = self.policy(this.number if held_out else this.number - 1)
        return PrepareArguments(**found | {
            "data": [str(self.held_out if held_out else self.prompts)],
            "output": str(this.answers if held_out else this.sampled),
            "generator": [model] if local else [],
            "generator_tokenizer": [given.tokenizer] if local and given.tokenizer else [],
            "max_prompt_length": config.prompt_room(given.max_new_tokens) if local else None,
            "temperature": given.sampling_temperature,
            "seed": config.seed + (0 if held_out else this.number),  # the same for all models
            "device": str(config.device),
            "overwrite": True,  # of what is not complete
        })  # fmt: skip

    def _train_arguments(self, this: Round) -> TrainArguments:
        of_model = {f.name: getattr(self.arguments, f.name) for f in fields(ModelOptions)}
        model = self.policy(this.number - 1)
        return TrainArguments(
            **of_model | {"model": model}, data=[str(this.lists)], eval_fraction=0.0
        )

    def _launch(self, this: Round, config: PROConfig) -> None:
        """Train by a command of its own, which reads its options from a file."""
        plain = PROConfig(output_dir="", use_cpu=config.use_cpu).to_dict()
        options = {n: x for n, x in config.to_dict().items() if n in plain and x != plain[n]}
        arguments = asdict(self._train_arguments(this))
        defaults = asdict(TrainArguments(demo=True))
        options |= {n: x for n, x in arguments.items() if x != defaults[n]}
        file = this.folder / "train.json"  # JSON is YAML
        write_json(file, options | {"use_cpu": config.use_cpu})
        module = ["-m", "pro_trainer.cli.main", "train", "--config", str(file)]
        command = [*shlex.split(self.arguments.launch or ""), *module]
        try:
            code = subprocess.run(command).returncode
        except OSError as error:
            raise ValueError(f"launch {self.arguments.launch!r}: {error}") from error
        if code:
            raise TrainingError(f"{shlex.join(command)} ended with exit code {code}")

    def _serve(self, number: int) -> None:
        """Tell the server to load the model of a round, unless it was told so before."""
        if not self.arguments.reload_command or self.serves == number:
            return
        model = self.policy(number)
        model = str(Path(model).resolve()) if Path(model).exists() else model
        command = self.arguments.reload_command
        names = {"PRO_KERNELS_CHECKPOINT": model, "PRO_KERNELS_ROUND": str(number)}
        print(f"reload_command for {model}", flush=True)
        code = subprocess.run(command, shell=True, env={**os.environ, **names}).returncode
        if code:
            raise TrainingError(
                f"reload_command {command!r} ended with exit code {code} for the model {model}, so "
                "the server may still serve another one"
            )
        self.serves = number

    @contextlib.contextmanager
    def _part(self, this: Round, what: str) -> Iterator[None]:
        name = f"round {this.number}" if this.number else "the base model"
        self.where = f"in {name}, {what}"
        print(f"\n=== {name}: {what}", flush=True)
        begun = time.monotonic()
        yield
        gc.collect()  # models of this part
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"=== {name}: {what} took {(time.monotonic() - begun) / 60:.1f} min", flush=True)


def _settings(arguments: RoundsArguments, config: PROConfig) -> dict[str, Any]:
    """All that decides what is computed, with the files behind the paths."""
    every = {**config.to_dict(), **asdict(arguments)}
    settings = {
        name: value
        for name, value in every.items()
        if name not in _FREE and not name.startswith(_FREE_KINDS)
    }
    settings |= {"device": config.device.type, "pro_kernels": pk.__version__}
    sources = [*arguments.prompts, *arguments.mix_reference, arguments.held_out]
    for path in [*sources, arguments.model, arguments.tokenizer, *arguments.reward_files()]:
        if path and (found := file_identity(path)):  # size and hash; when, does not matter
            settings[f"the files of {path}"] = {n: [x[0], x[2]] for n, x in found.items()}
    return settings


def _with_best(found: dict[str, Any], run: _Rounds) -> dict[str, Any]:
    rates = [found["base"]["win_rate"], *(x["win_rate"] for x in found["rounds"])]
    best = max(range(len(rates)), key=rates.__getitem__)  # of equal ones the earlier
    return {**found, "best": best, "checkpoint": run.policy(best)}


def _told(name: str, found: dict[str, Any]) -> str:
    low, high = found["win_rate_interval"]
    return (
        f"{name:8} reward {found['reward']:.4g}, best of its answers {found['best_of']:.4g}, "
        f"win rate against the base {found['win_rate']:.3f} [{low:.3f}, {high:.3f}], "
        f"{found['length']:.0f} characters"
    )


def _summary(found: dict[str, Any]) -> str:
    lines = ["", "held-out prompts:", _told("base", found["base"])]
    lines += [_told(f"round {n}", x) for n, x in enumerate(found["rounds"], 1)]
    lines.append(f"ended: {found['ended']}")
    if found["best"]:
        lines.append(f"best: round {found['best']}, its model is {found['checkpoint']}")
    else:
        lines.append(f"best: the base, {found['checkpoint']}; no round won against it")
    return "\n".join(lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
