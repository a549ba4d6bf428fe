"""The emulated CUDA library, and the CUDA backend on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from unittest import mock

from cuda_emulation import build
from pro_kernels.backends import cuda, native


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its signatures.

    Raises:
        build.NoCompiler: there is no C++ compiler.
    """
    loaded, reason = native.Library("cuda", cuda.library.functions).open(build.library())
    assert loaded is not None, reason
    return loaded


_machine = {"major": 9, "backward": 0, "max_cluster": 8}


@contextlib.contextmanager
def machine(**changes: int) -> Iterator[None]:
    """Emulate a device: its ``major`` compute capability, threads and blocks in ``backward`` order,
    the largest cluster that finds room."""
    before = dict(_machine)
    _machine.update(changes)
    library().pk_emulation_set(*_machine.values())
    try:
        yield
    finally:
        _machine.update(before)
        library().pk_emulation_set(*_machine.values())


def ordered(backward: bool) -> contextlib.AbstractContextManager:
    """Threads, warps and blocks in ascending or in descending order."""
    return machine(backward=int(backward))


@contextlib.contextmanager
def serving(major: int = 9) -> Iterator[None]:
    """The CUDA backend serves CPU tensors."""
    loaded = library(), None
    stand_ins = {
        "unusable": lambda device: None,
        "_stream_of": lambda x: contextlib.nullcontext(),
    }
    with (
        machine(major=major),
        mock.patch.object(cuda.library, "_loaded", loaded),
        mock.patch.multiple(cuda, **stand_ins),
    ):
        yield
