"""Compile the kernels for a target ahead of time, with no GPU, and report what they use.

``table("sm_90")`` returns one dict a kernel: its name, configuration, dtype and flags, registers a
thread, shared memory, bytes spilled, and whether logits move in 16-byte vectors. From the shell,
one JSON object a line:

    python -m pro_kernels.backends.triton.aot sm_90 [--all]

Without ``--all``: every launch configuration and dtype, with the flags all off and all on; with it,
every combination of flags and of alignment that the launchers can produce. Each is what a launcher
asks for when called with such tensors: nothing here restates a kernel's arguments.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any
from unittest import mock

import torch

from pro_kernels.backends.protocol import Candidates, Rows
from pro_kernels.backends.triton import configs, interpreted
from pro_kernels.options import LogitOptions, RankingOptions

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRANSFORMS = {
    "none": LogitOptions(),
    "scale": LogitOptions(logit_scale=0.5),
    "softcap": LogitOptions(softcap=30.0, logit_scale=0.5),
}

# The optional inputs and outputs of each kernel.
_OPTIONAL = {
    "logp": ("exact", "entropy"),
    "residual": ("exact",),
    "logits_grad": ("exact", "weights", "entropy"),
    "ranking": ("rewards",),
    "gather": ("weights",),
    "scatter": ("by_row",),
    "target_logits": ("bias",),
    "score": ("bias",),
    "compact": ("move",),
}
_HIDDEN, _WIDE = 1024, 1 << 17
# Those with one block size.
_BLOCKS = dict.fromkeys(("gather", "scatter", "target_logits"), configs.SIDE_BLOCK)
_BLOCKS |= dict.fromkeys(("count", "sums", "compact"), configs.FILTER_BLOCK)


@dataclass(frozen=True)
class Variant:
    """One binary that a launcher can ask for."""

    kernel: str
    arch: str
    dtype: str  # of the logits or of the matmul's operands; "fp32" for ranking and merge
    config: Any  # RowConfig, RankingConfig or ScoreConfig, or the one block size that there is
    transform: str = "none"
    given: tuple[str, ...] = ()  # the optional tensors that are not None
    aligned: bool = True  # pointers to 16 bytes, V and the strides to 16 elements


def variants(arch: str, exhaustive: bool = False) -> Iterator[Variant]:
    """Every binary the launchers can ask for on ``arch``, or the corners of the flags only.

    ``gather`` is compiled with one dtype for both sides; it has four more with two.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {list(ARCHS)}, got {arch!r}")
    family = _target(arch).family
    for kernel in (*configs.KERNELS, "score"):
        given = _OPTIONAL[kernel]
        # The second of them takes most registers: wide vectors, all pointers.
        most = "softcap" if kernel == "score" else "none"
        corners = [("none", (), True), (most, given, True), ("softcap", given, False)]
        every = itertools.product(TRANSFORMS, _subsets(given), (True, False))
        flags = list(every) if exhaustive else corners
        tables = configs.ROWS[family].get(kernel, (None,))
        for table, dtype, flag in itertools.product(tables, DTYPES, flags):
            score = configs.score_config(family, DTYPES[dtype].itemsize, aligned=flag[2])
            yield Variant(kernel, arch, dtype, table or score, *flag)
    for (kernel, block), dtype in itertools.product(_BLOCKS.items(), DTYPES):
        for given, aligned in (((), True), (_OPTIONAL.get(kernel, ()), False)):
            yield Variant(kernel, arch, dtype, block, given=given, aligned=aligned)
    for transform in TRANSFORMS:
        yield Variant("merge", arch, "fp32", configs.MERGE_BLOCK, transform)
    for ranking in configs.RANKING:
        for given in _subsets(_OPTIONAL["ranking"]):
            yield Variant("ranking", arch, "fp32", ranking, given=given)


def table(arch: str, exhaustive: bool = False) -> list[dict[str, Any]]:
    """Resources of every variant, compiled for ``arch`` (keys: see ``resources``)."""
    return [resources(v) for v in variants(arch, exhaustive)]


def resources(variant: Variant) -> dict[str, Any]:
    """Compile one variant: kernel, config, arch, dtype, flags, regs, smem, spills, vectors."""
    compiled = compile_variant(variant)
    asm = compiled.asm
    if "cubin" in asm:
        regs, spills = _cubin_usage(asm["cubin"])
        vectors = bool(re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg.* 0x10", asm["ptx"]))
    else:
        text = asm["amdgcn"]
        regs = _amd_field(text, "vgpr_count")
        spills = 4 * _amd_field(text, "vgpr_spill_count")
        vectors = bool(re.search(r"(global|buffer)_load_dwordx4", text))
    used = {"regs": regs, "smem": compiled.metadata.shared, "spills": spills, "vectors": vectors}
    return vars(variant) | {"config": str(variant.config)} | used


def compile_variant(variant: Variant) -> Any:
    """Triton's compiled kernel of one variant.

    Raises:
        RuntimeError: the process runs Triton's interpreter, whose functions cannot be compiled.
    """
    if interpreted():
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    with launches(variant.arch) as made:
        _launch(variant)
        return next(build for name, build in made if name == f"{variant.kernel}_kernel")()


@contextlib.contextmanager
def launches(arch: str) -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    """Make every launch, on CPU tensors, the one that a device of ``arch`` would get, but keep it.

    Yields a list that grows by ``(the kernel's name, what compiles it)``, of use in here only.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if cuda else GPUTarget("hip", arch, 64)
    driver = mock.Mock()
    driver.get_current_target.return_value = target
    driver.get_current_device.return_value = arch  # binaries are kept by device
    driver.get_current_stream.return_value = 0
    made: list[tuple[str, Callable[[], Any]]] = []
    compile_ = JITFunction.run

    def run(kernel: Any, *arguments: Any, warmup: bool, **keywords: Any) -> None:
        build = functools.partial(compile_, kernel, *arguments, warmup=True, **keywords)
        made.append((kernel.__name__, build))

    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "target_of", lambda *device: _target(arch)),
    ):
        yield made


def _launch(variant: Variant) -> None:
    """Call the launcher such that it asks for this variant."""
    from pro_kernels.backends.triton import filtered, launch

    shift = int(not variant.aligned)
    index, number = torch.zeros(1, dtype=torch.int64), torch.zeros(1)

    def matrix(columns: int, rows: int = 1) -> torch.Tensor:
        shape = rows, columns - shift
        whole = torch.empty(shift + math.prod(shape), dtype=DTYPES[variant.dtype])
        return whole[shift:].view(shape)

    def given(name: str, value: Any) -> Any:
        return value if name in variant.given else None

    options = TRANSFORMS[variant.transform]
    config, x, weights = variant.config, matrix(_HIDDEN), given("weights", number)
    if isinstance(config, configs.RowConfig):
        x = matrix(config.max_columns or _WIDE)
    rows = Rows(x, index, options, given("exact", number))
    match variant.kernel:
        case "logp":
            launch.logp(rows, entropy="entropy" in variant.given)
        case "residual":
            launch.residual_(rows)
        case "logits_grad":
            entropy = given("entropy", (number, number))
            launch.logits_grad(rows, number, weights, out=x, entropy=entropy)
        case "ranking":
            order, rewards = (t.expand(1, config.block_n) for t in (index, number))
            rest = (index.expand(2), index, order, given("rewards", rewards), index, number)
            launch.ranking(number, Candidates(*rest), RankingOptions())
        case "gather":
            launch.gather_rows(x, index, weights, x.dtype)
        case "scatter":
            launch.scatter_rows(x, number, index, x, "by_row" in variant.given)
        case "target_logits":
            launch.target_logits(x, matrix(_HIDDEN, 2), given("bias", x[0]), index)
        case "count":
            filtered.count_large(x, 0.5)
        case "sums":
            filtered.sums(x, index, 1)
        case "compact":
            groups = Namespace(order=index, size=1, starts=index.expand(2), columns=index[:0].int())
            weights = torch.zeros(2, x.shape[1])
            filtered.compact_(x, groups, weights, "move" in variant.given)
        case _:  # score, then merge
            weight = matrix(_HIDDEN, _HIDDEN - shift)
            bias = given("bias", x[0])
            launch.score(x, weight, bias, index, target_logits=number, options=options)


def _target(arch: str) -> configs.Target:
    if arch.startswith("sm_"):
        return configs.Target(configs.family("cuda", int(arch[3:])), 32)
    return configs.Target(configs.family("hip", arch), 64)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills), from Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_field(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", assembly)
    assert found is not None, name
    return int(found[1])


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    sizes = range(len(names) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(names, size)]


if __name__ == "__main__":
    for row in table(sys.argv[1], exhaustive="--all" in sys.argv[2:]):
        print(json.dumps(row), flush=True)
