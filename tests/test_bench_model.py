"""The performance model: counts, occupancy, resources, and the page they make."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed
from bench import tables  # noqa: E402
from bench.cli import main  # noqa: E402
from bench.model import costs, page, resources  # noqa: E402
from bench.model.cards import CARDS  # noqa: E402
from bench.model.occupancy import occupancy  # noqa: E402

H200 = CARDS["H200"]

# (registers, threads, shared bytes) -> CTAs an SM on (sm_80, sm_90, sm_100): what NVIDIA's
# cuda_occupancy.h (CUDA 13.0) returns, with 1 KB reserved a CTA and the largest carve-out.
CALCULATOR = {
    (32, 128, 0): (16, 16, 16),
    (40, 256, 0): (6, 6, 6),
    (64, 512, 0): (2, 2, 2),
    (255, 256, 0): (1, 1, 1),
    (64, 1024, 0): (1, 1, 1),
    (65, 1024, 0): (0, 0, 0),
    (32, 1024, 65536): (2, 2, 2),
    (40, 256, 40000): (4, 5, 5),
    (168, 384, 200000): (0, 1, 1),
    (16, 32, 0): (32, 32, 32),
    (33, 96, 1000): (16, 16, 16),
    (24, 128, 16384): (9, 13, 13),
    (56, 512, 114688): (1, 2, 2),
    (128, 512, 232448): (0, 1, 1),
    (32, 64, 8192): (18, 25, 25),
}


@pytest.mark.parametrize(("sizes", "expected"), CALCULATOR.items())
def test_occupancy_is_that_of_nvidias_calculator(sizes, expected):
    registers, threads, shared = sizes
    for arch, ctas in zip(("sm_80", "sm_90a", "sm_100"), expected, strict=True):
        found = occupancy(arch, registers, threads, shared)
        assert found.ctas == ctas, arch
        assert found.warps == ctas * -(-threads // 32)
        assert found.share == found.warps / 64


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [((16, 32, 0), "CTAs"), ((255, 256, 0), "registers"), ((24, 128, 16384), "shared memory"),
     ((24, 1024, 0), "warps")],
)  # fmt: skip
def test_occupancy_names_what_limits_it(sizes, limit):
    assert occupancy("sm_90", *sizes).limit == limit


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sm_70", 32, 128), "arch must be one of"),
        (("sm_90", 32, 2048), "threads must be in"),
        (("sm_90", 256, 128), "registers must be in"),
        (("sm_90", 32, 128, -1), "shared must be"),
    ],
)
def test_occupancy_refuses_what_no_kernel_has(arguments, said):
    with pytest.raises(ValueError, match=said):
        occupancy(*arguments)


def test_flops_and_bytes_by_hand():
    R, N, H, V = 16384, 6528, 4096, 128256
    full = costs.linear(R, N, H, V, 32, 4)
    assert (full.tier, full.flops) == ("T1", 6.0 * N * H * V)
    assert costs.linear(R, N, H, V, 32, 4, "frozen").flops == 4.0 * N * H * V
    assert costs.linear(R, N, H, V, 32, 4, "score").flops == 2.0 * N * H * V
    logits = costs.logits_in(R, N, V, 32, 4)
    needed = (2 * N + R) * V * 2
    assert needed < logits.moved < 1.001 * needed
    kept = costs.grad_filter(R, N, H, V, 32, 4, kept=0.25)
    assert kept.flops == pytest.approx((2 + 4 * 0.25) * N * H * V)


def test_times_by_hand():
    N, H, V = 6528, 4096, 128256
    cost = costs.linear(16384, N, H, V, 32, 4)
    assert cost.matmul_seconds(H200) == pytest.approx(6.0 * N * H * V / 785e12)
    row = costs.residual_kernel(N, V)
    assert row.bound(H200) == "bandwidth"
    assert row.seconds(H200) == pytest.approx(4.0 * N * V / 4.3e12, rel=1e-3)
    # Few rows against a wide head: the weight's bytes, not the flops.
    thin = costs.matmul("", 16, V, H)
    assert thin.bound(H200) == "bandwidth"
    share = costs.crossover(N, H, V, H200)
    product, read = 2.0 * N * H * V / 785e12, 2.0 * N * V / 4.3e12
    assert share == pytest.approx(product / (product + read), rel=1e-3)


def test_what_the_model_does_not_cover_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        costs.linear(8, 8, 8, 8, 1, 2, "trian")
    with pytest.raises(ValueError, match="tier T3 is not modelled"):
        costs.linear(16384, 16384, 4096, 128256, 32, 4, budget=1 << 30)


def test_committed_page_is_what_the_generator_gives():
    begin, end = tables.marks(page.BLOCK)
    committed = page.PAGE.read_text().split(begin)[1].split(end)[0].strip("\n")
    assert committed == page.block(resources.load()), "run: python -m bench --model"


def test_committed_resources_are_of_the_configurations_that_are_launched():
    aot = pytest.importorskip("pro_kernels.backends.triton.aot")
    rows = resources.load()["backends"]["triton"]["kernels"]
    for arch in {row["arch"] for row in rows}:
        committed = {(row["kernel"], row["config"]) for row in rows if row["arch"] == arch}
        launched = {
            (v.kernel, aot.describe(v)) for v in aot.variants(arch) if resources.plain(vars(v))
        }
        assert committed == launched, "run: python -m bench --model --resources"


def test_command_prints_and_rewrites_the_block(tmp_path, monkeypatch, capsys):
    begin, end = tables.marks(page.BLOCK)
    copy = tmp_path / "performance.md"
    copy.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    monkeypatch.setattr(page.update, "__defaults__", (copy,))
    assert main(["--model"]) == 0
    text = copy.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "Cases, predicted" in capsys.readouterr().out


def test_missing_binaries_are_named(tmp_path):
    with pytest.raises(RuntimeError, match="not built"):
        resources.cuda(tmp_path / "none.so")
    data = {
        "schema": resources.SCHEMA,
        "versions": {"triton": "3.6.0", "cuda": None},
        "backends": {
            "triton": {"reason": None, "kernels": []},
            "cuda": {"reason": "no nvcc", "kernels": []},
        },
    }
    path = tmp_path / "resources.json"
    resources.save(data, path)
    assert resources.load(path) == data
    assert "**cuda**: no figures: no nvcc." in page.block(data)
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="not a resources file"):
        resources.load(path)


def test_triton_rows_are_the_plain_variants_with_their_worst_flags():
    base = {"kernel": "logp", "config": "any V warps=8", "arch": "sm_90", "dtype": "bf16",
            "transform": "none", "aligned": True, "regs": 30, "smem": 16, "spills": 0}  # fmt: skip
    table = [base, {**base, "regs": 34}, {**base, "transform": "softcap", "regs": 99},
             {**base, "dtype": "fp16"}, {**base, "aligned": False}]  # fmt: skip
    (row,) = resources.triton_rows(table)
    assert (row["registers"], row["threads"]) == (34, 256)


USAGE = """\
arch = sm_80
 Function _Z1a:
  REG:10 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _Z1a:
  REG:12 STACK:8 SHARED:1536 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1b:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """\
arch = sm_90a
.nv.info._Z1b
.nv.info._Z1a
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x200 0x1 0x1 
"""  # noqa: W291


def test_cuda_rows_from_what_cuobjdump_prints():
    names = {"_Z1a": "void pk::a<float, 4>(float*)", "_Z1b": "b(float*)"}
    rows = resources.cuda_rows(USAGE, ELF, lambda found: [names[n] for n in found])
    keys = ("kernel", "config", "arch", "threads", "registers", "shared", "spills")
    assert [tuple(row[k] for k in keys) for row in rows] == [
        ("a", "float, 4", "sm_80", None, 10, 512, 0),
        ("a", "float, 4", "sm_90a", 512, 12, 512, 8),
        ("b", "", "sm_90a", None, 8, 0, 0),
    ]


@pytest.mark.parametrize(
    ("kernel", "config", "vocab", "expected"),
    [
        ("residual_on_chip_kernel", "pk::BFloat16, false", 1000, 512 + 2000),
        ("residual_on_chip_kernel", "pk::BFloat16, false", 128256, 512 + 128256 * 2 // 4),
        ("residual_on_chip_kernel", "float, true", 128256, 512 + 128256 * 4 // 8),
        ("residual_on_chip_kernel", "float, true", 1_000_000, 0),
        ("residual_reread_kernel", "float, true", 128256, 512),
        ("gather_kernel", "", 128256, 0),
    ],
)
def test_shared_memory_of_a_launch(kernel, config, vocab, expected):
    found = resources.dynamic_shared({"kernel": kernel, "config": config}, vocab)
    assert found == expected


def test_a_row_on_chip_leaves_room_for_two_more_on_the_page():
    text = page.block(resources.load())
    line = next(x for x in text.splitlines() if "on_chip_kernel | pk::BFloat16, false" in x)
    assert line.endswith("| 64640 | 0 | 3 | 38% | shared memory |")
