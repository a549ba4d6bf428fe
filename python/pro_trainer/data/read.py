"""Where records come from: files, folders, hub names and iterables, read as a stream of rows.

A row is ``(where, raw)``: ``where`` names file and line (or row, or record) for messages; ``raw``
is the bytes of a line, which ``decode_line`` reads, or the record itself. A line that is not JSON
is thus its reader's to judge, while a source that cannot be read to its end raises ``DataError``.

    x.jsonl, x.json, other names   a record a line, or one array of records   "x.jsonl:17"
    x.csv, x.tsv                   cells are text, or JSON lists and objects  "x.csv: row 17"
    x.parquet                                                                 "x.parquet: row 17"
    folder                         of ``Dataset.save_to_disk``, or of such files, in name order
    org/name, org/name:split       a hub data set, streamed                   "org/name: row 17"
    anything iterable              dict records                               "record 17"

Text files may be compressed: .gz, .bz2, .xz, .zst.

Lines of JSON are read here and not by ``datasets``: it would give all records of a file one schema,
so that records of different forms (a prompt that is text here and messages there) are refused, copy
the file into its cache, and name no line in an error. The same holds for its tables, whose cells it
would take for numbers. The rest is left to ``csv``, ``pyarrow`` and ``datasets``, as streams.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from pro_trainer.data.fields import DataError, kind

Row = tuple[str, Any]
Source = str | Path | Iterable[Mapping[str, Any]]

_DATA_FILE = re.compile(r"(?i)[^.].*(\.(jsonl?|csv|tsv)(\.(gz|bz2|xz|zst))?|\.parquet)")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
_PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}
_OBJECTS = ("tools", "chat_template_kwargs")  # columns
_ROWS_AT_ONCE = 512


def rows(source: Source) -> Iterator[Row]:
    """Stream the rows of one source.

    Raises:
        DataError: it is missing, unreadable, truncated or damaged.
        TypeError: it is neither a path, a name nor an iterable of records.
    """
    if isinstance(source, (str, Path)):
        return _path_rows(source)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            "a source must be a file, a folder, a hub name or an iterable of records, "
            f"got {kind(source)}"
        )
    if hasattr(source, "with_format"):  # a datasets.Dataset that gives tensors, say
        source = source.with_format(None)
    return ((f"record {number}", record) for number, record in enumerate(source, 1))


def decode_line(line: bytes) -> Any:
    """The JSON value of one line. DataError: it is not UTF-8 or not JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from None
    except (RecursionError, ValueError) as error:
        advice = " (a record is a line, or all are one array)" if line.strip() == b"{" else ""
        raise DataError(f"not JSON: {error}{advice}") from None


def _path_rows(source: str | Path) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        return _folder_rows(path)
    hub = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    if hub and not path.exists() and not _DATA_FILE.fullmatch(path.name):
        return _hub_rows(hub[1], hub[2])
    packed = path.suffix.lower() in _PACKED
    holds = (Path(path.stem) if packed else path).suffix.lower()
    if holds == ".parquet":
        return _numbered(path, "Parquet file", lambda: _parquet_records(path))
    if holds in (".csv", ".tsv"):
        return _numbered(path, "table", lambda: _table_records(path, holds))
    return _line_rows(path)


@contextlib.contextmanager
def _reading(name: str | Path, what: str, unit: str, number: list[int]) -> Iterator[None]:
    """Errors of whatever reads a source, as a DataError that names the last one read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each library has its own
        suffix = Path(name).suffix.lower()
        packed = f"{suffix[1:]} {what}" if suffix in _PACKED else what
        if isinstance(error, EOFError):
            text = f"the {packed} breaks off after {unit} {number[0]}"
        elif code := getattr(error, "errno", None):
            text = f"cannot be read: {os.strerror(code)}"
        else:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"damaged {packed}, after {unit} {number[0]}: {said}"
        raise DataError(f"{name}: {text}") from error


def _line_rows(path: Path) -> Iterator[Row]:
    """Non-blank lines, or the records of one array."""
    number, first = [0], True
    with _reading(path, "file", "line", number), _open(path) as file:
        for number[0], line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number[0] == 1 else line
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                try:
                    records = decode_line(line + file.read())
                except DataError as error:
                    raise DataError(f"{path}: {error}") from None
                for place, record in enumerate(records, 1):
                    yield f"{path}: record {place}", record
                return
            first = False
            yield f"{path}:{number[0]}", line


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".zst":
        # zstandard, fsspec and pandas take a truncated file for one that ends there; this does not.
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        return required_package(name, path).open(path)
    return _PACKED.get(path.suffix.lower(), open)(path, "rb")


def _numbered(
    name: str | Path, what: str, records: Callable[[], Iterable[Mapping[str, Any]]]
) -> Iterator[Row]:
    """Rows of a source that a library reads."""
    number = [0]
    with _reading(name, what, "row", number):
        for number[0], record in enumerate(records(), 1):
            yield f"{name}: row {number[0]}", record


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    parquet = required_package("pyarrow.parquet", path)
    with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _table_records(path: Path, kind_of: str) -> Iterator[dict[str, Any]]:
    """Cells are text, or JSON where that is a list, a message or options; empty ones are absent."""
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than some dialogues
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        table = csv.DictReader(text, delimiter="\t" if kind_of == ".tsv" else ",", strict=True)
        for record in table:
            surplus = [cell for cell in record.pop(None, None) or () if cell]
            missing = [name for name, cell in record.items() if cell is None]
            if surplus or missing:
                raise DataError(
                    f"{path}:{table.line_num}: a row must have a cell for each of the "
                    f"{len(table.fieldnames)} columns, got "
                    + (f"{surplus!r:.80} beyond them" if surplus else f"none for {missing[0]!r}")
                )
            yield {name: _cell(name, cell) for name, cell in record.items() if cell}


def _cell(name: str, cell: str) -> Any:
    if cell.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(cell)
        except ValueError:
            return cell  # text that begins with a bracket
        if isinstance(value, list) or {"role", "from"} & value.keys() or name in _OBJECTS:
            return value
    return cell


def _folder_rows(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        what = "folder of Dataset.save_to_disk"
        return _numbered(path, what, lambda: _saved_records(path))
    files = sorted(
        file for file in path.iterdir() if _DATA_FILE.fullmatch(file.name) and file.is_file()
    )
    if not files:
        raise DataError(
            f"{path}: this folder holds no data files (.jsonl, .json, .csv, .tsv, each also .gz, "
            ".bz2, .xz or .zst, or .parquet) and was not written by Dataset.save_to_disk"
        )
    return (row for file in files for row in _path_rows(file))


def _saved_records(path: Path) -> Iterable[Mapping[str, Any]]:
    datasets = required_package("datasets", path)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        path = path / _split(splits, f"{path}: give one of its folders")
    return datasets.load_from_disk(path).with_format(None)


def _hub_rows(name: str, split: str | None) -> Iterator[Row]:
    datasets = required_package("datasets", name)
    number = 0
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        if isinstance(stream, dict):
            stream = stream[_split(list(stream), f"{name}: give name:split with a split")]
        for number, record in enumerate(stream.with_format(None), 1):
            yield f"{name}: row {number}", record
    except DataError:
        raise
    except Exception as error:  # the network, the hub and each file format raise their own
        raise DataError(
            f"{name}: no file or folder of this name, and as a hub data set it cannot be read "
            f"(after row {number}): {type(error).__name__}: {error}"
        ) from error


def _split(splits: list[str], advice: str) -> str:
    """The split to read where none was named: train, or the only one."""
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{advice} out of {', '.join(splits)}")


def required_package(name: str, source: str | Path) -> ModuleType:
    """Import what only some sources need. DataError: the package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name if name.startswith("backports") else name.partition(".")[0]
        raise DataError(
            f"{source}: reading it needs the package {package}, which the extra "
            "'train' installs: pip install 'pro-kernels[train]'"
        ) from None
