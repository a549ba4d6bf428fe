"""Tokenised lists on disk, memory-mapped: a million of them take no more memory than a thousand.

``load_dataset`` streams them into an Arrow IPC file in a folder of its own, under the system's
temporary directory (``TMPDIR`` moves it; on many machines /tmp lies in memory, and a million lists
of four 300-token candidates are about 5 GB), and opens that as a ``datasets.Dataset``. The folder
goes with the data set, or at exit. Nothing is written to the Hugging Face cache: what ``map`` and
the like cache for this data set lies beside its file and goes with it.

Columns: ``prompts`` and ``completions`` lists of lists of int32 with 64-bit offsets (no limit on
the ids in a column), ``rewards`` a list of float64 or null, ``sft_index`` int32 or null,
``desirable`` a list of bool or null, ``weight`` float64, ``cut`` (what was cut off) a string or
null, ``length`` int32, all ids of the list (what ``Trainer`` groups
by under ``group_by_length``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pro_trainer.data.fields import DataError
from pro_trainer.data.lists import read_lists
from pro_trainer.data.read import Source, required_package
from pro_trainer.data.report import DataReport
from pro_trainer.text.encode import Encoder, TokenizedList
from pro_trainer.text.options import ListOptions

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_BATCH_LISTS = 1000
_BATCH_IDS = 1 << 20  # bounds a batch of long lists: ids are 36 bytes each while in Python


def load_dataset(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    options: ListOptions,
) -> tuple[Dataset, DataReport]:
    """Read, clean and tokenise all sources into one memory-mapped data set.

    Args:
        sources: as ``read_lists`` takes them.
        tokenizer: of the model.
        options: what becomes of the records; the length rule.

    Returns:
        The data set, one row a list with the fields of ``TokenizedList``, and the report on it.

    Raises:
        DataError: as ``read_lists`` and ``Encoder.lists``; or no list is usable.
        TypeError, ValueError: as these two.
    """
    datasets = required_package("datasets", "training data")
    report = DataReport()
    lists = read_lists(sources, report, options)
    tokenized = Encoder(tokenizer, options, report).lists(lists)
    folder = _Folder()
    file = folder.path / "lists.arrow"
    try:
        write_lists(tokenized, file)
        if report.lists == 0:
            raise DataError(f"no usable list in the data:\n{report.text()}")
        dataset = datasets.Dataset.from_file(str(file))
    except BaseException:
        folder.remove()
        raise
    dataset.temporary_folder = folder
    return dataset, report


def write_lists(lists: Iterable[TokenizedList], path: str | Path) -> None:
    """Stream tokenised lists into an Arrow IPC stream file."""
    import pyarrow as pa

    schema = _schema()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(lists):
            columns = [
                pa.array([getattr(tokens, field.name) for tokens in batch], field.type)
                for field in schema
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def split_held_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out lists; lists that share a prompt are never on both sides.

    Which prompts are held out depends on the prompts and ``seed``, not on the order of the rows.
    Only the column of prompts is read, and a hash of each prompt is held.

    Args:
        dataset: as ``load_dataset`` gives it.
        fraction: share of the different prompts to hold out, at least one of them; 0: none.
        seed: of the choice.

    Raises:
        ValueError: a fraction outside [0, 1).
        DataError: too few different prompts to hold any out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must lie in [0, 1), got {fraction}")
    held = np.zeros(len(dataset), dtype=bool)
    if fraction > 0:
        hashes, group = np.unique(_prompt_groups(dataset), return_inverse=True)
        if len(hashes) < 2:
            raise DataError(
                f"holding out {fraction} of the data needs at least 2 different prompts, got "
                f"{len(hashes)}; give evaluation data of its own, or hold out 0"
            )
        count = min(max(1, round(fraction * len(hashes))), len(hashes) - 1)
        chosen = np.zeros(len(hashes), dtype=bool)
        chosen[np.random.default_rng(seed).permutation(len(hashes))[:count]] = True
        held = chosen[group]
    return _rows(dataset, ~held), _rows(dataset, held)


class _Folder:
    """A temporary folder that goes with this object, or at exit, but not from another process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pro_trainer_"))
        weakref.finalize(self, _remove, self.path, os.getpid())

    def remove(self) -> None:
        _remove(self.path, os.getpid())

    def __deepcopy__(self, memo: dict) -> _Folder:
        return self


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked data loader holds a copy of the data set
        shutil.rmtree(path, ignore_errors=True)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    ids = pa.large_list(pa.large_list(pa.int32()))
    return pa.schema(
        [
            ("prompts", ids),
            ("completions", ids),
            ("rewards", pa.large_list(pa.float64())),
            ("sft_index", pa.int32()),
            ("desirable", pa.large_list(pa.bool_())),
            ("weight", pa.float64()),
            ("cut", pa.string()),
            ("length", pa.int32()),
        ]
    )


def _batches(lists: Iterable[TokenizedList]) -> Iterator[list[TokenizedList]]:
    batch: list[TokenizedList] = []
    size = 0
    for tokens in lists:
        batch.append(tokens)
        size += tokens.length
        if len(batch) == _BATCH_LISTS or size >= _BATCH_IDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prompt_groups(dataset: Dataset) -> np.ndarray:
    """(rows,) uint64: equal where lists share a prompt, be it through other lists."""
    groups = np.empty(len(dataset), dtype=np.uint64)
    links: dict[int, int] = {}  # union-find over the hashes of lists with prompts of their own
    row = 0
    prompts = dataset.select_columns("prompts").with_format("arrow")
    for table in prompts.iter(batch_size=_BATCH_LISTS):
        for own in table.column("prompts").to_pylist():
            hashes = [_hash(ids) for ids in own]
            groups[row] = hashes[0]
            row += 1
            for other in hashes[1:]:
                links[_root(links, other)] = _root(links, hashes[0])
    if links:
        groups = np.array([_root(links, int(group)) for group in groups], dtype=np.uint64)
    return groups


def _hash(ids: Sequence[int]) -> int:
    data = np.asarray(ids, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _root(links: dict[int, int], item: int) -> int:
    while (parent := links.get(item, item)) != item:
        item = parent
    return item


def _rows(dataset: Dataset, chosen: np.ndarray) -> Dataset:
    """The chosen rows, which keep the data set's folder in being."""
    part = dataset.select(np.flatnonzero(chosen).tolist())
    if hasattr(dataset, "temporary_folder"):
        part.temporary_folder = dataset.temporary_folder
    return part
