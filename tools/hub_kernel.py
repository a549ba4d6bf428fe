"""The package as a kernel of Hugging Face's ``kernels`` library, in one folder.

    python tools/hub_kernel.py OUT [PACKAGE]

writes ``OUT/build/torch-universal`` from PACKAGE: ``pro_kernels`` of this checkout, or that folder
of an unpacked wheel, whose native libraries come along. ``kernels.get_local_kernel(Path(OUT))``
loads it.

The library imports a kernel under a name of its own, so that two versions can be in one process.
Imports within the package are therefore made relative, and the ops take the name of the package.
Modules that another program starts by the name ``pro_kernels`` are left out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANT = "torch-universal"
LEFT_OUT = "__main__.py hook selfcheck axolotl.py llamafactory.py swift __pycache__".split()


def relative(source: str, depth: int) -> str:
    """``source`` with its imports of the package made relative.

    Args:
        source: a module of the package.
        depth: folders between it and the package: 0 for a module of the package itself.

    Raises:
        ValueError: an import that has no relative form.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "pro_kernels":
                    raise ValueError(f"line {node.lineno}: must be 'from ... import', not 'import'")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            top, _, below = node.module.partition(".")
            if top == "pro_kernels":
                at = node.lineno - 1
                old, new = f"from {node.module} import", f"from {'.' * (depth + 1)}{below} import"
                lines[at] = lines[at].replace(old, new, 1)
    return "".join(lines)


def write(out: Path, package: Path) -> Path:
    """Write the kernel of ``package`` below ``out``; returns the folder of the variant."""
    target = out / "build" / VARIANT
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(package, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copy(ROOT / "LICENSE", target)
    for path in sorted(target.rglob("*.py")):
        depth = len(path.relative_to(target).parts) - 1
        path.write_text(relative(path.read_text(), depth))
    digest = hashlib.sha256()
    for path in sorted(p for p in target.rglob("*") if p.is_file()):
        digest.update(path.relative_to(target).as_posix().encode() + path.read_bytes())
    version = runpy.run_path(str(package / "_version.py"))["__version__"]
    metadata = {
        "name": "pro-kernels",
        "id": f"_pro_kernels_{version.replace('.', '_')}_{digest.hexdigest()[:12]}",
        "version": 1,  # of what it offers; a change that breaks callers makes it the next
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder that gets build/torch-universal")
    parser.add_argument("package", type=Path, nargs="?", default=ROOT / "pro_kernels")
    options = parser.parse_args()
    print(write(options.out, options.package))
