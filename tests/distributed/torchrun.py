"""One launch of a script on several gloo ranks, and what each of them found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def launched(script: Path, world: int, folder: Path) -> list[dict]:
    """What each rank wrote to ``{rank}.json``; a rank that fails a comparison fails the launch."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
