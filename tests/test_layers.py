"""Imports go one way, top to bottom (docs/design.md, "Layers")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pro_kernels"

# Module -> what it may import from the package.
ALLOWED = {
    "options": set(),
    "shards": set(),
    "output": set(),
    "_version": set(),
    "layout": {"options"},
    "losses": {"options", "losses"},
    "reference": {"layout", "options", "output"},
    "matmul": {"options"},
    "planner": {"matmul", "options"},
    "column_filter": set(),
    "checks": set(),
    "backends": {"backends", "options"},
    "backends.torch": {"options"},
    "backends.native": {"options"},
    "backends.cpu": {"backends.native", "options"},
    "backends.cuda": {"backends.native", "options"},
    "backends.triton": {"options", "backends.triton"},
    "head": {"column_filter", "matmul", "options", "shards"},
    "token_stats": {"head", "matmul", "options"},
    "ops": {"backends", "head", "layout", "options", "shards", "token_stats"},
    "autograd": {"ops", "options", "planner", "shards"},
    "pro": {"checks", "layout", "options", "output"},
    "calls": {
        "autograd", "backends", "checks", "layout", "ops", "options", "output", "planner", "pro",
        "shards",
    },
    "functional": {
        "autograd", "backends", "calls", "checks", "column_filter", "head", "layout", "options",
        "output", "pro", "shards",
    },
    "lm_head": set(),
    "probe": {"lm_head"},
    "attached": {"functional", "layout", "lm_head", "options", "probe", "shards"},
    "attach": {"attached", "lm_head", "options", "probe", "shards"},
    "integrations": set(),
    "integrations.official": {"attach", "options", "reference"},
    "integrations.trl": {"functional"},
    "check": {"backends", "functional", "reference"},
    "env": {"_version", "backends", "matmul", "planner"},
    "trust": {"backends", "check", "env", "functional", "matmul", "planner", "reference"},
    "__main__": {"check", "env", "trust"},
    "__init__": {
        "attach", "backends", "losses", "reference", "functional", "layout", "output", "_version",
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
            if base:
                found.add(base)
            else:
                found |= {a.name for a in node.names}
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
