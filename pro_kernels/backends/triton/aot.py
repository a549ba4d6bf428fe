"""Compile the kernels for a target ahead of time, with no GPU, and report what they use.

``table("sm_90")`` returns one dict a kernel: its name, configuration, dtype and flags, registers a
thread, shared memory, bytes spilled, and whether logits move in 16-byte vectors. From the shell,
one JSON object a line:

    python -m pro_kernels.backends.triton.aot sm_90 [--all]

Without ``--all``: every launch configuration and dtype, with the flags all off and all on; with it,
every combination of flags and of alignment that the launchers can produce.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pro_kernels.backends.triton import configs, interpreted

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Types of the run-time arguments; ``*data`` is a pointer to the kernel's main dtype.
_TYPES = {
    **dict.fromkeys(("logits_ptr", "out_ptr", "x_ptr", "weight_ptr"), "*data"),
    **dict.fromkeys(("source_ptr", "side_ptr", "bias_ptr"), "*data"),
    **dict.fromkeys(("rows_ptr", "by_row_ptr"), "*i64"),
    **dict.fromkeys(("weight_stride", "H", "tiles"), "i32"),
    **dict.fromkeys(("targets_ptr", "offsets_ptr", "lengths_ptr", "order_ptr"), "*i64"),
    "sft_rank_ptr": "*i64",
    **dict.fromkeys(
        ("stride", "out_stride", "N", "V", "first_column", "B", "S", "n", "terms_live"), "i32"
    ),
    **dict.fromkeys(("length_normalize", "skip_ties", "sft_mean"), "i32"),
    **dict.fromkeys(("logit_scale", "softcap", "fixed_tau", "log_eps"), "fp32"),
    **dict.fromkeys(("sft_weight", "single_weight"), "fp32"),
}  # every other pointer: *fp32
_OPTIONAL = {
    "logp": ("exact_ptr", "entropy_ptr"),
    "residual": ("exact_ptr",),
    "logits_grad": ("exact_ptr", "weights_ptr", "entropy_ptr"),
    "ranking": ("rewards_ptr",),
    "gather": ("weights_ptr",),
    "scatter": ("by_row_ptr",),
    "target_logits": ("bias_ptr",),
    "score": ("bias_ptr",),
    "merge": (),
}
_SIDES = ("gather", "scatter", "target_logits")
_DIVISIBLE = (
    *("logits_ptr", "out_ptr", "x_ptr", "weight_ptr", "source_ptr", "side_ptr"),
    *("stride", "out_stride", "weight_stride", "V", "H"),
)


@dataclass(frozen=True)
class Variant:
    """One binary that a launcher can ask for."""

    kernel: str
    arch: str
    dtype: str  # of the logits or of the matmul's operands; "fp32" for ranking and merge
    config: configs.RowConfig | configs.RankingConfig | configs.ScoreConfig | None
    transform: int = 0
    given: tuple[str, ...] = ()  # the optional pointers that are not None
    aligned: bool = True  # pointers to 16 bytes, V and the strides to 16 elements


def variants(arch: str, exhaustive: bool = False) -> Iterator[Variant]:
    """Every binary the launchers can ask for on ``arch``, or the corners of the flags only.

    ``gather`` is compiled with one dtype for both sides; it has four more with two.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {list(ARCHS)}, got {arch!r}")
    target = _target(arch)
    for kernel in configs.KERNELS:
        for config, dtype in itertools.product(configs.ROWS[target.family][kernel], DTYPES):
            # The second of them takes most registers: wide vectors, all pointers.
            corners = [(0, (), True), (0, _OPTIONAL[kernel], True), (2, _OPTIONAL[kernel], False)]
            every = itertools.product(range(3), _subsets(_OPTIONAL[kernel]), (True, False))
            for transform, given, aligned in every if exhaustive else corners:
                yield Variant(kernel, arch, dtype, config, transform, given, aligned)
    for dtype, bytes_ in DTYPES.items():
        flags = list(itertools.product(range(3), _subsets(_OPTIONAL["score"]), (True, False)))
        corners = [(0, (), True), *((2, _OPTIONAL["score"], aligned) for aligned in (True, False))]
        for transform, given, aligned in flags if exhaustive else corners:
            score = configs.score_config(target.family, bytes_, aligned)
            yield Variant("score", arch, dtype, score, transform, given, aligned)
        for kernel in _SIDES:
            for given, aligned in (((), True), (_OPTIONAL[kernel], False)):
                yield Variant(kernel, arch, dtype, None, given=given, aligned=aligned)
    for transform in range(3):
        yield Variant("merge", arch, "fp32", None, transform)
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
    return {
        "kernel": variant.kernel,
        "config": _describe(variant),
        "arch": variant.arch,
        "dtype": variant.dtype,
        "transform": ("none", "scale", "softcap")[variant.transform],
        "given": [name.removesuffix("_ptr") for name in variant.given],
        "aligned": variant.aligned,
        "regs": regs,
        "smem": compiled.metadata.shared,
        "spills": spills,
        "vectors": vectors,
    }


def compile_variant(variant: Variant) -> Any:
    """Triton's compiled kernel of one variant.

    Raises:
        RuntimeError: the process runs Triton's interpreter, whose functions cannot be compiled.
    """
    if interpreted():
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(variant.kernel)
    constants = _constants(variant)
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = _TYPES.get(name, "*fp32").replace("data", variant.dtype)
        signature[name] = "constexpr" if name in constants else kind
        if variant.aligned and name in _DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    cuda = variant.arch.startswith("sm_")
    target = (
        GPUTarget("cuda", int(variant.arch[3:]), 32) if cuda else GPUTarget("hip", variant.arch, 64)
    )
    chosen = variant.config
    options = {} if chosen is None else {"num_warps": chosen.num_warps}
    if isinstance(chosen, configs.RowConfig | configs.ScoreConfig):
        options["num_stages"] = chosen.num_stages
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def _kernel(name: str) -> Any:
    from pro_kernels.backends.triton import prompts, rows, scoring, sides

    home = {"ranking": prompts, "score": scoring, "merge": scoring, **dict.fromkeys(_SIDES, sides)}
    return getattr(home.get(name, rows), f"{name}_kernel")


def _constants(variant: Variant) -> dict[str, Any]:
    absent = dict.fromkeys(set(_OPTIONAL[variant.kernel]) - set(variant.given))
    if variant.kernel == "logits_grad" and "entropy_ptr" in absent:
        absent["by_ptr"] = None  # the weights of the entropy
    config = variant.config
    if config is None:
        if variant.kernel in _SIDES:
            return {**absent, "BLOCK": configs.SIDE_BLOCK}
        return {"TRANSFORM": variant.transform, "BLOCK": configs.MERGE_BLOCK}
    if isinstance(config, configs.RankingConfig):
        blocks = {"BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "BLOCK_T": config.block_t}
        return {**absent, **blocks}
    constants = {**absent, "TRANSFORM": variant.transform}
    if isinstance(config, configs.ScoreConfig):
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_H": config.block_h}
        return {**constants, **blocks, "GROUP": config.group}
    lanes, group = _tile(variant.arch, variant.dtype, variant.transform, config)
    return {**constants, "LANES": lanes, "GROUP": group}


def _describe(variant: Variant) -> str:
    config = variant.config
    if config is None:
        block = configs.SIDE_BLOCK if variant.kernel in _SIDES else configs.MERGE_BLOCK
        return f"BLOCK={block} warps=4"
    if isinstance(config, configs.RankingConfig):
        return f"BLOCK_N={config.block_n} BLOCK_K={config.block_k} warps={config.num_warps}"
    if isinstance(config, configs.ScoreConfig):
        shape = f"{config.block_n}x{config.block_v}x{config.block_h}"
        return f"{shape} warps={config.num_warps} stages={config.num_stages}"
    lanes, group = _tile(variant.arch, variant.dtype, variant.transform, config)
    limit = "any V" if config.max_columns is None else f"V<={config.max_columns}"
    return f"{limit} BLOCK_V={lanes * group} warps={config.num_warps}"


def _tile(arch: str, dtype: str, transform: int, config: configs.RowConfig) -> tuple[int, int]:
    return config.tile(DTYPES[dtype], _target(arch).warp_size, softcap=transform == 2)


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
