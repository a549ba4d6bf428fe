"""A tokenised list as the model sees it, to be read or to be checked by a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pro_trainer.data.records import best_first
from pro_trainer.text.encode import TokenizedList

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEN, _DIM, _PLAIN = "\033[32m", "\033[2m", "\033[0m"


def as_json(tokens: TokenizedList) -> dict[str, Any]:
    """``prompt_ids`` (n lists where each candidate has a prompt of its own), ``completion_ids``,
    ``rewards``, ``desirable``, ``weight`` and ``cut``, the candidates best first.
    """
    order = best_first(tokens.rewards, len(tokens.completions))
    shared = len(tokens.prompts) == 1
    return {
        "prompt_ids": tokens.prompts[0] if shared else [tokens.prompts[i] for i in order],
        "completion_ids": [tokens.completions[i] for i in order],
        "rewards": None if tokens.rewards is None else [tokens.rewards[i] for i in order],
        "desirable": None if tokens.desirable is None else [tokens.desirable[i] for i in order],
        "weight": tokens.weight,
        "cut": tokens.cut,
    }


def as_text(tokens: TokenizedList, tokenizer: PreTrainedTokenizerBase, color: bool = False) -> str:
    """Prompt and candidates decoded, special tokens too; what is scored is green or in [ ]."""

    def decoded(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def head(text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if color else f"--- {text}"

    lines = []
    for place, i in enumerate(best_first(tokens.rewards, len(tokens.completions)), 1):
        prompt = tokens.prompts[i if len(tokens.prompts) > 1 else 0]
        if place == 1 or len(tokens.prompts) > 1:
            lines += [head(f"prompt, {len(prompt)} tokens, not scored"), decoded(prompt)]
        ids = tokens.completions[i]
        reward = "" if tokens.rewards is None else f", reward {tokens.rewards[i]:g}"
        sft = ", SFT" if tokens.sft_index == i or (tokens.sft_index is None and place == 1) else ""
        if tokens.desirable is not None:
            sft += ", desirable" if tokens.desirable[i] else ", undesirable"
        text = f"{_GREEN}{decoded(ids)}{_PLAIN}" if color else f"[{decoded(ids)}]"
        lines += [head(f"candidate {place}, {len(ids)} tokens scored{reward}{sft}"), text]
    if tokens.weight != 1:
        lines.append(head(f"weight of the list: {tokens.weight:g}"))
    if tokens.cut:
        lines.append(head(f"cut: {tokens.cut}"))
    return "\n".join(lines)
