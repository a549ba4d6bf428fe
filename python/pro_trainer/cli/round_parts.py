"""The parts of a round: sampling, mixing, training, answering; each is complete or goes on."""

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
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from pro_trainer.cli.arguments import LoraOptions, RoundsArguments, TrainArguments
from pro_trainer.cli.prepare import prepare
from pro_trainer.cli.train import train
from pro_trainer.data.report import DataReport
from pro_trainer.errors import TrainingError
from pro_trainer.models import merge_adapters
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.build import build_rewards, recipe_of, try_out_servers
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.output import PartialFile, write_atomically, write_json
from pro_trainer.rounds import answers, lists
from pro_trainer.rounds.state import Round, complete, told
from pro_trainer.train import checkpoints
from pro_trainer.train.config import PROConfig


class Parts:
    """Runs parts of rounds; each returns at once where it is complete.

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

    def policy(self, number: int) -> str:
        """The model after so many rounds."""
        return str(Round(self.output, number).checkpoint) if number else self.arguments.model

    def sample(self, this: Round) -> None:
        """Ranked lists of the current model's samples."""
        if complete(this.sampled):
            return
        with self._part(this, "sampling and scoring"):
            self._serve(this.number - 1)
            prepare(self.prepare_arguments(this))

    def mix(self, this: Round) -> None:
        """The lists to train on."""
        if this.lists.exists():
            return
        before = [Round(self.output, n).sampled for n in range(1, this.number)]
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
        """The model of the last round, trained on the lists of this one; adapters are merged."""
        folder = this.adapters if self.arguments.use_peft else this.checkpoint
        if not (folder / "metrics.json").exists():  # which train writes last
            with self._part(this, "training"):
                config = copy.copy(self.config)
                config.output_dir = str(folder)
                config.run_name = config.run_name and f"{config.run_name}-{this.number}"
                config.resume_from_checkpoint, config.overwrite = "auto", True
                if self.arguments.launch:
                    self._launch(this, config)
                else:
                    train(self.train_arguments(this), config)
        if not this.checkpoint.exists():
            whole = replace(self._of_model(this), load_in_4bit=False, load_in_8bit=False)
            merge_adapters(folder, this.checkpoint, whole)
        for old in checkpoints.checkpoints(folder):  # only for going on in the middle
            shutil.rmtree(old)

    def evaluate(self, this: Round) -> dict[str, Any]:
        """Metrics of the round's model on the held-out prompts."""
        if this.metrics.exists():
            return json.loads(this.metrics.read_bytes())
        base = _lines(Round(self.output, 0).answers) if this.number else None
        if not complete(this.answers):
            with self._part(this, "answering the held-out prompts"):
                self._serve(this.number)
                self._answer(this, base)
        found = answers.metrics(own := _lines(this.answers), base or own)
        write_json(this.metrics, found)
        print(told(this.name, found))
        return found

    def _answer(self, this: Round, base: list[dict[str, Any]] | None) -> None:
        arguments = self.prepare_arguments(this, held_out=True)
        this.folder.mkdir(parents=True, exist_ok=True)
        report, device = DataReport(), self.config.device
        held_out = list(lists.read_prompts([str(self.held_out)], report))
        rewards = build_rewards(arguments, device, report.unused)
        servers = try_out_servers(arguments)
        partial = PartialFile(
            this.answers,
            {"model": self.policy(this.number), "base": bool(base)},
            group_size=arguments.batch_size,
            keys=answers.KEYS,
            overwrite=True,
        )
        with contextlib.closing(partial):
            if partial.done < len(held_out):
                with recipe_of(arguments, device, servers, rewards) as recipe:
                    answers.fill(partial, recipe, held_out, base)
            partial.finish(partial.lines())

    def prepare_arguments(self, this: Round, held_out: bool = False) -> PrepareArguments:
        """What ``prepare`` is told: the options that it shares with ``rounds``, and the model."""
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

    def train_arguments(self, this: Round) -> TrainArguments:
        """What ``train`` is told: the current model and the round's lists."""
        of_lora = {f.name: getattr(self.arguments, f.name) for f in fields(LoraOptions)}
        return TrainArguments(
            **vars(self._of_model(this)), **of_lora, data=[str(this.lists)], eval_fraction=0.0
        )

    def _of_model(self, this: Round) -> ModelOptions:
        """The model that the round begins with, and how it is loaded."""
        given = {f.name: getattr(self.arguments, f.name) for f in fields(ModelOptions)}
        return ModelOptions(**given | {"model": self.policy(this.number - 1)})

    def _launch(self, this: Round, config: PROConfig) -> None:
        """Train by a command of its own, which reads its options from a file."""
        plain = PROConfig(output_dir="", use_cpu=config.use_cpu).to_dict()
        options = {n: x for n, x in config.to_dict().items() if x != plain.get(n, x)}
        arguments = asdict(self.train_arguments(this))
        defaults = asdict(TrainArguments(demo=True))
        options |= {n: x for n, x in arguments.items() if x != defaults[n]}
        file = this.folder / "train.json"  # JSON is YAML
        write_json(file, options | {"use_cpu": config.use_cpu})
        module = ["-m", "pro_trainer.cli.main", "train", "--config", str(file)]
        command = [*shlex.split(self.arguments.launch or ""), *module]
        _call("launch", command, "the same command goes on from its last whole checkpoint")

    def _serve(self, number: int) -> None:
        """Tell the server to load the model of a round, unless it was told so before."""
        command = self.arguments.reload_command
        if not command or self.serves == number:
            return
        model = self.policy(number)
        model = str(Path(model).resolve()) if Path(model).exists() else model
        print(f"reload_command for {model}", flush=True)
        told = {"PRO_KERNELS_CHECKPOINT": model, "PRO_KERNELS_ROUND": str(number)}
        _call("reload_command", command, f"the server may not serve {model}", **told)
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


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _call(option: str, command: str | list[str], then: str, **variables: str) -> None:
    """Run a command, a line for the shell or its words; TrainingError where it fails."""
    shown = command if isinstance(command, str) else shlex.join(command)
    environment = {**os.environ, **variables}
    try:
        process = subprocess.Popen(command, shell=isinstance(command, str), env=environment)
    except OSError as error:
        raise TrainingError(f"{option}: {shown} cannot be run: {error}") from error
    try:
        code = process.wait()
    except BaseException:  # interrupted: launchers end their workers when they are told to end
        process.terminate()
        process.wait()
        raise
    if code:
        raise TrainingError(f"{option}: {shown} ended with exit code {code}; {then}")
