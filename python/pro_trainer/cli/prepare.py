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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any, ClassVar

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
from pro_trainer.prepare.client import Client
from pro_trainer.prepare.options import SamplingOptions
from pro_trainer.prepare.output import (
    REPORT,
    PartialFile,
    check_output,
    file_identity,
    write_atomically,
)
from pro_trainer.prepare.progress import Progress
from pro_trainer.prepare.recipe import DATA, LINE_KEYS, Generator, Recipe
from pro_trainer.prepare.report import PrepareReport
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.prepare.served import Served, Servers, check_text
from pro_trainer.prepare.tryout import try_out
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions

_WITHOUT_EFFECT = (  # on the records
    *("output", "overwrite", "trust_remote_code", "concurrency", "api_key_env"),
    *("requests_per_second", "server_timeout", "server_retries", "server_patience"),
)


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
    total = _check_lists(arguments, data_report)
    servers = None
    if arguments.server:
        servers = _try_out(arguments)
    partial = PartialFile(
        output,
        _settings(arguments, device, servers),
        group_size=arguments.batch_size,
        keys=LINE_KEYS,
        overwrite=arguments.overwrite,
    )
    how = "after {} of {} lists; the same command goes on from there"
    report_file = output.with_name(output.name + REPORT)
    with contextlib.closing(partial), advising(lambda: how.format(partial.done, total)):
        if partial.done < total:
            with _recipe(arguments, device, servers) as recipe:
                _fill(partial, recipe, arguments, total)
        report = PrepareReport.of(partial.lines(), data_report, arguments.ranking_length)
        if not report.kept:
            samples = {name: dict(counts) for name, counts in report.samples.items()}
            raise ValueError(
                f"every list was dropped: {dict(report.dropped)}; nothing to write (samples: "
                f"{samples or 'none'})"
            )
        write_atomically(report_file, [report.json_bytes()])
        try:
            partial.finish(line["record"] for line in partial.lines() if line["record"] is not None)
        except BaseException:
            report_file.unlink()
            raise
    print(report.text())
    return report


def _check_lists(arguments: PrepareArguments, report: DataReport) -> int:
    """Read all lists before any work; how many there are. A bad line shows now, not after hours.

    Raises:
        ValueError: there is none, or one that cannot be used with these arguments.
    """
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


@dataclass
class _AlsoPrompts(DataOptions):
    """Lists that samples are added to may have no candidates yet."""

    fewest: ClassVar[int] = 0


def _lists(arguments: PrepareArguments, report: DataReport) -> Iterator[RankedList]:
    """The lists of the data, the same ones at every call."""
    rescored = arguments.reward_model is not None
    kind = _AlsoPrompts if arguments.generator or arguments.server else DataOptions
    options = kind(on_bad_line=arguments.on_bad_line, all_equal="order" if rescored else "drop")
    return islice(read_lists(arguments.data, report, options), arguments.limit)


def _try_out(arguments: PrepareArguments) -> Servers:
    """Ask the servers what they take, and say what is not as it was asked for."""
    servers, notes = try_out(
        arguments.server,
        arguments.server_model,
        arguments.server_api,
        arguments.further_fields(),
        _sampling(arguments),
        arguments.client(),
    )
    for note in notes:
        print(f"prepare: {note}", file=sys.stderr, flush=True)
    return servers


def _sampling(arguments: PrepareArguments) -> SamplingOptions:
    return SamplingOptions(
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperatures=arguments.temperature,
        top_p=arguments.top_p,
        stop_strings=arguments.stop,
        max_prompt_length=arguments.max_prompt_length,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


@contextlib.contextmanager
def _recipe(
    arguments: PrepareArguments, device: torch.device, servers: Servers | None
) -> Iterator[Recipe]:
    """Load the models, and stay in touch with the servers."""
    models = servers.models if servers else ()
    names = _generator_names([*arguments.generator, *models])
    options = ListOptions(
        chat_template=arguments.chat_template,
        split_special_tokens=arguments.split_special_tokens,
        append_eos=False,
    )
    tokenizers = arguments.generator_tokenizer or [None] * len(names)
    generators: list[Generator | Served] = []
    for name, path, tokenizer_path in zip(names, arguments.generator, tokenizers, strict=False):
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
    sampling = _sampling(arguments)
    with contextlib.ExitStack() as stack:
        if servers:
            client = stack.enter_context(Client(servers.urls, arguments.client()))
            keep_cut = arguments.cut_samples == "keep"
            for name, model in zip(names[len(arguments.generator) :], models, strict=True):
                generators.append(Served(name, model, servers, client, sampling, keep_cut))
            stack.callback(_say_failures, client)
        yield Recipe(generators, sampling, reward_model, arguments.ranking_length, arguments.sft)


def _say_failures(client: Client) -> None:
    if client.failures:
        counts = ", ".join(f"{count} {why}" for why, count in client.failures.most_common())
        print(f"prepare: requests that failed, sent again or given up: {counts}", file=sys.stderr)


def _generator_names(paths: list[str]) -> list[str]:
    """Last parts of the paths where they tell them apart, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len({DATA, *names}) == len(names) + 1 else paths


def _settings(
    arguments: PrepareArguments, device: torch.device, servers: Servers | None
) -> dict[str, Any]:
    """All that the records depend on: arguments, versions, servers, the files behind the paths."""
    settings = {
        name: value for name, value in asdict(arguments).items() if name not in _WITHOUT_EFFECT
    }
    settings |= {"device": device.type, "pro_kernels": pk.__version__}
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
