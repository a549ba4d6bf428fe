"""A chat model as judge: a number for each completion, or which of two is better.

In pairs every completion of a list meets every other one twice, once in each place, since judges
favour a place. Its score is the share of these meetings that it won, a tie counted as half.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, permutations
from typing import Any, Literal

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.prepare.answers import ClientOptions, Failure
from pro_trainer.prepare.rewards.base import Score, excerpt, is_finite, readable
from pro_trainer.prepare.rewards.parse import Spec
from pro_trainer.prepare.rewards.server import Asked

Mode = Literal["number", "pairs"]
PLACES = {"number": ("prompt", "completion"), "pairs": ("prompt", "a", "b")}
_TEMPLATES = {
    "number": """Judge how well an assistant answers. Consider whether the answer is correct, \
helpful, complete and harmless. Its length is no merit.

[Conversation]
{prompt}

[Answer]
{completion}

Give your reasons in two sentences at most. Then end with a grade from 1 (bad) to 10 (excellent) \
in double brackets, as in [[5]].""",
    "pairs": """Judge which of two answers is better. Consider whether they are correct, helpful, \
complete and harmless. Neither their length nor their order is a merit.

[Conversation]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Give your reasons in two sentences at most. Then end with the better one in double brackets: \
[[A]], [[B]], or [[C]] for a tie.""",
}
_PATTERNS = {"number": r"\[\[\s*([-+]?\d+(?:\.\d+)?)\s*\]\]", "pairs": r"\[\[\s*([ABC])\s*\]\]"}
_WON = {"A": 1.0, "B": 0.0, "C": 0.5}


class Judge(Asked):
    """Scores read from what a chat model says at temperature 0."""

    def __init__(
        self,
        spec: Spec,
        options: ClientOptions | None = None,
        *,
        mode: Mode = "number",
        template: str | None = None,
        pattern: str | None = None,
        max_tokens: int = 512,
    ) -> None:
        r"""Take the address and what is said.

        Args:
            spec: of a URL that ends in ``/chat/completions``.
            options: how the server is asked.
            mode: what it is asked for.
            template: the message, with ``{prompt}`` and ``{completion}``, or with ``{prompt}``,
                ``{a}`` and ``{b}``.
            pattern: a regular expression whose group is the number, or A, B or C (a tie); the last
                match in the answer counts. Default: as in ``[[5]]`` and ``[[A]]``.
            max_tokens: most tokens of an answer.

        Raises:
            ValueError: a template without these places, a pattern without a group.
        """
        super().__init__(spec, options)
        self._mode = mode
        self._template = _TEMPLATES[mode] if template is None else template
        missing = [place for place in PLACES[mode] if f"{{{place}}}" not in self._template]
        if missing:
            raise ValueError(
                f"judge_template: {{{missing[0]}}} was expected in it, where the text goes; it "
                f"begins {self._template!r:.60}"
            )
        try:
            self._pattern = re.compile(_PATTERNS[mode] if pattern is None else pattern)
        except re.error as error:
            raise ValueError(f"judge_pattern {pattern!r}: no regular expression: {error}") from None
        if self._pattern.groups != 1:
            raise ValueError(
                f"judge_pattern {pattern!r}: one group (...) was expected, around what counts, got "
                f"{self._pattern.groups}"
            )
        self._max_tokens = max_tokens

    def score(self, texts: Sequence[tuple[RankedList, Text]]) -> list[Score]:
        """A request for each completion, or n (n - 1) for a list of n."""
        if self._mode == "number":
            said = self._verdicts([self._places(*text) for text in texts])
            return [_number(verdict) for verdict in said]
        lists = [list(group) for _, group in groupby(texts, key=lambda text: id(text[0]))]
        asked = [
            self._places(group[i][0], group[i][1], group[j][1])
            for group in lists
            for i, j in permutations(range(len(group)), 2)
        ]
        verdicts = iter(self._verdicts(asked))
        scores: list[Score] = []
        for group in lists:
            pairs = {pair: next(verdicts) for pair in permutations(range(len(group)), 2)}
            scores += _shares(pairs, len(group))
        return scores

    def _places(self, ranked: RankedList, *completions: Text) -> dict[str, str]:
        texts = (ranked.prompts[0], *completions)
        shown = [readable(text).strip() for text in texts]
        return dict(zip(PLACES[self._mode], shown, strict=True)) | {
            "where": excerpt(ranked, shown[1])
        }

    def _verdicts(self, asked: Sequence[dict[str, str]]) -> list[tuple[str | None, str]]:
        """Of each request what the pattern found, else None and why there is nothing."""
        place = re.compile("{(" + "|".join(PLACES[self._mode]) + ")}")
        bodies = []
        for texts in asked:
            message = place.sub(lambda match, texts=texts: texts[match[1]], self._template)
            bodies.append({
                "messages": [{"role": "user", "content": message}],
                "temperature": 0,
                "max_tokens": self._max_tokens,
            })  # fmt: skip
        verdicts: list[tuple[str | None, str]] = []
        for texts, answer in zip(asked, self._ask(bodies), strict=True):
            if isinstance(answer, Failure):
                verdicts.append((None, f"refused by the server, {answer.reason}"))
                continue
            found = self._pattern.findall(self._content(answer, texts["where"]))
            verdicts.append((found[-1], "") if found else (None, "judge's answer not understood"))
        return verdicts

    def _content(self, answer: Any, where: str) -> str:
        try:
            content = answer["choices"][0]["message"]["content"] or ""  # null: only reasoning
            return content + ""
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self._written}: {where}: an answer of a chat model was expected, got "
                f"{answer!r:.200}"
            ) from error


def _number(verdict: tuple[str | None, str]) -> Score:
    found, why = verdict
    try:
        value = float(found) if found is not None else None
    except ValueError:
        value, why = None, "judge's answer not understood"
    if value is not None and not is_finite(value):
        value, why = None, "judge's answer not understood"
    return Score(value, (why,) if why else ())


def _shares(pairs: dict[tuple[int, int], tuple[str | None, str]], n: int) -> list[Score]:
    """The share of its meetings that each of n completions won, of those that were decided."""
    won: list[list[float]] = [[] for _ in range(n)]
    notes: list[list[str]] = [[] for _ in range(n)]
    for (a, b), (found, why) in pairs.items():
        share = _WON.get(str(found).upper())
        if share is None:
            notes[a].append(why or "judge's answer not understood")
            continue
        won[a].append(share)
        won[b].append(1 - share)
        other = pairs[b, a][0]
        if a < b and other is not None and _WON.get(other.upper()) not in (None, 1 - share):
            notes[a].append("pairs judged by their order")
    return [
        Score(sum(of_one) / len(of_one) if of_one else None, tuple(said))
        for of_one, said in zip(won, notes, strict=True)
    ]
