"""From the options of ``prepare`` to what samples, scores and chooses."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from pro_trainer.models import load
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.client import Client
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.pool import DATA
from pro_trainer.prepare.recipe import Generator, Recipe
from pro_trainer.prepare.rewards.base import Scorer, Spec, parse
from pro_trainer.prepare.rewards.function import Function
from pro_trainer.prepare.rewards.judge import Judge
from pro_trainer.prepare.rewards.server import Server
from pro_trainer.prepare.scoring import Classifier, RewardModel
from pro_trainer.prepare.served import Served, Servers
from pro_trainer.prepare.tryout import try_out
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions


def build_rewards(
    options: PrepareArguments, device: torch.device, columns: Collection[str]
) -> list[Scorer]:
    """The rewards, checked as far as that takes no time: models are loaded in their contexts.

    ``columns``: those of the data that nothing else uses.

    Raises:
        ValueError: a function that cannot be imported or needs another column, a URL, template or
            pattern that cannot be.
    """

    def built(spec: Spec) -> Scorer:
        if spec.kind == "classifier":
            return Classifier(spec, lambda: _reward_model(spec.target, options, device))
        if spec.kind == "function":
            return Function(spec)
        return (Judge if spec.kind == "judge" else Server)(spec, options)

    rewards = [built(spec) for spec in parse(options.reward)]
    for reward in rewards:
        reward.columns([name for name in columns if "[]." not in name])
    return rewards


def _reward_model(path: str, options: PrepareArguments, device: torch.device) -> RewardModel:
    return RewardModel.from_path(
        path,
        device=device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        batch_size=options.batch_size,
        options=_list_options(options),
    )


def _list_options(options: PrepareArguments) -> ListOptions:
    """How texts are written for generators and reward models."""
    return ListOptions(
        chat_template=options.chat_template,
        split_special_tokens=options.split_special_tokens,
        append_eos=False,
    )


def try_out_servers(options: PrepareArguments) -> Servers | None:
    """Ask the servers, if there are any, what they take, and say what is not as asked for."""
    if not options.server:
        return None
    servers, notes = try_out(options)
    for note in notes:
        print(f"prepare: {note}", file=sys.stderr, flush=True)
    return servers


@contextlib.contextmanager
def recipe_of(
    options: PrepareArguments,
    device: torch.device,
    servers: Servers | None,
    rewards: Sequence[Scorer],
) -> Iterator[Recipe]:
    """Load the models, and stay in touch with the servers."""
    models = servers.models if servers else ()
    names = _generator_names([*options.generator, *models])
    generators: list[Generator | Served] = []
    tokenizers = options.generator_tokenizer or [None] * len(options.generator)
    for name, path, tokenizer_path in zip(names, options.generator, tokenizers, strict=False):
        how = ModelOptions(
            tokenizer=tokenizer_path,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
        model, tokenizer = load(path, how)
        encoder = Encoder(tokenizer, _list_options(options))
        generators.append(Generator(name, model.to(device), encoder, options))
    with contextlib.ExitStack() as stack:
        if servers:
            client = stack.enter_context(Client(servers.urls, options))
            for name, model in zip(names[len(options.generator) :], models, strict=True):
                generators.append(Served(name, model, servers, client))
            stack.callback(_say_failures, client.failures)
        for reward in rewards:
            stack.callback(_say_failures, reward.failures)
            stack.enter_context(reward)
        yield Recipe(generators, rewards, options)


def _say_failures(failures: Counter[str]) -> None:
    if failures:
        counts = ", ".join(f"{count} {why}" for why, count in failures.most_common())
        print(f"prepare: requests that failed, sent again or given up: {counts}", file=sys.stderr)


def _generator_names(paths: list[str]) -> list[str]:
    """Last parts of the paths where they tell them apart, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len({DATA, *names}) == len(names) + 1 else paths
