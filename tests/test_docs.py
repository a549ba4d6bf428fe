"""README.md and docs/: their length, links and pictures; the first steps do what they say."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as mkdocs makes them."""
    heads = re.findall(r"^#{1,6} (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda x: str(x.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        name = "../README.md" if name == "index.md" else name  # the first page of the site
        file = (page.parent / name) if name else page
        assert file.is_file(), f"{target} is no file"
        assert not anchor or anchor in slugs(file.read_text()), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda x: str(x.relative_to(ROOT)))
def test_a_page_stands_in_the_site_and_says_first_what_it_is_for(page):
    name = page.relative_to(DOCS).as_posix()
    assert f" {name}\n" in (ROOT / "mkdocs.yml").read_text()
    first = page.read_text().split("\n\n")[1]
    assert re.search(r"\b[Yy]ou\b", first), f"says nothing to the reader: {first}"


def test_the_readme_is_short_and_tables_are_whole():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
            head, rule, *rows = block.splitlines()
            assert re.fullmatch(r"[|:\- ]+", rule), f"{page.name}: {head} has no rule below it"
            columns = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", x))) for x in rows}
            assert len(columns) <= 1, f"{page.name}: rows of different lengths below {head}"


def test_pictures_are_what_the_script_draws():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert set(figures.FIGURES) == {x.stem for x in DOCS.glob("*.svg")}
    for name, make in figures.FIGURES.items():
        assert (DOCS / f"{name}.svg").read_text() == str(make()), "run: python docs/figures.py"


def test_the_first_steps(tmp_path, monkeypatch, capsys):
    """The commands of docs/start.md, in order; fewer steps of training."""
    main = pytest.importorskip("pro_trainer.cli.main").main
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "start.md").read_text()
    (lists,) = re.findall(r'```json title="lists.jsonl"\n(.*?)```', text, re.S)
    Path("lists.jsonl").write_text(lists)
    commands = re.findall(r"^pro-kernels (.*)$", text, re.M)
    assert [x.split()[0] for x in commands] == ["env", "check", "train", "inspect", "train", "eval"]
    for command in commands:
        argv = shlex.split(command)
        if argv[0] == "train":
            argv += ["--max_steps", "2"]
        if argv[0] != "check":  # has tests of its own
            assert main(argv) == 0, command
    assert "pairwise accuracy" in capsys.readouterr().out
