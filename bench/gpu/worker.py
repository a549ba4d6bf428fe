"""One backend's parts in this process: ``python -m bench.gpu.worker BACKEND PART ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from bench.gpu import measure, parts
from bench.gpu.jobs import MARK, RESTART
from bench.step import Refused, describe


def main(arguments: list[str]) -> int:
    """Run the parts on the GPU; RESTART if one left the device unusable."""
    backend, *names = arguments
    setting = measure.Setting(torch.device("cuda"), backend, measure.CARD)
    return run(setting, names, lambda said: print(MARK + json.dumps(said), flush=True))


def run(setting: measure.Setting, names: list[str], say: Callable[[dict], None]) -> int:
    """Run the parts, each for itself, saying every row and how each part ended."""
    for name in names:
        status, note = "ok", ""
        try:
            for row in parts.PARTS[name](setting):
                say({"part": name, "row": row})
        except Refused as refused:
            status, note = "refused", str(refused)
        except Exception as error:  # a kernel that never ran may raise anything
            status, note = "failed", describe(error)
        say({"part": name, "status": status, "note": note})
        if setting.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # the context is lost: the parts that are left need a new process
                return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
