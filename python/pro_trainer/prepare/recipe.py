"""The paper's recipe for one group of ranked lists: extend, score, sort, choose, mark.

Near-duplicates go before anything is scored, and candidates without a score before scores are
compared.

The candidates of a list are those of the data and the samples of each generator. The one the data
prefers (its ``sft_index``, else the best by its own ranking) is called chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from pro_trainer.data.choose import choose, without_near_duplicates
from pro_trainer.data.lists import select
from pro_trainer.data.records import RankedList
from pro_trainer.prepare.draws import Samples, as_replies, list_seed
from pro_trainer.prepare.options import PrepareArguments
from pro_trainer.prepare.output import plain
from pro_trainer.prepare.pool import DATA, Normalize, Pool, combined
from pro_trainer.prepare.rewards.base import Scorer
from pro_trainer.prepare.sampling import prompt_limit, sample
from pro_trainer.text.encode import Encoder

if TYPE_CHECKING:
    from pro_trainer.prepare.served import Served

ALL_EQUAL = "all rewards equal"
KEPT_EQUAL = "rewards of the candidates kept equal"
TOO_FEW = "fewer than 2 different candidates"
CHOSEN_LOST = "the candidate that the data prefers has no score"
NEAR = "near-duplicates"
LINE_KEYS = ("record", "dropped", "samples", "lost", "notes", "scored", "chosen_first",
             "chosen_first_of_data")  # fmt: skip


@dataclass
class Generator:
    """A causal LM that candidates are sampled from, under the name it has in ``sources``."""

    name: str
    model: nn.Module
    encoder: Encoder
    options: PrepareArguments

    def samples(self, lists: Sequence[RankedList], first_index: int) -> list[Samples]:
        """Of each list's prompt, and counts of what befell them."""
        options, encoder = self.options, self.encoder
        indices = range(first_index, first_index + len(lists))
        seeds = [list_seed(options.seed, self.name, index) for index in indices]
        samples = sample(self.model, encoder, lists, options, seeds)
        limit = prompt_limit(self.model, options.max_new_tokens, options.max_prompt_length)
        made = []
        for ranked, texts in zip(lists, samples, strict=True):
            if encoder.writer.under_template(ranked):
                texts = as_replies(ranked, texts)
            _, cut = encoder.prompt(ranked, limit)
            made.append((texts, Counter(prompts_cut=int(cut is not None))))
        return made


@dataclass(frozen=True)
class Recipe:
    """Makes lines of the output (with their counts) from ranked lists."""

    generators: Sequence[Generator | Served]
    rewards: Sequence[Scorer]
    options: PrepareArguments

    def lines(self, lists: Sequence[RankedList], first_index: int) -> list[dict[str, Any]]:
        """One line a list: its record, or why it was dropped, and its counts.

        Args:
            lists: run through the models together.
            first_index: position of the first of them in the data; samples depend on it.
        """
        pools = [Pool.of(ranked) for ranked in lists]
        for generator in self.generators:
            made = generator.samples(lists, first_index)
            for pool, (texts, counts) in zip(pools, made, strict=True):
                pool.extend(texts, generator.name)
                pool.samples[generator.name].update(counts)
        if (share := self.options.near_duplicates) is not None:
            for pool in pools:
                kept = without_near_duplicates(pool.ranked.completions, share, pool.chosen)
                pool.keep(kept, NEAR)
        if self.rewards:
            self.score(pools)
        return [self._line(pool) for pool in pools]

    def score(self, pools: Sequence[Pool]) -> None:
        """Rewards of all candidates; those that a reward gives no score are lost."""
        texts = [(pool.given, text) for pool in pools for text in pool.ranked.completions]
        raw: list[dict[str, tuple[float, ...]]] = [{} for _ in pools]
        unscored: set[tuple[int, int]] = set()
        for reward in self.rewards:
            scores = iter(reward.score(texts))
            for p, pool in enumerate(pools):
                found = [next(scores) for _ in pool.sources]
                pool.notes[reward.name].update(note for score in found for note in score.notes)
                unscored |= {(p, i) for i, score in enumerate(found) if score.value is None}
                raw[p][reward.name] = tuple(score.value or 0.0 for score in found)
        for p, pool in enumerate(pools):
            pool.ranked = replace(pool.ranked, rewards=None, raw_rewards=raw[p])
            scored = [i for i in range(len(pool.sources)) if (p, i) not in unscored]
            pool.keep(scored, "without a score")
            rewards = self.combined(pool, self.options.normalize) if scored else ()
            pool.ranked = replace(pool.ranked, rewards=tuple(rewards))

    def combined(self, pool: Pool, normalize: Normalize) -> list[float]:
        """One reward of each candidate."""
        weights = {reward.name: reward.weight for reward in self.rewards}
        penalty = self.options.length_penalty
        return combined(pool.ranked.raw_rewards, weights, pool.lengths(), normalize, penalty)

    def _line(self, pool: Pool) -> dict[str, Any]:
        record, dropped = self._record(pool)
        return {
            "record": record,
            "dropped": dropped,
            "samples": pool.samples,
            "lost": pool.lost,
            "notes": pool.notes,
            "scored": {
                "rewards": pool.ranked.rewards, "lengths": pool.lengths(), "sources": pool.sources
            },
            **self._agreement(pool),
        }  # fmt: skip

    def _record(self, pool: Pool) -> tuple[dict[str, Any] | None, str | None]:
        """What is written of a list, or None and why nothing is."""
        options, ranked, by_data = self.options, pool.ranked, self.options.sft == "chosen"
        if len(ranked.completions) < 2:
            return None, TOO_FEW
        if by_data and pool.chosen is None:
            return None, CHOSEN_LOST
        kept = choose(
            ranked.best_first(),
            ranked.rewards,
            options.ranking_length,
            pool.chosen if by_data else None,
            select=options.select,
            bottom=options.bottom,
            texts=ranked.completions,
        )
        written = select(ranked, kept)
        if written.rewards is not None and len(set(written.rewards)) == 1:
            return None, ALL_EQUAL if len(set(ranked.rewards or ())) == 1 else KEPT_EQUAL
        record = written.record() | {
            "sft_index": written.sft_index if by_data else 0,
            "chosen_index": written.sft_index,
            "sources": [pool.sources[i] for i in kept],
        }
        taken = {name for reward in self.rewards for name in reward.taken} - record.keys()
        others = {name: x for name, x in ranked.columns.items() if name in taken}
        return record | plain(others), None

    def _agreement(self, pool: Pool) -> dict[str, Any]:
        """Whether the rewards prefer what the data prefers; None where that is unknown."""
        if not self.rewards or pool.chosen is None or len(pool.sources) < 2:
            return {"chosen_first": None, "chosen_first_of_data": None}
        order = pool.ranked.best_first()
        of_data = [i for i in order if pool.sources[i] == DATA]
        return {
            "chosen_first": order[0] == pool.chosen,
            "chosen_first_of_data": of_data[0] == pool.chosen,
        }
