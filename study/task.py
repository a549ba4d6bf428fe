"""The study's made-up task: short prompts, answers of mixed quality, and a reward that is known.

A prompt is ``LENGTH`` letters of a ring of twelve and a mark: ``"cabhl="``. The right answer moves
each letter ``SHIFT`` places round the ring: ``"fdekc"``. The reward adds up, over
the places, 1 for the right letter and less for one further from it on the ring, down to 0 at
``SHIFT`` places: between 0 and ``LENGTH``.

The behaviour policy is of mixed quality in two ways. Some letters it mostly gets wrong, others it
gets right every second time (``SKILL``), and each answer is written with more or less care, which
all its letters share. What it does instead is mostly lazy: it copies the letter, for which there is
no reward. So its likeliest answer is poor, good answers are there to be found by drawing more of
them, and what imitates the best of a few draws is still lazy at the letters that even those get
wrong, while a ranking of the draws says everywhere which way is better.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LETTERS = "abcdefghijkl"
LENGTH = 5
SHIFT = 3
MARK = "="
SKILL = tuple(0.05 + 0.45 * i / (len(LETTERS) - 1) for i in range(len(LETTERS)))
CARE = (0.5, 1.5)  # an answer's skill is that of its letters times one number between these
LAZY = 0.6  # share of the letters not written with skill that are copied; the others are random
MAX_REWARD = float(LENGTH)


@dataclass(frozen=True)
class Example:
    """A prompt with answers of the behaviour policy in the order drawn, no two of equal reward."""

    prompt: str
    answers: tuple[str, ...]
    rewards: tuple[float, ...]

    def best(self, candidates: int) -> str:
        """The best of the first so many answers."""
        rewards = self.rewards[:candidates]
        return self.answers[rewards.index(max(rewards))]

    def record(self, candidates: int) -> dict:
        """The first so many answers, as a record for ``PROTrainer``, best first."""
        pairs = zip(self.rewards[:candidates], self.answers[:candidates], strict=True)
        rewards, answers = zip(*sorted(pairs, reverse=True), strict=True)
        return {"prompt": self.prompt, "completions": list(answers), "rewards": list(rewards)}


def shifted(letter: str, places: int) -> str:
    """The letter so many places further round the ring."""
    return LETTERS[(LETTERS.index(letter) + places) % len(LETTERS)]


def reward(prompt: str, answer: str) -> float:
    """The known reward of any answer, from 0 to ``MAX_REWARD``; 0 where its length is wrong."""
    asked = prompt.removesuffix(MARK)
    if len(answer) != len(asked):
        return 0.0
    return sum(_points(shifted(a, SHIFT), b) for a, b in zip(asked, answer, strict=True)) / SHIFT


def behave(prompt: str, rng: random.Random) -> str:
    """One answer of the behaviour policy."""
    care = rng.uniform(*CARE)
    return "".join(_letter(letter, care, rng) for letter in prompt.removesuffix(MARK))


def draw_prompts(count: int, seed: int) -> list[str]:
    """So many different prompts."""
    rng = random.Random(f"prompts {seed}")
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts["".join(rng.choices(LETTERS, k=LENGTH)) + MARK] = None
    return list(prompts)


def draw_example(prompt: str, candidates: int, rng: random.Random) -> Example:
    """So many answers of different reward: one whose reward is taken is drawn again."""
    drawn: dict[float, str] = {}
    while len(drawn) < candidates:
        answer = behave(prompt, rng)
        drawn.setdefault(reward(prompt, answer), answer)
    return Example(prompt, tuple(drawn.values()), tuple(drawn))


def _points(right: str, given: str) -> int:
    """From 0 to ``SHIFT``; whole numbers, so that equal rewards are exactly equal."""
    if given not in LETTERS:
        return 0
    steps = (LETTERS.index(given) - LETTERS.index(right)) % len(LETTERS)
    return max(0, SHIFT - min(steps, len(LETTERS) - steps))


def _letter(letter: str, care: float, rng: random.Random) -> str:
    if rng.random() < SKILL[LETTERS.index(letter)] * care:
        return shifted(letter, SHIFT)
    return letter if rng.random() < LAZY else rng.choice(LETTERS)
