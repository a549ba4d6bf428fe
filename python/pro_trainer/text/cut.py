"""Where a prompt that is too long is cut.

Nothing is cut where prompt and completion fit ``max_length`` together. Else the prompt is
cut to what the longest completion of its list leaves, but not below half of ``max_length``
(``max_prompt_length`` sets its length instead), and completions keep their beginning, without EOS.
A chat loses whole turns, the oldest first, then the system's, and only then text of its last turn,
so that what remains is a well-formed chat. Other prompts lose their start (or end).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pro_trainer.data.fields import Text
from pro_trainer.data.transcripts import HUMAN, is_transcript
from pro_trainer.text.template import Writer


def cut_prompt(
    source: Text,
    ids: list[int],
    room: int,
    ids_of: Callable[[Text], list[int]],
    writer: Writer,
    chat: bool,
    front: list[int],
) -> tuple[list[int], str] | None:
    """A prompt cut to ``room``, and what it lost; None where the template does not fit.

    Args:
        source: the prompt, messages where ``chat``.
        ids: what ``ids_of`` makes of it.
        room: most tokens.
        ids_of: the ids of a shorter prompt.
        writer: of the tokenizer.
        chat: whether the chat template writes it.
        front: special tokens before any text, which stay.
    """
    from jinja2 import TemplateError

    lost, keep_end = "", writer.options.truncation_mode == "keep_end"
    for fewer, gone in shorter_prompts(source) if chat or keep_end else ():
        try:
            shorter = ids_of(fewer)
        except (TemplateError, TypeError, ValueError):
            continue  # the template wants what went, the system's turn perhaps
        if len(shorter) >= len(ids):
            continue  # the template wrote a system's turn of its own, a longer one
        source, ids, lost = fewer, shorter, gone
        if len(ids) <= room:
            return ids, lost
    lost = f"{lost} and " if lost else ""
    side = "first" if keep_end else "last"
    if chat:
        found = _cut_texts(source, ids, room, ids_of, writer)
        if found is None:
            return None
        return found[0], f"{lost}the {side} {found[1]} tokens of its last turn"
    front = front if ids[: len(front)] == front else []
    rest, left = ids[len(front) :], max(0, room - len(front))
    kept = rest[len(rest) - left :] if keep_end else rest[:left]
    return front + kept, f"{lost}its {side} {len(rest) - left} tokens of {len(ids)}"


def _cut_texts(
    messages: Text,
    ids: list[int],
    room: int,
    ids_of: Callable[[Text], list[int]],
    writer: Writer,
) -> tuple[list[int], int] | None:
    """The same messages with less text in the longest, and how many tokens went."""
    keep_end = writer.options.truncation_mode == "keep_end"
    messages, gone = [*messages], 0
    contents = writer.tokenize([m["content"] for m in messages], literal=True)
    places = [i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")]
    for place in sorted(places, key=lambda i: -len(contents[i])):
        content = contents[place]
        left = len(content)
        while len(ids) > room and left:
            left = max(0, left - (len(ids) - room))
            part = content[len(content) - left :] if keep_end else content[:left]
            text = writer.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            # A cut may leave half a character.
            messages[place] = messages[place] | {"content": text.strip("\ufffd")}
            ids = ids_of(tuple(messages))
        gone += len(content) - left
        if len(ids) <= room:
            return ids, gone
    return None


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
