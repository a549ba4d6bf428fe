"""The pictures of README.md and of these pages: ``python docs/figures.py`` writes them as SVG.

Each has a background of its own, so that it can be read on a light and on a dark page. Lengths
and times are those of committed results; the pictures that only explain say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_STYLE = """
.panel{fill:#fff}.ink{fill:#24292f}.soft{fill:#57606a}.pad{fill:#dfe3e8}.line{stroke:#57606a}
.p{fill:#3f6fa5}.a{fill:#e08a3c}.b{fill:#f0b787}.q{fill:#8a5a9c}.c{fill:#5fa39c}.d{fill:#9fcdc8}
.off{fill:#eceff2}
@media (prefers-color-scheme:dark){.panel{fill:#161b22}.ink{fill:#e6edf3}.soft{fill:#9aa4af}
.pad{fill:#39424e}.line{stroke:#9aa4af}.off{fill:#232a33}.p{fill:#5b8fcb}.q{fill:#a97fba}}
"""


class Picture:
    """Shapes on a panel of ``width`` by ``height``; ``label`` is read to those who cannot see."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="{label}" font-family="system-ui,sans-serif">',
            f"<style>{''.join(_STYLE.split(chr(10)))}</style>",
            '<marker id="m" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0 0L6 3L0 6z" class="soft"/></marker>',
            f'<rect class="panel" width="{width}" height="{height}" rx="8"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, kind: str) -> None:
        """A rectangle of a colour class."""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, size: int = 13, kind: str = "ink", at: str = "start"
    ) -> None:
        """A line of text; ``at`` is start, middle or end."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}">'
            f"{text}</text>"
        )

    def arrow(self, path: str) -> None:
        """A path with a head."""
        self.parts.append(f'<path class="line" d="{path}" fill="none" marker-end="url(#m)"/>')

    def __str__(self) -> str:
        """The file."""
        return "\n".join([*self.parts, "</svg>\n"])


def batch() -> Picture:
    """A batch of HH-RLHF pairs as it is padded and as it is run; the measured steps beside it."""
    results = json.loads((ROOT / "bench/results/step-cpu-fp32/results.json").read_text())
    rows = {r["provider"]: r for r in results["results"] if r["case"] == "HH n=2, SmolLM2 in fp32"}
    run = rows["trl-dpo"]
    entry = json.loads((ROOT / "bench/engine/lists.json").read_text())["HH"]
    lists = [
        (min(prompt, run["P"]), own)
        for prompt, own in zip(entry["prompts"], entry["completions"], strict=True)
    ]
    assert sum(p + o for p, own in lists for o in own) == run["tokens"]
    longest = max(p + max(own) for p, own in lists)
    padded = sum(len(own) for _, own in lists) * longest
    distinct = entry["start"] + sum(p - entry["start"] + sum(own) for p, own in lists)
    picture = Picture(
        820, 312, f"A padded batch of {padded} positions, its {distinct} distinct tokens, and times"
    )
    scale, y = 380 / longest, 44
    picture.text(20, 28, f"A batch of 8 preference pairs: {padded:,} positions".replace(",", " "))
    for prompt, own in lists:
        for answer, kind in zip(own, "ab", strict=True):
            picture.box(20, y, 380, 7, "pad")
            picture.box(20, y, prompt * scale, 7, "p")
            picture.box(20 + prompt * scale, y, answer * scale, 7, kind)
            y += 8
        y += 2
    y += 32
    picture.text(20, y - 9, f"What is really run: {distinct:,} tokens".replace(",", " "))
    x = 0.0
    for index, (prompt, own) in enumerate(lists):
        shared = entry["start"] if index else 0
        for length, kind in ((prompt - shared, "p"), (own[0], "a"), (own[1], "b")):
            rest = length * scale
            while rest > 0:
                part = min(rest, 380 - x)
                picture.box(20 + x, y, part, 7, kind)
                x, rest = x + part, rest - part
                if x >= 380 - 1e-9:
                    x, y = 0.0, y + 8
    y += 30
    for x, kind, name in (
        *((20, "p", "prompt"), (96, "a", "better answer"), (206, "b", "worse answer")),
        (312, "pad", "padding"),
    ):
        picture.box(x, y - 9, 10, 10, kind)
        picture.text(x + 15, y, name, 12, "soft")
    picture.text(440, 28, "One DPO step of TRL on this batch, in seconds")
    bars = (
        ("trl-dpo", "TRL alone", "pad"),
        ("trl-dpo-head", "and the fused loss", "p"),
        ("trl-dpo-distinct", "and each token run once", "a"),
    )
    most = run["seconds"]
    for index, (provider, name, kind) in enumerate(bars):
        top, seconds = 50 + 62 * index, rows[provider]["seconds"]
        picture.text(440, top + 8, name, 12, "soft")
        picture.box(440, top + 14, 300 * seconds / most, 24, kind)
        picture.text(446 + 300 * seconds / most, top + 31, f"{seconds:.1f}")
    picture.text(440, 250, "The losses are the same but for rounding.", 12, "soft")
    picture.text(440, 268, "SmolLM2's shape, fp32, 2 threads of an AMD EPYC,", 12, "soft")
    picture.text(440, 286, f"{results['date'][:10]}. Lengths of HH-RLHF dialogues.", 12, "soft")
    return picture


def distinct() -> Picture:
    """A padded batch, its distinct tokens, and the blocks of attention."""
    segments = (("p", 6, -1), ("a", 3, 0), ("b", 5, 0), ("q", 4, -1), ("c", 2, 3), ("d", 5, 3))
    rows = ((0, 1), (0, 2), (3, 4), (3, 5))
    picture = Picture(
        700, 410, "A padded batch, its distinct tokens in one row, and the blocks of attention"
    )
    picture.text(20, 26, "padded: 48 tokens are run")
    for y, row in enumerate(rows):
        kinds = [segments[s][0] for s in row for _ in range(segments[s][1])]
        for x, kind in enumerate((*kinds, *["pad"] * (12 - len(kinds)))):
            picture.box(20 + 16 * x, 40 + 25.6 * y, 15, 15, kind)
    picture.text(260, 26, "its distinct tokens, in one row: 25 are run")
    starts = [sum(s[1] for s in segments[:i]) for i in range(len(segments))]
    names = ("prompt 1", "1a", "1b", "prompt 2", "2a", "2b")
    for (kind, length, parent), start, name in zip(segments, starts, names, strict=True):
        for x in range(start, start + length):
            picture.box(260 + 16 * x, 62, 15, 15, kind)
        middle = 260 + 16 * start + 8 * length
        picture.text(middle, 96, name, 11, "soft", "middle")
        if parent >= 0:
            above = 260 + 16 * starts[parent] + 8 * segments[parent][1]
            picture.arrow(f"M{above} 102C{above} 128 {middle} 128 {middle} 104")
    picture.text(120, 158, "what attends to what (queries down, keys across)")
    picture.box(120, 170, 225, 225, "off")
    for (kind, length, parent), start in zip(segments, starts, strict=True):
        for i in range(length):
            picture.box(120 + 9 * start, 170 + 9 * (start + i), 9 * (i + 1), 8.5, kind)
        if parent >= 0:
            above = segments[parent]
            at = 120 + 9 * starts[parent]
            picture.box(at, 170 + 9 * start, 9 * above[1], 9 * length - 0.5, above[0])
    for line, text in enumerate(
        (
            "A segment attends to itself, causally (triangles),",
            "and to the whole of its ancestors (rectangles).",
            "No block is masked. No key is copied.",
            "Positions go on from the ancestor's, so each row",
            "has the positions that it has in the padded batch.",
        )
    ):
        picture.text(372, 200 + 22 * line, text, 12, "soft")
    return picture


def terms() -> Picture:
    """The terms of the ranking loss of four answers: what each one sums."""
    picture = Picture(700, 236, "Each ranking term compares one answer with all that rank below it")
    picture.text(20, 28, "Four answers, best first")
    for column, name in enumerate(("best", "second", "third", "worst")):
        picture.text(190 + 90 * column, 60, name, 12, "soft", "middle")
    for k in range(3):
        y = 74 + 46 * k
        picture.text(20, y + 21, f"term {k + 1} compares", 12, "soft")
        for i in range(4):
            picture.box(150 + 90 * i, y, 80, 32, "off" if i < k else "a" if i == k else "p")
        picture.text(525, y + 21, f"answer {k + 1} is to win", 12, "soft")
    picture.text(20, 226, "A term is near 0 when its answer is far likelier than all below it.", 12)
    return picture


def rows() -> Picture:
    """Which rows of a padded batch reach the head."""
    picture = Picture(700, 232, "Only positions that predict a token of an answer reach the head")
    picture.text(20, 28, "hidden states of a batch")
    picture.text(330, 28, "scored rows")
    picture.text(470, 28, "log-probs")
    picture.text(590, 28, "sum S")
    own = ((5, 4), (5, 6), (3, 7), (3, 3))
    top = 44
    for y, (prompt, answer) in enumerate(own):
        for x in range(12):
            scored = prompt - 1 <= x < prompt + answer - 1
            kind = "ac"[y // 2] if scored else "p" if x < prompt + answer else "pad"
            picture.box(20 + 20 * x, 44 + 44 * y, 18, 30, kind)
        for at, width in ((330, 90), (470, 30)):
            for x in range(answer):
                picture.box(at, top + 7 * x, width, 6, "ac"[y // 2])
        middle = top + 3.5 * answer
        picture.box(590, middle - 8, 16, 16, "ac"[y // 2])
        picture.arrow(f"M505 {middle:g}L584 {middle:g}")
        top += 7 * answer + 8
    for start, stop in ((268, 322), (426, 464)):
        picture.arrow(f"M{start} 120L{stop} 120")
    return picture


def filtered() -> Picture:
    """Columns that groups of rows keep under ``grad_filter`` (a sketch)."""
    picture = Picture(700, 232, "Each group of rows keeps the vocabulary columns that it needs")
    picture.text(20, 28, "the gradient of the logits, rows sorted by need")
    picture.text(440, 28, "what both products multiply")
    kept = (3, 6, 11, 20)
    for group, count in enumerate(kept):
        y = 46 + 44 * group
        columns = sorted({(7 * group + 5 * j * (j + 1) // 2) % 36 for j in range(count)})
        picture.box(20, y, 36 * 11, 36, "off")
        for j, column in enumerate(columns):
            picture.box(20 + 11 * column, y, 10, 36, "abcd"[group])
            picture.box(440 + 11 * j, y, 10, 36, "abcd"[group])
        picture.text(446 + 11 * len(columns), y + 22, f"group {group + 1}", 11, "soft")
    return picture


FIGURES: dict[str, Callable[[], Picture]] = {
    "batch": batch,
    "distinct": distinct,
    "loss-terms": terms,
    "loss-rows": rows,
    "loss-filter": filtered,
}

if __name__ == "__main__":
    for name, make in FIGURES.items():
        (ROOT / "docs" / f"{name}.svg").write_text(str(make()))
