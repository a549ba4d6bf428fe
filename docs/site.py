"""mkdocs hooks: formulas become MathML (readers download nothing), files outside are added."""

from __future__ import annotations

import html
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_NO_PAGE = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:|#|LICENSE|[\w/-]+\.md)[^)]+\)")
_REMOTE = re.compile(r"(?:https://|git@|ssh://git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?/?")


def on_config(config: Any, **_: Any) -> Any:
    """Link to the repository that the site is built from: REPOSITORY_URL, or git's origin."""
    url = os.environ.get("REPOSITORY_URL", "")
    if not url:
        command = ["git", "-C", str(_ROOT), "remote", "get-url", "origin"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        url = found.stdout.strip()
    if remote := _REMOTE.fullmatch(url):
        config.repo_url, config.repo_name = f"https://{remote[1]}/{remote[2]}", "Repository"
    return config


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add what lies outside ``docs``: README.md as the first page, reports and their plots."""
    pages = {"README.md": "index.md", "CHANGELOG.md": "", "CONTRIBUTING.md": ""}
    for source, name in pages.items():
        if (_ROOT / source).is_file():
            text = (_ROOT / source).read_text().replace("](docs/", "](")
            # A file that is no page of the site is named, without a link.
            text = _NO_PAGE.sub(r"\1", text)
            files.append(File.generated(config, name or source, content=text))
    for pattern in ("LICENSE", "bench/results/**/*.md", "bench/results/**/*.png"):
        for path in sorted(_ROOT.glob(pattern)):
            name = path.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the reports, as they are within the site."""
    return markdown.replace("](../bench/results/", "](bench/results/")


def on_page_content(content: str, **_: Any) -> str:
    """Replace what ``pymdownx.arithmatex`` marked as a formula."""

    def rendered(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return _FORMULA.sub(rendered, content)
