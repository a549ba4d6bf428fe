"""What the model sees of a text: template, special tokens, where a cut falls."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pro_trainer.data.fields import DataError
from pro_trainer.data.formats import parse_record
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.text import show
from pro_trainer.text.encode import Encoder, TokenizedList
from pro_trainer.text.options import ListOptions

CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
Help.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WITH_TOOLS = "{% for t in tools or [] %}<tool>{{ t.name }}</tool>{% endfor %}{{ mood }}" + CHATML
SYSTEM = "<|im_start|>system\nHelp.<|im_end|>\n"


def make(template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of ChatML, or with BOS before each text."""
    special = ["<bos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<bos>" if bos else "<|im_start|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def encode(record: dict | RankedList, tokenizer=None, **options):
    """The list of a record as token ids, its texts decoded, and the report."""
    tokenizer, report = tokenizer or make(), DataReport()
    ranked = record if isinstance(record, RankedList) else parse_record(record).content
    report.records += 1
    report.count(ranked)
    found = list(Encoder(tokenizer, ListOptions(**options), report).lists([ranked]))
    if not found:
        return None, None, None, report
    (tokens,) = found
    prompt, *ends = (tokenizer.decode(ids) for ids in (tokens.prompts[0], *tokens.completions))
    return tokens, prompt, ends, report


def pair(prompt: object = "Hi", chosen: object = "yes", rejected: object = "no", **more: object):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def user(text: object) -> dict:
    return {"role": "user", "content": text}


def assistant(text: object, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


# ---- special tokens


@pytest.mark.parametrize("prompt", ["Hi", "<bos>Hi", "<bos><bos>Hi"])
def test_there_is_one_bos_whoever_puts_it_there(prompt):
    plain = make(None, bos=True)
    tokens, text, _, _ = encode(pair(prompt), plain)
    assert text == "<bos>Hi" and tokens.prompts[0].count(0) == 1
    assert Encoder(plain).prompt(prompt)[0] == tokens.prompts[0]
    assert Encoder(plain).text(prompt, " yes")[0].count(0) == 1
    template = make("{{ bos_token }}" + CHATML, bos=True)
    assert encode(pair(prompt), template, chat_template="on")[1].count("<bos>") == 1


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_there_is_one_eos_and_nothing_behind_it(end, template, mode):
    if template is None and mode == "on":
        with pytest.raises(ValueError, match="chat_template='on', but .* has no chat template"):
            encode(pair(), make(None), chat_template="on")
        return
    tokens, _, ends, _ = encode(pair("Hi", f"yes{end}"), make(template), chat_template=mode)
    assert ends[0].strip() == "yes<|im_end|>"
    eos = make().eos_token_id
    assert all(ids.count(eos) == 1 and ids[-1] == eos for ids in tokens.completions)


def test_text_without_eos_stays_without_where_none_is_appended():
    _, _, ends, _ = encode(pair("Hi", "yes<|im_end|>"), make(None), append_eos=False)
    assert ends == ["yes<|im_end|>", "no"]


def test_control_tokens_in_a_message_are_text_unless_told_otherwise():
    record = pair([user("a<|im_end|>b")], [assistant("x<|im_start|>")], [assistant("y")])
    im_end = make().eos_token_id
    tokens, text, ends, report = encode(record)
    assert tokens.prompts[0].count(im_end) == 2  # of the system and of the user, by the template
    assert "user\na<|im_end|>b<|im_end|>" in text and ends[0] == "x<|im_start|><|im_end|>"
    assert "texts that spell out control tokens, taken as ordinary text: 2" in report.text()
    tokens, _, _, report = encode(record, split_special_tokens=False)
    assert tokens.prompts[0].count(im_end) == 3
    assert "taken as control tokens: 2" in report.text()


def test_control_tokens_in_a_string_count_unless_told_otherwise():
    record, im_end = pair("a<|im_end|>b"), make().eos_token_id
    tokens, text, _, report = encode(record)
    assert text == "a<|im_end|>b" and tokens.prompts[0].count(im_end) == 1  # no template then
    assert "taken as control tokens: 1" in report.text()
    assert "lists taken as written, not as turns: they hold control tokens: 1" in report.text()
    for mode, count in (("off", 0), ("auto", 2), ("on", 2)):
        tokens, text, _, report = encode(record, split_special_tokens=True, chat_template=mode)
        assert tokens.prompts[0].count(im_end) == count and "a<|im_end|>b" in text
        assert "taken as ordinary text: 1" in report.text()


# ---- the template


def test_strings_are_turns_where_there_is_a_template():
    _, text, ends, report = encode(pair("Hi", " yes "))
    assert text == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ends == ["yes<|im_end|>", "no<|im_end|>"]
    assert "lists whose strings are written as turns of the chat template: 1" in report.text()
    assert encode(pair("Hi", " yes "), chat_template="off")[1:3] == (
        "Hi", [" yes <|im_end|>", "no<|im_end|>"],
    )  # fmt: skip
    assert encode(pair("Hi"), make(None))[1] == "Hi"


def test_transcripts_are_turns_and_those_who_speak_twice_are_one():
    context = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nHuman: q3\n\nwell?\n\nAssistant:"
    record = {"chosen": context + " good", "rejected": context + " bad"}
    _, text, ends, _ = encode(record)
    assert text == (
        f"{SYSTEM}<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2\n\nq3\n\nwell?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ends == ["good<|im_end|>", "bad<|im_end|>"]
    _, text, ends, _ = encode(record, chat_template="off")
    assert text == context and ends[0] == " good<|im_end|>"


def test_messages_need_a_template_that_is_not_switched_off():
    record = pair([user("Hi")])
    with pytest.raises(DataError, match="needs a chat template, which .* lacks"):
        encode(record, make(None))
    with pytest.raises(DataError, match="chat template, which chat_template='off' rules out"):
        encode(record, chat_template="off")


def test_tools_calls_and_keywords_reach_the_template():
    call = {"name": "find", "arguments": {"q": "x"}}
    more = {"tools": [{"name": "find", "nothing": None}], "chat_template_kwargs": {"mood": "glad"}}
    calls = [assistant(None, tool_calls=[call])]
    record = pair([user("Hi")], calls, [assistant("no")], **more)
    _, text, ends, report = encode(record, make(WITH_TOOLS))
    assert text.startswith(f"<tool>find</tool>glad{SYSTEM}")
    assert ends[0] == "<call>find</call><|im_end|>"
    assert "takes no" not in report.text()
    again = encode(record | {"tools": '[{"name": "find"}]'}, make(WITH_TOOLS))
    assert again[1] == text
    ids, _ = Encoder(make(WITH_TOOLS)).prompt(parse_record(record).content)
    assert make().decode(ids) == text


def test_what_the_template_does_not_take_is_said_once():
    message = user("Hi") | {"name": "Ann"}
    more = {"tools": [{"name": "find"}], "chat_template_kwargs": {"mood": "glad"}}
    record = pair([message], [assistant("x", reasoning_content="hm")], [assistant("y")], **more)
    *_, report = encode(record)
    said = [line for line in report.text().splitlines() if "takes no" in line]
    assert sorted(line.split("'")[1] for line in said) == [
        "mood", "name", "reasoning_content", "tools",
    ]  # fmt: skip


# ---- cuts


@pytest.mark.parametrize("prompt", ["x" * 40, [user("x" * 40)]])
def test_nothing_is_cut_where_both_fit_together(prompt):
    whole, text, _, _ = encode(pair(prompt), max_length=1000)
    fits = len(whole.prompts[0]) + len(whole.completions[0])
    tokens, _, _, report = encode(pair(prompt), max_length=fits)
    assert tokens.prompts == whole.prompts and tokens.cut is None and not report.prompts_cut
    tokens, _, _, report = encode(pair(prompt), max_length=fits - 1)
    assert len(tokens.prompts[0]) == len(whole.prompts[0]) - 1 and report.prompts_cut == 1
    assert tokens.completions == whole.completions


def test_a_prompt_keeps_half_of_the_length():
    tokens, _, _, report = encode(pair("p" * 30, "c" * 90), make(None), max_length=40)
    assert (len(tokens.prompts[0]), len(tokens.completions[0])) == (20, 20)
    assert tokens.cut == (
        "the prompt lost its first 10 tokens of 30; 1 of 2 completions lost their end"
    )
    tokens, *_ = encode(pair("p" * 8, "c" * 90), make(None), max_length=40)
    assert len(tokens.prompts[0]) == 8 and tokens.cut == "1 of 2 completions lost their end"


CHAT = [{"role": "system", "content": "Be brief."}]
for number in range(4):
    CHAT += [user(f"question {number}"), assistant(f"answer {number}")]
CHAT.append(user("the last question"))


def well_formed(text: str) -> list[str]:
    """The roles of a chat whose turns are whole."""
    assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1
    assert text.endswith("<|im_start|>assistant\n")
    return [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:-1]]


def test_a_chat_loses_whole_turns_then_the_system_then_its_last_text():
    whole = len(encode(pair(CHAT), max_length=10_000)[0].prompts[0]) + len("yes") + 1
    seen = []
    for length in range(whole, 50, -1):
        tokens, text, ends, _ = encode(pair(CHAT), max_length=length)
        assert len(tokens.prompts[0]) + len(tokens.completions[0]) <= length
        assert ends == ["yes<|im_end|>", "no<|im_end|>"]
        roles = well_formed(text)
        assert roles[0] == "system" and roles[1] == roles[-1] == "user"
        assert text.count("question") == roles.count("user")
        assert "last question<|im_end|>" in text
        said = (roles.count("user"), "Be brief." in text, "the last question" in text, tokens.cut)
        if not seen or seen[-1] != said:
            seen.append(said)
    assert [x[:3] for x in seen[:6]] == [
        (5, True, True), (4, True, True), (3, True, True), (2, True, True), (1, True, True),
        (1, False, True),
    ]  # fmt: skip
    assert seen[0][3] is None and seen[1][3] == "the prompt lost its oldest turn"
    assert seen[4][3] == "the prompt lost its 4 oldest turns"
    assert seen[5][3] == "the prompt lost its 4 oldest turns and the system's turn"


def test_the_last_turn_is_cut_within_its_text():
    for mode, kept in (("keep_end", "the end."), ("keep_start", "The start")):
        prompt = [user("The start" + "-" * 200 + "the end.")]
        tokens, text, _, _ = encode(pair(prompt), max_length=100, truncation_mode=mode)
        assert well_formed(text) == ["system", "user"] and kept in text
        assert len(tokens.prompts[0]) == 96
        side = "first" if mode == "keep_end" else "last"
        assert tokens.cut.startswith(f"the prompt lost the {side} ")
    # A cut amid the bytes of a character leaves none of them.
    text = encode(pair([user("é" * 200)]), max_length=101)[1]
    assert "�" not in text and well_formed(text)


def test_a_template_that_does_not_fit_is_no_chat():
    *found, report = encode(pair([user("Hi")]), max_length=30)
    assert found == [None] * 3
    assert report.dropped == {"the chat template alone does not fit max_length": 1}
    with pytest.raises(ValueError, match="alone takes more than the 20 tokens"):
        Encoder(make()).prompt("Hi", room=20)


def test_a_transcript_as_text_loses_whole_turns_too():
    context = "".join(f"\n\nHuman: q{i}\n\nAssistant: a{i}" for i in range(4))
    record = pair(context + "\n\nHuman: last\n\nAssistant:", " yes", " no")
    tokens, text, _, _ = encode(record, make(None), max_length=80)
    assert text.startswith("\n\nHuman: q") and text.endswith("last\n\nAssistant:")
    assert tokens.cut == "the prompt lost its 3 oldest turns"
    tokens, text, _, _ = encode(record, make(None), max_length=24)
    assert len(tokens.prompts[0]) == 19 and text.endswith("last\n\nAssistant:")


def test_max_prompt_length_cuts_whatever_the_completions_leave():
    tokens, *_ = encode(pair("p" * 30), make(None), max_prompt_length=8)
    assert len(tokens.prompts[0]) == 8


# ---- one place for all


def test_training_sampling_and_scoring_see_the_same_text():
    for prompt in ("Hi", [user("Hi"), assistant("ho"), user("hm")], "\n\nHuman: Hi\n\nAssistant:"):
        tokens, *_ = encode(pair(prompt, " yes", " no"))
        ranked = parse_record(pair(prompt, " yes", " no")).content
        encoder = Encoder(make())
        assert encoder.prompt(ranked.prompts[0])[0] == tokens.prompts[0]
        whole, cut = encoder.text(ranked.prompts[0], ranked.completions[0])
        assert cut is None
        assert whole[: len(tokens.prompts[0])] == tokens.prompts[0]
        rest = whole[len(tokens.prompts[0]) :]
        assert rest[: len(tokens.completions[0])] == tokens.completions[0]


# ---- shown


def test_what_is_shown():
    tokenizer = make()
    tokens = TokenizedList([[3, 4]], [[5], [6, 2]], [0.5, 2.0], None, "the prompt lost all")
    assert show.as_json(tokens) == {
        "prompt_ids": [3, 4],
        "completion_ids": [[6, 2], [5]],
        "rewards": [2.0, 0.5],
        "cut": "the prompt lost all",
    }
    text = show.as_text(tokens, tokenizer)
    first = tokenizer.decode([6]) + "<|im_end|>"
    assert f"candidate 1, 2 tokens scored, reward 2, SFT\n[{first}]" in text
    assert text.endswith("--- cut: the prompt lost all")
    assert "\033[32m" in show.as_text(tokens, tokenizer, color=True)
    apart = TokenizedList([[3], [4]], [[5], [6]], None, 1)
    assert show.as_json(apart)["prompt_ids"] == [[3], [4]]
    assert show.as_text(apart, tokenizer).count("not scored") == 2
    assert show.as_json(apart)["rewards"] is show.as_json(apart)["cut"] is None


# ---- what a reviewer found


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRICT = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls[0].id|length != 9 %}"
    "{{ raise_exception('ids of nine characters') }}{% endif %}{% endfor %}" + CHATML
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}"
    + CHATML
)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_eos_behind_a_string_is_no_control_token(mode):
    ranked = parse_record(pair("Hi", "yes<|im_end|>")).content
    _, text, ends, report = encode(ranked, chat_template=mode)
    assert text.endswith("Hi<|im_end|>\n<|im_start|>assistant\n") and "control" not in report.text()
    encoder = Encoder(make(), ListOptions(chat_template=mode))
    assert make().decode(encoder.prompt(ranked)[0]) == text
    texts = [encoder.text(ranked, c)[0] for c in ranked.completions]
    assert [make().decode(ids) for ids in texts] == [f"{text}{end}\n" for end in ends]
    _, _, ends, _ = encode(pair([user("q")], "x<|im_end|>", [assistant("y<|im_end|>")]))
    assert ends == ["x<|im_end|>", "y<|im_end|>"]


def test_what_is_said_of_a_list_holds_for_all_its_texts():
    ranked = parse_record(pair("Hi", "a<|im_end|>b")).content
    encoder = Encoder(make())
    assert make().decode(encoder.prompt(ranked)[0]) == "Hi"  # as written, for one text's sake
    assert make().decode(encoder.text(ranked, "no")[0]) == "Hino"


def test_no_text_of_a_user_becomes_a_control_token():
    im_end = make().eos_token_id
    call = {"name": "<|im_end|>\n<|im_start|>system"}
    record = pair([user("q")], [assistant("", tool_calls=[call])], [assistant("y")])
    tokens, _, _, report = encode(record)
    assert tokens.completions[0].count(im_end) == 1 and "ordinary text: 1" in report.text()
    literal = Encoder(make(None), ListOptions(split_special_tokens=True))
    for ids in (literal.prompt("a <|im_end|>")[0], literal.text("a <|im_end|>", " b")[0]):
        assert im_end not in ids
    for text in ("\ue000 <|im_end|>", "a \ue000999\ue001 b", "\ue0000\ue001"):
        for template in (None, CHATML):
            tokens, shown, _, _ = encode(pair(text), make(template), split_special_tokens=True)
            assert text in shown and tokens.prompts[0].count(im_end) == (2 if template else 0)
        assert text in encode(pair([user(text)]))[1]


def test_a_template_that_asks_for_a_key_takes_it():
    call = {"id": "abc123456", "name": "f"}
    record = pair([user("q")], [assistant("", tool_calls=[call])], [assistant("y")])
    tokens, _, ends, report = encode(record, make(STRICT))
    assert ends[0] == "<call>f</call><|im_end|>" and "takes no" not in report.text()


def test_the_longest_text_of_the_last_turn_is_cut_whoever_said_it():
    tool = {"role": "tool", "content": "data " * 100}
    for turns in (
        [user("weather?"), assistant("call"), tool],
        [user("q"), assistant("long " * 99)],
    ):
        tokens, text, _, _ = encode(pair(turns), max_length=160)
        assert len(tokens.prompts[0]) <= 156 and turns[0]["content"] in text
        assert tokens.cut.endswith("tokens of its last turn")
    tokens, text, _, _ = encode(pair([user("<|im_end|> a " * 60)]), max_length=100)
    assert len(tokens.prompts[0]) == 96 and tokens.cut


def test_a_system_turn_stays_where_the_template_would_write_a_longer_one():
    prompt = [{"role": "system", "content": "Be."}, user("w" * 200)]
    _, text, _, _ = encode(pair(prompt), max_length=100)
    assert "system\nBe.<|im_end|>" in text and "Help." not in text
    prompt = [{"role": "system", "content": "Be rude. " * 3}, user("w" * 100)]
    tokens, text, _, _ = encode(pair(prompt), make(NEEDS_SYSTEM), max_length=120)
    assert "Be rude" in text and tokens.cut.startswith("the prompt lost the first")


def test_a_cut_prompt_ends_where_others_do():
    chat = [user("old question"), assistant("old answer"), user("Hi")]
    whole = encode(pair(chat), make(THINKING))
    cut = encode(pair(chat), make(THINKING), max_length=len(whole[0].prompts[0]) - 20)
    assert cut[0].cut == "the prompt lost its oldest turn"
    assert whole[1].endswith("assistant\n") and cut[1].endswith("assistant\n")
    assert "for generation, which no reply follows" in whole[3].text()


def test_a_completion_that_equals_a_better_one_goes_and_the_list_stays():
    record = {"prompt": "q", "completions": ["x", "z", "x "], "rewards": [1, 2, 3]}
    tokens, _, ends, report = encode(record)
    assert ends == ["z<|im_end|>", "x<|im_end|>"] and tokens.rewards == [2.0, 3.0]
    assert report.candidates == {2: 1} and report.dropped_completions == {
        "equals a better one as token ids": 1
    }


def test_a_template_that_refuses_a_shorter_chat_stops_nothing():
    prompt = [{"role": "system", "content": "Be."}, user("q"), assistant("a"), user("w" * 60)]
    tokens, *_ = encode(pair(prompt), make(NEEDS_SYSTEM), max_length=90)
    assert tokens.cut.startswith("the prompt lost its oldest turn and the first")
