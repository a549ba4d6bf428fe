"""What the frameworks run with: environments, the model in fp32, 16 preference pairs."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from bench.engine.isolate import ROOT
from bench.suites.frameworks.table import SHARED, Framework
from pro_trainer.demo_data import BUNDLED_TRAIN

PAIRS = 16


def environment(folder: Path, framework: Framework) -> Path:
    """The Python of a framework's environment, which is made anew if its recipe has changed."""
    shared = _environment(folder / "shared", (SHARED,), [])
    return _environment(
        folder / framework.key,
        framework.install,
        [_packages(shared), ROOT, ROOT / "python"],
        framework.broken,
    )


def _environment(place: Path, install: tuple[str, ...], sees: list[Path], broken: str = "") -> Path:
    """A venv whose last paths are ``sees``; ``broken`` files are removed from it."""
    python, stamp = place / "bin" / "python", place / "recipe"
    torch = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x[:5] == "torch"]
    recipe = "\n".join((*torch, *install))
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    (place / "constraints.txt").write_text("\n".join(torch))
    (_packages(python) / "shared.pth").write_text("\n".join(map(str, sees)))
    pip = [python, "-m", "pip", "install", "--quiet", "-c", place / "constraints.txt"]
    for arguments in install:
        subprocess.run([*pip, *shlex.split(arguments)], check=True)
    for path in _packages(python).glob(broken) if broken else ():
        path.unlink()
    stamp.write_text(recipe)
    return python


def _packages(python: Path) -> Path:
    (found,) = (python.parent.parent / "lib").glob("python*/site-packages")
    return found


def model(source: Path, out: Path) -> Path:
    """SmolLM2 with its weights stored in fp32, as frameworks load what is stored.

    Its configuration is one that transformers 4 and 5 read alike.
    """
    from safetensors.torch import load_file, save_file

    if (out / "config.json").exists():
        return out
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
    weights = {k: v.float() for k, v in load_file(source / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    known = {k: v for k, v in tokenizer.items() if k not in ("backend", "is_local", "model_type")}
    known["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(known))
    config = json.loads((source / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))  # last: says that all is there
    return out


def pairs(out: Path) -> Path:
    """The pairs in the forms that the frameworks read.

    A dialogue asks the questions of a few bundled lists, in two turns. The reply to the first is
    the best answers. To the second they are chosen, and the worst answers are rejected.
    """
    lists = (json.loads(line) for line in Path(BUNDLED_TRAIN).read_text().splitlines())
    rows = []
    for i in range(PAIRS):
        asked = [next(lists) for _ in range(3 + 7 * i % 16)]  # so that lengths differ
        first, second = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        prompt = [_message("user", first, min), _message("assistant", first, max)]
        prompt.append(_message("user", second, min))
        rows.append((prompt, *(_message("assistant", second, pick) for pick in (max, min))))
    out.mkdir(parents=True, exist_ok=True)
    forms = {
        "trl": [{"prompt": p, "chosen": [c], "rejected": [r]} for p, c, r in rows],
        "swift": [{"messages": [*p, c], "rejected_messages": [*p, r]} for p, c, r in rows],
        "messages": [{"messages": p, "chosen": c, "rejected": r} for p, c, r in rows],
    }
    for name, items in forms.items():
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in items))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant"}  # fmt: skip
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    form = {"ranking": True, "formatting": "sharegpt", "columns": columns, "tags": tags}
    info = {"pairs": {"file_name": "messages.jsonl", **form}}  # LLaMA-Factory's
    (out / "dataset_info.json").write_text(json.dumps(info))
    return out


def _message(role: str, lists: list[dict], pick) -> dict[str, str]:
    def text(item: dict) -> str:
        if role == "user":
            return item["prompt"].removeprefix("Q: ").removesuffix("\nA: ")
        return item["completions"][item["rewards"].index(pick(item["rewards"]))]

    return {"role": role, "content": " ".join(map(text, lists))}
