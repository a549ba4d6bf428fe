"""Generate the bundled ranked lists: ``python -m pro_trainer.demo_data.generate``.

Each prompt asks where, when or who about some thing. Each of its 4 to 6 answers opens in one of
four tones and fits the question or does not, which can only be told from the prompt. The reward is

    reward = tone (+1.0, +0.4, -0.2 or -0.8) + 2.4 if it fits the question

No thing (adjective and noun) of the held-out prompts occurs in the training prompts. The output is
the same on every machine.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from pro_trainer.demo_data import BUNDLED_EVAL, BUNDLED_TRAIN

ADJECTIVES = ("red", "old", "tall", "tiny", "lost", "blue", "warm", "new", "odd", "grey")
NOUNS = ("kite", "lamp", "boat", "clock", "piano", "ladder", "wagon", "drum", "scarf", "kettle")
ANSWERS = {
    "Where is the {}?": ("in the barn", "by the river", "on the roof", "under the bridge"),
    "When was the {} made?": ("at noon", "last spring", "this year", "on a Monday"),
    "Who has the {}?": ("a sailor", "my aunt", "the baker", "our teacher"),
}
TONES = {"Gladly: ": 1.0, "Sure, ": 0.4, "Well, ": -0.2, "Bah! ": -0.8}
TRAINING_LISTS, HELD_OUT_LISTS = 240, 60


def main() -> None:
    """Write both files."""
    rng = random.Random(2306_17492)
    things = [f"{a} {n}" for a, n in itertools.product(ADJECTIVES, NOUNS)]
    rng.shuffle(things)
    prompts = [(question, thing) for thing in things for question in ANSWERS]
    held_out = prompts[:HELD_OUT_LISTS]  # whole things: HELD_OUT_LISTS is a multiple of 3
    training = prompts[HELD_OUT_LISTS : HELD_OUT_LISTS + TRAINING_LISTS]
    for path, chosen in ((BUNDLED_TRAIN, training), (BUNDLED_EVAL, held_out)):
        lines = [json.dumps(ranked_list(rng, *prompt)) for prompt in chosen]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def ranked_list(rng: random.Random, question: str, thing: str) -> dict[str, object]:
    """One record: 4 to 6 answers with different rewards, in random order."""
    answers: dict[float, str] = {}
    size = rng.randint(4, 6)
    while len(answers) < size:
        text, reward = answer(rng, question)
        answers.setdefault(reward, text)
    pairs = list(answers.items())
    rng.shuffle(pairs)
    return {
        "prompt": f"Q: {question.format(thing)}\nA: ",
        "completions": [text for _, text in pairs],
        "rewards": [reward for reward, _ in pairs],
    }


def answer(rng: random.Random, question: str) -> tuple[str, float]:
    """A random answer and its reward by the rule."""
    fits, tone = rng.random() < 0.5, rng.choice(list(TONES))
    asked = question if fits else rng.choice([q for q in ANSWERS if q != question])
    text = f"{tone}{rng.choice(ANSWERS[asked])}."
    return text, round(TONES[tone] + 2.4 * fits, 1)


if __name__ == "__main__":
    main()
