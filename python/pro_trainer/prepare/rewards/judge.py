"""A chat model as judge: a number for each completion, or which of two is better.

In pairs every completion of a list meets every other one twice, once in each place, since judges
favour a place. Its score is the share of these meetings that it won, a tie counted as half.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from pro_trainer.prepare.answers import Failure
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.rewards.base import Score, Scored, Spec, as_score, excerpt, readable
from pro_trainer.prepare.rewards.server import Asked, by_list

_PLACES = {"number": ("prompt", "completion"), "pairs": ("prompt", "a", "b")}
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
_UNCLEAR = "judge's answer not understood"
Verdict = tuple[str | None, str]  # what the pattern found; else None, and why there is nothing


class Judge(Asked):
    """Scores read from what a chat model says at temperature 0."""

    def __init__(self, spec: Spec, options: PrepareArguments) -> None:
        """Take address and template; ValueError for a template or pattern that cannot be."""
        super().__init__(spec, options)
        mode, pattern, file = options.judge, options.judge_pattern, options.judge_template
        self._template = _TEMPLATES[mode]
        try:
            if file is not None:
                self._template = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"judge_template {file}: cannot be read: {error}") from None
        self._places = _PLACES[mode]
        missing = [place for place in self._places if f"{{{place}}}" not in self._template]
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

    def score(self, texts: Sequence[Scored]) -> list[Score]:
        """A request for each completion, or n (n - 1) for a list of n."""
        if self._options.judge == "number":
            return [_number(verdict) for verdict in self._verdicts([list(x) for x in texts])]
        lists = by_list(texts)
        asked = [[group[0][0], a[1], b[1]] for group in lists for a, b in permutations(group, 2)]
        verdicts = iter(self._verdicts(asked))
        scores: list[Score] = []
        for group in lists:
            pairs = {pair: next(verdicts) for pair in permutations(range(len(group)), 2)}
            scores += _shares(pairs, len(group))
        return scores

    def _verdicts(self, asked: Sequence[list[Any]]) -> list[Verdict]:
        """Of a list and what is asked about its completions, each."""
        place = re.compile("{(" + "|".join(self._places) + ")}")
        bodies = []
        for ranked, *completions in asked:
            shown = [readable(text).strip() for text in (ranked.prompts[0], *completions)]
            texts = dict(zip(self._places, shown, strict=True))
            message = place.sub(lambda match, texts=texts: texts[match[1]], self._template)
            bodies.append({
                "messages": [{"role": "user", "content": message}],
                "temperature": 0,
                "max_tokens": self._options.judge_max_tokens,
            })  # fmt: skip
        verdicts: list[Verdict] = []
        for (ranked, completion, *_), answer in zip(asked, self._ask(bodies), strict=True):
            if isinstance(answer, Failure):
                verdicts.append((None, f"refused by the server, {answer.reason}"))
                continue
            found = self._pattern.findall(self._content(answer, excerpt(ranked, completion)))
            verdicts.append((found[-1], "") if found else (None, _UNCLEAR))
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


def _number(verdict: Verdict) -> Score:
    found, why = verdict
    try:
        value = as_score(float(found), "") if found is not None else None
    except ValueError:
        value, why = None, _UNCLEAR
    return Score(value, (why,) if why else ())


def _shares(pairs: dict[tuple[int, int], Verdict], n: int) -> list[Score]:
    """The share of its meetings that each of n completions won, of those that were decided."""
    won: list[list[float]] = [[] for _ in range(n)]
    notes: list[list[str]] = [[] for _ in range(n)]
    for (a, b), (found, why) in pairs.items():
        share = _WON.get(str(found).upper())
        if share is None:
            notes[a].append(why or _UNCLEAR)
            continue
        won[a].append(share)
        won[b].append(1 - share)
        other = _WON.get(str(pairs[b, a][0]).upper())
        if a < b and other not in (None, 1 - share):
            notes[a].append("pairs judged by their order")
    return [
        Score(sum(of_one) / len(of_one) if of_one else None, tuple(said))
        for of_one, said in zip(won, notes, strict=True)
    ]
