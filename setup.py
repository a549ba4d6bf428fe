"""Build of the native libraries; all metadata is in pyproject.toml.

They have a plain C ABI and need neither torch nor Python to build: ninja and a C++17 compiler
($CXX, c++, g++ or clang++) for the CPU; for CUDA nvcc ($PRO_KERNELS_NVCC, $CUDA_HOME/bin/nvcc or on
PATH), whose run-time library is linked in. ``PRO_KERNELS_BUILD`` says what a missing or failing
compiler means: ``auto`` (default) installs without that library and keeps the reason, ``1`` is an
error (but a machine without nvcc just has no CUDA library), ``0`` does not try. One library never
depends on the other. Results and reasons are in ``pro_kernels/lib/build.json``.
``PRO_KERNELS_CUDA_ARCHS`` (such as "sm_90a compute_100") replaces the targets.

In place, as ``pip install -e .`` does it:  python setup.py build_native --inplace
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

FLAGS = (
    "-std=c++17 -O3 -fPIC -fno-math-errno -ffp-contract=on -fno-exceptions -fno-rtti "
    "-fvisibility=hidden -Wall -Wextra"
).split()
# Instruction sets by machine: name -> flags of isa.cpp, the best first. Every one has "generic".
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16"], "avx512": _AVX512, "avx2": _AVX2}
_ARM64 = {"neon": []}
ISAS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM64, "arm64": _ARM64}
COMMON_SOURCES = ("attention", "dispatch", "filter", "logits", "ranking")

CUDA_FLAGS = "-std=c++17 -O3 -cudart static -Xcompiler -fPIC,-fvisibility=hidden".split()
# Machine code for these, and PTX (compute_*) for what comes later.
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100", "compute_100")


Units = dict[str, tuple[Path, str]]  # object -> its source, and flags of its own


class BuildError(Exception):
    """Why there is no library; the message is shown to users."""


class NotThereError(BuildError):
    """There is nothing to build with, which no setting makes an error."""


def find_compiler(kind: str, setting: str, names: list[str]) -> list[str]:
    """A compiler as an argument list; an explicit one, of the setting, never falls back."""
    if chosen := os.environ.get(setting):
        command = [chosen] if shutil.which(chosen) else shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"no {kind} compiler found: {setting}={chosen} is not an executable")
        return command
    for name in names:
        if shutil.which(name):
            return [name]
    missing = NotThereError if kind == "CUDA" else BuildError
    raise missing(f"no {kind} compiler found (tried ${setting}, {', '.join(names)})")


def find_ninja() -> list[str]:
    """The ninja command: on PATH, or the module of the PyPI package."""
    if shutil.which("ninja"):
        return ["ninja"]
    found = subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True)
    if found.returncode:
        raise BuildError("ninja not found (pip install ninja)")
    return [sys.executable, "-m", "ninja"]


def accepts(compiler: list[str], flags: list[str], work: Path, link: bool = False) -> bool:
    """Whether an empty program compiles (and links) with these flags."""
    source = work / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    how = ["-o", str(work / "probe")] if link else ["-fsyntax-only"]
    command = [*compiler, *flags, str(source), *how]
    return subprocess.run(command, capture_output=True).returncode == 0


def output_of(command: list[str]) -> str:
    """Standard output of a command; its failure is a BuildError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def plan(work: Path) -> tuple[dict, Units, str]:
    """What will be built and how; probes the compiler only."""
    compiler = find_compiler("C++", "CXX", ["c++", "g++", "clang++"])
    version = output_of([*compiler, "--version"]).splitlines()[0]
    machine = output_of([*compiler, "-dumpmachine"]).split("-")[0].strip()
    isas = {n: f for n, f in ISAS.get(machine, {}).items() if accepts(compiler, f, work)}
    isas["generic"] = []
    openmp = ["-fopenmp"] if accepts(compiler, ["-fopenmp"], work, link=True) else []
    listed = f"'-DPK_ISAS(F)={' '.join(f'F({name})' for name in isas)}'"
    units: Units = {name: (CSRC / "cpu" / f"{name}.cpp", listed) for name in COMMON_SOURCES}
    for name, flags in isas.items():
        units[f"isa_{name}"] = CSRC / "cpu" / "isa.cpp", " ".join([f"-DPK_ISA={name}", *flags])
    spec = {"compiler": shlex.join(compiler), "version": version, "machine": machine}
    spec |= {"flags": FLAGS + openmp, "isas": isas, "openmp": bool(openmp)}
    return spec, units, " ".join([*openmp, "-lm"])


def gencode(target: str) -> str:
    """The option for machine code of sm_90a, or for PTX of compute_90."""
    kind, _, number = target.partition("_")
    if kind not in ("sm", "compute") or not number[:2].isdigit():
        raise BuildError(
            f"PRO_KERNELS_CUDA_ARCHS: no target such as sm_90a or compute_90: {target!r}"
        )
    return f"-gencode=arch=compute_{number},code={target}"


def plan_cuda(work: Path) -> tuple[dict, Units, str]:
    """What will be built for CUDA and how; asks nvcc what it knows."""
    home = os.environ.get("CUDA_HOME")
    of_home = [os.path.join(home, "bin", "nvcc")] if home else []
    nvcc = find_compiler("CUDA", "PRO_KERNELS_NVCC", [*of_home, "nvcc"])
    shown = shlex.join(nvcc)
    version = next(
        (line for line in output_of([*nvcc, "--version"]).splitlines() if "release" in line), shown
    )
    known = output_of([*nvcc, "--list-gpu-arch"]) + output_of([*nvcc, "--list-gpu-code"])
    chosen = os.environ.get("PRO_KERNELS_CUDA_ARCHS", "").split()
    # An old nvcc does without the new targets; those asked for by name are compiled or fail.
    targets = chosen or [t for t in CUDA_TARGETS if t.rstrip("a") in known.split()]
    if not targets:
        raise BuildError(f"{shown} ({version}) knows none of {', '.join(CUDA_TARGETS)}")
    extra = [*map(gencode, targets), f"'-DPK_CUDA_TARGETS=\"{' '.join(targets)}\"'"]
    units = {p.stem: (p, " ".join(extra)) for p in sorted((CSRC / "cuda").glob("*.cu"))}
    spec = {"compiler": shown, "version": version, "flags": CUDA_FLAGS}
    return spec | {"targets": targets}, units, "-cudart static"


def write_ninja(library: str, spec: dict, units: Units, link: str, work: Path) -> None:
    """One object a unit, then one shared library."""
    lines = [
        f"compiler = {spec['compiler']}".replace("$", "$$"),
        "rule compile",
        f"  command = $compiler {' '.join(spec['flags'])} $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $compiler -shared $in -o $out {link}",
    ]
    for name, (source, extra) in units.items():
        path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines += [f"build {name}.o: compile {path}", f"  extra = {extra}"]
    lines.append(f"build {library}: link {' '.join(f'{name}.o' for name in units)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")


# Part of build.json -> what plans its library.
PLANS = {"cpu": plan, "cuda": plan_cuda}


def library_of(part: str) -> str:
    """The name of the file."""
    return f"libpro_kernels_{part}.so"


def build_library(part: str, work: Path) -> dict:
    """Build one library in ``work``; returns what ``build.json`` records."""
    work.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        raise BuildError("no native build for Windows yet")
    spec, units, link = PLANS[part](work)
    write_ninja(library_of(part), spec, units, link, work)
    done = subprocess.run([*find_ninja(), "-C", str(work)], capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise BuildError(f"{spec['compiler']} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return spec


class BuildNative(Command):
    """Build the libraries into the wheel, or in place (also in an editable install)."""

    description = "build the native libraries (PRO_KERNELS_BUILD=0|1|auto)"
    user_options = [
        ("inplace", "i", "put the library into the source tree"),
        ("build-lib=", None, "directory of the wheel's contents"),
        ("build-base=", None, "directory of intermediate files"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib = None
        self.build_base = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_base", "build_base"))

    def run(self) -> None:
        mode = os.environ.get("PRO_KERNELS_BUILD", "auto").lower()
        if mode not in ("0", "1", "auto"):
            raise SystemExit(f"PRO_KERNELS_BUILD must be 0, 1 or auto, got {mode!r}")
        work = Path(self.build_base).resolve() / "native"
        target = self._target()
        target.mkdir(parents=True, exist_ok=True)
        records = {part: self._build(part, mode, work / part, target) for part in PLANS}
        self.distribution.native_libraries = [
            library_of(part) for part, record in records.items() if "reason" not in record
        ]
        (target / "build.json").write_text(json.dumps(records, indent=1) + "\n")

    def _build(self, part: str, mode: str, work: Path, target: Path) -> dict:
        """Build one library into ``target``; its record."""
        library = library_of(part)
        try:
            if mode == "0":
                raise BuildError("PRO_KERNELS_BUILD=0")
            record = build_library(part, work)
            shutil.copy2(work / library, target / f"{library}.new")
            os.replace(target / f"{library}.new", target / library)  # running programs keep the old
            return record
        except BuildError as error:
            (target / library).unlink(missing_ok=True)  # never an old library with new Python code
            if mode == "1" and not isinstance(error, NotThereError):
                raise SystemExit(f"PRO_KERNELS_BUILD=1 and the build failed: {error}") from error
            sys.stderr.write(f"pro_kernels: installing without {library}: {error}\n")
            return {"reason": str(error)}

    def _target(self) -> Path:
        """Directory of the libraries (`lib` inside the package)."""
        if self.inplace or self.editable_mode:
            return ROOT / "pro_kernels" / "lib"
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        return Path(self.build_lib) / "pro_kernels" / "lib"

    # What setuptools asks of a build step (setuptools.command.build.SubCommand).
    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*"))]

    def get_outputs(self) -> list[str]:
        names = [*self.distribution.native_libraries, "build.json"]
        return [str(self._target() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """The usual build, the native libraries last (build_py must not sweep it away)."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class BdistWheel(bdist_wheel):
    """A wheel of this platform if it holds the library, of any platform if it does not."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.native_libraries
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        # The libraries do not know about Python: only the platform matters.
        return ("py3", "none", platform if self.distribution.native_libraries else "any")


class NativeDistribution(Distribution):
    """Knows which libraries were built (set by BuildNative)."""

    native_libraries: list[str] = []

    def has_ext_modules(self) -> bool:
        return bool(self.native_libraries)


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
    packages=find_packages(include=["pro_kernels", "pro_kernels.*"])
    + find_packages("python", include=["pro_trainer", "pro_trainer.*"]),
    package_dir={"pro_trainer": "python/pro_trainer"},
    package_data={"pro_kernels": ["py.typed"], "pro_trainer.demo_data": ["*.jsonl"]},
)
