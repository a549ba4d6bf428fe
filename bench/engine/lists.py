"""Real ranked lists as numbers: lengths, shared prefixes and rewards; no token, no text.

    python -m bench.engine.lists NAME FILE MODEL [LISTS [N]]

adds an entry to ``lists.json``. MODEL is a folder whose tokenizer counts. Cases make batches of
random tokens in that form. Where the file and the model are there, ``hidden_states`` gives the
real ones: FILE is looked for in ``$PRO_KERNELS_DATA`` and MODEL in ``$PRO_KERNELS_MODELS``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.engine.timing import Refused

PATH = Path(__file__).with_suffix(".json")
MAX_LENGTH, MAX_COMPLETION = 512, 256


class Model(NamedTuple):
    """A model of tests/models/build.py: its name in tables, width and vocabulary."""

    label: str
    H: int
    V: int


MODELS = {
    "smollm2-135m-instruct": Model("SmolLM2", 576, 49152),
    "gemma3-270m": Model("Gemma 3", 640, 262144),
}


@dataclass(frozen=True)
class Lists:
    """An entry: lists of n candidates each."""

    source: str  # file that they are from, without its ending
    model: str  # key of MODELS, whose tokenizer counted
    start: int  # tokens that all lists begin with
    prompts: list[int]  # tokens that the candidates of a list share, those of the start included
    completions: list[list[int]]  # tokens of each candidate after that; best first
    rewards: list[list[float]]

    def head(self, count: int) -> Lists:
        cut = (x[:count] for x in (self.prompts, self.completions, self.rewards))
        return Lists(self.source, self.model, self.start, *cut)

    @property
    def unit_rewards(self) -> list[list[float]]:
        """Rewards within [0, 1], where the authors' eps is far below every exp."""
        every = [r for rewards in self.rewards for r in rewards]
        low, span = min(every), max(every) - min(every)
        return [[(r - low) / span for r in rewards] for rewards in self.rewards]

    @property
    def longest(self) -> int:
        return max(p + max(own) for p, own in zip(self.prompts, self.completions, strict=True))


@lru_cache
def load() -> dict[str, Lists]:
    return {name: Lists(**entry) for name, entry in json.loads(PATH.read_text()).items()}


def tokens(
    source: Path, tokenizer: object, n: int
) -> Iterator[tuple[list[list[int]], list[float]]]:
    """Of each list of ``n`` candidates in a file, token ids of its sequences, and rewards."""
    from pro_trainer.text.options import ListOptions
    from pro_trainer.text.store import load_dataset

    options = ListOptions(max_length=MAX_LENGTH, num_candidates=n)
    for row in load_dataset([str(source)], tokenizer, options)[0]:
        prompts, completions = row["prompts"], row["completions"]
        if len(completions) == n:
            prompts = prompts * (1 if len(prompts) > 1 else n)
            pairs = zip(prompts, completions, strict=True)
            rewards = row["rewards"] or [float(n - i) for i in range(n)]
            yield [[*p, *c[:MAX_COMPLETION]] for p, c in pairs], rewards


@lru_cache(maxsize=1)
def hidden_states(name: str, model: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real hidden states of an entry's first lists.

    Returns:
        Hidden states (B, n, T, H) fp32, the head's weight (V, H) fp32, and targets (B, n, T), the
        next token where it is of a completion, else -100.

    Raises:
        Refused: the model or the file is not there, or gives other lengths.
    """
    entry = load()[name]
    folder = Path(os.environ.get("PRO_KERNELS_MODELS", "~/.cache/pro_kernels/models")).expanduser()
    data = Path(os.environ.get("PRO_KERNELS_DATA", PATH.parents[3] / "shared" / "data"))
    file = data / f"{entry.source}.jsonl.gz"
    for what, path in (("model", folder / model), ("data", file)):
        if not path.exists():
            raise Refused(f"no {what} {path.name} in {path.parent.name}/")
    from transformers import AutoModelForCausalLM

    from pro_trainer.models import load_tokenizer

    found = tokens(file, load_tokenizer(str(folder / model)), len(entry.completions[0]))
    network = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32).eval()
    weight = network.get_output_embeddings().weight.detach()
    B, n, T = count, len(entry.completions[0]), entry.head(count).longest
    hidden, targets = torch.zeros(B, n, T, weight.shape[1]), torch.full((B, n, T), -100)
    for b, (rows, _) in zip(range(count), found, strict=False):
        shared = _shared(rows)
        if [len(x) - shared for x in rows] != entry.completions[b]:
            raise Refused(f"{file.name} has other lists than those of {PATH.name}")
        for i, row in enumerate(rows):
            with torch.no_grad():
                states = network.base_model(torch.tensor([row])).last_hidden_state[0]
            hidden[b, i, : len(row)] = states
            targets[b, i, shared - 1 : len(row) - 1] = torch.tensor(row[shared:])
    return hidden, weight, targets


def _shared(rows: list[list[int]]) -> int:
    """Tokens that all begin with; each has one more at least."""
    return min(len(commonprefix(rows)), min(map(len, rows)) - 1)


def main(name: str, file: str, model: str, lists: str = "4", n: str = "8") -> None:
    """Read lists as the trainer does, and add their shape."""
    from pro_trainer.models import load_tokenizer

    found = tokens(Path(file), load_tokenizer(model), int(n))
    chosen = [(rows, _shared(rows), rewards) for rows, rewards in islice(found, int(lists))]
    entry = {
        "source": Path(file).name.partition(".")[0],
        "model": Path(model).name,
        "start": len(commonprefix([rows[0][:shared] for rows, shared, _ in chosen])),
        "prompts": [shared for _, shared, _ in chosen],
        "completions": [[len(x) - shared for x in rows] for rows, shared, _ in chosen],
        "rewards": [[round(r, 4) for r in rewards] for *_, rewards in chosen],
    }
    every = json.loads(PATH.read_text()) | {name: entry}
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in every.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
