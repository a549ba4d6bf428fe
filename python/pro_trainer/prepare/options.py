"""How candidates are sampled, by whatever samples them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pro_trainer.options import check_choices, option
from pro_trainer.prepare.answers import ClientOptions, check_url


@dataclass(frozen=True)
class SamplingOptions:
    """How candidates are sampled; see ``sampling.sample``."""

    num_samples: int
    max_new_tokens: int
    temperatures: Sequence[float]
    top_p: float
    stop_strings: Sequence[str]
    max_prompt_length: int | None
    batch_size: int
    seed: int


def list_seed(seed: int, generator: str, index: int) -> int:
    """A seed of 63 bits for one list and generator, far from those of its neighbours."""
    digest = hashlib.blake2b(f"{seed} {generator} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


_OF_ANY_SERVER = ("concurrency", "requests_per_second", "server_timeout", "server_retries",
                  "server_patience")  # fmt: skip


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
        "",
        "Further fields of every request, as a JSON object: '{\"top_k\": 50}'.",
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

    def client(self) -> ClientOptions:
        """How servers are asked.

        Raises:
            TypeError, ValueError: a number out of range.
        """
        return ClientOptions(
            concurrency=self.concurrency,
            timeout=self.server_timeout,
            retries=self.server_retries,
            patience=self.server_patience,
            requests_per_second=self.requests_per_second,
            api_key_env=self.api_key_env,
        )

    def further_fields(self) -> dict[str, Any]:
        """What ``server_fields`` says.

        Raises:
            ValueError: it is no JSON object, or names a field that has an option of its own.
        """
        try:
            found = json.loads(self.server_fields or "{}")
        except ValueError as error:
            raise ValueError(f"server_fields must be a JSON object: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"server_fields must be a JSON object, got {self.server_fields}")
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
        self.client()
        self.further_fields()
