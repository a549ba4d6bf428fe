"""Texts as they stand before the model: written as turns of its chat template, or as they are.

A control token is one of the tokenizer's special tokens (BOS, the marks of turns, ...). Under the
template, one that a message spells out is no control token: it is kept apart from those that the
template writes, and split into ordinary tokens (``split_special_tokens=False`` lets it through).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pro_trainer.data.fields import DataError, Message, Text
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.data.transcripts import turns
from pro_trainer.text.options import ListOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIES = 16  # conversations, as templates take some keys in some turns only
# Around the number of a control token that a text spells out, or of a mark that it holds itself.
_MARKS = ("\ue000", "\ue001")
_SPELLED_OUT = re.compile("{}(\\d+){}".format(*_MARKS))


class Writer:
    """Writes texts for one tokenizer, and says in the report what became of them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: ListOptions, report: DataReport
    ) -> None:
        """Raise ValueError for ``chat_template="on"`` and a tokenizer that has none."""
        self.tokenizer, self.options, self.report = tokenizer, options, report
        template = tokenizer.chat_template or ""
        self._template = template if isinstance(template, str) else "\n".join(template.values())
        if options.chat_template == "on" and not template:
            raise ValueError(f"chat_template='on', but {_name(tokenizer)} has no chat template")
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        known = {*tokenizer.all_special_tokens, *added} - {""}
        self.control = sorted(known, key=len, reverse=True)
        self._spelled = [*self.control, *_MARKS]
        self.control_ids = set(tokenizer.convert_tokens_to_ids(self.control)) - {None}
        self._tries: Counter[str] = Counter()  # conversations in which a key was looked for
        self._any_control = re.compile("|".join(map(re.escape, self.control)) or "(?!)")

    def under_template(self, ranked: RankedList) -> bool:
        """Whether a list is written as turns; DataError for messages that cannot be."""
        mode, literal = self.options.chat_template, self.options.split_special_tokens
        messages = not isinstance(ranked.prompts[0], str)
        control = sum(self._any_control.search(text) is not None for text in self._inner(ranked))
        if control:
            parsed = literal is False or (literal is None and not messages)
            taken = "control tokens" if parsed else "ordinary text"
            self.report.notes[f"texts that spell out control tokens, taken as {taken}"] += control
        if messages and (mode == "off" or not self._template):
            why = (
                "chat_template='off' rules out"
                if self._template
                else f"{_name(self.tokenizer)} lacks: set tokenizer.chat_template (a jinja "
                "template), or give prompts and completions as strings, without a system text"
            )
            raise DataError(f"{ranked.where}: a conversation needs a chat template, which {why}")
        if messages or mode == "off" or not self._template:
            return messages
        if mode == "auto" and control and not literal:
            self.report.notes["lists taken as written, not as turns: they hold control tokens"] += 1
            return False
        self.report.notes["lists whose strings are written as turns of the chat template"] += 1
        return True

    def _inner(self, ranked: RankedList) -> list[str]:
        """All there is to read of each text, without a BOS before it or an EOS behind it."""
        texts = [self._without_bos(p) for p in ranked.prompts]
        texts += [self._without_eos(c) for c in ranked.completions]
        return [x if isinstance(x, str) else " ".join(_strings(x)) for x in texts]

    def _without_bos(self, prompt: Text) -> Text:
        bos = self.tokenizer.bos_token
        while bos and isinstance(prompt, str) and prompt.startswith(bos):
            prompt = prompt.removeprefix(bos)
        return prompt

    def _without_eos(self, completion: Text) -> Text:
        eos = self.tokenizer.eos_token
        if not isinstance(completion, str):
            *before, last = completion
            return (*before, last | {"content": self._without_eos(last["content"])})
        while eos and completion.rstrip().endswith(eos):
            completion = completion.rstrip().removesuffix(eos)
        return completion

    def turns(self, prompt: Text) -> tuple[Message, ...]:
        """A prompt as messages."""
        return turns(self._without_bos(prompt)) if isinstance(prompt, str) else prompt

    def reply(self, completion: Text) -> tuple[Message, ...]:
        """A completion as messages; the template ends the turn, so an EOS at its end goes."""
        completion = self._without_eos(completion)
        if isinstance(completion, str):
            return ({"role": "assistant", "content": completion.strip()},)
        return completion

    def write(
        self,
        messages: Sequence[Message],
        given: Mapping[str, Any],
        *,
        generation: bool = False,
        from_strings: bool = False,
    ) -> str:
        """Messages as the template writes them; control tokens they spell out may be replaced.

        Args:
            messages: of one conversation.
            given: ``tools`` and other keywords for the template, which may raise a TemplateError.
            generation: with the beginning of the assistant's next turn.
            from_strings: the messages are made of strings, whose control tokens are taken as such
                unless ``split_special_tokens`` says otherwise.
        """
        from jinja2 import TemplateError

        literal = self.options.split_special_tokens
        spelled = self._any_control if literal or (literal is None and not from_strings) else None
        messages = [
            {key: self._spell(x, spelled) if key != "role" else x for key, x in message.items()}
            for message in messages
        ]
        given = {key: self._spell(x, spelled) for key, x in given.items()}

        def render(messages: Sequence[Message], given: Mapping[str, Any]) -> str:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **given
            )

        text = render(messages, given)
        for key in {key for message in messages for key in message} | given.keys():
            if key in ("role", "content") or self._tries[key] >= _TRIES:
                continue
            self._tries[key] += 1
            without = [{k: x for k, x in message.items() if k != key} for message in messages]
            sentence = f"the chat template takes no {key!r}: the model does not see it"
            try:
                used = render(without, {k: x for k, x in given.items() if k != key}) != text
            except (TemplateError, TypeError, ValueError):
                used = True  # the template asks for it
            if used:
                self._tries[key] = _TRIES
                self.report.once.pop(sentence, None)
            else:
                self.report.once[sentence] = None
        return text

    def ids(self, texts: Sequence[str], chat: bool = True) -> list[list[int]]:
        """Token ids of texts, no special token added; ``chat``: ``write`` made them."""
        if not chat:
            return self.tokenize(texts, literal=bool(self.options.split_special_tokens))
        plain = iter(self.tokenize([t for t in texts if _MARKS[0] not in t]))
        return [self._spelled_ids(text) if _MARKS[0] in text else next(plain) for text in texts]

    def tokenize(
        self, texts: Sequence[str], literal: bool = False, special: bool = False
    ) -> list[list[int]]:
        """Ids of texts.

        ``literal``: control tokens split into ordinary ones; ``special``: with the tokenizer's own
        special tokens around.
        """
        if not texts:
            return []
        split = {"split_special_tokens": True} if literal else {}
        return self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **split,
        ).input_ids

    def _spell(self, value: Any, also: re.Pattern[str] | None) -> Any:
        """A value whose texts hold marks for the marks, and for what ``also`` matches."""
        if isinstance(value, str):
            value = re.sub("|".join(_MARKS), self._mark, value)
            return also.sub(self._mark, value) if also else value
        if isinstance(value, Mapping):
            return {key: self._spell(x, also) for key, x in value.items()}
        return [self._spell(x, also) for x in value] if isinstance(value, (list, tuple)) else value

    def _mark(self, match: re.Match[str]) -> str:
        return f"{_MARKS[0]}{self._spelled.index(match[0])}{_MARKS[1]}"

    def _spelled_ids(self, text: str) -> list[int]:
        """Ids of a text with marks: what lies between two control tokens is ordinary text."""
        found: list[int] = []
        at = 0
        for match in [*self._any_control.finditer(text), None]:
            between = text[at : match.start() if match else None]
            if between:
                between = _SPELLED_OUT.sub(lambda m: self._spelled[int(m[1])], between)
                found += self.tokenize([between], literal=True)[0]
            if match:
                found.append(self.tokenizer.convert_tokens_to_ids(match[0]))
                at = match.end()
        return found


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value but roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, x in value.items():
            yield from _strings(x) if key != "role" else ()
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _strings(x)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
