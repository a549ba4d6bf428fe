"""What is the C++ library's own: its exp on every instruction set, its build, its threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pro_kernels.backends import cpu
from pro_kernels.backends.protocol import Rows
from pro_kernels.options import LogitOptions
from subjects import isa, isas

if cpu.unusable(torch.device("cpu")) is not None:
    pytest.skip(cpu.unusable(torch.device("cpu")), allow_module_level=True)


@pytest.mark.parametrize("name", isas())
def test_exp_is_exact_to_two_ulp(name):
    """logits_grad in fp32 with lse 0 and weight -1 is exp itself."""
    z = torch.cat([torch.linspace(-87, 80, 200_001), torch.linspace(-1, 1, 100_001)])
    z = torch.cat([z, torch.tensor([0.0, -0.0, -87.4, -200.0, -1e30, -torch.inf, torch.nan])])
    rows = Rows(z[None], torch.tensor([10**9]), LogitOptions())
    with isa(name):
        assert cpu.isa() == name
        assert cpu.details()["instruction set"].startswith(f"{name} (built: ")
        got = cpu.logits_grad(rows, torch.zeros(1), -torch.ones(1))[0]
    want = torch.exp(z.double())
    ulp = torch.exp2(torch.floor(torch.log2(want[:-7])) - 23)
    error = ((got[:-7].double() - want[:-7]).abs() / ulp).max()
    assert error <= 1.5, f"{error:.2f} ulp"
    assert got[-7:-1].tolist() == [1, 1, 0, 0, 0, 0] and got[-1].isnan()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_a_process_of_its_own():
    """The environment forces an instruction set; one OpenMP pool is shared with torch."""
    code = (
        "import torch; from pro_kernels.backends import cpu, protocol;"
        "from pro_kernels.options import LogitOptions;"
        "torch.set_num_threads(2); torch.randn(999, 999) @ torch.randn(999, 999);"
        "x, t = torch.randn(64, 9999), torch.zeros(64, dtype=torch.int64);"
        "cpu.logp(protocol.Rows(x, t, LogitOptions()));"
        "maps = open('/proc/self/maps').read().split();"
        "pools = {p for p in maps if 'libgomp' in p or 'libomp' in p or 'libiomp' in p};"
        "print(cpu.isa(), len(pools))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PRO_KERNELS_CPU_ISA": "generic"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    name, pools = done.stdout.split()
    assert name == "generic"
    assert pools == "1" or not cpu.library.info.get("openmp")
