"""PRO in LLaMA-Factory: its command, data and options, on ranked lists.

    python -m pro_kernels.integrations.llamafactory run.yaml
    torchrun --nproc-per-node 8 -m pro_kernels.integrations.llamafactory run.yaml

takes what ``llamafactory-cli train`` takes, with ``stage: dpo`` and ``pref_loss: pro``. Data sets
are those of DPO (``ranking: true``). A row's candidates are what the columns ``chosen`` and
``rejected`` hold, in that order; either may be a list, and one is enough. A column named
``rewards`` has a number for each. Without it the first is the best.

LLaMA-Factory does the rest: templates, cutting, adapters, optimizers, checkpoints. For the time of
the run four of its classes are replaced by those of this file, which are their subclasses.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from llamafactory.data import converter, loader
from llamafactory.data.collator import MultiModalDataCollatorForSeq2Seq
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.data.processor.processor_utils import infer_seqlen
from llamafactory.extras import logging
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.hparams import FinetuningArguments, read_args
from llamafactory.train import tuner
from llamafactory.train.dpo import trainer, workflow

from pro_kernels.integrations.lists import collate_lists, list_metrics, why_unusable
from pro_kernels.models.attach import attach

logger = logging.get_logger(__name__)

# Options of DPO's losses, which PRO does not have.
_OTHER_LOSS = ("pref_beta", "pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "simpo_gamma",
               "ld_alpha", "ref_model", "include_effective_tokens_per_second")  # fmt: skip
_MEDIA = ("images", "videos", "audios")


def main() -> None:
    """Train as the arguments of the command say.

    Raises:
        ValueError: they are not of a run with PRO.
    """
    args = read_args()
    if not isinstance(args, dict):
        raise ValueError("give a YAML or JSON file, then key=value pairs")
    options = args.pop("pro_options", None) or {}
    if (args.get("stage"), args.get("pref_loss")) != ("dpo", "pro"):
        raise ValueError("a run with PRO has stage: dpo and pref_loss: pro")
    run = functools.partial(run_pro, options=options)
    with mock.patch.object(tuner, "run_dpo", run):
        tuner.run_exp(args)


def run_pro(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    callbacks: Any = None,
    *,
    options: Mapping[str, Any],
) -> None:
    """LLaMA-Factory's ``run_dpo`` with lists for pairs; ``options`` are those of ``attach``.

    Raises:
        ValueError: an option of another loss.
    """
    for name in _OTHER_LOSS:
        default = FinetuningArguments.__dataclass_fields__[name].default
        if (value := getattr(finetuning_args, name)) != default:
            raise ValueError(f"{name}={value!r} is no option of pref_loss: pro")
    finetuning_args.use_ref_model = False
    of_lists = {name: _of_lists(kind) for name, kind in converter.DATASET_CONVERTERS.items()}
    ranking = functools.partial(RankingTrainer, options=options)
    with (
        mock.patch.dict(converter.DATASET_CONVERTERS, of_lists),
        mock.patch.object(loader, "PairwiseDatasetProcessor", ListProcessor),
        mock.patch.object(workflow, "PairwiseDataCollatorWithPadding", ListCollator),
        mock.patch.object(trainer, "CustomDPOTrainer", ranking),
    ):
        workflow.run_dpo(model_args, data_args, training_args, finetuning_args, callbacks)


def _of_lists(kind: Any) -> type:
    """A converter of pairs, for rows of n candidates."""

    class OfLists(kind):
        def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
            names = self.dataset_attr.chosen, self.dataset_attr.rejected
            candidates = []
            for name in names:
                value = example[name] if name else []
                candidates += value if isinstance(value, list) else [value]
            rewards = example.get("rewards")
            rewards = [None] * len(candidates) if rewards is None else rewards
            if not candidates or len(rewards) != len(candidates):
                raise ValueError(
                    f"a row with {len(candidates)} candidates, in {names}, and {len(rewards)} "
                    "rewards"
                )
            # Each in turn is both answers of a pair. (A column that has no name is called None.)
            pairs = [super(OfLists, self).__call__({**example, **dict.fromkeys(names, x)})
                     for x in candidates]  # fmt: skip
            sizes = {len(pair["_response"]) for pair in pairs}
            if sizes not in ({0}, {2}):  # {0}: a dialogue that is broken, which is dropped
                raise ValueError(f"candidates that are no answers of this format: {candidates}")
            response = [
                {**x, "reward": reward}
                for pair, reward in zip(pairs, rewards, strict=True)
                for x in pair["_response"][:1]
            ]
            return {**pairs[0], "_response": response}

    return OfLists


class ListProcessor(PairwiseDatasetProcessor):
    """The token ids of a row's candidates, each after the prompt, cut as pairs are."""

    def preprocess_dataset(self, examples: Mapping[str, Sequence]) -> dict[str, list]:
        """Rows of ``input_ids`` and ``labels`` (n lists each), ``rewards``, and media."""
        rows: dict[str, list] = defaultdict(list)
        for at, (prompt, response) in enumerate(
            zip(examples["_prompt"], examples["_response"], strict=True)
        ):
            rewards = [x["reward"] for x in response]
            why = "no prompt" if len(prompt) % 2 != 1 else why_unusable(rewards)
            if why:
                logger.warning_rank0(f"Dropped a list: {why}: {prompt + response}")
                continue
            media = [examples[f"_{name}"][at] for name in _MEDIA]
            about = [examples[f"_{name}"][at] for name in ("system", "tools")]
            ids, labels = self._encode(prompt, response, about, [x or [] for x in media])
            row = {"input_ids": ids, "labels": labels, "rewards": rewards}
            for name, value in {**row, **dict(zip(_MEDIA, media, strict=True))}.items():
                rows[name].append(value)
        return rows

    def _encode(
        self, prompt: list, response: list, about: list, media: list
    ) -> tuple[list[list[int]], list[list[int]]]:
        plugin, answers = self.template.mm_plugin, []
        source: list[int] = []
        for candidate in response:
            turn = {name: candidate[name] for name in ("role", "content")}
            messages = plugin.process_messages([*prompt, turn], *media, self.processor)
            source, answer = self.template.encode_oneturn(self.tokenizer, messages, *about)
            end = [self.tokenizer.eos_token_id] if self.template.efficient_eos else []
            answers.append(answer + end)
        source, _ = plugin.process_token_ids(source, None, *media, self.tokenizer, self.processor)
        longest = max(map(len, answers))
        before, after = infer_seqlen(len(source), longest, self.data_args.cutoff_len)
        source, answers = source[:before], [x[:after] for x in answers]
        return [source + x for x in answers], [[IGNORE_INDEX] * before + x for x in answers]

    def print_data_example(self, example: Mapping[str, Any]) -> None:
        """Print a list."""
        for ids, labels, reward in zip(
            example["input_ids"], example["labels"], example["rewards"], strict=True
        ):
            scored = [x for x in labels if x != IGNORE_INDEX]
            print(f"candidate, reward {reward}:\n{self.tokenizer.decode(ids)}")
            print(f"scored of it:\n{self.tokenizer.decode(scored)}")


class ListCollator(MultiModalDataCollatorForSeq2Seq):
    """LLaMA-Factory's collator of rows, as one of lists."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch that an attached model takes."""
        lists = [
            [
                {
                    "input_ids": ids,
                    "attention_mask": [1] * len(ids),
                    "labels": labels,
                    **{name: x[name] for name in _MEDIA},
                }
                for ids, labels in zip(x["input_ids"], x["labels"], strict=True)
            ]
            for x in features
        ]
        return collate_lists(super().__call__, lists, [x["rewards"] for x in features])


class RankingTrainer(trainer.CustomDPOTrainer):
    """LLaMA-Factory's trainer of preferences; the loss is the attached model's."""

    def __init__(self, model: Any, *args: Any, options: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        attach(self.model, loss="ranking", **options)

    def get_batch_loss_metrics(
        self, model: Any, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Any, dict[str, float]]:
        """PRO of a batch, and what is logged of it."""
        out = model(**batch, use_cache=False)
        prefix = "eval_" if train_eval == "eval" else ""
        return out.loss, {f"{prefix}{k}": x.item() for k, x in list_metrics(out, batch).items()}


if __name__ == "__main__":
    main()
