"""Where records come from: files, folders, hub names and iterables, read as a stream of rows.

A row is ``(where, raw)``: ``where`` names file and line (or row, or record) for messages; ``raw``
is the bytes of a line, which ``decode_line`` reads, or the record itself. A line that is not JSON
is thus its reader's to judge, while a source that cannot be read to its end raises ``DataError``.

    x.jsonl x.json (any other name)  JSON Lines; .gz gzip, .zst zstd      "x.jsonl:17"
    x.parquet                        by batches of a row group            "x.parquet: row 17"
    folder                           of ``Dataset.save_to_disk``, or of such files, in name order
    org/name, org/name:split         a hub data set, streamed             "org/name: row 17"
    anything iterable                dict records                         "record 17"

Nothing is written to the Hugging Face cache but what ``datasets`` keeps of a hub data set's card
and file list: a hub data set itself is streamed, a saved one memory-mapped where it lies.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from pro_trainer.data.fields import DataError, kind

Row = tuple[str, Any]
Source = str | Path | Iterable[Mapping[str, Any]]

_DATA_FILE = re.compile(r"[^.].*(\.jsonl?(\.gz|\.zst)?|\.parquet)")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
_PARQUET_BATCH = 512  # rows
_ZSTD_CHUNK = 1 << 14  # bytes
_ZSTD_WINDOW = 1 << 31  # bytes: what `zstd --long=31` writes


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
    """The JSON value of one line.

    Raises:
        DataError: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"not JSON: {error}") from None


def _path_rows(source: str | Path) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        return _folder_rows(path)
    hub = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    if hub and not path.exists() and not _DATA_FILE.fullmatch(path.name):
        return _hub_rows(hub[1], hub[2])
    return _parquet_rows(path) if path.suffix == ".parquet" else _line_rows(path)


def _line_rows(path: Path) -> Iterator[Row]:
    """Non-blank lines; every failure to read on is a DataError."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", line
    except EOFError:
        name = "zstd" if path.suffix == ".zst" else "gzip"
        raise DataError(f"{path}: the {name} stream breaks off after line {number}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file, after line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_Chunks(_zstd_chunks(path, required_package("zstandard", path))))
    return open(path, "rb")


def _zstd_chunks(path: Path, zstandard: ModuleType) -> Iterator[bytes]:
    """Decompressed bytes of all frames; EOFError where one breaks off.

    zstandard's own stream reader takes a truncated file for one that ends there.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_ZSTD_CHUNK):
                while chunk:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd file: {error}") from None
    if frame is not None:
        raise EOFError


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet, arrow = required_package("pyarrow.parquet", path), required_package("pyarrow", path)
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (arrow.ArrowException, OSError) as error:
        if code := getattr(error, "errno", None):
            raise DataError(f"{path}: cannot be read: {os.strerror(code)}") from None
        raise DataError(f"{path}: damaged Parquet file, after row {number}: {error}") from None


def _folder_rows(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_rows(path)
    files = sorted(
        file for file in path.iterdir() if _DATA_FILE.fullmatch(file.name) and file.is_file()
    )
    if not files:
        raise DataError(
            f"{path}: this folder holds no data files (.jsonl, .json, either with .gz or .zst, or "
            ".parquet) and was not written by Dataset.save_to_disk"
        )
    return (row for file in files for row in _path_rows(file))


def _saved_rows(path: Path) -> Iterator[Row]:
    datasets, arrow = required_package("datasets", path), required_package("pyarrow", path)
    number = 0
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            path = path / _split(splits, f"{path}: give one of its folders")
        for number, record in enumerate(datasets.load_from_disk(path).with_format(None), 1):
            yield f"{path}: row {number}", record
    except DataError:
        raise
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: damaged folder of Dataset.save_to_disk, after row {number}: {error}"
        ) from None


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
    """Import what only some sources need.

    Raises:
        DataError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{source}: reading it needs the package {name.partition('.')[0]}, which the extra "
            "'train' installs: pip install 'pro-kernels[train]'"
        ) from None
