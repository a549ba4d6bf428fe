"""Imports go one way, top to bottom (docs/design.md, "Layers")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pro_kernels"

# Module -> what it may import from the package.
ALLOWED = {
    "_version": set(),
    "option_types": set(),
    "output": set(),
    "ranking": set(),
    "validate": {"option_types", "ranking"},
    "options": {"option_types", "validate"},
    "layout": {"options", "validate"},
    "losses": {"losses", "option_types", "ranking", "validate"},
    "reference": {"layout", "options", "output"},
    "backends": {"backends", "options"},
    "backends.torch": {"options", "ranking"},
    "backends.native": {"options"},
    "backends.cpu": {"backends.native", "options"},
    "backends.cuda": {"backends.native", "options"},
    "backends.triton": {"options", "backends.triton"},
    "fused": set(),
    "fused.shards": set(),
    "fused.columns": set(),
    "fused.matmul": {"options"},
    "fused.planner": {"fused.matmul", "options", "validate"},
    "fused.call": {
        "backends", "fused.planner", "fused.shards", "layout", "options", "validate",
    },
    "fused.rank_order": {
        "fused.call", "layout", "option_types", "options", "output", "ranking", "validate",
    },
    "fused.registry": {"fused.call"},
    "fused.gather_scatter": {"fused.call", "fused.matmul"},
    "fused.head": {"fused.call", "fused.columns", "fused.gather_scatter", "fused.matmul"},
    "fused.backward": {"fused.call", "fused.gather_scatter", "fused.head", "fused.matmul"},
    "fused.prompts": {
        "fused.backward", "fused.call", "fused.columns", "fused.gather_scatter", "fused.head",
    },
    "fused.ops": {
        "fused.backward", "fused.call", "fused.columns", "fused.gather_scatter", "fused.head",
        "fused.prompts", "fused.registry", "layout", "options",
    },
    "fused.autograd": {
        "fused.call", "fused.ops", "fused.registry", "fused.shards", "layout",
    },
    "fused.ranks": {
        "fused.autograd", "fused.call", "fused.ops", "fused.planner", "fused.rank_order",
        "fused.shards", "layout", "options", "output", "validate",
    },
    "api": {
        "backends", "fused.autograd", "fused.call", "fused.columns", "fused.planner",
        "fused.rank_order", "fused.ranks", "fused.shards", "layout", "options", "output",
        "validate",
    },
    "distinct": set(),
    "distinct.tree": set(),
    "distinct.attention": {"backends.cpu"},
    "distinct.gpu": {"distinct.attention", "distinct.tree"},
    "distinct.interface": {"distinct.attention", "distinct.gpu"},
    "distinct.row": {"distinct.interface", "distinct.tree"},
    "distinct.states": {"distinct.interface", "models.probe"},
    "distinct.tryout": {
        "distinct.interface", "distinct.row", "distinct.states", "distinct.tree", "models.probe",
    },
    "distinct.decoder": {
        "distinct.interface", "distinct.row", "distinct.states", "distinct.tryout",
        "models.counts", "models.opened",
    },
    "models": set(),
    "models.counts": set(),
    "models.head": {"options"},
    "models.probe": {"models.head", "option_types"},
    "models.lazy": {"api", "fused.autograd", "models.counts", "models.head"},
    "models.answers": {"models.lazy"},
    "models.opened": {
        "distinct.row", "fused.shards", "models.answers", "models.head", "models.lazy",
        "models.probe",
    },
    "models.forward": {"api", "fused.shards", "layout", "models.head", "models.opened", "options"},
    "models.tryout": {"models.forward", "models.head", "models.opened", "models.probe", "options"},
    "models.attach": {
        "distinct.decoder", "fused.shards", "models.forward", "models.head", "models.opened",
        "models.probe", "models.tryout", "options", "validate",
    },
    "models.loaded": {"models.attach", "models.counts", "models.forward", "models.opened"},
    "hook": {"models.loaded"},
    "models.official": {"models.attach", "options", "reference"},
    "models.trl": {
        "api", "distinct.decoder", "models.attach", "models.head", "models.opened", "validate",
    },
    "integrations": set(),
    "integrations.names": set(),
    "integrations.liger": {"api", "integrations.names", "models.head"},
    "integrations.verl": {"api", "integrations.names", "models.head"},
    "integrations.verl_workers": {"integrations.verl"},
    "integrations.axolotl": {"models.loaded"},
    "integrations.swift": {"models.loaded"},
    "integrations.lists": {"losses"},
    "integrations.trl": {"integrations.lists", "models.attach"},
    "integrations.llamafactory": {"integrations.lists", "models.attach"},
    "selfcheck": {
        "_version", "api", "backends", "fused.matmul", "fused.planner", "options", "reference",
        "selfcheck",
    },
    "__main__": {"options", "selfcheck"},
    "__init__": {
        "_version", "api", "backends", "distinct.decoder", "distinct.tree", "integrations",
        "layout", "losses", "models.attach", "output", "reference",
    },
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(".".join(p.relative_to(PACKAGE).with_suffix("").parts), p) for p in paths]


def imported(path: Path) -> set[str]:
    """Names below pro_kernels that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("pro_kernels.") for a in node.names if "pro_kernels" in a.name
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pro_kernels"):
            base = node.module.removeprefix("pro_kernels").lstrip(".")
            for name in (f"{base}.{a.name}".lstrip(".") for a in node.names):
                below = PACKAGE / name.replace(".", "/")
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                found.add(name if is_module or not base else base)
    return found


def rule(name: str) -> str:
    """The longest key of ALLOWED that covers a module."""
    parts = name.removesuffix(".__init__").split(".")
    for n in range(len(parts), 0, -1):
        key = ".".join(parts[:n])
        if key in ALLOWED:
            return key
    raise KeyError(f"no layer rule for module {name}: add it to ALLOWED")


@pytest.mark.parametrize(("name", "path"), modules(), ids=[m[0] for m in modules()])
def test_imports_go_down(name, path):
    key = rule(name)
    allowed = ALLOWED[key] | {key}
    for other in imported(path):
        parts = other.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        assert prefixes & allowed, f"{name} may import {sorted(allowed)}, not {other}"


def _called(decorator: ast.expr) -> str:
    """Name of the function that a decorator calls."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(function, "id", "")


def test_no_function_below_the_public_ones_takes_more_than_13_arguments():
    """What belongs together travels together (``fused/call.py``)."""
    wide = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                a = node.args
                count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
                registered = "register" in map(_called, getattr(node, "decorator_list", []))
                if count > 13 and not registered:  # the options of a loss are public
                    wide.append(f"{name}:{node.lineno} takes {count}")
    assert not wide, wide


def test_backends_never_import_each_other():
    names = {"torch", "cpu", "cuda", "triton"}
    for name, path in modules():
        if name.startswith("backends.") and name != "backends.__init__":
            own = name.split(".")[1]
            for other in imported(path):
                if other.startswith("backends."):
                    assert other.split(".")[1] not in names - {own}, f"{name} imports {other}"


TRAINER = ROOT / "python" / "pro_trainer"
# The way of a record, after what all of it stands on; imports go to the left.
JOURNEY = (
    "errors", "options", "files", "demo_data", "models", "data", "text", "batch", "prepare",
    "evaluate", "train", "cli", "demo", "__init__",
)  # fmt: skip


def trainer_imports() -> dict[str, set[str]]:
    """Module of pro_trainer -> those it imports, anywhere in it (type hints too)."""
    names = {
        ".".join(p.relative_to(TRAINER).with_suffix("").parts): p for p in TRAINER.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pro_trainer"):
                base = node.module.removeprefix("pro_trainer").lstrip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    found[name].add(inner if inner in names else base)
    return found


def test_the_trainers_folders_follow_the_way_of_a_record():
    for name, others in trainer_imports().items():
        place = JOURNEY.index(name.split(".")[0])
        for other in others:
            assert JOURNEY.index(other.split(".")[0]) <= place, f"{name} imports {other}"


def test_the_trainers_modules_import_in_no_circle():
    imports = trainer_imports()
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in imports.get(name, ()):
                walk(other, (*path, name))
            done.add(name)

    for name in imports:
        walk(name, ())


def test_the_trainer_uses_the_public_api_only():
    public = {"", "Layout", "PROOutput", "losses", "reference"}
    for path in sorted((ROOT / "python").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pro_kernels"):
                below = node.module.removeprefix("pro_kernels").lstrip(".")
                assert below in public | {"backends", "__main__"}, f"{path}: from {node.module}"


def test_the_import_brings_in_neither_compilers_nor_models():
    """They take seconds; nobody who only wants the loss should wait for them."""
    code = (
        "import sys, torch; before = set(sys.modules); import pro_kernels; "
        "print([m for m in ('torch._dynamo', 'transformers', 'triton') "
        "if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
