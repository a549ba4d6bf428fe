"""Records -> usable ranked lists: cleaned, ranked, capped, and every loss counted.

A malformed record is an error naming where it stands (or skipped and counted on request). What is
well formed but ranks nothing is left out, and each reason is counted in the ``DataReport``:

    empty completion             that completion goes
    repeated completion          the best of them stays (an SFT mark passes on to it)
    equal ranks                  the first of them stays
    dialogues that differ        the list goes, or keeps its n prompts (``different_contexts``)
    all rewards (or ranks) equal the list goes, is an error, or becomes its order (``all_equal``)
    fewer than 2 completions     the list goes (``DataOptions.fewest``)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pro_trainer.data.choose import choose
from pro_trainer.data.fields import DataError, Text, kind
from pro_trainer.data.formats import parse_record, shared
from pro_trainer.data.options import DataOptions
from pro_trainer.data.read import Source, decode_line, rows
from pro_trainer.data.records import ParsedRecord, RankedList
from pro_trainer.data.report import DataReport

DIFFERENT_CONTEXTS = "candidates answer different dialogues"


def read_lists(
    sources: Sequence[Source], report: DataReport, options: DataOptions
) -> Iterator[RankedList]:
    """Stream the usable lists of all sources, in order, counting into ``report``.

    Args:
        sources: files, folders, hub names (``org/name`` or ``org/name:split``), or iterables of
            records (a list, a ``datasets.Dataset``).
        report: filled while the lists stream by.
        options: what becomes of records that cannot be used as they are.

    Raises:
        DataError: a source that is missing, unreadable, truncated or empty; a malformed record,
            unless ``on_bad_line="skip"``; a list of equal rewards under ``all_equal="error"``.
        TypeError: something else than sources.
        ValueError: no sources.
    """
    if isinstance(sources, (str, Path, Mapping)):
        raise TypeError(f"sources must be a list of sources, got {kind(sources)}: {sources!r:.80}")
    sources = list(sources)
    if not sources:
        raise ValueError("sources is empty: give at least one file, folder, name or iterable")
    for source in sources:
        if isinstance(source, Mapping):
            raise TypeError("a source is a whole set of records, got one record: [records], say")
    return (ranked for source in sources for ranked in _source_lists(source, report, options))


def select(ranked: RankedList, indices: Sequence[int]) -> RankedList:
    """The list of these candidates in this order; ``sft_index`` follows its own, or is None."""
    prompts = ranked.prompts
    if len(prompts) > 1:
        prompts = shared([prompts[i] for i in indices])
    marked = ranked.sft_index
    return replace(
        ranked,
        prompts=prompts,
        completions=tuple(ranked.completions[i] for i in indices),
        rewards=None if ranked.rewards is None else tuple(ranked.rewards[i] for i in indices),
        raw_rewards={
            name: tuple(of_all[i] for i in indices) for name, of_all in ranked.raw_rewards.items()
        },
        desirable=ranked.desirable and tuple(ranked.desirable[i] for i in indices),
        sft_index=list(indices).index(marked) if marked in indices else None,
    )


def _source_lists(source: Source, report: DataReport, options: DataOptions) -> Iterator[RankedList]:
    empty = True
    for where, raw in rows(source):
        empty = False
        try:
            record = decode_line(raw) if isinstance(raw, bytes) else raw
            parsed = parse_record(record, prompts_alone=not options.fewest)
            ranked = _usable(parsed, report, options)
        except DataError as error:
            if options.on_bad_line != "skip":
                raise DataError(f"{where}: {error}") from None
            report.bad_line(f"{where}: {error}")
            continue
        report.records += 1
        report.formats[parsed.format] += 1
        report.unused.update(parsed.unused)
        report.notes.update(parsed.notes)
        if ranked is not None:
            ranked = replace(ranked, where=where)
            report.count(ranked)
            yield ranked
    if empty:
        name = source if isinstance(source, (str, Path)) else "a source of records"
        raise DataError(f"{name}: holds no records")


def _usable(parsed: ParsedRecord, report: DataReport, options: DataOptions) -> RankedList | None:
    """The cleaned list; None, counted, where nothing is ranked."""
    if isinstance(parsed.content, str):
        report.dropped[parsed.content] += 1
        return None
    marked = parsed.content.sft_index is not None
    ranked = _without_empty_and_repeated(parsed.content, report)
    if not ranked.completions and not options.fewest:
        return replace(ranked, rewards=None)
    if len(ranked.completions) < options.fewest:
        report.dropped["fewer than 2 different, non-empty completions"] += 1
        return None
    if len(ranked.prompts) > 1 and options.different_contexts == "drop":
        report.dropped[DIFFERENT_CONTEXTS] += 1
        return None
    if ranked.rewards is not None and len(set(ranked.rewards)) == 1 < len(ranked.rewards):
        if options.all_equal == "error":
            value, name = ranked.rewards[0], "rewards"
            if parsed.by_rank:
                value, name = -value, "ranks"
            raise DataError(f"all {len(ranked.rewards)} {name} are equal ({value})")
        if options.all_equal == "drop":
            report.dropped["all rewards equal"] += 1
            return None
        ranked = replace(ranked, rewards=None)
    elif parsed.by_rank:
        ranked = _in_order(ranked, report)
    gaps = _gaps(ranked.rewards, options)
    kept = choose(ranked.best_first(), gaps, options.num_candidates)
    if len(kept) < len(ranked.completions):
        ranked = select(ranked, sorted(kept))
    report.sft_marks_dropped += marked and ranked.sft_index is None
    return ranked


def _gaps(rewards: tuple[float, ...] | None, options: DataOptions) -> list[float] | None:
    """How far each reward lies below the best of its list: what losses tell apart."""
    if rewards is None:
        return None
    if fault := options.reward_fault(rewards):
        raise DataError(f"rewards {min(rewards):g} to {max(rewards):g} are {fault}")
    return [reward - max(rewards) for reward in rewards]


def _without_empty_and_repeated(ranked: RankedList, report: DataReport) -> RankedList:
    first: dict[object, int] = {}  # what a candidate says -> the best candidate that says it
    n = len(ranked.completions)
    prompts = [0] * n if len(ranked.prompts) == 1 else [_key(p) for p in ranked.prompts]
    for i in ranked.best_first():
        text = ranked.completions[i]
        key = prompts[i], _key(text)
        messages = ({"content": text},) if isinstance(text, str) else text
        if not any(m.get("tool_calls") or m["content"].strip() for m in messages):
            report.dropped_completions["empty"] += 1
        elif key in first:
            report.dropped_completions["repeats a better one of its list"] += 1
            if ranked.sft_index == i:
                ranked = replace(ranked, sft_index=first[key])
        else:
            first[key] = i
    return ranked if len(first) == n else select(ranked, sorted(first.values()))


def _in_order(ranked: RankedList, report: DataReport) -> RankedList:
    """Ranks become an order; of equal ranks the first stays."""
    kept: dict[float, int] = {}
    for i in ranked.best_first():
        kept.setdefault(ranked.rewards[i], i)
    if surplus := len(ranked.completions) - len(kept):
        report.dropped_completions["has the rank of an earlier one"] += surplus
    return replace(select(ranked, list(kept.values())), rewards=None)


def _key(text: Text) -> object:
    """Something equal and hashable for equal texts."""
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
