"""The table of frameworks, what they run with, and the committed page."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from bench.frameworks import measure, page, prepare
from bench.frameworks.table import FRAMEWORKS, SHARED
from bench.report import blocks
from bench.tables import marks

COMMITTED = json.loads(page.RESULTS.read_text())


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.key)
def test_what_is_installed_and_run_is_pinned_and_there(framework):
    pins = " ".join(framework.install)
    assert f"{framework.package}=={framework.version}" in pins
    assert " transformers==" in f" {pins}" and " trl==" in f" {pins}"
    names = {word.split("=")[0] for line in framework.install for word in shlex.split(line)}
    assert "torch" in SHARED and "torch" not in names
    assert framework.file in shlex.split(framework.command)
    text = (measure.HERE / framework.file).read_text()
    assert "model" in text and "data/" in text or "dataset_dir: data" in text
    assert "out" in text and "/tmp" not in text


def test_every_framework_was_run_each_way_with_the_pinned_versions():
    found = {(row["framework"], row["way"]) for row in COMMITTED["results"]}
    assert found == {(x.key, way) for x in FRAMEWORKS for way in measure.WAYS}
    pins = {x.key: " ".join(x.install) for x in FRAMEWORKS}
    for row in COMMITTED["results"]:
        for name in ("transformers", "trl"):
            assert f"{name}=={row['versions'][name]} " in pins[row["framework"]] + " "


def test_committed_page_is_what_the_results_give():
    begin, end = marks(page.BLOCK)
    (text,) = blocks(page.RESULTS, page.PAGE).values()
    assert f"{begin}\n{text}\n{end}" in page.PAGE.read_text(), "run: --report, --update"
    sections = page.PAGE.read_text().split(begin)[0]
    for framework in FRAMEWORKS:
        assert f"\n## {framework.name}\n" in sections
        assert f"pro-kernels run -- {framework.command.split()[0]} " in sections


def test_pairs_are_the_same_in_every_form(tmp_path):
    prepare.pairs(tmp_path)
    trl, swift, messages = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("trl", "swift", "messages")
    )
    assert len(trl) == len(swift) == len(messages) == prepare.PAIRS
    for a, b, c in zip(trl, swift, messages, strict=True):
        assert a["prompt"] + a["chosen"] == b["messages"] == [*c["messages"], c["chosen"]]
        assert a["prompt"] + a["rejected"] == b["rejected_messages"]
        assert c["rejected"] == a["rejected"][0] != c["chosen"]


def test_a_run_is_watched_and_its_losses_are_read(tmp_path):
    code = (
        "import json, os, time\n"
        "os.mkdir('out'); log = open('out/logging.jsonl', 'w')\n"
        "for i in range(4):\n"
        "    end = time.process_time() + 0.1\n"
        "    while time.process_time() < end: pass\n"
        "    print({'loss': '0.5'}); log.write(json.dumps({'loss': 0.5 + i}) + chr(10))\n"
    )
    env = {"PYTHONUNBUFFERED": "1"}
    exit_code, numbers, log = measure._watched([sys.executable, "-c", code], tmp_path, env)
    assert exit_code == 0 and log.count("loss") == 4
    assert 0.05 < numbers["seconds"] < 1 and numbers["peak_bytes"] > 1 << 20
    assert measure._losses(tmp_path / "out") == [0.5, 1.5, 2.5, 3.5]
