"""A record of any known form -> a ranked list, checked but not yet cleaned (``lists`` does that).

Forms are recognised by a record's own columns (null counts as absent), so one file may mix them.
``PROMPT``, ``COMPLETIONS``, ... below are the names that a column may have. Columns that nothing
uses are named in the report.

    prompt, completions     completions: strings, message lists, or objects that hold a text and
                            perhaps its reward or rank (UltraFeedback, NeMo). Beside them at most
                            one of rewards, scores (higher is better), ranks (lower is better) or
                            order (indices, best first). With none of them the completions stand
                            best first. sft_index optional.
    prompt, chosen, rejected  ``rejected`` may be a list, best first; score_chosen and
                            score_rejected are the rewards where they are given
    chosen, rejected        whole conversations, the prompt being what they share; or HH-RLHF
                            transcripts as strings
    prefix, suffix, reward, sft_index  the official PRO training files
    prompt                  alone, where lists are to be made of prompts (``prompts_alone``)

Beside any of these: ``desirable`` (a bool for each completion, for KTO), ``prompt_weight`` (of
the list in the mean over lists), and what ``pro-kernels prepare`` tells of its lists:
``raw_rewards``, ``chosen_index``, ``sources``.

A text is a string or a conversation (``fields``). Where a record has both, its strings become one
message (the prompt of the user, a completion of the assistant). A completion holds no message of
the user or system. ``system``, ``tools`` and ``chat_template_kwargs`` go with any prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from pro_trainer.data.fields import (
    DataError,
    Message,
    Text,
    as_list,
    as_number,
    as_numbers,
    as_string,
    as_template_options,
    as_text,
    as_tools,
    kind,
)
from pro_trainer.data.records import ParsedRecord, RankedList
from pro_trainer.data.transcripts import ASSISTANT, HUMAN, is_transcript, split_transcript, turns

PROMPT = ("prompt", "instruction", "question", "query", "context", "messages", "conversations")
COMPLETIONS = ("completions", "responses", "answers", "candidates")
RANKINGS = ("rewards", "scores", "ranks", "order")
TEXT_OF_OBJECT = ("completion", "response", "text", "output", "answer", "generation", "content")
REWARD_OF_OBJECT = ("reward", "score", "overall_score", "rating")
SCORE_OF_PAIR = ("score_{}", "{}_score", "{}-score", "rating_{}", "{}_rating", "{}-rating",
                 "reward_{}", "{}_reward")  # fmt: skip
_PROMPT_ROLES = ("user", "system", "developer")
_FORMS = (
    ("prompt", "completions", "rewards"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prefix", "suffix", "reward"),
)
_CONTRADICTS = "'rejected' has the higher score, so it ranks first"


class Columns(dict[str, Any]):
    """The columns of a record that hold something, and which of them were used."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__({str(key): value for key, value in record.items() if value is not None})
        self.unused = dict.fromkeys(self)
        self.notes: list[str] = []

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these columns that is there."""
        return next((name for name in names if name in self), None)

    def take(self, name: str) -> Any:
        """The value of a column, which counts as used; DataError where it is missing."""
        if name not in self:
            raise DataError(f"'{name}' is missing")
        self.unused.pop(name, None)
        return self[name]

    def optional(self, name: str) -> Any:
        """The same, or None."""
        return self.take(name) if name in self else None

    def nearest_form(self) -> str:
        """What is known, what was seen, and what is missing of the form it is nearest to."""
        names = {"prompt": PROMPT, "completions": COMPLETIONS, "rewards": RANKINGS}

        def missing(form: Sequence[str]) -> list[str]:
            return [n for n in form if not self.first(names.get(n, (n,)))]

        seen = f"no known form has the columns {sorted(self)[:12]}"
        form = max(_FORMS, key=lambda form: len(form) - 2 * len(missing(form)))
        if missing(form) == list(form):
            return f"{seen}. Known are: {'; '.join(map(', '.join, _FORMS))}"
        lacks = " and ".join(repr(n) for n in missing(form) if n not in ("rewards", "reward"))
        return f"{seen}. The nearest is {', '.join(form)}" + (f"; {lacks} is missing" * bool(lacks))


def parse_record(record: Any, *, prompts_alone: bool = False) -> ParsedRecord:
    """Read a record of any form; ``prompts_alone``: one without completions is a list of none.

    Raises:
        DataError: the record is malformed or fits no form.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be a JSON object, got {kind(record)}")
    columns = Columns(record)
    if columns.first(COMPLETIONS) and not {"chosen", "rejected"} <= columns.keys():
        parsed = _parse_list(columns)
    elif "chosen" in columns or "rejected" in columns:
        parsed = _parse_pair(columns)
    elif "prefix" in columns and "suffix" in columns:
        parsed = _parse_official(columns)
    elif prompts_alone and columns.first(PROMPT):
        parsed = ParsedRecord("prompts alone", RankedList((_asking(columns),), ()))
    else:
        raise DataError(columns.nearest_form())
    if isinstance(parsed.content, RankedList):
        given = columns.optional("chat_template_kwargs")
        template = as_template_options(given or {}, "chat_template_kwargs")
        if tools := columns.optional("tools"):
            template["tools"] = as_tools(tools, "tools")
        n = len(parsed.content.completions)
        about = {"desirable": _desirable(columns, n), "weight": _weight(columns)}
        about |= {"raw_rewards": _raw_rewards(columns, n), "template": template}
        others = {name: columns[name] for name in columns.unused if name in columns}
        parsed = replace(parsed, content=replace(parsed.content, columns=others, **about))
    return replace(parsed, unused=tuple(columns.unused), notes=tuple(columns.notes))


def _parse_list(columns: Columns) -> ParsedRecord:
    key = columns.first(COMPLETIONS)
    prompt = _prompt(columns)
    items = as_list(columns.take(key), f"'{key}'")
    names = [f"{key}[{i}]" for i in range(len(items))]
    name = "prompt and completions"
    of_objects, ranked_by = None, None
    if any(_is_candidate(item) for item in items):
        name = "prompt and completions with a score each"
        items, names, of_objects, ranked_by = _candidate_objects(columns, key, items, names)
    rewards, by_rank = _ranking(columns, len(items))
    if of_objects is not None:
        if rewards is not None:
            raise DataError(
                f"a list is ranked by its {key} or by a column beside them, not by both"
            )
        by_rank = ranked_by == "rank"
        rewards = tuple(-value if by_rank else value for value in of_objects)
    texts = [as_text(*item) for item in zip(items, names, strict=True)]
    prompt, texts = _one_kind(prompt, texts, names)
    index = _sft_index(columns, len(texts))
    return ParsedRecord(name, RankedList((prompt,), tuple(texts), rewards, index), by_rank)


def _is_candidate(item: Any) -> bool:
    """Whether a completion is an object that holds its text, and is no message."""
    return isinstance(item, Mapping) and "role" not in item and "from" not in item


def _candidate_objects(
    columns: Columns, key: str, items: Sequence[Any], names: Sequence[str]
) -> tuple[list[Any], list[str], list[float] | None, str | None]:
    """Texts and their names, and what ranks them, numbers and their name, or None."""
    texts, text_names, values = [], [], []
    held = [Columns(item if isinstance(item, Mapping) else {}) for item in items]
    ranking = ("rank", *REWARD_OF_OBJECT)
    ranked_by = next((name for name in ranking if any(name in x for x in held)), None)
    for item, columns_of_it, name in zip(items, held, names, strict=True):
        text = columns_of_it.first(TEXT_OF_OBJECT)
        if text is None or (ranked_by is not None and ranked_by not in columns_of_it):
            raise DataError(
                f"{name} must be an object with one of {', '.join(TEXT_OF_OBJECT)}"
                + (f" and with {ranked_by!r}" if ranked_by else "")
                + f" as others of its list are, got {kind(item)} {list(columns_of_it)[:8]}"
            )
        texts.append(columns_of_it.take(text))
        text_names.append(f"{name}.{text}")
        if ranked_by is not None:
            values.append(as_number(columns_of_it.take(ranked_by), f"{name}.{ranked_by}"))
        columns.unused.update(dict.fromkeys(f"{key}[].{x}" for x in columns_of_it.unused))
    return texts, text_names, values if ranked_by else None, ranked_by


def _parse_pair(columns: Columns) -> ParsedRecord:
    chosen, rejected = columns.take("chosen"), columns.take("rejected")
    given = {"'chosen'": chosen, "'rejected'": rejected}
    if isinstance(rejected, (list, tuple)) and not (
        rejected and isinstance(rejected[0], Mapping)
    ):  # several, best first
        several = {f"rejected[{i}]": item for i, item in enumerate(rejected)}
        given = {"'chosen'": chosen, **several}
    names, replies = list(given), [as_text(item, name) for name, item in given.items()]
    rewards = _pair_rewards(columns, len(replies) - 1)
    whole = all(
        not isinstance(reply, str) and reply and reply[0]["role"] in _PROMPT_ROLES
        for reply in replies
    )
    if not whole and columns.first(PROMPT):
        prompt, replies = _one_kind(_prompt(columns), replies, names)
        ranked = RankedList((prompt,), tuple(replies), rewards)
        return ParsedRecord("prompt, chosen, rejected", ranked)
    if all(isinstance(reply, str) for reply in replies):
        if not any(mark in reply for reply in replies for mark in (HUMAN, ASSISTANT)):
            raise DataError(
                "'chosen' and 'rejected' are strings without a prompt, and no transcripts "
                f"({HUMAN.strip()} ... {ASSISTANT.strip()} ...): {columns.nearest_form()}; a "
                "prompt is looked for in " + ", ".join(PROMPT)
            )
        name, parts = "transcripts", [split_transcript(reply) for reply in replies]
    elif not any(isinstance(reply, str) for reply in replies):
        name, parts = "conversations", _split_conversations(replies, names)
    else:
        raise DataError("'chosen' and 'rejected' must be all strings or all lists of messages")
    if None in parts:
        return ParsedRecord(name, f"a {name[:-1]} does not end with an assistant's turn")
    prompts, completions = zip(*parts, strict=True)
    _same_prompt_said_twice(columns, prompts[0])
    prompts = [_with_system(columns, prompt) for prompt in prompts]
    if not isinstance(prompts[0], str):
        completions = [
            _message("assistant", text.strip()) if isinstance(text, str) else text
            for text in completions
        ]
    return ParsedRecord(name, RankedList(shared(prompts), tuple(completions), rewards))


def _same_prompt_said_twice(columns: Columns, prompt: Text) -> None:
    """A prompt beside whole conversations is used where it says what they begin with."""
    name = columns.first(PROMPT)
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if name is not None and columns[name] in (said, list(prompt)):
        columns.take(name)


def _pair_rewards(columns: Columns, rejected: int) -> tuple[float, ...] | None:
    """The rewards of a chosen completion and of the rejected ones, where they have scores."""
    for pattern in SCORE_OF_PAIR:
        names = [pattern.format(which) for which in ("chosen", "rejected")]
        if not columns.first(names):
            continue
        best, others = (columns.take(name) for name in names)
        others = others if isinstance(others, (list, tuple)) else [others]
        rewards = (as_number(best, names[0]), *as_numbers(others, names[1], rejected))
        if max(rewards) > rewards[0]:
            columns.notes.append(_CONTRADICTS)
        return rewards
    return None


def _parse_official(columns: Columns) -> ParsedRecord:
    prefixes = as_list(columns.take("prefix"), "'prefix'")
    suffixes = as_list(columns.take("suffix"), "'suffix'")
    if len(prefixes) != len(suffixes):
        raise DataError(f"{len(suffixes)} 'suffix' texts but {len(prefixes)} 'prefix' texts")
    prompts, completions = [], []
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        suffix = as_string(suffix, f"suffix[{i}]")
        if isinstance(prefix, str):  # the summarisation data: the two are joined as they are
            prompt = as_string(prefix, f"prefix[{i}]")
        else:  # turns of a dialogue, written out and joined as the authors' collator does
            turns = as_list(prefix, f"prefix[{i}]")
            prompt = "".join(as_string(turn, f"prefix[{i}]") for turn in turns)
            prompt = prompt.replace("<|prompter|>", HUMAN + " ")
            prompt = prompt.replace("<|assistant|>", ASSISTANT + " ").rstrip()
            suffix = " " + suffix
        prompts.append(prompt)
        completions.append(suffix)
    rewards = None
    if "reward" in columns:
        rewards = as_numbers(columns.take("reward"), "reward", len(completions))
    index = _sft_index(columns, len(completions))
    ranked = RankedList(shared(prompts), tuple(completions), rewards, index)
    return ParsedRecord("official PRO files", ranked)


def shared(prompts: Sequence[Text]) -> tuple[Text, ...]:
    """One prompt where all are equal, else all of them."""
    return tuple(prompts[:1]) if all(prompt == prompts[0] for prompt in prompts) else tuple(prompts)


def _prompt(columns: Columns) -> Text:
    """The prompt, with Alpaca's ``input`` behind an instruction and a ``system`` text before it."""
    name = columns.first(PROMPT)
    if name is None:
        raise DataError(f"'prompt' is missing: {columns.nearest_form()}")
    prompt = as_text(columns.take(name), f"'{name}'")
    if prompt == ():
        raise DataError(f"'{name}' holds no messages")
    if name == "instruction" and "input" in columns and isinstance(prompt, str):
        given = as_string(columns.take("input"), "'input'")
        prompt = f"{prompt}\n{given}" if given else prompt
    return _with_system(columns, prompt)


def _asking(columns: Columns) -> Text:
    """A prompt that an answer can follow: neither empty nor ended by the assistant's message."""
    prompt = _prompt(columns)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("'prompt' is empty")
    elif prompt[-1]["role"] == "assistant":
        raise DataError("the prompt ends with a message of the assistant, which answers it already")
    return prompt


def _with_system(columns: Columns, prompt: Text) -> Text:
    """The prompt after the system's message of a column ``system``, if it has none of its own."""
    if "system" not in columns or (not isinstance(prompt, str) and prompt[0]["role"] == "system"):
        return prompt
    system = as_string(columns.take("system"), "'system'")
    if not system:
        return prompt
    return (*_message("system", system), *(turns(prompt) if isinstance(prompt, str) else prompt))


def _message(role: str, content: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},)


def _split_conversations(
    conversations: Sequence[tuple[Message, ...]], names: Sequence[str]
) -> list[tuple[tuple[Message, ...], tuple[Message, ...]] | None]:
    """Context and reply of each; the reply is what follows the last message of user or system.

    Of one shared context, replies leave to the prompt the messages they begin with in common, as
    long as each keeps one of its own. None where nothing follows.
    """
    parts = []
    for messages, name in zip(conversations, names, strict=True):
        asked = [i for i, message in enumerate(messages) if message["role"] in _PROMPT_ROLES]
        if not asked:
            raise DataError(f"{name} holds no message of the user, and there is no 'prompt'")
        cut = asked[-1] + 1
        parts.append(cut if cut < len(messages) else None)
    if None in parts:
        return [None]
    cut = parts[0]
    if all(own == cut and messages[:cut] == conversations[0][:cut]
           for own, messages in zip(parts, conversations, strict=True)):  # fmt: skip
        while all(
            len(messages) > cut + 1 and messages[cut] == conversations[0][cut]
            for messages in conversations
        ):
            cut += 1
        parts = [cut] * len(parts)
    return [
        (messages[:own], messages[own:]) for own, messages in zip(parts, conversations, strict=True)
    ]


def _one_kind(
    prompt: Text, completions: list[Text], names: Sequence[str]
) -> tuple[Text, list[Text]]:
    """All strings, or all messages of the roles they may have."""
    if all(isinstance(text, str) for text in (prompt, *completions)):
        if is_transcript(prompt) and all(text.startswith(prompt) for text in completions):
            completions = [text.removeprefix(prompt) for text in completions]
        return prompt, completions
    prompt = turns(prompt) if isinstance(prompt, str) else prompt
    completions = [
        _message("assistant", text) if isinstance(text, str) else text for text in completions
    ]
    for messages, name in zip(completions, names, strict=True):
        for message in messages:
            if message["role"] in _PROMPT_ROLES:
                raise DataError(
                    f"{name} must hold the assistant's messages, got the role {message['role']!r}"
                )
    return prompt, completions


def _ranking(columns: Columns, n: int) -> tuple[tuple[float, ...] | None, bool]:
    """Rewards (or negated ranks) of n completions, and whether they are ranks."""
    keys = [key for key in RANKINGS if key in columns]
    if not keys:
        return None, False
    if len(keys) > 1:
        raise DataError(f"a list is ranked by one of {' and '.join(map(repr, keys))}, not by both")
    given = columns.take(keys[0])
    values = as_numbers(given, keys[0], n)
    if keys[0] in ("rewards", "scores"):
        return values, False
    if keys[0] == "order":
        if sorted(values) != list(range(n)):
            raise DataError(f"'order' must hold each index 0 to {n - 1} once, got {given}")
        places = {int(index): place for place, index in enumerate(values)}
        values = tuple(float(places[i]) for i in range(n))
    return tuple(-value for value in values), True


def _sft_index(columns: Columns, n: int) -> int | None:
    index = columns.optional("sft_index")
    if index is None:
        return None
    if isinstance(index, str) and index.isdecimal():  # as CSV has it
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= index < n:
        raise DataError(f"'sft_index' must be an index of the {n} completions, got {index!r}")
    return int(index)


def _desirable(columns: Columns, n: int) -> tuple[bool, ...] | None:
    given = columns.optional("desirable")
    if given is None:
        return None
    marks = as_list(given, "'desirable'")
    if len(marks) != n or not all(mark in (0, 1) for mark in marks):
        raise DataError(
            f"'desirable' must hold true or false for each of {n} completions, got {given!r}"
        )
    return tuple(map(bool, marks))


def _weight(columns: Columns) -> float:
    given = columns.optional("prompt_weight")
    weight = 1.0 if given is None else as_number(given, "'prompt_weight'")
    if weight < 0:
        raise DataError(f"'prompt_weight' must be >= 0, got {weight:g}")
    return weight


def _raw_rewards(columns: Columns, n: int) -> dict[str, tuple[float, ...]]:
    """What the rewards of a prepared list were made of."""
    if columns.first(("raw_rewards", "chosen_index")):
        for name in ("chosen_index", "sources"):
            columns.optional(name)
    given = columns.optional("raw_rewards")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DataError(
            f"'raw_rewards' must be an object of names with {n} numbers each, got {kind(given)}"
        )
    return {
        str(name): as_numbers(values, f"raw_rewards.{name}", n)
        for name, values in given.items()
        if values is not None
    }
