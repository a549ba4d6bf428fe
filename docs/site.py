"""mkdocs hooks: formulas become MathML, so that readers download nothing; plots are added."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = ("bench/results/cpu", "bench/results/gpu", "bench/results/scaling")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the committed reports and their plots, which lie outside ``docs``."""
    for folder in _RESULTS:
        for path in sorted((_ROOT / folder).iterdir()):
            if path.suffix in (".md", ".png"):
                name = path.relative_to(_ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the reports, as they are within the site."""
    for folder in _RESULTS:
        markdown = markdown.replace(f"(../{folder}/", f"({folder}/")
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Replace what ``pymdownx.arithmatex`` marked as a formula."""

    def rendered(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return _FORMULA.sub(rendered, content)
