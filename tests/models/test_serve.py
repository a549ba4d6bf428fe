"""``prepare`` on a server of real text: ``transformers serve`` with SmolLM2, on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from pro_trainer.cli.prepare import prepare
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.recipe import Recipe

pytestmark = [pytest.mark.models, pytest.mark.slow]


class Running(NamedTuple):
    url: str
    model: str
    reward_model: str


@pytest.fixture(scope="module")
def server(smollm, tmp_path_factory) -> Iterator[Running]:
    """A process of its own, with a model that samples; and a small reward model."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve needs the 'models' extra")
    folder = tmp_path_factory.mktemp("sampling")
    for file in Path(smollm).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((Path(smollm) / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield Running(url, str(folder), _reward_model(smollm, tmp_path_factory.mktemp("rm")))
    finally:
        process.terminate()
        process.wait(30)


def _reward_model(smollm: str, folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, num_attention_heads=2, num_labels=1,
                         pad_token_id=tokenizer.pad_token_id, initializer_range=0.5)  # fmt: skip
    for made in (LlamaForSequenceClassification(config), tokenizer):
        made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_candidates_of_a_real_server_and_a_run_that_was_cut_short(
    server, tmp_path, monkeypatch, capsys, api
):
    questions = ["Once upon a time, there", "Bees make honey, and", "The sky is blue because"]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))

    def arguments(name: str) -> PrepareArguments:
        return PrepareArguments(
            data=[str(data)],
            output=str(tmp_path / name),
            server=[server.url],
            server_model=[server.model],
            server_api=api,
            reward=[server.reward_model],
            num_samples=2,
            max_new_tokens=12,
            batch_size=1,
            concurrency=1,  # seeds of this server are of all its requests together
            device="cpu",
        )

    report = prepare(arguments("whole.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert len(records) >= 2 and {record["prompt"] for record in records} <= {*questions}
    for record in records:
        assert len(set(record["completions"])) == 2 and all(map(str.strip, record["completions"]))
        assert all(text.isprintable() or "\n" in text for text in record["completions"])
    assert report.samples[Path(server.model).name]["made"] == 6
    assert "tokens a second" in capsys.readouterr().err

    plain = Recipe.lines

    def lines(self, lists, first_index):
        if first_index == 2:
            raise KeyboardInterrupt
        return plain(self, lists, first_index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recipe, "lines", lines)
        prepare(arguments("broken.jsonl"))
    assert (tmp_path / "broken.jsonl.partial").read_bytes().count(b"\n") == 2
    prepare(arguments("broken.jsonl"))
    for end in ("", ".report.json"):
        whole, broken = (tmp_path / f"{x}.jsonl{end}" for x in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()
