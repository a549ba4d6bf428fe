"""Which prompts are held out, and what a round trains on: decided by hashes alone.

A prompt stays on its side whatever other prompts stand beside it, and lists that are mixed in are
the same ones however often a round is begun.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pro_trainer.data.fields import Text
from pro_trainer.data.lists import read_lists
from pro_trainer.data.options import DataOptions, PromptOptions
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.rounds.options import RoundOptions

Record = dict[str, Any]


def split(
    options: RoundOptions, report: DataReport, on_bad_line: str = "error"
) -> tuple[list[Record], list[Record]]:
    """Records of prompts alone, to train on and held out; ValueError without some of both."""
    prompts = list(read_prompts(options.prompts, report, on_bad_line))
    share = options.share_held_out()
    if share is None:
        held_out = list(read_prompts([options.held_out], DataReport(), on_bad_line))
        known = {key(ranked) for ranked in held_out}
        training = [ranked for ranked in prompts if key(ranked) not in known]
    else:
        held_out = [ranked for ranked in prompts if _unit(key(ranked)) < share]
        training = [ranked for ranked in prompts if not _unit(key(ranked)) < share]
    if not training or not held_out:
        raise ValueError(
            f"held_out {options.held_out}: of {len(prompts)} prompts {len(training)} are left to "
            f"train on and {len(held_out)} are held out, and there must be some of both"
        )
    return list(map(_prompt, training)), list(map(_prompt, held_out))


def read_prompts(
    sources: Sequence[str], report: DataReport, on_bad_line: str = "error"
) -> Iterator[RankedList]:
    """Lists of which the prompts count."""
    return read_lists(sources, report, PromptOptions(on_bad_line=on_bad_line, all_equal="order"))


def references(
    sources: Sequence[str],
    held_out: Iterable[Record],
    report: DataReport,
    on_bad_line: str = "error",
) -> list[Record]:
    """Ranked lists as records, but for prompts that are held out; ValueError where none is left."""
    taken = {_text(record["prompt"]) for record in held_out}
    lists = read_lists(sources, report, DataOptions(on_bad_line=on_bad_line))
    records = [ranked.record() for ranked in lists if key(ranked) not in taken]
    if not records:
        raise ValueError(f"mix_reference: no usable list of other prompts in {', '.join(sources)}")
    return records


def mixed(
    own: Path, pools: Sequence[tuple[Sequence[Path], float]], seed: str
) -> tuple[list[bytes], list[int]]:
    """The lines of a round's own lists and of those mixed in, and how many there are of each kind.

    All lines of ``own`` are taken, and of each of the ``pools`` (files of lines) as many as make
    its share of the outcome, or all where there are fewer; ``seed`` decides which.
    """
    lines = own.read_bytes().splitlines(keepends=True)
    rest = 1 - sum(share for paths, share in pools if paths)
    counts = [len(lines)]
    for paths, share in pools:
        every = enumerate(line for path in paths for line in path.open("rb"))
        wanted = round(counts[0] * share / rest)
        taken = heapq.nsmallest(wanted, every, key=lambda item: _unit(f"{seed} {item[0]}"))
        lines += [line for _, line in sorted(taken)]
        counts.append(len(taken))
    return lines, counts


def key(ranked: RankedList) -> str:
    """What makes two prompts the same one: their text."""
    return _text(ranked.prompts[0])


def _text(prompt: Text) -> str:
    return prompt.strip() if isinstance(prompt, str) else json.dumps(list(prompt), default=str)


def _unit(text: str) -> float:
    """A number in [0, 1) that a text decides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _prompt(ranked: RankedList) -> Record:
    return {"prompt": ranked.prompts[0], **ranked.beside(), **ranked.columns}
