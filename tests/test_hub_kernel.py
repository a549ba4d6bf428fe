"""The package as a kernel of Hugging Face's library: a folder, loaded under another name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "hub_kernel.py"

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="not a source checkout")

# What kernels.importer does with a folder, for where the library is not installed.
BY_HAND = """
import importlib.util, json
file = out / "build" / "torch-universal" / "__init__.py"
name = json.loads((file.parent / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, file)
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
BY_LIBRARY = "import kernels; kernel = kernels.get_local_kernel(out)"
USE = """
import torch
assert not [m for m in sys.modules if m.split(".")[0] == "pro_kernels"]
weight = torch.randn(50, 8, requires_grad=True)
hidden, targets = torch.randn(2, 3, 5, 8), torch.randint(0, 50, (2, 3, 5))
rewards = torch.randn(2, 3)
import pro_kernels as installed
import pro_kernels.distinct.attention
found = [
    torch.autograd.grad(p.linear_pro_loss(hidden, weight, targets, rewards).loss, weight)
    for p in (kernel, installed)
]
assert torch.equal(*(x for x, in found))
ours = {m for m in sys.modules if m.split(".")[0] == kernel.__name__}
assert {f"{kernel.__name__}.distinct.attention", f"{kernel.__name__}.losses.pro"} <= ours
print(kernel.backends.refusal("cpu", torch.device("cpu"), torch.float32))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, str(TOOL), str(out)], check=True)
    return out


@pytest.mark.parametrize("load", [BY_HAND, BY_LIBRARY], ids=["by hand", "kernels"])
def test_it_loads_beside_the_installed_package_and_computes_the_same(folder, load):
    if load is BY_LIBRARY and importlib.util.find_spec("kernels") is None:
        pytest.skip("needs kernels: make hub")
    code = f"import sys\nfrom pathlib import Path\nout = Path(sys.argv[1])\n{load}\n{USE}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = "reason" not in json.loads((ROOT / "pro_kernels/lib/build.json").read_text())["cpu"]
    assert (done.stdout == "None\n") == built  # its own library, from its own folder


def test_an_import_that_has_no_relative_form_is_refused():
    spec = importlib.util.spec_from_file_location("hub_kernel", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(ValueError, match="line 2: must be"):
        tool.relative("import torch\nimport pro_kernels.api\n", 0)
    assert tool.relative("from pro_kernels import a\nfrom pro_kernels.b import c\n", 1) == (
        "from .. import a\nfrom ..b import c\n"
    )
