"""A JSON Lines file that is made bit by bit, survives a kill, and appears only when it is whole.

Beside ``OUTPUT`` stand ``OUTPUT.partial``, one finished line a record, and ``OUTPUT.partial.json``,
the settings it was begun with. A restart with the same settings goes on behind the last finished
group of lines; with others it is an error. At the end the output is written under another name,
brought to the disk, and renamed.

Lines come in groups (what is computed as one batch): a group that a kill broke up is computed
again, in the same composition, so that the outcome is the same to the last bit.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from pro_trainer.files import destroyed, lies_in

REPORT = ".report.json"  # behind the name of the output
_HASHED_BYTES = 1 << 20


class PartialFile:
    """The unfinished form of an output file of JSON lines.

    Attributes:
        done: finished lines.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        *,
        group_size: int,
        keys: Collection[str],
        overwrite: bool = False,
    ) -> None:
        """Go on with what is there, or begin: lines with these ``keys``, ``group_size`` at a time.

        ``settings`` are what the lines depend on, JSON values only. With ``overwrite`` what was
        begun with others is dropped.

        Raises:
            ValueError: it was begun with other settings; a damaged file.
        """
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.settings_path = output.with_name(output.name + ".partial.json")
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they are read back
        self.done = 0
        if self._begun_with(settings, overwrite):
            self.done = _keep_whole_groups(self.path, group_size, keys)
        else:
            self.path.unlink(missing_ok=True)  # first: it belongs to the settings replaced next
            write_atomically(self.settings_path, [json_line(settings)])
        self._file = open(self.path, "ab")

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write a group of lines, each in one piece."""
        for line in lines:
            self._file.write(json_line(line))
            self._file.flush()
            self.done += 1

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines so far, read back."""
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)

    def finish(self, records: Iterable[dict[str, Any]]) -> None:
        """Write ``records`` as the output (gzip where its name ends in .gz); drop the rest."""
        write_atomically(self.output, map(json_line, records))
        self.close()
        self._remove()

    def close(self) -> None:
        """Stop writing; a later run goes on, if there is something to go on from."""
        with contextlib.suppress(OSError):  # the disk is full: a line that was cut is made again
            self._file.close()
        if not self.done:
            self._remove()

    def _remove(self) -> None:
        for path in (self.path, self.settings_path):
            path.unlink(missing_ok=True)

    def _begun_with(self, settings: dict[str, Any], overwrite: bool) -> bool:
        """Whether there is something to go on with."""
        if not self.path.exists():
            return False
        try:
            before = json.loads(self.settings_path.read_bytes())
            if not isinstance(before, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            if overwrite:
                return False
            raise ValueError(
                f"{self.path} is there, but not what it was begun with ({self.settings_path}: "
                f"{error}); start over with --overwrite"
            ) from None
        changed = changes(before, settings)
        if changed and not overwrite:
            raise ValueError(
                f"{self.path} was begun with other settings: {changed}. Finish it with those, or "
                "start over with --overwrite"
            )
        return not changed


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings differ, and how; "" where none does."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def check_output(output: Path, overwrite: bool, read: Iterable[str]) -> None:
    """Raise ValueError where the output may not be written, or lies in one of those ``read``."""
    for end in ("", ".partial", ".partial.json", REPORT):
        for source in read:
            if lies_in(output.with_name(output.name + end), source):
                raise destroyed("output", output, source)
    if output.is_dir():
        raise ValueError(f"output {output} is a folder, a file name was expected")
    if output.exists() and not overwrite:
        raise ValueError(f"output {output} exists; --overwrite replaces it")


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that appears whole or not at all; a .gz has no time stamp and no name in it."""
    temporary = path.with_name(path.name + ".writing")
    try:
        with open(temporary, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                    file.writelines(pieces)
            else:
                raw.writelines(pieces)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; numbers that JSON has no form for (NaN: undefined) are null."""
    text = json.dumps(defined(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, [text.encode(), b"\n"])


def plain(value: Any) -> Any:
    """The same as JSON gives it back; what JSON has no form for is text, or null (NaN)."""
    return defined(json.loads(json.dumps(value, default=str)))


def defined(value: Any) -> Any:
    """A JSON value without NaN and infinities: these become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: defined(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(part) for part in value]
    return value


def file_identity(source: str) -> dict[str, Any]:
    """What tells that a file, a folder, or a hub name is the same as before.

    Size, time of change and a hash of the first MiB of each file; nothing for a hub name.
    """
    path = Path(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return {}
    identity = {}
    for file in files:
        status = file.stat()
        with open(file, "rb") as stream:
            digest = hashlib.sha256(stream.read(_HASHED_BYTES)).hexdigest()
        name = str(file.relative_to(path)) if file != path else file.name
        identity[name] = [status.st_size, status.st_mtime_ns, digest[:16]]
    return identity


def _keep_whole_groups(path: Path, group_size: int, keys: Collection[str]) -> int:
    """Cut the file behind its last whole group of whole lines; how many lines are left."""
    position = end = kept = 0
    with open(path, "r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # the last one, cut off
            if not _has_keys(line, keys):
                raise ValueError(
                    f"{path}:{number}: damaged, or not of this program; start over with --overwrite"
                )
            position += len(line)
            if number % group_size == 0:
                end, kept = position, number
        file.truncate(end)
        os.fsync(file.fileno())
    return kept


def _has_keys(line: bytes, keys: Collection[str]) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() == set(keys)


def json_line(value: dict[str, Any]) -> bytes:
    """A line of a JSON Lines file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
