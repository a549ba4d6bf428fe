"""Imports go one way, top to bottom (docs/design.md, "Layers")."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TRAINER = ROOT / "pro_kernels", ROOT / "python" / "pro_trainer"

# Modules that import nothing of the package, and what the others may import. No backend imports
# another one.
NOTHING = """
_version option_types output ranking fused fused.shards distinct distinct.tree
models integrations integrations.switch
"""
TABLE = """
validate: option_types ranking
options: option_types validate
layout: options validate
losses: losses option_types ranking validate
policy: option_types options validate
reference: layout options output
backends: backends options
backends.torch: backends.protocol options ranking
backends.native: backends.protocol options
backends.cpu: backends.native options
backends.cuda: backends.native options
backends.triton: backends.protocol backends.triton options
fused.matmul: options
fused.planner: fused.matmul options validate
fused.call: backends fused.matmul fused.planner fused.shards layout options validate
fused.rank_order: backends layout option_types options output ranking validate
fused.registry: fused.call
fused.gather_scatter: fused.call fused.matmul
fused.column_groups: fused.matmul
fused.columns: backends fused.call fused.column_groups fused.gather_scatter fused.matmul
fused.head: fused.call fused.columns fused.gather_scatter fused.matmul
fused.target_columns: fused.gather_scatter fused.head
fused.backward: backends fused.call fused.column_groups fused.columns fused.gather_scatter
    fused.head fused.matmul fused.target_columns
fused.ops: backends fused.backward fused.call fused.columns fused.gather_scatter
    fused.head fused.matmul fused.registry fused.target_columns layout options
fused.autograd: fused.call fused.ops fused.registry fused.shards layout
fused.ranks: backends fused.autograd fused.call fused.ops fused.planner fused.rank_order
    fused.shards layout options output validate
api: backends fused.autograd fused.call fused.columns fused.planner fused.rank_order fused.ranks
    fused.shards layout options output validate
fused.thin: fused.autograd fused.gather_scatter options
cross_entropy: api fused.shards fused.thin options output validate
distinct.attention: backends.cpu distinct.tree
distinct.gpu: distinct.attention distinct.tree
distinct.interface: distinct.attention distinct.gpu
distinct.row: distinct.interface distinct.tree
distinct.states: distinct.interface distinct.tree models.probe
distinct.tryout: distinct.interface distinct.row distinct.states distinct.tree models.probe
distinct.decoder: distinct.interface distinct.row distinct.states distinct.tryout models
    models.opened
models.head: options
models.probe: models.head option_types
models.lazy: api fused.autograd fused.thin models models.head options
models.answers: cross_entropy models.lazy
models.opened: distinct.row fused.shards models.answers models.head models.lazy models.probe
models.forward: api cross_entropy fused.shards layout losses models.head models.opened options
    validate
models.tryout: models.forward models.head models.opened models.probe options
models.attach: distinct.decoder fused.shards losses models.forward models.head models.opened
    models.probe models.tryout options validate
models.loaded: models.attach models models.forward models.opened
hook: models.loaded
models.official: models.attach options reference
models.trl: api distinct.decoder integrations.switch models.attach models.head
    models.opened validate
integrations.liger: api cross_entropy integrations.switch models.head
integrations.verl: api integrations.switch models.head
integrations.verl_workers: integrations.verl
integrations.axolotl: models.loaded
integrations.swift: integrations.switch models.loaded
integrations.lists: losses
integrations.trl: integrations.lists models.attach
integrations.llamafactory: integrations.lists models.attach
selfcheck: _version api backends fused.matmul fused.planner options reference selfcheck
__main__: options selfcheck
__init__: _version api backends cross_entropy distinct.decoder distinct.tree integrations layout
    losses models.attach output policy reference
"""
ALLOWED: dict[str, set[str]] = {name: set() for name in NOTHING.split()}
for line in TABLE.replace("\n    ", " ").split("\n")[1:-1]:
    ALLOWED[line.partition(":")[0]] = set(line.partition(":")[2].split())


def modules(package: Path) -> dict[str, Path]:
    paths = sorted(package.rglob("*.py"))
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in paths}


def imported(path: Path, package: Path) -> set[str]:
    """Names below a package that a file imports, anywhere in it (type hints too)."""
    found, top = set(), package.name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix(f"{top}.") for a in node.names if top in a.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(top):
            base = node.module.removeprefix(top).lstrip(".")
            for name in (f"{base}.{a.name}".lstrip(".") for a in node.names):
                below = package / name.replace(".", "/")
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                found.add(name if is_module or not base else base)
    return found


def prefixes(name: str) -> list[str]:
    """A module and the packages it is in, longest first."""
    parts = name.removesuffix(".__init__").split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


KERNELS = modules(PACKAGE)


@pytest.mark.parametrize("name", KERNELS)
def test_imports_go_down(name):
    key = next((x for x in prefixes(name) if x in ALLOWED), None)
    assert key, f"no layer rule for module {name}: add it to TABLE"
    allowed = ALLOWED[key] | {key}
    for other in imported(KERNELS[name], PACKAGE):
        assert allowed & set(prefixes(other)), f"{name} may import {sorted(allowed)}, not {other}"


def test_no_function_below_the_public_ones_takes_more_than_13_arguments():
    """What belongs together travels together (``fused/call.py``)."""
    wide = []
    for name, path in KERNELS.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                decorators = [getattr(x, "func", x) for x in getattr(node, "decorator_list", [])]
                registered = any(getattr(x, "id", "") == "register" for x in decorators)
                if count > 13 and not registered:  # the options of a loss are public
                    wide.append(f"{name}:{node.lineno} takes {count}")
    assert not wide, wide


# The way of a record, after what all of it stands on; imports go to the left.
JOURNEY = (
    "errors options files demo_data models data text batch prepare evaluate train rounds cli demo "
    "__init__"
).split()
IMPORTS = {name: imported(path, TRAINER) for name, path in modules(TRAINER).items()}


def test_the_trainers_folders_follow_the_way_of_a_record():
    for name, others in IMPORTS.items():
        place = JOURNEY.index(name.split(".")[0])
        for other in others:
            assert JOURNEY.index(other.split(".")[0]) <= place, f"{name} imports {other}"


def test_the_trainers_modules_import_in_no_circle():
    assert list(TopologicalSorter(IMPORTS).static_order())  # a CycleError says which


def test_the_trainer_uses_the_public_api_only():
    public = {"", "Layout", "PROOutput", "losses", "reference"}
    for path in sorted((ROOT / "python").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pro_kernels"):
                below = node.module.removeprefix("pro_kernels").lstrip(".")
                assert below in public | {"backends", "__main__"}, f"{path}: from {node.module}"


def test_the_import_brings_in_neither_compilers_nor_models_nor_switches():
    """They take seconds; nobody who only wants the loss should wait for them."""
    code = (
        "import sys, torch; before = set(sys.modules); import pro_kernels as pk; "
        "print([m for m in set(sys.modules) - before if m.startswith("
        "('torch._dynamo', 'transformers', 'triton', 'pro_kernels.integrations.'))]); "
        "print(pk.integrations.liger.apply.__name__, hasattr(pk.integrations, 'llama'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\napply False\n"
