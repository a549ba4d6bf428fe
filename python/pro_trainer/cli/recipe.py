"""From the flags of ``pro-kernels prepare`` to what samples, scores and chooses."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pro_trainer.cli.arguments import PrepareArguments
from pro_trainer.models import load
from pro_trainer.options import ModelOptions
from pro_trainer.prepare.client import Client
from pro_trainer.prepare.combine import Combination
from pro_trainer.prepare.options import SamplingOptions
from pro_trainer.prepare.pool import DATA
from pro_trainer.prepare.recipe import Generator, Recipe, Selection
from pro_trainer.prepare.rewards.base import Scorer
from pro_trainer.prepare.rewards.build import build
from pro_trainer.prepare.rewards.parse import parse
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.prepare.served import Served, Servers
from pro_trainer.prepare.tryout import try_out
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions


def try_out_servers(arguments: PrepareArguments) -> Servers:
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


def _list_options(arguments: PrepareArguments) -> ListOptions:
    """How texts are written for generators and reward models."""
    return ListOptions(
        chat_template=arguments.chat_template,
        split_special_tokens=arguments.split_special_tokens,
        append_eos=False,
    )


def rewards_of(arguments: PrepareArguments, device: torch.device) -> list[Scorer]:
    """The rewards; their models are loaded in their contexts.

    Raises:
        ValueError: a function, URL or template that cannot be used.
    """

    def load_classifier(path: str) -> RewardModel:
        return RewardModel.from_path(
            path,
            device=device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            batch_size=arguments.batch_size,
            options=_list_options(arguments),
        )

    asked = replace(arguments.client(), api_key_env=arguments.reward_api_key_env)
    return build(arguments, load_classifier, asked, strings_stay=arguments.chat_template == "off")


@contextlib.contextmanager
def recipe_of(
    arguments: PrepareArguments,
    device: torch.device,
    servers: Servers | None,
    rewards: Sequence[Scorer],
) -> Iterator[Recipe]:
    """Load the models, and stay in touch with the servers."""
    models = servers.models if servers else ()
    names = _generator_names([*arguments.generator, *models])
    tokenizers = arguments.generator_tokenizer or [None] * len(names)
    generators: list[Generator | Served] = []
    for name, path, tokenizer_path in zip(names, arguments.generator, tokenizers, strict=False):
        how = ModelOptions(
            tokenizer=tokenizer_path,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
        model, tokenizer = load(path, how)
        generators.append(
            Generator(name, model.to(device), Encoder(tokenizer, _list_options(arguments)))
        )
    sampling = _sampling(arguments)
    weights = {spec.name: spec.weight for spec in parse(arguments.reward)}
    combination = Combination(weights, arguments.normalize, arguments.length_penalty)
    selection = Selection(
        near_duplicates=arguments.near_duplicates,
        length=arguments.ranking_length,
        select=arguments.select,
        bottom=arguments.bottom,
        sft=arguments.sft,
    )
    with contextlib.ExitStack() as stack:
        if servers:
            client = stack.enter_context(Client(servers.urls, arguments.client()))
            keep_cut = arguments.cut_samples == "keep"
            for name, model in zip(names[len(arguments.generator) :], models, strict=True):
                generators.append(Served(name, model, servers, client, sampling, keep_cut))
            stack.callback(_say_failures, client.failures)
        for reward in rewards:
            stack.callback(_say_failures, reward.failures)
            stack.enter_context(reward)
        yield Recipe(generators, sampling, rewards, combination, selection)


def _say_failures(failures: Counter[str]) -> None:
    if failures:
        counts = ", ".join(f"{count} {why}" for why, count in failures.most_common())
        print(f"prepare: requests that failed, sent again or given up: {counts}", file=sys.stderr)


def _generator_names(paths: list[str]) -> list[str]:
    """Last parts of the paths where they tell them apart, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    return names if len({DATA, *names}) == len(names) + 1 else paths
