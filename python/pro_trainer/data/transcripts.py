"""Dialogues written as HH-RLHF writes them: speakers before what they say, in one string."""

from __future__ import annotations

import re

from pro_trainer.data.fields import Message, Text

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def split_transcript(transcript: str) -> tuple[str, str] | None:
    """Context up to and with the last ``Assistant:``, and that reply, all its paragraphs.

    None where the last turn is not the assistant's.
    """
    at = transcript.rfind(ASSISTANT)
    if at < 0 or HUMAN in transcript[at:]:
        return None
    at += len(ASSISTANT)
    return transcript[:at], transcript[at:]


def is_transcript(prompt: Text) -> bool:
    """Whether a prompt is a dialogue as HH-RLHF writes it, up to the assistant's next turn."""
    return isinstance(prompt, str) and _TRANSCRIPT.fullmatch(prompt) is not None


def turns(prompt: str) -> tuple[Message, ...]:
    """A string as messages: of the speakers of a transcript, else of the user.

    Who speaks twice in a row has one message: chat templates refuse two.
    """
    if not is_transcript(prompt):
        return ({"role": "user", "content": prompt},)
    parts = _TURN.split(prompt)[1:-2]  # but for the last Assistant:
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _SPEAKERS[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{said}"
        else:
            messages.append({"role": role, "content": said})
    return tuple(messages)
