"""A reward model in this process (``scoring.RewardModel``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.prepare.rewards.base import Score, Scorer
from pro_trainer.prepare.scoring import RewardModel

CUT = "texts cut to its length"


class Classifier(Scorer):
    """A sequence classifier with one label, loaded when its context begins."""

    def __init__(self, name: str, load: Callable[[], RewardModel]) -> None:
        super().__init__(name)
        self._load = load

    def __enter__(self) -> Classifier:
        """Load it."""
        self.model = self._load()
        return self

    def score(self, texts: Sequence[tuple[RankedList, Text]]) -> list[Score]:
        """Scores in batches of like length."""
        encoded = [self.model.encode(ranked, completion) for ranked, completion in texts]
        values = self.model.score_ids([ids for ids, _ in encoded])
        return [
            Score(value, (CUT,) if cut else ())
            for value, (_, cut) in zip(values, encoded, strict=True)
        ]
