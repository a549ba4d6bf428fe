"""The case table: shapes of models and of lists, and the presets that group them.

Legend: ``B`` prompts, ``n`` candidates, ``P`` prompt tokens, ``R`` tokens of each completion, ``H``
hidden, ``V`` vocabulary. All lists of a case have the same lengths, so nothing is padding: the
official procedure, which pads to the longest candidate, has no smaller batch.
"""

from __future__ import annotations

from dataclasses import dataclass

_FEW = ("floor", "official", "ours-padded", "ours-shared", "ours-auto")
_MOST = (*_FEW, "official-published")
_ALL = (*_MOST, "official-checkpointed", "ours-auto-checkpointed")


@dataclass(frozen=True)
class ModelShape:
    """A Llama-shaped model with random weights, in fp32."""

    layers: int
    H: int
    feed_forward: int
    heads: int
    V: int
    tied: bool = False


MODELS = {
    "small": ModelShape(8, 512, 1408, 8, 32000),
    "large vocabulary": ModelShape(4, 512, 1408, 8, 151936, tied=True),
    "tiny": ModelShape(2, 32, 48, 4, 211),
}


@dataclass(frozen=True)
class TrainingCase:
    """Lists of one shape and a model.

    Attributes:
        name: unique within a preset.
        n: candidates.
        P: tokens of a prompt.
        R: tokens of a completion.
        B: prompts a batch.
        model: key of ``MODELS``.
        only: names of the providers.
        repeats: rounds.
    """

    name: str
    n: int
    P: int
    R: int
    B: int = 2
    model: str = "small"
    only: tuple[str, ...] = _FEW
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.n < 2 or min(self.P, self.R, self.B) < 1:
            raise ValueError(f"not a case: {self}")

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return MODELS[self.model]

    @property
    def tokens(self) -> int:
        """Positions of all sequences."""
        return self.B * self.n * (self.P + self.R)

    @property
    def scored(self) -> int:
        """Tokens of all completions."""
        return self.B * self.n * self.R

    @property
    def needed(self) -> int:
        """Positions that the loss depends on: prompts once, no completion's last token."""
        return self.B * (self.P + self.n * (self.R - 1))


def _case(n: int, P: int, R: int, **more) -> TrainingCase:
    what = "" if "model" not in more else f", V={MODELS[more['model']].V}"
    return TrainingCase(f"n={n} P={P} R={R}{what}", n, P, R, **more)


def _tiny() -> list[TrainingCase]:
    """Seconds; for tests of the harness, the numbers mean nothing."""
    return [
        _case(3, 12, 4, model="tiny", repeats=2, only=_ALL),
        _case(2, 4, 4, model="tiny", repeats=2),
    ]


def _quick() -> list[TrainingCase]:
    """Two minutes: the first case, one prompt a batch, fewer rounds."""
    return [_case(4, 512, 64, B=1, repeats=3, only=_MOST)]


def _full() -> list[TrainingCase]:
    """Twenty to thirty minutes on two slow cores."""
    return [
        _case(4, 512, 64, only=_ALL),
        _case(8, 512, 64),
        _case(8, 128, 128),
        _case(2, 64, 64, repeats=9),
        _case(4, 512, 64, model="large vocabulary", repeats=3),
    ]


PRESETS = {"tiny": _tiny, "quick": _quick, "full": _full}


def cases_of(preset: str, patterns: tuple[str, ...] = ()) -> list[TrainingCase]:
    """The cases of a preset whose name contains one of ``patterns`` (none: all).

    Raises:
        ValueError: nothing left.
    """
    found = [
        case for case in PRESETS[preset]() if not patterns or any(p in case.name for p in patterns)
    ]
    if not found:
        raise ValueError(f"no training case of preset {preset!r} matches {list(patterns)}")
    return found
