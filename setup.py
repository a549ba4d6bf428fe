"""Build of the native library; all metadata is in pyproject.toml.

The library has a plain C ABI and needs neither torch nor Python to build: ninja and a C++17
compiler ($CXX, c++, g++ or clang++). ``PRO_KERNELS_BUILD`` says what a missing or failing compiler
means: ``auto`` (default) installs without the library and keeps the reason, ``1`` is an error,
``0`` does not try. Result and reason are in ``pro_kernels/lib/build.json``.

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
SOURCES = ROOT / "csrc" / "cpu"
LIBRARY = "libpro_kernels_cpu.so"

FLAGS = (
    "-std=c++17 -O3 -fPIC -fno-math-errno -ffp-contract=on -fno-exceptions -fno-rtti "
    "-fvisibility=hidden -Wall -Wextra"
).split()
# Instruction sets by machine: name -> flags of isa_<name>.cpp. Every machine has "generic".
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
_X86 = {"avx512bf16": [*_AVX512, "-mavx512bf16"], "avx512": _AVX512, "avx2": _AVX2}
_ARM64 = {"neon": []}
ISAS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM64, "arm64": _ARM64}
COMMON_SOURCES = ("dispatch", "logits", "ranking")


class BuildError(Exception):
    """Why there is no library; the message is shown to users."""


def find_compiler() -> list[str]:
    """The C++ compiler as an argument list. An explicit $CXX never falls back."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise BuildError(f"no C++ compiler found: CXX={chosen} is not an executable")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (tried $CXX, c++, g++, clang++)")


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


def plan(work: Path) -> dict:
    """What will be built and how; probes the compiler only."""
    if sys.platform == "win32":
        raise BuildError("no native build for Windows yet")
    compiler = find_compiler()
    version = output_of([*compiler, "--version"]).splitlines()[0]
    machine = output_of([*compiler, "-dumpmachine"]).split("-")[0].strip()
    isas = {n: f for n, f in ISAS.get(machine, {}).items() if accepts(compiler, f, work)}
    isas["generic"] = []
    openmp = accepts(compiler, ["-fopenmp"], work, link=True)
    return {
        "library": LIBRARY,
        "compiler": shlex.join(compiler),
        "version": version,
        "machine": machine,
        "flags": FLAGS + (["-fopenmp"] if openmp else []),
        "isas": isas,
        "openmp": openmp,
    }


def write_ninja(spec: dict, work: Path) -> None:
    """One object per common source and per instruction set, then one shared library."""
    have = [f"-DPK_HAVE_{name.upper()}" for name in spec["isas"]]
    units = {name: have for name in COMMON_SOURCES}
    units |= {f"isa_{name}": flags for name, flags in spec["isas"].items()}

    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"compiler = {spec['compiler']}".replace("$", "$$"),
        "rule compile",
        f"  command = $compiler {' '.join(spec['flags'])} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $compiler -shared {'-fopenmp' if spec['openmp'] else ''} $in -o $out -lm",
    ]
    for name, extra in units.items():
        lines.append(f"build {name}.o: compile {escape(str(SOURCES / name))}.cpp")
        lines.append(f"  extra = {' '.join(extra)}")
    lines.append(f"build {LIBRARY}: link {' '.join(f'{name}.o' for name in units)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")


def build_library(work: Path) -> dict:
    """Build in ``work``; returns what ``build.json`` records."""
    work.mkdir(parents=True, exist_ok=True)
    spec = plan(work)
    write_ninja(spec, work)
    done = subprocess.run([*find_ninja(), "-C", str(work)], capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise BuildError(f"{spec['compiler']} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return spec


class BuildNative(Command):
    """Build the library into the wheel, or in place (also in an editable install)."""

    description = "build the native library (PRO_KERNELS_BUILD=0|1|auto)"
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
        try:
            if mode == "0":
                raise BuildError("PRO_KERNELS_BUILD=0")
            record = build_library(work)
            shutil.copy2(work / LIBRARY, target / f"{LIBRARY}.new")
            os.replace(target / f"{LIBRARY}.new", target / LIBRARY)  # running programs keep the old
            self.distribution.has_library = True
        except BuildError as error:
            (target / LIBRARY).unlink(missing_ok=True)  # never an old library with new Python code
            if mode == "1":
                raise SystemExit(f"PRO_KERNELS_BUILD=1 and the build failed: {error}") from error
            record = {"reason": str(error)}
            sys.stderr.write(f"pro_kernels: installing without the native library: {error}\n")
        (target / "build.json").write_text(json.dumps({"cpu": record}, indent=1) + "\n")

    def _target(self) -> Path:
        """Directory of the library (`lib` inside the package)."""
        if self.inplace or self.editable_mode:
            return ROOT / "pro_kernels" / "lib"
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        return Path(self.build_lib) / "pro_kernels" / "lib"

    # What setuptools asks of a build step (setuptools.command.build.SubCommand).
    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*"))]

    def get_outputs(self) -> list[str]:
        names = [LIBRARY, "build.json"] if self.distribution.has_library else ["build.json"]
        return [str(self._target() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """The usual build, the native library last (build_py must not sweep it away)."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class BdistWheel(bdist_wheel):
    """A wheel of this platform if it holds the library, of any platform if it does not."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_library
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        # The library does not know about Python: only the platform matters.
        return ("py3", "none", platform if self.distribution.has_library else "any")


class NativeDistribution(Distribution):
    """Knows whether the library was built (set by BuildNative)."""

    has_library = False

    def has_ext_modules(self) -> bool:
        return self.has_library


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
    packages=find_packages(include=["pro_kernels", "pro_kernels.*"])
    + find_packages("python", include=["pro_trainer", "pro_trainer.*"]),
    package_dir={"pro_trainer": "python/pro_trainer"},
    package_data={"pro_trainer.demo_data": ["*.jsonl"]},
)
