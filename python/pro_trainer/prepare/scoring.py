"""A reward model: a sequence classifier with one output, which scores prompt and completion.

A score does not depend on what a text is batched with, but for rounding: texts are padded on the
right, masked, and read at their own last token.

Shapes: S texts of one batch, padded to T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pro_trainer.data.fields import Text
from pro_trainer.data.records import RankedList
from pro_trainer.models import first_line, load_tokenizer, quiet
from pro_trainer.prepare.rewards.base import Score, Scored, Scorer, Spec
from pro_trainer.text.encode import Encoder
from pro_trainer.text.options import ListOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_LIMIT = 10**9  # tokenizers without a limit say 10**30


class RewardModel:
    """Scores by a sequence classifier with one label; higher is better.

    Attributes:
        max_length: most tokens of a text, as model and tokenizer take them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        options: ListOptions | None = None,
    ) -> None:
        """Take over a loaded model (it stays in evaluation mode) and its tokenizer.

        ``batch_size`` texts are run together, written as ``options`` say.

        Raises:
            ValueError: more than one label, a tokenizer that does not fit.
        """
        _check_labels(model.config.num_labels, model.name_or_path or type(model).__name__)
        embeddings = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the reward model "
                f"{model.name_or_path} only {embeddings}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, options)
        self.batch_size = batch_size
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limits = (context, tokenizer.model_max_length, _NO_LIMIT)
        self.max_length = min(limit for limit in limits if limit and limit > 0)
        self._pad = model.config.get_text_config().pad_token_id

    @classmethod
    def from_path(
        cls,
        path: str,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        trust_remote_code: bool = False,
        **how: Any,
    ) -> RewardModel:
        """Load from a folder (or hub name): safetensors only. ``how``: as of the constructor.

        Raises:
            ValueError: nothing usable there, more than one label, weights the checkpoint lacks.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification

        with quiet():
            try:
                config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
                if config.num_labels == 1:
                    model, info = AutoModelForSequenceClassification.from_pretrained(
                        path,
                        config=config,
                        dtype=dtype,
                        trust_remote_code=trust_remote_code,
                        use_safetensors=True,
                        output_loading_info=True,
                    )
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: not a reward model: {first_line(error)}") from error
            _check_labels(config.num_labels, path)
            tokenizer = load_tokenizer(path, trust_remote_code)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise ValueError(
                f"{path}: the checkpoint lacks weights of {type(model).__name__} ({missing}); a "
                "language model without a trained score head is no reward model"
            )
        return cls(model.to(device), tokenizer, **how)

    def score(
        self,
        prompts: Sequence[Text | RankedList],
        completions: Sequence[Text],
    ) -> list[float]:
        """One score for each prompt with its completion.

        Strings are scored as ``prompt + completion``, or as turns where the tokenizer has a chat
        template (``ListOptions.chat_template``); a string after messages is the assistant's.

        Raises:
            ValueError: unequal counts, messages without a chat template, a score that is not
                finite.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        texts = zip(prompts, completions, strict=True)
        return self.score_ids([self.encode(*text)[0] for text in texts])

    def encode(self, prompt: Text | RankedList, completion: Text) -> tuple[list[int], bool]:
        """Token ids of one text, and whether the beginning of its prompt went to fit.

        ``prompt``: a text, or the list that the completion is of.
        """
        ids, cut = self.encoder.text(prompt, completion, room=self.max_length)
        return ids, cut is not None

    @torch.no_grad()
    def score_ids(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Scores of encoded texts, in their order; computed in batches of like length.

        Raises:
            ValueError: a text without tokens, a score that is not finite.
        """
        if not all(texts):
            raise ValueError("a text without tokens cannot be scored")
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = self._forward([list(texts[i]) for i in batch])
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return scores

    def _forward(self, texts: list[list[int]]) -> list[float]:
        device = next(self.model.parameters()).device
        length = max(map(len, texts))
        pad = self._pad_id(texts)
        ids = torch.tensor([text + [pad] * (length - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        values = output.logits.float()[:, 0]
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"the reward model {self.model.name_or_path} gives {values.tolist()}, not finite "
                f"numbers, in {self.model.dtype}; try a wider dtype (float32)"
            )
        return values.tolist()

    def _pad_id(self, texts: list[list[int]]) -> int:
        """The model's pad token; decoders are read at the last token that is another.

        A model without one was trained to be read at the very last token. It gets a token that
        ends none of these texts: with EOS, a text that ends with EOS would be read before it.
        """
        if self._pad is not None:
            return self._pad
        last = {text[-1] for text in texts}
        config = self.model.config.get_text_config()
        config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
        return config.pad_token_id


def _check_labels(num_labels: int, path: str) -> None:
    if num_labels != 1:
        raise ValueError(
            f"{path}: a reward model gives one number a text (num_labels=1), this classifier has "
            f"num_labels={num_labels}"
        )


class Classifier(Scorer):
    """A ``RewardModel`` as a reward, loaded when its context begins."""

    def __init__(self, spec: Spec, load: Callable[[], RewardModel]) -> None:
        super().__init__(spec)
        self._load = load

    def __enter__(self) -> Classifier:
        """Load it."""
        self.model = self._load()
        return self

    def score(self, texts: Sequence[Scored]) -> list[Score]:
        """Scores in batches of like length."""
        encoded = [self.model.encode(*text) for text in texts]
        values = self.model.score_ids([ids for ids, _ in encoded])
        notes = [("texts cut to its length",) if cut else () for _, cut in encoded]
        return [Score(*found) for found in zip(values, notes, strict=True)]
