"""Small files, a small tokenizer and a small model for the trainer's tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the trainer needs the 'train' extra")

RECORDS = [
    {"prompt": f"q{i}: ", "completions": ["good", "okay?", "bad!"], "rewards": [1.5, 0.25, -1.0]}
    for i in range(8)
]


@pytest.fixture(autouse=True, scope="module")
def _quick_runs() -> Iterator[None]:
    """Without what takes most of a short run: its curves."""
    with pytest.MonkeyPatch.context() as patch:
        if callbacks := sys.modules.get("pro_trainer.train.callbacks"):
            patch.setattr(callbacks, "draw_curves", lambda *_: None)
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run draws its curves."""
    from pro_trainer.evaluate.plots import draw_curves

    monkeypatch.setattr("pro_trainer.train.callbacks.draw_curves", draw_curves)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Write records (or raw bytes) as lines of a file and return its path."""

    def write(*lines: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        path.write_bytes(b"".join(x + b"\n" for x in raw))
        return str(path)

    return write


@pytest.fixture
def data_file(write_lines: Callable[..., str]) -> str:
    """Eight lists of three candidates."""
    return write_lines(*RECORDS)


@pytest.fixture
def train(data_file: str, tmp_path: Path) -> Callable[..., int]:
    """Run the command for two steps with these options more, into ``tmp_path / "out"``."""
    from trainer_runs import QUICK

    from pro_trainer.cli import commands

    def run(*more: str, output: Path = tmp_path / "out") -> int:
        argv = ["--demo", "--data", data_file, "--output_dir", str(output), *QUICK]
        return commands.train([*argv, "--eval_fraction", "0", *more])

    return run


@pytest.fixture(scope="session")
def tiny():
    """The demo's model and tokenizer; not to be trained in place."""
    from pro_trainer.models import tiny_llama

    return tiny_llama(0)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with both; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    for made in tiny:
        made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def recipe_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny generators, ``small`` and ``other``, and a reward model ``rm``, with a template."""
    from test_generation import TEMPLATE
    from texts import classifier, save

    from pro_trainer.models import tiny_llama

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("small", "other")):
        model, tokenizer = tiny_llama(seed)
        tokenizer.chat_template = TEMPLATE
        save(folder / name, model, tokenizer)
    save(folder / "rm", classifier(len(tokenizer)), tokenizer)
    return folder


@pytest.fixture(scope="session")
def make_arguments(recipe_models: Path) -> Callable[..., object]:
    """Makes arguments of ``prepare`` that write into a folder."""
    from pro_trainer.prepare.options import PrepareArguments

    def made(folder: Path, name: str = "out.jsonl", **changes: object) -> PrepareArguments:
        values = {
            "output": str(folder / name),
            "reward": [str(recipe_models / "rm")],
            "max_new_tokens": 8,
            "batch_size": 2,
            "seed": 5,  # one that makes no empty sample
            "device": "cpu",
            "chat_template": "off",
        }
        return PrepareArguments(**{**values, **changes})

    return made


@pytest.fixture(scope="session")
def run_prepare() -> Callable[[object], int]:
    """Runs the command ``prepare`` with these arguments."""
    from pro_trainer.cli import commands

    def run(arguments: object) -> int:
        flags = []
        for name, x in vars(arguments).items():
            if x not in (None, [], False, "") and name != "stop":
                values = [] if x is True else x if isinstance(x, list) else [x]
                flags += [f"--{name}", *map(str, values)]
        return commands.prepare(flags)

    return run
