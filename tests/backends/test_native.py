"""The C ABI: structs and functions are what the headers of csrc say, or the library is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cuda_emulation import build
from pro_kernels.backends import cpu, cuda, native
from pro_kernels.backends.protocol import Rows
from pro_kernels.options import LogitOptions, RankingOptions

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_options_keep_their_values_in_c():
    for options in (
        LogitOptions(),
        LogitOptions(30.0, -0.5),
        RankingOptions(),
        RankingOptions(False, 0.3, True, 1e-10, 1.5, True, 7, False),
    ):
        in_c = native.in_c(options)
        assert {name for name, _ in in_c._fields_} == {f.name for f in dataclasses.fields(options)}
        for name, value in dataclasses.asdict(options).items():
            none = {"softcap": 0.0, "top_k": -1}.get(name)
            assert getattr(in_c, name) == (none if value is None else value), name
        assert native.in_c(dataclasses.replace(options)) is in_c


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
def test_signatures_match_the_header(backend):
    name = backend.NAME
    text = (CSRC / name / f"pro_kernels_{name}.h").read_text()
    text = re.sub(r"//.*", "", text)
    declared = dict(re.findall(rf"PK_EXPORT [\w ]+\W+pk_{name}_(\w+)\(([^)]*)\);", text))
    assert set(declared) == {"layout", *backend.library.functions}
    for function, (_, kinds) in backend.library.functions.items():
        arguments = [a for a in declared[function].split(",") if a.strip() != "void"]
        assert len(arguments) == len(kinds) <= 13
        for argument, kind in zip(arguments, kinds, strict=True):
            if "pk::" in argument:
                want = kind._type_.__name__
                assert f"const pk::{want}*" in argument, (function, argument)
            else:
                want = (ctypes.c_void_p, ctypes.c_char_p) if "*" in argument else (ctypes.c_int32,)
                assert kind in want, (function, argument)


@pytest.fixture(scope="module")
def altered(tmp_path_factory):
    """Builds a library that only tells its layout, from headers in which a text is replaced."""
    try:
        compiler = build._compiler()
    except build.NoCompiler as error:
        pytest.skip(str(error))

    def make(old: str = "", new: str = "") -> Path:
        folder = tmp_path_factory.mktemp("abi")
        header = (CSRC / "include" / "pk_abi.h").read_text()
        assert old in header
        (folder / "pk_abi.h").write_text(header.replace(old, new, 1))
        (folder / "library.cpp").write_text(
            '#include "pk_abi.h"\nPK_EXPORT const char* pk_cpu_layout(void) {'
            "static const std::string text = pk::layout(); return text.c_str(); }\n"
        )
        target = folder / "library.so"
        flags = ["-std=c++17", "-shared", "-fPIC", str(folder / "library.cpp"), "-o", str(target)]
        subprocess.run([*compiler, *flags], check=True)
        return target

    return make


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("kAbi = 1;", "kAbi = 7;", "it has ABI 7, this package ABI 1"),
        (
            "FIELD(double, eps)",
            "FIELD(double, epsilon)",
            "it has RankingOptions.epsilon float64 at 8, this package RankingOptions.eps float64 at"
            " 8",
        ),
        (
            "FIELD(int64_t, stride)",
            "FIELD(int32_t, stride)",
            "it has Rows.stride int32 at 32, this package Rows.stride int64 at 32",
        ),
        (
            "FIELD(int32_t, single_sft)",
            "FIELD(int32_t, single_sft) FIELD(int32_t, focal)",
            "it has RankingOptions 56 bytes, this package RankingOptions 48 bytes",
        ),
        (
            "STRUCT(ColumnFilter, PK_COLUMN_FILTER)",
            "",
            "it has nothing more, this package ColumnFilter 192 bytes",
        ),
    ],
    ids=["number", "name", "type", "more fields", "no struct"],
)
def test_a_library_of_another_layout_is_refused(altered, old, new, reason):
    library, said = native.Library("cpu", {}).open(altered(old, new))
    assert library is None and "is of another version: " in said and said.endswith(reason)


def test_a_library_of_this_layout_is_taken(altered):
    path = altered()
    assert native.Library("cpu", {}).open(path)[1] is None
    missing = cpu.library.open(path)[1]
    assert "does not load" in missing and "pk_cpu_isa" in missing


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
def test_a_library_that_is_not_there_or_does_not_load_tells_why(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    here, elsewhere = torch.device(backend.NAME, 0), torch.device("meta")
    assert "tensors are on meta, not on" in backend.unusable(elsewhere)
    monkeypatch.setattr(backend.library, "folder", tmp_path)
    monkeypatch.setattr(backend.library, "_loaded", None)
    assert "never built" in backend.unusable(here)
    record = {backend.NAME: {"reason": "no compiler found"}}
    (tmp_path / "build.json").write_text(json.dumps(record))
    backend.library._loaded = None
    assert "no compiler found" in backend.unusable(here)
    assert "no compiler found" in backend.details()["reason"]
    with pytest.raises(RuntimeError, match="no compiler found"):
        backend.logp(Rows(torch.randn(1, 3), torch.zeros(1).long(), LogitOptions()))
    backend.library.path.write_text("not a library")
    backend.library._loaded = None
    assert "does not load" in backend.unusable(here)
