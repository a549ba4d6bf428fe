"""Ranked lists from JSON Lines files.

A record is one of

    {"prompt": str, "completions": [str, ...], "rewards": [number, ...]}   rewards optional
    {"chosen": transcript, "rejected": transcript}                         raw HH-RLHF

Without rewards the order is the ranking, best first. Other keys are ignored. Blank lines carry
nothing and are skipped. A line that is none of these is an error naming file and line; a file that
cannot be read to its end is always one. What is well formed but ranks nothing is left out, and
every case is counted in the ``DataReport``.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
_SHOWN_BAD_LINES = 5


class DataError(ValueError):
    """A data file that cannot be used, with file, line number and what is wrong."""


@dataclass(frozen=True)
class RankedList:
    """One prompt and its completions; ``rewards is None``: they are in order, best first."""

    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float, ...] | None = None


@dataclass
class DataReport:
    """What was read and what was left out, filled while the lists stream by."""

    records: int = 0
    lists: int = 0
    candidates: Counter[int] = field(default_factory=Counter)
    with_rewards: int = 0
    tied: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_completions: Counter[str] = field(default_factory=Counter)
    bad_lines: int = 0
    bad_line_messages: list[str] = field(default_factory=list)
    prompts_cut: int = 0
    completions_cut: int = 0

    def text(self) -> str:
        """The report as lines to print; a count that is 0 is left out."""
        n = ", ".join(f"{count} of {size}" for size, count in sorted(self.candidates.items()))
        lines = [
            f"records read: {self.records}, lists kept: {self.lists} ({n or 'none'} candidates)",
            f"with rewards: {self.with_rewards}, of these with ties: {self.tied}",
        ]
        lines += [f"lists dropped, {why}: {count}" for why, count in self.dropped.items()]
        lines += [
            f"completions dropped, {why}: {count}"
            for why, count in self.dropped_completions.items()
        ]
        if self.prompts_cut or self.completions_cut:
            lines.append(
                f"cut to length: {self.prompts_cut} prompts, {self.completions_cut} completions"
            )
        if self.bad_lines:
            lines.append(f"malformed lines skipped: {self.bad_lines}")
            lines += [f"  {message}" for message in self.bad_line_messages]
        return "\n".join(lines)

    def count(self, ranked: RankedList) -> None:
        """Count a list that is kept."""
        self.lists += 1
        self.candidates[len(ranked.completions)] += 1
        if ranked.rewards is not None:
            self.with_rewards += 1
            self.tied += len(set(ranked.rewards)) < len(ranked.rewards)

    def uncount(self, ranked: RankedList, why: str) -> None:
        """Move a list that was counted as kept to those dropped, for a later stage's reason."""
        self.lists -= 1
        self.candidates -= Counter([len(ranked.completions)])
        if ranked.rewards is not None:
            self.with_rewards -= 1
            self.tied -= len(set(ranked.rewards)) < len(ranked.rewards)
        self.dropped[why] += 1


def read_lists(
    paths: Sequence[str | Path],
    report: DataReport,
    *,
    on_bad_line: str = "error",
    all_equal: str = "drop",
    num_candidates: int | None = None,
) -> Iterator[RankedList]:
    """Stream the usable lists of all files, in order, counting into ``report``.

    Raises:
        DataError: a missing, unreadable, truncated or empty file; a malformed line, unless
            ``on_bad_line="skip"``; a list of equal rewards under ``all_equal="error"``.
    """
    for path in paths:
        before = report.records + report.bad_lines
        for number, line in _numbered_lines(Path(path)):
            try:
                ranked = _usable(parse_record(line), report, all_equal)
            except DataError as error:
                if on_bad_line != "skip":
                    raise DataError(f"{path}:{number}: {error}") from None
                report.bad_lines += 1
                if len(report.bad_line_messages) < _SHOWN_BAD_LINES:
                    report.bad_line_messages.append(f"{path}:{number}: {error}")
                continue
            report.records += 1
            if ranked is not None:
                ranked = cap_candidates(ranked, num_candidates)
                report.count(ranked)
                yield ranked
        if report.records + report.bad_lines == before:
            raise DataError(f"{path}: holds no records")


def parse_record(line: bytes) -> RankedList | str:
    """The list of one line, or why it ranks nothing.

    Raises:
        DataError: the line is malformed.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"a record must be a JSON object, got {_kind(record)}")
    if "prompt" in record or "completions" in record:
        return _parse_list(record)
    if "chosen" in record or "rejected" in record:
        return _parse_transcripts(record)
    raise DataError(
        "a record needs 'prompt' and 'completions', or 'chosen' and 'rejected'; "
        f"got the keys {sorted(record)[:8]}"
    )


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """Context up to and with the last ``Assistant:``, and that reply, all its paragraphs.

    None where the last turn is not the assistant's.
    """
    at = transcript.rfind(ASSISTANT)
    if at < 0 or HUMAN in transcript[at:]:
        return None
    at += len(ASSISTANT)
    return transcript[:at], transcript[at:]


def cap_candidates(ranked: RankedList, limit: int | None) -> RankedList:
    """Keep ``limit`` completions, evenly spaced in rank, the best and the worst among them."""
    n = len(ranked.completions)
    if limit is None or n <= limit:
        return ranked
    order = list(range(n))
    if ranked.rewards is not None:
        order.sort(key=lambda i: -ranked.rewards[i])
    kept = sorted(order[round(i * (n - 1) / (limit - 1))] for i in range(limit))
    return _select(ranked, kept)


def _parse_list(record: dict[str, Any]) -> RankedList:
    prompt = _string(record, "prompt")
    completions = record.get("completions")
    if not isinstance(completions, list):
        raise DataError(f"'completions' must be a list of strings, got {_kind(completions)}")
    texts = tuple(_text(c, f"completions[{i}]") for i, c in enumerate(completions))
    rewards = record.get("rewards")
    if rewards is None:
        return RankedList(prompt, texts)
    if not isinstance(rewards, list):
        raise DataError(f"'rewards' must be a list of numbers, got {_kind(rewards)}")
    if len(rewards) != len(texts):
        raise DataError(f"{len(texts)} completions but {len(rewards)} rewards")
    return RankedList(prompt, texts, tuple(_number(r, i) for i, r in enumerate(rewards)))


def _parse_transcripts(record: dict[str, Any]) -> RankedList | str:
    chosen = split_transcript(_string(record, "chosen"))
    rejected = split_transcript(_string(record, "rejected"))
    if chosen is None or rejected is None:
        return "a transcript does not end with an assistant's turn"
    if chosen[0] != rejected[0]:
        return "chosen and rejected have different contexts"
    return RankedList(chosen[0], (chosen[1], rejected[1]))


def _usable(parsed: RankedList | str, report: DataReport, all_equal: str) -> RankedList | None:
    """The list without empty and repeated completions; None, counted, where nothing is ranked."""
    if isinstance(parsed, str):
        report.dropped[parsed] += 1
        return None
    order = range(len(parsed.completions))
    if parsed.rewards is not None:
        order = sorted(order, key=lambda i: -parsed.rewards[i])
    seen: set[str] = set()
    kept = []
    for i in order:  # best first, so that the best of equal texts stays
        text = parsed.completions[i]
        if not text.strip():
            report.dropped_completions["empty"] += 1
        elif text in seen:
            report.dropped_completions["repeats a better one of its list"] += 1
        else:
            seen.add(text)
            kept.append(i)
    ranked = _select(parsed, sorted(kept))
    if len(kept) < 2:
        report.dropped["fewer than 2 different, non-empty completions"] += 1
        return None
    if ranked.rewards is not None and len(set(ranked.rewards)) == 1:
        if all_equal == "error":
            raise DataError(f"all {len(kept)} rewards are equal ({ranked.rewards[0]})")
        if all_equal == "drop":
            report.dropped["all rewards equal"] += 1
            return None
        return RankedList(ranked.prompt, ranked.completions)
    return ranked


def _select(ranked: RankedList, indices: Sequence[int]) -> RankedList:
    rewards = ranked.rewards
    return RankedList(
        ranked.prompt,
        tuple(ranked.completions[i] for i in indices),
        None if rewards is None else tuple(rewards[i] for i in indices),
    )


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers; every failure to read on is a DataError."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except EOFError:
        raise DataError(f"{path}: the gzip stream breaks off after line {number}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file, after line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _string(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise DataError(f"'{key}' is missing")
    return _text(record[key], f"'{key}'")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{name} holds a lone surrogate, which is not text") from None
    return value


def _number(value: Any, index: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"rewards[{index}] must be a number, got {_kind(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"rewards[{index}] must be finite, got {value}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]
