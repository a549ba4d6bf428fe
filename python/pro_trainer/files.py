"""What a run writes: never over what it reads, one run at a time, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # locks of this process
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of safetensors and of torch.save, whose errors carry no number.
_FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|PytorchStreamWriter failed wri"
                        r"|inline_container.* unexpected pos")  # fmt: skip


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether ``path`` is ``folder`` or below it, links followed."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    return folder in (path, *path.parents)


def destroyed(option: str, path: Path, source: str) -> ValueError:
    """The error of a run that would write over what it reads."""
    return ValueError(
        f"{option} {path}: writing there would change {source}, which this run reads; give another "
        f"{option}"
    )


@contextlib.contextmanager
def alone(option: str, path: Path, lock: Path) -> Iterator[None]:
    """Keep other runs from writing ``path``; ``lock`` is the file that says so.

    The lock goes with the process, however that ends, and its file at the end of the run, with the
    folders that were made for it and stayed empty. Inside another ``alone`` of the same lock this
    does nothing.

    Raises:
        ValueError: another run holds it, or there can be no file.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{option} {path} is a link to {os.readlink(path)}, which is not there: remove the "
            "link, or make what it points to"
        )
    lock = lock.absolute()
    if lock in _held:
        yield
        return
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(option, path, lock)
        except OSError as error:
            raise ValueError(
                f"{option} {path} cannot be written ({error.strerror}): give another {option}"
            ) from error
        _held.add(lock)
        try:
            yield
        finally:
            _held.remove(lock)
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _lock(option: str, path: Path, lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no fcntl")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a fork does not inherit it
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "it does not say which"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise ValueError(
                    f"{option} {path} is being written by another run ({holder}): wait for its "
                    f"end, or give another {option}"
                ) from None
            print(f"{path}: no locks here ({error.strerror}): nothing keeps another run out")
        with contextlib.suppress(FileNotFoundError):  # its holder ended in between
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder whose files move to ``folder`` once all are written; where one fails none does."""
    writing = folder / ".writing"
    shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
    writing.mkdir(parents=True)
    try:
        yield writing
        for file in [p for p in writing.rglob("*") if p.is_file()]:
            target = folder / file.relative_to(writing)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` comes of a disk, a quota or a largest file size that is used up."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__
    return False
