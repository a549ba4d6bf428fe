"""A record of any known format -> a ranked list, checked but not yet cleaned (``data`` does that).

Formats are recognised by a record's own keys (a key holding null counts as absent), so one file may
mix them. Other keys are ignored.

    prompt | context, completions     completions: strings, message lists, or NeMo's objects
                                      {"completion": ..., "rank": number}; beside them at most one
                                      of rewards | scores (higher is better), ranks (lower is
                                      better), order (indices, best first); with none of them the
                                      completions stand best first. sft_index optional.
    prompt, chosen, rejected          TRL; ``rejected`` may be a list, best first
    chosen, rejected                  conversations as message lists, the prompt being what they
                                      share; or HH-RLHF transcripts as strings
    prefix, suffix, reward, sft_index the official PRO training files

A text is a string, or a conversation: a list of messages {"role": str, "content": str}. Where a
record has both, its strings become one message (the prompt of the user, a completion of the
assistant). A completion holds no message of the user or system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pro_trainer.data.fields import (
    DataError,
    Message,
    Text,
    as_list,
    as_number,
    as_numbers,
    as_string,
    as_text,
    kind,
    prompt_text,
    ranked_member,
    required,
)

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
_PROMPT_ROLES = ("user", "system", "developer")
_FORMATS = (
    "'prompt' (or 'context') and 'completions'; 'chosen' and 'rejected'; or 'prefix' and 'suffix'"
)


@dataclass(frozen=True)
class RankedList:
    """A prompt and its n ranked completions.

    Attributes:
        prompts: 1 (shared by all) or n (one a completion, where they answer different dialogues).
        completions: n texts.
        rewards: n finite numbers, higher is better; None: the completions stand best first.
        sft_index: the completion that carries the SFT term; None: the best.
        where: file and line it came from, for messages; no part of its value.
    """

    prompts: tuple[Text, ...]
    completions: tuple[Text, ...]
    rewards: tuple[float, ...] | None = None
    sft_index: int | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class ParsedRecord:
    """What a record says, before empty, repeated and unranked candidates are taken out.

    Attributes:
        format: the name of its format, for the report.
        content: the list, or why a well-formed record ranks nothing.
        by_rank: whether the list's rewards are negated ranks, which do no more than order it.
    """

    format: str
    content: RankedList | str
    by_rank: bool = False


def parse_record(record: Any) -> ParsedRecord:
    """Read a record of any format.

    Raises:
        DataError: the record is malformed or fits no format.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be a JSON object, got {kind(record)}")
    given = {key for key, value in record.items() if value is not None}
    if "completions" in given:
        return _parse_list(record)
    if {"chosen", "rejected"} & given:
        return _parse_pair(record)
    if {"prefix", "suffix"} <= given:
        return _parse_official(record)
    raise DataError(f"a record needs {_FORMATS}; got the keys {sorted(map(str, given))[:8]}")


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """Context up to and with the last ``Assistant:``, and that reply, all its paragraphs.

    None where the last turn is not the assistant's.
    """
    at = transcript.rfind(ASSISTANT)
    if at < 0 or HUMAN in transcript[at:]:
        return None
    at += len(ASSISTANT)
    return transcript[:at], transcript[at:]


def _parse_list(record: Mapping[str, Any]) -> ParsedRecord:
    key = "context" if record.get("prompt") is None and "context" in record else "prompt"
    prompt = prompt_text(record, key)
    completions = as_list(record["completions"], "'completions'")
    ranked_objects = any(isinstance(completion, Mapping) for completion in completions)
    names = [f"completions[{i}]" for i in range(len(completions))]
    if ranked_objects:
        rewards: tuple[float, ...] | None = tuple(
            -as_number(ranked_member(item, "rank", name), f"{name}.rank")
            for item, name in zip(completions, names, strict=True)
        )
        completions = [item.get("completion") for item in completions]
        names = [f"{name}.completion" for name in names]
        by_rank = True
    else:
        rewards, by_rank = _ranking(record, len(completions))
    texts = [as_text(item, name) for item, name in zip(completions, names, strict=True)]
    prompt, texts = _one_kind(prompt, texts, names)
    index = _sft_index(record, len(texts))
    name = "context and ranked completions" if ranked_objects else "prompt and completions"
    return ParsedRecord(name, RankedList((prompt,), tuple(texts), rewards, index), by_rank)


def _parse_pair(record: Mapping[str, Any]) -> ParsedRecord:
    chosen = as_text(required(record, "chosen"), "'chosen'")
    rejected = required(record, "rejected")
    names = ["'chosen'", "'rejected'"]
    if isinstance(rejected, (list, tuple)) and not (
        rejected and isinstance(rejected[0], Mapping)
    ):  # several, best first
        names = ["'chosen'", *(f"rejected[{i}]" for i in range(len(rejected)))]
        others = [as_text(item, name) for item, name in zip(rejected, names[1:], strict=True)]
    else:
        others = [as_text(rejected, "'rejected'")]
    replies = [chosen, *others]
    whole = all(
        not isinstance(reply, str) and reply and reply[0]["role"] in _PROMPT_ROLES
        for reply in replies
    )
    if record.get("prompt") is not None and not whole:
        prompt, replies = _one_kind(prompt_text(record, "prompt"), replies, names)
        return ParsedRecord("prompt, chosen, rejected", RankedList((prompt,), tuple(replies)))
    if all(isinstance(reply, str) for reply in replies):
        name, parts = "transcripts", [split_transcript(reply) for reply in replies]
    elif not any(isinstance(reply, str) for reply in replies):
        name, parts = "conversations", _split_conversations(replies, names)
    else:
        raise DataError("'chosen' and 'rejected' must be all strings or all lists of messages")
    if None in parts:
        return ParsedRecord(name, f"a {name[:-1]} does not end with an assistant's turn")
    prompts, completions = zip(*parts, strict=True)
    return ParsedRecord(name, RankedList(shared(prompts), completions))


def _parse_official(record: Mapping[str, Any]) -> ParsedRecord:
    prefixes = as_list(record["prefix"], "'prefix'")
    suffixes = as_list(record["suffix"], "'suffix'")
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
    if record.get("reward") is not None:
        rewards = as_numbers(record["reward"], "reward", len(completions))
    index = _sft_index(record, len(completions))
    ranked = RankedList(shared(prompts), tuple(completions), rewards, index)
    return ParsedRecord("official PRO files", ranked)


def shared(prompts: Sequence[Text]) -> tuple[Text, ...]:
    """One prompt where all are equal, else all of them."""
    return tuple(prompts[:1]) if all(prompt == prompts[0] for prompt in prompts) else tuple(prompts)


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
        return prompt, completions
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    completions = [
        ({"role": "assistant", "content": text},) if isinstance(text, str) else text
        for text in completions
    ]
    for messages, name in zip(completions, names, strict=True):
        for message in messages:
            if message["role"] in _PROMPT_ROLES:
                raise DataError(
                    f"{name} must hold the assistant's messages, got the role {message['role']!r}"
                )
    return prompt, completions


def _ranking(record: Mapping[str, Any], n: int) -> tuple[tuple[float, ...] | None, bool]:
    """Rewards (or negated ranks) of n completions, and whether they are ranks."""
    keys = [key for key in ("rewards", "scores", "ranks", "order") if record.get(key) is not None]
    if not keys:
        return None, False
    if len(keys) > 1:
        raise DataError(f"a list is ranked by one of {' and '.join(map(repr, keys))}, not by both")
    values = as_numbers(record[keys[0]], keys[0], n)
    if keys[0] in ("rewards", "scores"):
        return values, False
    if keys[0] == "order":
        if sorted(values) != list(range(n)):
            raise DataError(
                f"'order' must hold each index 0 to {n - 1} once, got {record['order']}"
            )
        places = {int(index): place for place, index in enumerate(values)}
        values = tuple(float(places[i]) for i in range(n))
    return tuple(-value for value in values), True


def _sft_index(record: Mapping[str, Any], n: int) -> int | None:
    index = record.get("sft_index")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n:
        raise DataError(f"'sft_index' must be an index of the {n} completions, got {index!r}")
    return index
