"""From what the command line says to the rewards themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pro_trainer.prepare.rewards.base import Scorer
from pro_trainer.prepare.rewards.classifier import Classifier
from pro_trainer.prepare.rewards.function import Function
from pro_trainer.prepare.rewards.options import RewardOptions
from pro_trainer.prepare.rewards.parse import Spec, parse

if TYPE_CHECKING:
    from pro_trainer.prepare.answers import ClientOptions
    from pro_trainer.prepare.scoring import RewardModel


def build(
    options: RewardOptions,
    load: Callable[[str], RewardModel],
    asked: ClientOptions | None = None,
    *,
    strings_stay: bool = False,
) -> list[Scorer]:
    """The rewards, checked as far as that takes no time: models are loaded in their contexts.

    Args:
        options: of the command.
        load: makes a reward model of a folder or hub name.
        asked: how servers are asked.
        strings_stay: strings do not become turns of a chat before a server.

    Raises:
        ValueError: a function that cannot be imported, a URL, template or pattern that cannot be.
        ModuleNotFoundError: a server without httpx.
    """

    def built(spec: Spec) -> Scorer:
        if spec.kind == "classifier":
            return Classifier(spec.name, lambda: load(spec.target))
        if spec.kind == "function":
            return Function(spec.name, spec.target, spec.part)
        from pro_trainer.prepare.rewards.judge import Judge
        from pro_trainer.prepare.rewards.server import Server

        if spec.kind != "judge":
            return Server(spec, asked, strings_stay=strings_stay)
        return Judge(
            spec,
            asked,
            mode=options.judge,
            template=_template(options.judge_template),
            pattern=options.judge_pattern,
            max_tokens=options.judge_max_tokens,
        )

    return [built(spec) for spec in parse(options.reward)]


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"judge_template {file}: cannot be read: {error}") from None
