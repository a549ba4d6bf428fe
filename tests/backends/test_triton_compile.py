"""Every Triton kernel compiles for its targets without a GPU, spills nothing and loads vectors.

In subprocesses without TRITON_INTERPRET, as an interpreted function cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from pro_kernels.backends.triton import aot, configs  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
ROW_KERNELS = {"logp", "residual", "logits_grad"}
OTHERS = {*"count sums compact ranking gather scatter target_logits score merge".split()}


def run_python(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, environment.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def check(arch: str, *arguments: str, variants: list) -> list[dict]:
    found = [json.loads(line) for line in run_python(*arguments).splitlines()]
    assert len(found) == len(variants)
    for row, variant in zip(found, variants, strict=True):
        # The ranking kernel runs once a step, off the bandwidth-bound path: there some versions of
        # ptxas put a few words aside for occupancy (8 bytes with Triton 3.7, up to 24 with 3.6).
        assert row["spills"] <= (32 if row["kernel"] == "ranking" else 0), row
        if row["kernel"] in ROW_KERNELS | {"score"}:
            assert row["vectors"] == row["aligned"] or arch == "gfx942", row
        # ``residual`` counts on its whole grid being resident: 65536 registers, 2048 threads an SM.
        if row["kernel"] == "residual" and row["transform"] == "none" and arch != "gfx942":
            threads = 32 * variant.config.num_warps * variant.config.programs
            assert threads <= 2048 and threads * (row["regs"] + 7 & ~7) <= 65536, row
    return found


CHOSEN = """
import json, sys
from pro_kernels.backends.triton import aot
for i, variant in enumerate(aot.variants(sys.argv[1])):
    if i in json.loads(sys.argv[2]):
        print(json.dumps(aot.resources(variant)))
"""


@pytest.mark.parametrize("turn", range(len(aot.ARCHS)), ids=aot.ARCHS)
def test_every_configuration_compiles(turn):
    """In each dtype for one of Nvidia's; the slow test has them all for each."""
    arch, groups = aot.ARCHS[turn], {}
    variants = list(aot.variants(arch))
    for i, variant in enumerate(variants):
        groups.setdefault(dataclasses.replace(variant, dtype=""), []).append(i)
    chosen = sorted(x[(i + turn) % len(x)] for i, x in enumerate(groups.values()))
    some = [variants[i] for i in chosen]
    found = check(arch, "-c", CHOSEN, arch, json.dumps(chosen), variants=some)
    assert {row["kernel"] for row in found} == ROW_KERNELS | OTHERS
    assert {row["dtype"] for row in found if row["kernel"] == "residual"} == set(aot.DTYPES)
    if arch == "gfx942":
        assert all(r["vectors"] for r in found if r["aligned"] and r["kernel"] in ROW_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_combination_of_flags_compiles(arch):
    variants = list(aot.variants(arch, exhaustive=True))
    check(arch, "-m", aot.__name__, arch, "--all", variants=variants)


def test_launchers_build_one_binary_a_kernel_with_64_bit_offsets():
    """N, n, alignment of per-row vectors, block offsets and option values build no new one."""
    code = """
import re
import torch
from pro_kernels import backends
from pro_kernels.backends.protocol import Candidates, Rows
from pro_kernels.backends.triton import aot
from pro_kernels.options import LogitOptions, RankingOptions
backend = backends.get("triton")

def call(rows, n, first, scale, ranking_options):
    options = LogitOptions(logit_scale=scale)
    logits = torch.randn(rows, 32000).bfloat16()
    targets = torch.zeros(rows + 5, dtype=torch.int64)[first : first + rows]
    numbers = torch.randn(rows + 5)[first : first + rows]
    given = Rows(logits, targets, options, numbers)
    backend.logp(given)
    backend.residual_(given)
    given = given._replace(exact=None)
    for entropy in (None, (numbers, numbers)):
        backend.logits_grad(given, numbers, numbers, first_column=first, entropy=entropy)
    lengths = torch.full((2 * n,), 3)
    candidates = Candidates(
        torch.arange(2 * n + 1) * 3, lengths, torch.arange(2 * n).view(2, n),
        torch.randn(2, n), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    backend.ranking(torch.randn(6 * n), candidates, ranking_options)

    source, weight = torch.randn(50, 64).bfloat16(), torch.randn(32000, 64).bfloat16()
    x = backend.gather_rows(source, targets, numbers, torch.bfloat16)
    for shared in (False, True):
        backend.scatter_rows(x, numbers, targets, source, shared)
    backend.score(x, weight, weight[:, 0], targets, options=options)

with aot.launches("sm_90") as made:
    call(16, 4, 0, 0.5, RankingOptions())
    call(1, 3, 1, 2, RankingOptions(eps=1e-10, top_k=1, skip_ties=True, tau=2))
    call(37, 1, 3, 0.1, RankingOptions(length_normalize=False, sft_weight=1, top_k=16))
    built = [(name, build()) for name, build in made]
print(len(built), len({build.hash for _, build in built}))
offset = re.compile(r"arith.muli %row\\S*, %\\S+ : i64")
rows = ("logp_kernel", "residual_kernel", "logits_grad_kernel")
print({bool(offset.search(build.asm["ttir"])) for name, build in built if name in rows})
"""
    # The row kernels and the ranking; gather, scatter with and without a sort, the target's logit,
    # score and merge.
    assert run_python("-c", code).split() == ["33", "11", "{True}"]


def test_aot_refuses_an_unknown_arch_and_the_interpreter(monkeypatch):
    with pytest.raises(ValueError, match="sm_70"):
        list(aot.variants("sm_70"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.table("sm_90")


@pytest.mark.parametrize(
    ("backend", "arch", "family"),
    [("cuda", 80, "sm_80"), ("cuda", 89, "sm_86"), ("cuda", 90, "sm_90"), ("cuda", 103, "sm_100"),
     ("cuda", 120, "sm_86"), ("hip", "gfx942", "gfx942"), ("xpu", "pvc", "xpu")],
)  # fmt: skip
def test_families(backend, arch, family):
    assert configs.family(backend, arch) == family


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_tiles_are_powers_of_two_and_fit_a_program(kernel):
    for family, tables in configs.ROWS.items():
        warp_size = 64 if family == "gfx942" else 32
        limits = [c.max_columns for c in tables[kernel][:-1]]
        assert limits == sorted(limits)
        for config in tables[kernel]:
            lanes, group = config.tile(2, warp_size, softcap=False)
            assert lanes & (lanes - 1) == 0 and group == 8
            assert config.num_warps * warp_size <= 1024


@pytest.mark.parametrize("columns", [2048, 32000, 50257, 65536, 128256, 262144])
@pytest.mark.parametrize(
    ("family", "sms"),
    [("sm_80", 108), ("sm_90", 132), ("sm_100", 148), ("sm_86", 58), ("gfx942", 304)],
)
def test_rows_under_way_fit_the_cache_that_reads_them_again(family, sms, columns):
    """Or there is one program an SM, the least. Up to 128256 columns of bf16 they always fit."""
    target = configs.Target(family, 64 if family == "gfx942" else 32, sms)
    config = configs.row_config("residual", target, columns)
    programs = configs.row_programs("residual", target, config, 2 * columns)
    fits = programs * 2 * columns <= 0.75 * configs.L2_BYTES[family]
    assert programs % sms == 0 and (fits or (programs == sms and columns > 128256))
