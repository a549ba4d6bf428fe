"""``pro-kernels prepare``: the paper's data recipe, from ranked lists to longer ranked lists.

Each prompt's candidates are extended by samples of causal LMs, all are scored by rewards, sorted,
and ``ranking_length`` of them kept. The output is what ``pro-kernels train`` reads, one
record a line::

    {"prompt", "completions", "rewards", "raw_rewards", "sft_index", "chosen_index", "sources"}

best first; ``raw_rewards`` holds what each reward gave, by its name, ``chosen_index`` is where the
candidate stands that the data prefers (null where it was not kept), ``sources`` where each one is
from. Columns that reward functions took follow. A run that was cut short goes on where it stopped,
and ends with the same bytes (see ``partial``).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, tee
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import pro_kernels as pk
from pro_trainer import files
from pro_trainer.cli.stop import advising
from pro_trainer.data.lists import read_lists
from pro_trainer.data.options import DataOptions, PromptOptions
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.prepare.build import build_rewards, recipe_of, try_out_servers
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.output import REPORT, PartialFile, check_output, file_identity, write_json
from pro_trainer.prepare.recipe import LINE_KEYS, Recipe
from pro_trainer.prepare.report import PrepareReport
from pro_trainer.prepare.rewards.base import Scorer
from pro_trainer.prepare.served import Served, Servers, check_text

_WITHOUT_EFFECT = (  # on the records
    *("output", "overwrite", "trust_remote_code", "api_key_env", "reward_api_key_env"),
    *("concurrency", "requests_per_second", "server_timeout", "server_retries", "server_patience"),
)

_LINES_A_MESSAGE = 100
_SECONDS_A_MESSAGE = 60.0


class NothingRankedError(ValueError):
    """No list has candidates of different rewards."""


def prepare(arguments: PrepareArguments) -> PrepareReport:
    """Write ``arguments.output`` and ``<output>.report.json``, print and return the report.

    Raises:
        ValueError: bad arguments, data, models; an output that exists or that was begun with other
            settings (``overwrite`` aside).
        NothingRankedError: every list was dropped.
    """
    arguments.check()
    output = Path(arguments.output)
    with files.alone("output", output, output.with_name(output.name + ".lock")):
        return _prepare(arguments, output)


def _prepare(arguments: PrepareArguments, output: Path) -> PrepareReport:
    read = [*arguments.sources(), *arguments.reward_sources()]
    check_output(output, arguments.overwrite, read)
    device = _device(arguments.device)
    data_report = DataReport()
    total = _check_lists(arguments, data_report)
    rewards = build_rewards(arguments, device, data_report.unused)
    for column in {column for reward in rewards for column in reward.taken}:
        data_report.unused.pop(column, None)
    servers = try_out_servers(arguments)
    partial = PartialFile(
        output,
        _settings(arguments, device, servers, rewards),
        group_size=arguments.batch_size,
        keys=LINE_KEYS,
        overwrite=arguments.overwrite,
    )
    how = "after {} of {} lists; the same command goes on from there"
    report_file = output.with_name(output.name + REPORT)
    with contextlib.closing(partial), advising(lambda: how.format(partial.done, total)):
        if partial.done < total:
            with recipe_of(arguments, device, servers, rewards) as recipe:
                _fill(partial, recipe, arguments, total)
        report = PrepareReport.of(partial.lines(), data_report, arguments.ranking_length)
        if not report.kept:
            samples = {name: dict(counts) for name, counts in report.samples.items()}
            raise NothingRankedError(
                f"every list was dropped: {dict(report.dropped)}; nothing to write (samples: "
                f"{'; '.join([str(samples or 'none'), *report.losses()])})"
            )
        write_json(report_file, report.as_dict())
        try:
            partial.finish(line["record"] for line in partial.lines() if line["record"] is not None)
        except BaseException:
            report_file.unlink()
            raise
    print(report.text())
    return report


def _check_lists(arguments: PrepareArguments, report: DataReport) -> int:
    """Read all lists before any work; how many there are. A bad line shows now, not after hours."""
    total = 0
    for ranked in _lists(arguments, report):
        total += 1
        if arguments.server and arguments.server_api == "completions":
            check_text(ranked)
        if arguments.sft == "chosen" and not ranked.completions:
            raise ValueError(
                f"{ranked.where}: a prompt alone prefers no candidate, which sft chosen asks for"
            )
    if not total:
        raise ValueError(f"data: no usable list in {', '.join(arguments.data)}")
    if report.marked:
        raise ValueError(
            f"{report.marked} lists have a column 'desirable', which says nothing of the "
            "candidates that are added: leave it out"
        )
    return total


def _fill(partial: PartialFile, recipe: Recipe, arguments: PrepareArguments, total: int) -> None:
    """Compute the groups that are missing, and save each."""
    done = partial.done
    served = [x for x in recipe.generators if isinstance(x, Served)]
    # Servers are asked for the samples of later lists while earlier ones are scored.
    lists, *ahead = tee(islice(_lists(arguments, DataReport()), done, None), 1 + len(served))
    for generator, asked in zip(served, ahead, strict=True):
        generator.begin(asked, done)
    with Progress(done, total, lambda: sum(x.tokens for x in served)) as progress:
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
    kind = PromptOptions if arguments.generator or arguments.server else DataOptions
    all_equal = "order" if arguments.reward else "drop"
    options = kind(on_bad_line=arguments.on_bad_line, all_equal=all_equal)
    return islice(read_lists(arguments.data, report, options), arguments.limit)


def _settings(
    arguments: PrepareArguments,
    device: torch.device,
    servers: Servers | None,
    rewards: Sequence[Scorer],
) -> dict[str, Any]:
    """All that the records depend on: arguments, versions, servers, the files behind the paths."""
    settings = {
        name: value for name, value in asdict(arguments).items() if name not in _WITHOUT_EFFECT
    }
    settings |= {"device": device.type, "pro_kernels": pk.__version__}
    for reward in rewards:
        settings |= reward.identity()
    if servers:
        settings |= {"server_model": servers.models, "fields no server gets": servers.left_out}
    return settings | {f"the files of {path}": file_identity(path) for path in arguments.sources()}


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {first}") from error
    return device


class Progress:
    """A bar on a terminal, else a line now and then, on standard error: lists, and known tokens."""

    def __init__(self, done: int, total: int, tokens: Callable[[], int]) -> None:
        self.start = self.done = done
        self.total = total
        self.tokens = tokens
        self.terminal = sys.stderr.isatty()
        self.began = self.said = time.monotonic()
        self.bar = tqdm(
            total=total, initial=done, unit="list", file=sys.stderr, disable=not self.terminal
        )

    def __enter__(self) -> Progress:
        if self.start:
            self.say(f"going on after {self.start} of {self.total} lists")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Count lists that are done."""
        before, self.done = self.done, self.done + count
        now = time.monotonic()
        rate = (self.done - self.start) / max(1e-9, now - self.began)
        tokens = self.tokens() / max(1e-9, now - self.began)
        if tokens:
            self.bar.set_postfix_str(f"{tokens:.0f} tokens/s", refresh=False)
        self.bar.update(count)
        due = before // _LINES_A_MESSAGE < self.done // _LINES_A_MESSAGE
        if due or self.done == self.total or now - self.said > _SECONDS_A_MESSAGE:
            self.said = now
            left = (self.total - self.done) / rate
            self.say(
                f"{self.done} of {self.total} lists, {rate:.3g} a second"
                + (f", {tokens:.0f} tokens a second" if tokens else "")
                + (f", about {_duration(left)} left" if left else "")
            )

    def say(self, message: str) -> None:
        """A line, where no bar says the same."""
        if not self.terminal:
            print(f"prepare: {message}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
