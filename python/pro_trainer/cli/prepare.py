"""``pro-kernels prepare``: the paper's data recipe, from ranked lists to longer ranked lists.

Each prompt's candidates are extended by samples of causal LMs, all are scored by a reward model,
sorted, and ``ranking_length`` of them kept. The output is what ``pro-kernels train`` reads, one
record a line::

    {"prompt", "completions", "rewards", "sft_index", "chosen_index", "sources"}

best first; ``chosen_index`` is where the candidate stands that the data prefers (null where it was
not kept), ``sources`` where each one is from. A run that was cut short goes on where it stopped,
and ends with the same bytes (see ``partial``).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import pro_kernels as pk
from pro_trainer import files
from pro_trainer.cli.arguments import PrepareArguments
from pro_trainer.cli.stop import advising
from pro_trainer.data.lists import read_lists
from pro_trainer.data.options import DataOptions
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.models import load
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.output import (
    REPORT,
    PartialFile,
    check_output,
    file_identity,
    write_atomically,
)
from pro_trainer.prepare.recipe import DATA, LINE_KEYS, Generator, Recipe, SamplingOptions
from pro_trainer.prepare.report import PrepareReport
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions

_LINES_A_MESSAGE = 100  # progress where standard error is no terminal
_WITHOUT_EFFECT = ("output", "overwrite", "trust_remote_code")  # on the records


def prepare(arguments: PrepareArguments) -> PrepareReport:
    """Write ``arguments.output`` and ``<output>.report.json``, print and return the report.

    Raises:
        ValueError: bad arguments, data, models; an output that exists or that was begun with other
            settings (``overwrite`` aside).
    """
    arguments.check()
    output = Path(arguments.output)
    with files.alone("output", output, output.with_name(output.name + ".lock")):
        return _prepare(arguments, output)


def _prepare(arguments: PrepareArguments, output: Path) -> PrepareReport:
    check_output(output, arguments.overwrite, arguments.sources())
    device = _device(arguments.device)
    data_report = DataReport()
    # All of it before any work: a malformed line shows now and not after hours.
    total = sum(1 for _ in _lists(arguments, data_report))
    if not total:
        raise ValueError(f"data: no usable list in {', '.join(arguments.data)}")
    if data_report.marked:
        raise ValueError(
            f"{data_report.marked} lists have a column 'desirable', which says nothing of the "
            "candidates that are added: leave it out"
        )
    partial = PartialFile(
        output,
        _settings(arguments, device),
        group_size=arguments.batch_size,
        keys=LINE_KEYS,
        overwrite=arguments.overwrite,
    )
    how = "after {} of {} lists; the same command goes on from there"
    report_file = output.with_name(output.name + REPORT)
    with contextlib.closing(partial), advising(lambda: how.format(partial.done, total)):
        if partial.done < total:
            _fill(partial, _recipe(arguments, device), arguments, total)
        report = PrepareReport.of(partial.lines(), data_report, arguments.ranking_length)
        if not report.kept:
            raise ValueError(f"every list was dropped: {dict(report.dropped)}; nothing to write")
        write_atomically(report_file, [report.json_bytes()])
        try:
            partial.finish(line["record"] for line in partial.lines() if line["record"] is not None)
        except BaseException:
            report_file.unlink()
            raise
    print(report.text())
    return report


def _fill(partial: PartialFile, recipe: Recipe, arguments: PrepareArguments, total: int) -> None:
    """Compute the groups that are missing, and save each."""
    lists = islice(_lists(arguments, DataReport()), partial.done, None)
    done = partial.done
    with _Progress(done, total) as progress:
        while group := list(islice(lists, arguments.batch_size)):
            try:
                lines = recipe.lines(group, done)
            except ValueError as error:  # a score that is no number, a template that refuses
                raise ValueError(f"{group[0].where} to {group[-1].where}: {error}") from error
            partial.append(lines)
            done += len(group)
            progress.update(len(group))


def _lists(arguments: PrepareArguments, report: DataReport) -> Iterator[RankedList]:
    """The lists of the data, the same ones at every call."""
    rescored = arguments.reward_model is not None
    options = DataOptions(
        on_bad_line=arguments.on_bad_line, all_equal="order" if rescored else "drop"
    )
    return islice(read_lists(arguments.data, report, options), arguments.limit)


def _recipe(arguments: PrepareArguments, device: torch.device) -> Recipe:
    """Load the models."""
    names = _generator_names(arguments.generator)
    options = ListOptions(
        chat_template=arguments.chat_template,
        split_special_tokens=arguments.split_special_tokens,
        append_eos=False,
    )
    tokenizers = arguments.generator_tokenizer or [None] * len(names)
    generators = []
    for name, path, tokenizer_path in zip(names, arguments.generator, tokenizers, strict=True):
        how = ModelOptions(
            tokenizer=tokenizer_path,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
        model, tokenizer = load(path, how)
        generators.append(Generator(name, model.to(device), Encoder(tokenizer, options)))
    reward_model = None
    if arguments.reward_model is not None:
        reward_model = RewardModel.from_path(
            arguments.reward_model,
            device=device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            batch_size=arguments.batch_size,
            options=options,
        )
    sampling = SamplingOptions(
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        stop_strings=arguments.stop,
        max_prompt_length=arguments.max_prompt_length,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    return Recipe(generators, sampling, reward_model, arguments.ranking_length, arguments.sft)


def _generator_names(paths: list[str]) -> list[str]:
    """Last parts of the paths where they tell them apart, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len({DATA, *names}) == len(names) + 1 else paths


def _settings(arguments: PrepareArguments, device: torch.device) -> dict[str, Any]:
    """All that the records depend on: arguments, versions, and the files behind the paths."""
    settings = {
        name: value for name, value in asdict(arguments).items() if name not in _WITHOUT_EFFECT
    }
    settings |= {"device": device.type, "pro_kernels": pk.__version__}
    return settings | {f"the files of {path}": file_identity(path) for path in arguments.sources()}


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {first}") from error
    return device


class _Progress:
    """A bar on a terminal, else a line every hundred lists, on standard error."""

    def __init__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        self.start = self.done = done
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.began = time.monotonic()
        self.bar = tqdm(
            total=total, initial=done, unit="list", file=sys.stderr, disable=not self.terminal
        )

    def __enter__(self) -> _Progress:
        if self.start:
            self._say(f"going on after {self.start} of {self.total} lists")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Count lists that are done."""
        before, self.done = self.done, self.done + count
        self.bar.update(count)
        if before // _LINES_A_MESSAGE < self.done // _LINES_A_MESSAGE or self.done == self.total:
            rate = (self.done - self.start) / max(1e-9, time.monotonic() - self.began)
            self._say(f"{self.done} of {self.total} lists, {rate:.3g} a second")

    def _say(self, message: str) -> None:
        if not self.terminal:
            print(f"prepare: {message}", file=sys.stderr, flush=True)
