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
from pro_trainer.data.formats import HUMAN
from pro_trainer.data.report import DataReport
from pro_trainer.text.options import ListOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TRIES = 16  # conversations, as templates take some keys in some turns only
_SPELLED = "\ue000{}\ue001"  # stands for a control token that a text spells out
_SPELLED_OUT = re.compile("\ue000(\\d+)\ue001")


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
        self.control_ids = set(tokenizer.convert_tokens_to_ids(self.control)) - {None}
        self._tries: Counter[str] = Counter()  # conversations in which a key was looked for
        self._any_control = re.compile("|".join(map(re.escape, self.control)) or "(?!)")

    def under_template(self, texts: Sequence[Text], where: str = "") -> bool:
        """Whether these texts of one list are written as turns of the chat template.

        Raises:
            DataError: messages, and no template or ``chat_template="off"``.
        """
        mode, literal = self.options.chat_template, self.options.split_special_tokens
        messages = not isinstance(texts[0], str)
        control = sum(self._holds_control(text) for text in texts)
        if control:
            parsed = literal is False or (literal is None and not messages)
            taken = "control tokens" if parsed else "ordinary text"
            self.report.notes[f"texts that spell out control tokens, taken as {taken}"] += control
        if messages and (mode == "off" or not self._template):
            why = (
                "chat_template='off' rules out"
                if self._template
                else f"{_name(self.tokenizer)} lacks: set tokenizer.chat_template (a jinja "
                "template), or give prompts and completions as strings"
            )
            raise DataError(f"{where}: a conversation needs a chat template, which {why}")
        if messages or mode == "off" or not self._template:
            return messages
        if mode == "auto" and control and not literal:
            self.report.notes["lists taken as written, not as turns: they hold control tokens"] += 1
            return False
        self.report.notes["lists whose strings are written as turns of the chat template"] += 1
        return True

    def turns(self, prompt: Text) -> tuple[Message, ...]:
        """A prompt as messages: of the speakers of an HH-RLHF transcript, else of the user."""
        if not isinstance(prompt, str):
            return prompt
        bos = self.tokenizer.bos_token
        while bos and prompt.startswith(bos):
            prompt = prompt.removeprefix(bos)
        if not is_transcript(prompt):
            return ({"role": "user", "content": prompt},)
        parts = _TURN.split(prompt)[1:-2]  # but for the last Assistant:
        messages: list[Message] = []
        for speaker, said in zip(parts[::2], parts[1::2], strict=True):
            role, said = _ROLES[speaker], said.strip()
            if (
                messages and messages[-1]["role"] == role
            ):  # some speak twice, which templates refuse
                messages[-1]["content"] += f"\n\n{said}"
            else:
                messages.append({"role": role, "content": said})
        return tuple(messages)

    def reply(self, completion: Text) -> tuple[Message, ...]:
        """A completion as messages; the template ends the turn, so an EOS at its end goes."""
        if not isinstance(completion, str):
            return completion
        eos = self.tokenizer.eos_token
        text = completion.strip()
        while eos and text.endswith(eos):
            text = text.removesuffix(eos).rstrip()
        return ({"role": "assistant", "content": text},)

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
            given: ``tools`` and other keywords for the template.
            generation: with the beginning of the assistant's next turn.
            from_strings: the messages are made of strings, whose control tokens are taken as such
                unless ``split_special_tokens`` says otherwise.

        Raises:
            jinja2.TemplateError: the template refuses them.
        """
        literal = self.options.split_special_tokens
        if literal or (literal is None and not from_strings):
            messages = [
                {key: self._spell(x) if key != "role" else x for key, x in message.items()}
                for message in messages
            ]

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
            if render(without, {k: x for k, x in given.items() if k != key}) == text:
                self.report.once[sentence] = None
            else:
                self._tries[key] = _TRIES
                self.report.once.pop(sentence, None)
        return text

    def ids(self, texts: Sequence[str], chat: bool = True) -> list[list[int]]:
        """Token ids of texts, no special token added; ``chat``: the template wrote them."""
        literal = bool(self.options.split_special_tokens and not chat)
        plain = iter(self._tokenize([t for t in texts if "\ue000" not in t], literal))
        return [self._spelled_ids(text) if "\ue000" in text else next(plain) for text in texts]

    def _tokenize(self, texts: list[str], literal: bool) -> list[list[int]]:
        if not texts:
            return []
        split = {"split_special_tokens": True} if literal else {}
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **split,
        ).input_ids

    def _spell(self, text: Any) -> Any:
        """Text in which control tokens stand as ``_SPELLED``; what is no text as it is."""
        if not isinstance(text, str):
            return text
        return self._any_control.sub(lambda m: _SPELLED.format(self.control.index(m[0])), text)

    def _spelled_ids(self, text: str) -> list[int]:
        """Ids of a text of ``_spell``: what lies between two control tokens is ordinary text."""
        found: list[int] = []
        at = 0
        for match in [*self._any_control.finditer(text), None]:
            between = text[at : match.start() if match else None]
            if between:
                between = _SPELLED_OUT.sub(lambda m: self.control[int(m[1])], between)
                found += self._tokenize([between], literal=True)[0]
            if match:
                found.append(self.tokenizer.convert_tokens_to_ids(match[0]))
                at = match.end()
        return found

    def _holds_control(self, text: Text) -> bool:
        contents = (text,) if isinstance(text, str) else [message["content"] for message in text]
        return any(self._any_control.search(content) for content in contents)


def is_transcript(prompt: Text) -> bool:
    """Whether a prompt is a dialogue as HH-RLHF writes it, up to the assistant's next turn."""
    return isinstance(prompt, str) and _TRANSCRIPT.fullmatch(prompt) is not None


def shorter_prompts(prompt: Text) -> Iterator[tuple[Text, str]]:
    """The prompt without its oldest turns, one more at a time, and what is gone.

    A turn is what the user says and what is answered. Of messages the system's go after all turns
    but the last, which stays.
    """
    if isinstance(prompt, str):
        turns = prompt.split(HUMAN) if is_transcript(prompt) else [prompt]
        turns = [HUMAN + turn for turn in turns[1:]] if turns[0].strip() == "" else turns
        for gone in range(1, len(turns)):
            yield "".join(turns[gone:]), _turns(gone)
        return
    start = next((i for i, m in enumerate(prompt) if m["role"] not in ("system", "developer")), 0)
    users = [i for i in range(start + 1, len(prompt)) if prompt[i]["role"] == "user"]
    for gone, first in enumerate(users, 1):
        yield (*prompt[:start], *prompt[first:]), _turns(gone)
    if start:
        first, gone = (users[-1], _turns(len(users)) + " and ") if users else (start, "")
        yield prompt[first:], f"{gone}the system's turn"


def _turns(count: int) -> str:
    return f"its {count} oldest turns" if count > 1 else "its oldest turn"


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
