"""``pro-kernels env``: what is built, what is usable here, and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

from pro_kernels import backends
from pro_kernels._version import __version__
from pro_kernels.fused import matmul, planner

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "triton", "transformers", "numpy", "trl", "liger-kernel", "cut-cross-entropy")
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def report() -> dict:
    """Versions, devices, backends with the reason of each refusal, matmul route and budget."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return {
        "pro_kernels": __version__,
        "python": platform.python_version(),
        "machine": machine(),
        "packages": {name: version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": {
            str(device): {
                "backends": {
                    name: backends.refusal(name, device, torch.bfloat16)
                    or "; auto passes it over: ".join(
                        filter(None, ("usable", backends.not_by_itself(name, device)))
                    )
                    for name in backends.ORDER
                },
                "auto": backends.resolve("auto", device, torch.bfloat16),
                "matmuls": {name: _matmuls(dtype, device) for name, dtype in _LOW.items()},
                "budget": planner.default_budget(device),
            }
            for device in devices
        },
        "details": {name: backends.get(name).details() for name in backends.ORDER},
    }


def machine() -> str:
    """Processor, cores and, where there is one, the GPU."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next((x.split(":")[1].strip() for x in f if x.startswith("model name")), name)
    except OSError:
        pass
    text = f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        text += f"; {torch.cuda.get_device_name()}"
    return text


def run(as_json: bool) -> int:
    """Print the report."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    for key in ("pro_kernels", "python", "machine"):
        print(f"{key:12} {found[key]}")
    for name, version in found["packages"].items():
        print(f"{name:20} {version or 'not installed'}")
    for device, facts in found["devices"].items():
        print(f"\n{device}: auto picks {facts['auto']}")
        for name, state in facts["backends"].items():
            print(f"  {name:8} {state}")
        for name, path in facts["matmuls"].items():
            print(f"  {name} matmuls: {path}")
        print(f"  budget: {facts['budget'] >> 20} MiB")
    for name, details in found["details"].items():
        for key, value in details.items():
            print(f"{name} {key}: {value}")
    return 0


def _matmuls(dtype: torch.dtype, device: torch.device) -> str:
    if matmul.upcasts(dtype, device.type):
        return "fp32 by blocks"
    if matmul.leaves_sums(dtype, device.type):
        return "native, fp32 sums kept by out_dtype"
    return "native"


def version(package: str) -> str | None:
    """Of what is installed; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    """What git says of this checkout; empty where it is none, as below another's repository."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
