"""Lengths and common prefixes of real lists, as counts alone: no token and no text is kept.

    python -m bench.training.shapes NAME MODEL DATA [--lists B] [--n N] [--max_length T]

adds one entry to ``shapes.json``: how many first tokens all its lists have in common, and of each
list how many tokens its completions share and how many each has of its own. Cases make batches of
random tokens in that form.
"""

from __future__ import annotations

import argparse
import json
from os.path import commonprefix
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")


def load() -> dict[str, dict]:
    """Name -> source, ``start`` and ``lists`` (shared tokens, own tokens of each completion)."""
    return json.loads(PATH.read_text())


def main() -> None:
    """Read lists as the trainer does, and add their shape."""
    from pro_trainer.models import load_tokenizer
    from pro_trainer.text.options import ListOptions
    from pro_trainer.text.store import load_dataset

    parser = argparse.ArgumentParser(prog="python -m bench.training.shapes")
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--lists", type=int, default=4)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_completion", type=int, default=256)
    args = parser.parse_args()
    options = ListOptions(max_length=args.max_length, num_candidates=args.n)
    found, _ = load_dataset([args.data], load_tokenizer(args.model), options)
    lists, firsts = [], []
    for row in found:
        prompts = row["prompts"] * (1 if len(row["prompts"]) > 1 else len(row["completions"]))
        rows = [
            [*p, *c[: args.max_completion]]
            for p, c in zip(prompts, row["completions"], strict=True)
        ]
        if len(rows) != args.n:
            continue
        shared = min(len(commonprefix(rows)), min(map(len, rows)) - 1)
        firsts.append(rows[0][:shared])
        lists.append([shared, [len(x) - shared for x in rows]])
        if len(lists) == args.lists:
            break
    every = load() if PATH.exists() else {}
    source = Path(args.data).name.partition(".")[0]
    start = len(commonprefix(firsts))
    every[args.name] = {"source": source, "tokenizer": "SmolLM2", "start": start, "lists": lists}
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in every.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
