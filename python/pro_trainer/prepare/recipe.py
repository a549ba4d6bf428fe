"""The paper's recipe for one group of ranked lists: extend, score, sort, choose, mark.

The candidates of a list are those of the data and the samples of each generator. The one the data
prefers (its ``sft_index``, else the best by its own ranking) is called chosen.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from pro_trainer.data.choose import choose
from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import is_transcript
from pro_trainer.prepare.options import SamplingOptions, list_seed
from pro_trainer.prepare.sampling import prompt_limit, sample
from pro_trainer.text.encode import Encoder

if TYPE_CHECKING:
    from pro_trainer.prepare.scoring import RewardModel
    from pro_trainer.prepare.served import Served

DATA = "data"
ALL_EQUAL = "all rewards equal"
TOO_FEW = "fewer than 2 different candidates"
LINE_KEYS = ("record", "dropped", "samples", "texts_cut", "reward_sums", "chosen_first",
             "chosen_first_of_data")  # fmt: skip


@dataclass(frozen=True)
class Generator:
    """A causal LM that candidates are sampled from, under the name it has in ``sources``."""

    name: str
    model: nn.Module
    encoder: Encoder


@dataclass
class Pool:
    """The candidates of one list, and what happened on the way."""

    prompt: Text
    completions: list[Text]
    sources: list[str]
    rewards: list[float] | None
    chosen: int | None
    ranked: RankedList
    samples: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    texts_cut: int = 0

    @classmethod
    def of(cls, ranked: RankedList) -> Pool:
        """The candidates of the data; none of them is chosen where there are none."""
        rewards = None if ranked.rewards is None else list(ranked.rewards)
        chosen = ranked.sft_index
        if chosen is None and ranked.completions:
            chosen = 0 if rewards is None else rewards.index(max(rewards))
        sources = [DATA] * len(ranked.completions)
        completions = list(ranked.completions)
        return cls(ranked.prompts[0], completions, sources, rewards, chosen, ranked)

    def extend(self, texts: Sequence[str], source: str) -> None:
        """Add samples that are neither empty nor there already (white space around aside)."""
        seen = {_key(completion) for completion in self.completions}
        counts = self.samples[source]
        for text in texts:
            counts["made"] += 1
            completion = self._in_form(text)
            if not text.strip():
                counts["empty"] += 1
            elif _key(completion) in seen:
                counts["repeated"] += 1
            else:
                seen.add(_key(completion))
                self.completions.append(completion)
                self.sources.append(source)

    def order(self) -> list[int]:
        """Indices, best first; of equal rewards the earlier one."""
        indices = range(len(self.completions))
        if self.rewards is None:
            return list(indices)
        return sorted(indices, key=lambda i: -self.rewards[i])

    def _in_form(self, text: str) -> Text:
        """A sample in the form of what is there: text, or one message."""
        if isinstance((*self.completions, self.prompt)[0], str):
            return text.rstrip()
        return ({"role": "assistant", "content": text.strip()},)


@dataclass(frozen=True)
class Recipe:
    """Makes lines of the output (with their counts) from ranked lists."""

    generators: Sequence[Generator | Served]
    sampling: SamplingOptions
    reward_model: RewardModel | None
    ranking_length: int | None
    sft: Literal["best", "chosen"]

    def lines(self, lists: Sequence[RankedList], first_index: int) -> list[dict[str, Any]]:
        """One line a list: its record, or why it was dropped, and its counts.

        Args:
            lists: run through the models together.
            first_index: position of the first of them in the data; samples depend on it.
        """
        pools = [Pool.of(ranked) for ranked in lists]
        for generator in self.generators:
            self._extend(pools, generator, first_index)
        if self.reward_model is not None:
            self._score(pools, self.reward_model)
        return [self._line(pool) for pool in pools]

    def _extend(
        self, pools: Sequence[Pool], generator: Generator | Served, first_index: int
    ) -> None:
        if not isinstance(generator, Generator):
            for pool in pools:
                texts, counts = generator.take()
                if is_transcript(pool.prompt) and generator.servers.api == "chat":
                    texts = [f" {text.strip()}" for text in texts]
                pool.extend(texts, generator.name)
                pool.samples[generator.name].update(counts)
            return
        options = self.sampling
        model, encoder = generator.model, generator.encoder
        indices = range(first_index, first_index + len(pools))
        samples = sample(
            model,
            encoder.tokenizer,
            [pool.ranked for pool in pools],
            num_samples=options.num_samples,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperatures,
            top_p=options.top_p,
            seeds=[list_seed(options.seed, generator.name, index) for index in indices],
            batch_size=options.batch_size,
            stop_strings=options.stop_strings,
            max_prompt_length=options.max_prompt_length,
            encoder=encoder,
        )
        limit = prompt_limit(model, options.max_new_tokens, options.max_prompt_length)
        for pool, texts in zip(pools, samples, strict=True):
            if is_transcript(pool.prompt) and encoder.writer.under_template(pool.ranked):
                texts = [f" {text.strip()}" for text in texts]  # as replies of transcripts begin
            pool.extend(texts, generator.name)
            _, cut = encoder.prompt(pool.ranked, limit)
            pool.samples[generator.name]["prompts_cut"] += cut is not None

    def _score(self, pools: Sequence[Pool], reward_model: RewardModel) -> None:
        texts = []
        for pool in pools:
            for completion in pool.completions:
                ids, cut = reward_model.encode(pool.ranked, completion)
                texts.append(ids)
                pool.texts_cut += cut
        scores = iter(reward_model.score_ids(texts))
        for pool in pools:
            pool.rewards = [next(scores) for _ in pool.completions]

    def _line(self, pool: Pool) -> dict[str, Any]:
        order = pool.order()
        if len(order) < 2:
            return self._counted(pool, order, None, TOO_FEW)
        keep = pool.chosen if self.sft == "chosen" else None
        kept = choose(order, pool.rewards, self.ranking_length, keep)
        rewards = None if pool.rewards is None else [pool.rewards[i] for i in kept]
        nothing_ranked = rewards is not None and len(set(rewards)) == 1
        chosen = kept.index(pool.chosen) if pool.chosen in kept else None
        record = {
            "prompt": pool.prompt,
            "completions": [pool.completions[i] for i in kept],
            "rewards": rewards,
            "sft_index": chosen if self.sft == "chosen" else 0,
            "chosen_index": chosen,
            "sources": [pool.sources[i] for i in kept],
        }
        if rewards is None:
            del record["rewards"]
        if pool.ranked.weight != 1:
            record["prompt_weight"] = pool.ranked.weight
        template = dict(pool.ranked.template)
        if tools := template.pop("tools", None):
            record["tools"] = tools
        if template:
            record["chat_template_kwargs"] = template
        if nothing_ranked:
            return self._counted(pool, order, None, ALL_EQUAL)
        return self._counted(pool, order, record, None)

    def _counted(
        self, pool: Pool, order: Sequence[int], record: dict[str, Any] | None, dropped: str | None
    ) -> dict[str, Any]:
        """The line of a list: its record, or why it was dropped, and what happened on the way."""
        return {
            "record": record,
            "dropped": dropped,
            "samples": pool.samples,
            "texts_cut": pool.texts_cut,
            **self._agreement(pool, order),
        }

    def _agreement(self, pool: Pool, order: Sequence[int]) -> dict[str, Any]:
        """Reward sums by source, and whether the reward model prefers what the data prefers."""
        sums: dict[str, list[float]] = {}
        for source, reward in zip(pool.sources, pool.rewards or (), strict=False):
            count, total = sums.get(source, (0, 0.0))
            sums[source] = [count + 1, total + reward]
        of_data = [i for i in order if pool.sources[i] == DATA]
        scored = self.reward_model is not None and pool.chosen is not None
        return {
            "reward_sums": sums,
            "chosen_first": order[0] == pool.chosen if scored else None,
            "chosen_first_of_data": of_data[0] == pool.chosen if scored else None,
        }


def _key(completion: Text) -> object:
    if isinstance(completion, str):
        return completion.strip()
    return json.dumps([m | {"content": m["content"].strip()} for m in completion], sort_keys=True)
