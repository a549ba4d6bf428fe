"""How candidates are sampled, by whatever samples them, and what else ``prepare`` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pro_trainer.options import (
    check_choices,
    check_integers,
    check_positive,
    json_object,
    option,
)
from pro_trainer.prepare.answers import check_url
from pro_trainer.prepare.rewards.options import RewardOptions
from pro_trainer.text.options import TemplateOptions

_OF_ANY_SERVER = ("concurrency", "requests_per_second", "server_timeout", "server_retries",
                  "server_patience")  # fmt: skip


@dataclass
class SampleOptions:
    """How candidates are sampled, but for their temperature: losses have one, too."""

    group: ClassVar[str] = "prepare"

    num_samples: int = option(2, "Samples for each prompt from each generator and server_model.")
    top_p: float = option(
        0.95, "Only the likeliest tokens that reach this share together are drawn from."
    )
    max_new_tokens: int = option(128, "Most tokens of a sample.")
    stop: list[str] = option(["\n\nHuman:"], "A sample ends before the first of these strings.")
    batch_size: int = option(16, "Sequences run together, and lists between two saves.")


@dataclass
class ServerOptions:
    """Which servers are asked for samples, and how."""

    group: ClassVar[str] = "server"

    server: list[str] = option(
        [],
        "URLs of OpenAI-compatible servers (vLLM, SGLang, TGI, llama.cpp, transformers serve) that "
        "candidates are sampled from. All serve the same models and share the work.",
    )
    server_model: list[str] = option(
        [], "Names of their models, each sampled from. Default: the one model that they list."
    )
    server_api: Literal["chat", "completions"] = option(
        "chat",
        "chat: prompts are sent as messages, a text as the user's (transcripts as their turns); "
        "completions: texts are sent as they are.",
    )
    server_fields: str = option(
        "", "Further fields of every request, as a JSON object: '{\"top_k\": 50}'."
    )
    cut_samples: Literal["keep", "drop"] = option(
        "keep", "What becomes of a server's samples that reach max_new_tokens before their end."
    )
    concurrency: int = option(64, "Requests under way at once, over all servers.")
    api_key_env: str | None = option(
        None, "Name of the environment variable that holds the servers' API key."
    )
    requests_per_second: float | None = option(
        None, "At most so many requests a second, over all servers. Default: no limit."
    )
    server_timeout: float = option(
        600.0, "Seconds for an answer, those it waits in the server's queue included."
    )
    server_retries: int = option(
        8, "How often a request is sent again that failed by itself (not for a busy server)."
    )
    server_patience: float = option(
        600.0, "Seconds without an answer of any server, after which the run stops."
    )

    def further_fields(self) -> dict[str, Any]:
        """What ``server_fields`` says; ValueError where that is no object, or of other options."""
        found = json_object(self, "server_fields")
        own = {"model", "messages", "prompt", "n", "seed", "temperature", "top_p", "max_tokens",
               "stop", "stream", "tools"}  # fmt: skip
        if taken := sorted(own & found.keys()):
            raise ValueError(f"server_fields names {taken}, which other options or the data decide")
        return found

    def check_servers(self, others: bool) -> None:
        """Raise ValueError or TypeError for options out of range, at odds or without a server.

        ``others``: servers are asked for something else than samples, too.
        """
        check_choices(self, ServerOptions)
        for item in fields(ServerOptions):
            default = [] if item.name == "server_model" else item.default
            if others and item.name in _OF_ANY_SERVER:
                continue
            if not self.server and item.name != "server" and getattr(self, item.name) != default:
                raise ValueError(f"{item.name} is about servers: give one as server, or leave it")
        for url in self.server:
            check_url(url)
        for name in ("server", "server_model"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: one is named twice in {values}")
        self.further_fields()
        check_integers(self, "concurrency", "server_retries")
        check_positive(self, "concurrency", "server_timeout", "server_patience")
        check_positive(self, "requests_per_second")
        if self.server_retries < 0:
            raise ValueError(f"server_retries must be at least 0, got {self.server_retries}")


@dataclass
class PrepareArguments(SampleOptions, RewardOptions, ServerOptions, TemplateOptions):
    """Flags of ``pro-kernels prepare``."""

    group: ClassVar[str] = "prepare"

    data: list[str] = option(
        [],
        "Ranked lists, in any form that train reads: files, dataset folders or hub names. With a "
        'generator or a server also prompts alone: {"prompt": text or messages}.',
    )
    output: str = option("", "File to write, .jsonl or .jsonl.gz; OUTPUT.report.json beside it.")
    generator: list[str] = option(
        [],
        "Causal LMs (folders or hub names) that candidates are sampled from, loaded all at once.",
    )
    generator_tokenizer: list[str] = option(
        [], "Their tokenizers, as many as generators. Default: each generator's own."
    )
    temperature: list[float] = option(
        [1.0], "Sampling temperature. Several: a prompt's samples have them in turn."
    )
    max_prompt_length: int | None = option(
        None,
        "Tokens of the prompt a generator sees; a longer one loses its start there (never in the "
        "output). Default: what its context leaves.",
    )
    seed: int = option(42, "Of the samples.")
    limit: int | None = option(None, "Only the first so many lists.")
    on_bad_line: Literal["error", "skip"] = option(
        "error", "A malformed record stops the run (error), or is counted and reported (skip)."
    )
    overwrite: bool = option(
        False, "Replace an existing output, and drop what was begun with other settings."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoints.")
    device: str | None = option(None, "Device of the models. Default: cuda where there is one.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Of the models' weights; auto: as saved."
    )

    def sources(self) -> list[str]:
        """The paths (or hub names) of all that is read."""
        return [*self.data, *self.generator, *self.generator_tokenizer, *self.reward_files()]

    def check(self) -> None:
        """Raise ValueError for arguments out of range or at odds."""
        check_choices(self, PrepareArguments)
        if not self.data:
            raise ValueError("data: no file, folder or hub name given")
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"output must end in .jsonl or .jsonl.gz, got {self.output!r}")
        self.check_rewards()
        self.check_servers(self.asks_servers())
        if (self.generator or self.server) and not self.reward:
            name = "generator" if self.generator else "server"
            raise ValueError(
                f"samples have no reward of their own: a {name} needs a reward that scores all "
                "candidates"
            )
        if self.max_prompt_length is not None and not self.generator:
            raise ValueError(
                "max_prompt_length cuts the prompts of a generator, and none was given; a server "
                "has a length of its own"
            )
        if self.generator_tokenizer and len(self.generator_tokenizer) != len(self.generator):
            raise ValueError(
                f"generator_tokenizer: one for each of the {len(self.generator)} generators, got "
                f"{len(self.generator_tokenizer)}"
            )
        check_positive(self, "num_samples", "top_p", "max_new_tokens")
        check_positive(self, "max_prompt_length", "batch_size", "limit")
        if not self.temperature:
            raise ValueError("temperature: none was given")
        for temperature in self.temperature:
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperature must be finite and > 0, got {temperature}")
        if len(self.temperature) > self.num_samples:
            raise ValueError(
                f"temperature: {len(self.temperature)} of them for {self.num_samples} samples of a "
                "prompt: raise num_samples"
            )
        if self.top_p > 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not all(self.stop):
            raise ValueError("stop: an empty string would end every sample at once")
