"""What the model sees of a text: template, special tokens, where a cut falls."""

from __future__ import annotations

import re

import pytest
from texts import CHATML, assistant, chat_tokenizer, pair, row, system, user

from pro_trainer.data.fields import DataError
from pro_trainer.data.formats import parse_record
from pro_trainer.data.report import DataReport
from pro_trainer.text import show
from pro_trainer.text.encode import Encoder, TokenizedList
from pro_trainer.text.options import ListOptions

WITH_TOOLS = "{% for t in tools or [] %}<tool>{{ t.name }}</tool>{% endfor %}{{ mood }}" + CHATML
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRICT = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls[0].id|length != 9 %}"
    "{{ raise_exception('ids of nine characters') }}{% endif %}{% endfor %}" + CHATML
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}"
    + CHATML
)
REPLY = "<|im_start|>assistant\n"
HELP = "<|im_start|>system\nHelp.<|im_end|>\n"
HI = f"{HELP}<|im_start|>user\nHi<|im_end|>\n{REPLY}"
TURNS = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nHuman: q3\n\nwell?\n\nAssistant:"
TURNS_WRITTEN = (  # who speaks twice has one turn
    f"{HELP}<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    f"<|im_start|>user\nq2\n\nq3\n\nwell?<|im_end|>\n{REPLY}"
)
TRANSCRIPTS = {"chosen": f"{TURNS} good", "rejected": f"{TURNS} bad"}
EOS = 2  # of the chat tokenizer


def encode(record: dict, tokenizer=None, **options):
    """The list of a record as token ids, its texts decoded, and the report."""
    tokenizer, report = tokenizer or chat_tokenizer(), DataReport()
    ranked = parse_record(record).content
    report.records += 1
    report.count(ranked)
    found = list(Encoder(tokenizer, ListOptions(**options), report).lists([ranked]))
    if not found:
        return None, None, None, report
    (tokens,) = found
    prompt, *ends = (tokenizer.decode(ids) for ids in (tokens.prompts[0], *tokens.completions))
    return tokens, prompt, ends, report


# ---- special tokens


@pytest.mark.parametrize("prompt", ["Hi", "<bos>Hi", "<bos><bos>Hi"])
def test_there_is_one_bos_whoever_puts_it_there(prompt):
    plain = chat_tokenizer(None, bos=True)
    tokens, text, _, _ = encode(pair(prompt), plain)
    assert text == "<bos>Hi" and tokens.prompts[0].count(0) == 1
    assert Encoder(plain).prompt(prompt)[0] == tokens.prompts[0]
    assert Encoder(plain).text(prompt, " yes")[0].count(0) == 1
    template = chat_tokenizer("{{ bos_token }}" + CHATML, bos=True)
    assert encode(pair(prompt), template, chat_template="on")[1].count("<bos>") == 1


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("prompt", ["Hi", [user("Hi")]])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_there_is_one_eos_and_nothing_behind_it(end, template, prompt, mode):
    if template is None and (mode == "on" or prompt != "Hi"):
        with pytest.raises(ValueError, match="chat_template='on', but .* has no|needs a chat temp"):
            encode(pair(prompt), chat_tokenizer(None), chat_template=mode)
        return
    record = pair(prompt, f"yes{end}", f"no{end}")
    tokens, _, ends, report = encode(record, chat_tokenizer(template), chat_template=mode)
    assert [text.strip() for text in ends] == ["yes<|im_end|>", "no<|im_end|>"]
    assert all(ids.count(EOS) == 1 and ids[-1] == EOS for ids in tokens.completions)
    assert "control" not in report.text()


def test_text_without_eos_stays_without_where_none_is_appended():
    _, _, ends, _ = encode(pair("Hi", "yes<|im_end|>"), chat_tokenizer(None), append_eos=False)
    assert ends == ["yes<|im_end|>", "no"]


STRING, SPLIT = pair("a<|im_end|>b"), {"split_special_tokens": True}
SPELLED = pair([user("a<|im_end|>b")], [assistant("x<|im_start|>")], [assistant("y")])
CALLED = pair([user("q")], [assistant("", tool_calls=[{"name": "<|im_end|>\n"}])], "y")


@pytest.mark.parametrize(
    ("record", "in_prompt", "shown", "said", "options"),
    [
        # Two are the template's: of the system's turn and of the user's.
        row(SPELLED, 2, f"b<|im_end|>\n{REPLY}x<|im_start|><|im_end|>", "as ordinary text: 2"),
        row(SPELLED, 3, "a<|im_end|>b", "as control tokens: 2", split_special_tokens=False),
        row(CALLED, 2, "<call><|im_end|>\n</call><|im_end|>", "as ordinary text: 1"),
        row(STRING, 1, "a<|im_end|>byes<|im_end|>", "as control tokens: 1"),
        row(STRING, 1, "", "taken as written, not as turns: they hold control tokens: 1"),
        row(STRING, 0, "a<|im_end|>b", "as ordinary text: 1", **SPLIT, chat_template="off"),
        row(STRING, 2, "a<|im_end|>b", "as ordinary text: 1", **SPLIT, chat_template="auto"),
        row(STRING, 2, "a<|im_end|>b", "as ordinary text: 1", **SPLIT, chat_template="on"),
    ],
)
def test_control_tokens_of_a_user(record, in_prompt, shown, said, options):
    tokens, prompt, ends, report = encode(record, **options)
    assert tokens.prompts[0].count(EOS) == in_prompt and shown in prompt + ends[0]
    assert [ids.count(EOS) for ids in tokens.completions] == [1, 1]
    assert said in report.text()


@pytest.mark.parametrize("text", ["\ue000 <|im_end|>", "a \ue000999\ue001 b", "\ue0000\ue001"])
def test_no_text_of_a_user_becomes_a_control_token(text):
    for template, count in ((None, 0), (CHATML, 2)):
        tokenizer = chat_tokenizer(template)
        tokens, shown, _, _ = encode(pair(text), tokenizer, split_special_tokens=True)
        assert text in shown and tokens.prompts[0].count(EOS) == count
    assert text in encode(pair([user(text)]))[1]
    literal = Encoder(chat_tokenizer(None), ListOptions(split_special_tokens=True))
    for ids in (literal.prompt("a <|im_end|>")[0], literal.text("a <|im_end|>", " b")[0]):
        assert EOS not in ids


# ---- the template


@pytest.mark.parametrize(
    ("record", "prompt", "ends", "options"),
    [
        row(pair("Hi", " yes "), HI, ["yes", "no"]),
        row(pair("Hi", " yes "), "Hi", [" yes ", "no"], chat_template="off"),
        row(pair("Hi"), "Hi", ["yes", "no"], tokenizer=chat_tokenizer(None)),
        row(TRANSCRIPTS, TURNS_WRITTEN, ["good", "bad"]),
        row(TRANSCRIPTS, TURNS, [" good", " bad"], chat_template="off"),
    ],
)
def test_strings_and_transcripts_are_turns_where_there_is_a_template(record, prompt, ends, options):
    found = encode(record, **options)
    assert (found[1], found[2]) == (prompt, [f"{text}<|im_end|>" for text in ends])
    said = "lists whose strings are written as turns of the chat template: 1"
    assert (said in found[3].text()) == (HELP in prompt)


def test_messages_need_a_template_that_is_not_switched_off():
    with pytest.raises(DataError, match="needs a chat template, which .* lacks"):
        encode(pair([user("Hi")]), chat_tokenizer(None))
    with pytest.raises(DataError, match="chat template, which chat_template='off' rules out"):
        encode(pair([user("Hi")]), chat_template="off")


TOOLS = {"tools": [{"name": "find", "nothing": None}], "chat_template_kwargs": {"mood": "glad"}}


def test_tools_calls_and_keywords_reach_the_template():
    call = {"name": "find", "arguments": {"q": "x"}}
    record = pair([user("Hi")], [assistant(None, tool_calls=[call])], "no", **TOOLS)
    _, text, ends, report = encode(record, chat_tokenizer(WITH_TOOLS))
    assert text.startswith(f"<tool>find</tool>glad{HELP}")
    assert ends[0] == "<call>find</call><|im_end|>" and "takes no" not in report.text()
    again = encode(record | {"tools": '[{"name": "find"}]'}, chat_tokenizer(WITH_TOOLS))
    assert again[1] == text
    ids, _ = Encoder(chat_tokenizer(WITH_TOOLS)).prompt(parse_record(record).content)
    assert chat_tokenizer().decode(ids) == text
    call["id"] = "abc123456"  # which a template asks for
    _, _, ends, report = encode(pair([user("q")], record["chosen"], "y"), chat_tokenizer(STRICT))
    assert ends[0] == "<call>find</call><|im_end|>" and "takes no" not in report.text()


def test_what_the_template_does_not_take_is_said_once():
    message = user("Hi") | {"name": "Ann"}
    record = pair([message], [assistant("x", reasoning_content="hm")], [assistant("y")], **TOOLS)
    said = [line for line in encode(record)[3].text().splitlines() if "takes no" in line]
    unused = ["mood", "name", "reasoning_content", "tools"]
    assert sorted(line.split("'")[1] for line in said) == unused


# ---- cuts


@pytest.mark.parametrize("prompt", ["x" * 40, [user("x" * 40)]])
def test_nothing_is_cut_where_both_fit_together(prompt):
    whole, *_ = encode(pair(prompt), max_length=1000)
    fits = len(whole.prompts[0]) + len(whole.completions[0])
    tokens, _, _, report = encode(pair(prompt), max_length=fits)
    assert tokens.prompts == whole.prompts and tokens.cut is None and not report.prompts_cut
    tokens, _, _, report = encode(pair(prompt), max_length=fits - 1)
    assert len(tokens.prompts[0]) == len(whole.prompts[0]) - 1 and report.prompts_cut == 1
    assert tokens.completions == whole.completions


def well_formed(tokens: TokenizedList, text: str) -> list[str]:
    """The roles of a chat whose turns are whole."""
    assert tokens.prompts[0].count(EOS - 1) == tokens.prompts[0].count(EOS) + 1
    assert text.endswith(REPLY)
    return [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:-1]]


def test_a_chat_loses_whole_turns_then_the_system_then_its_last_text():
    turns = [turn for i in range(4) for turn in (user(f"question {i}"), assistant(f"answer {i}"))]
    chat = [system("Be brief."), *turns, user("the last question")]
    whole = len(encode(pair(chat), max_length=10_000)[0].prompts[0]) + len("yes") + 1
    seen = []
    for length in range(whole, 50, -1):
        tokens, text, ends, _ = encode(pair(chat), max_length=length)
        assert len(tokens.prompts[0]) + len(tokens.completions[0]) <= length
        assert ends == ["yes<|im_end|>", "no<|im_end|>"]
        roles = well_formed(tokens, text)
        assert roles[0] == "system" and roles[1] == roles[-1] == "user"
        assert text.count("question") == roles.count("user")
        assert "last question<|im_end|>" in text
        said = (roles.count("user"), "Be brief." in text, "the last question" in text, tokens.cut)
        if not seen or seen[-1] != said:
            seen.append(said)
    assert seen[:6] == [
        (5, True, True, None),
        (4, True, True, "the prompt lost its oldest turn"),
        (3, True, True, "the prompt lost its 2 oldest turns"),
        (2, True, True, "the prompt lost its 3 oldest turns"),
        (1, True, True, "the prompt lost its 4 oldest turns"),
        (1, False, True, "the prompt lost its 4 oldest turns and the system's turn"),
    ]


LONG = "The start" + "-" * 200 + "the end."
STEPS = [user("weather?"), assistant("call"), {"role": "tool", "content": "data " * 100}]
STRICT_CHAT = {"tokenizer": chat_tokenizer(NEEDS_SYSTEM)}
OLD = [system("Be."), user("q"), assistant("a"), user("w" * 60)]


@pytest.mark.parametrize(
    ("prompt", "max_length", "kept", "cut", "options"),
    [
        row([user(LONG)], 100, "the end.", "the first .* tokens of its last turn"),
        row(
            [user(LONG)], 100, "The start", "the last .* of its last", truncation_mode="keep_start"
        ),
        # A cut amid the bytes of a character leaves none of them.
        row([user("é" * 200)], 101, "éé<|im_end|>", "the first"),
        row([user("<|im_end|> a " * 60)], 100, " a ", "the first"),
        # The longest text of the last turn is cut, whoever said it.
        row(STEPS, 160, "weather?", ".*of its last turn"),
        row([user("q"), assistant("long " * 99)], 160, "q", ".*of its last turn"),
        # A system's turn stays where the template would write a longer one, or wants it.
        row([system("Be."), user("w" * 200)], 100, "system\nBe.<|im_end|>", "the first"),
        row([system("Be rude. " * 3), user("w" * 100)], 120, "Be rude", "the first", **STRICT_CHAT),
        # A template that refuses a shorter chat stops nothing.
        row(OLD, 90, "Be.", "its oldest turn and the first", **STRICT_CHAT),
    ],
)
def test_a_chat_is_cut_within_its_last_turn(prompt, max_length, kept, cut, options):
    tokens, text, ends, _ = encode(pair(prompt), max_length=max_length, **options)
    assert well_formed(tokens, text)[0] == "system" and kept in text and "�" not in text
    assert ("Help." in text) == (prompt[0]["role"] != "system")
    assert max_length - 8 < len(tokens.prompts[0]) + 4 <= max_length
    assert ends[0] == "yes<|im_end|>"
    assert re.match(f"the prompt lost {cut}", tokens.cut)


def test_a_template_that_does_not_fit_is_no_chat():
    *found, report = encode(pair([user("Hi")]), max_length=30)
    assert found == [None] * 3
    assert report.dropped == {"the chat template alone does not fit max_length": 1}
    with pytest.raises(ValueError, match="alone takes more than the 20 tokens"):
        Encoder(chat_tokenizer()).prompt("Hi", room=20)


def test_a_transcript_as_text_loses_whole_turns_too():
    context = "".join(f"\n\nHuman: q{i}\n\nAssistant: a{i}" for i in range(4))
    record = pair(context + "\n\nHuman: last\n\nAssistant:", " yes", " no")
    tokens, text, _, _ = encode(record, chat_tokenizer(None), max_length=80)
    assert text.startswith("\n\nHuman: q") and text.endswith("last\n\nAssistant:")
    assert tokens.cut == "the prompt lost its 3 oldest turns"
    tokens, text, _, _ = encode(record, chat_tokenizer(None), max_length=24)
    assert len(tokens.prompts[0]) == 19 and text.endswith("last\n\nAssistant:")


def test_a_cut_prompt_ends_where_others_do():
    chat = pair([user("old question"), assistant("old answer"), user("Hi")])
    whole = encode(chat, chat_tokenizer(THINKING))
    cut = encode(chat, chat_tokenizer(THINKING), max_length=len(whole[0].prompts[0]) - 20)
    assert cut[0].cut == "the prompt lost its oldest turn"
    assert whole[1].endswith("assistant\n") and cut[1].endswith("assistant\n")
    assert "for generation, which no reply follows" in whole[3].text()


# ---- one place for all


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("reply", [" yes", "yes<|im_end|>", "a<|im_end|>b"])
@pytest.mark.parametrize("prompt", ["Hi", TURNS, [user("Hi"), assistant("ho"), user("hm")]])
def test_training_sampling_and_scoring_see_the_same_text(prompt, reply, mode):
    record = pair(prompt, reply, " no")
    tokens, text, _, _ = encode(record, chat_template=mode, append_eos=False)
    ranked = parse_record(record).content
    encoder = Encoder(chat_tokenizer(), ListOptions(chat_template=mode, append_eos=False))
    # A control token in one text decides for all of the list: it is taken as written.
    as_written = mode == "auto" and reply == "a<|im_end|>b" and isinstance(prompt, str)
    assert text.endswith(prompt if as_written else REPLY)
    for source in [ranked] if as_written else [ranked, ranked.prompts[0]]:
        assert encoder.prompt(source)[0] == tokens.prompts[0]
        for completion, ids in zip(ranked.completions, tokens.completions, strict=True):
            whole, cut = encoder.text(source, completion)
            known = tokens.prompts[0] + ids
            assert cut is None and whole[: len(known)] == known
            assert not chat_tokenizer().decode(whole[len(known) :]).strip()


def test_a_completion_that_equals_a_better_one_goes_and_the_list_stays():
    record = {"prompt": "q", "completions": ["x", "z", "x "], "rewards": [1, 2, 3]}
    tokens, _, ends, report = encode(record)
    assert ends == ["z<|im_end|>", "x<|im_end|>"] and tokens.rewards == [2.0, 3.0]
    assert report.candidates == {2: 1}
    assert report.dropped_completions == {"equals a better one as token ids": 1}


def test_what_is_shown():
    tokenizer = chat_tokenizer()
    marks = {"desirable": [False, True], "weight": 0.5, "cut": "the prompt lost all"}
    tokens = TokenizedList([[3, 4]], [[5], [6, 2]], [0.5, 2.0], None, **marks)
    assert show.as_json(tokens) == {
        "prompt_ids": [3, 4],
        "completion_ids": [[6, 2], [5]],
        "rewards": [2.0, 0.5],
        "desirable": [True, False],
        "weight": 0.5,
        "cut": "the prompt lost all",
    }
    text = show.as_text(tokens, tokenizer)
    first = tokenizer.decode([6]) + "<|im_end|>"
    assert f"candidate 1, 2 tokens scored, reward 2, SFT, desirable\n[{first}]" in text
    assert text.endswith("--- weight of the list: 0.5\n--- cut: the prompt lost all")
    assert "\033[32m" in show.as_text(tokens, tokenizer, color=True)
    apart = TokenizedList([[3], [4]], [[5], [6]], None, 1)
    found = show.as_json(apart)
    assert (found["prompt_ids"], found["rewards"], found["cut"]) == ([[3], [4]], None, None)
    assert show.as_text(apart, tokenizer).count("not scored") == 2
