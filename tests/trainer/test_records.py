"""Every record format, and every record that is none."""

from __future__ import annotations

import numpy as np
import pytest
from texts import assistant, pair, system, user

from pro_trainer.data.fields import DataError
from pro_trainer.data.formats import parse_record
from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import split_transcript


def ranked(prompt: object, *completions: object, **more: object) -> RankedList:
    """A list of strings and conversations; a message stands for the conversation of it alone."""
    texts = [(text,) if isinstance(text, dict) else text for text in (prompt, *completions)]
    texts = [tuple(text) if isinstance(text, list) else text for text in texts]
    return RankedList((texts[0],), tuple(texts[1:]), **more)


GOOD = {"prompt": "p", "completions": ["a", "b"]}
PAIR = pair("p", "a", "b")
Q, A, B = user("q"), assistant("a"), assistant("b")
THREE = {"prompt": "p", "completions": ["x", "y", "z"]}
THREE_RANKED = ranked("p", "x", "y", "z", rewards=(-2.0, 0.0, -1.0))
START = [system("s"), Q, assistant("r"), user("more")]
CALL, RESULT = assistant("call"), {"role": "tool", "content": "42"}
NAMED, GLAD = RESULT | {"name": "f"}, {"mood": "glad"}
FIND = assistant(None, tool_calls=[{"name": "f", "arguments": None}], name=None)
FOUND = assistant("", tool_calls=[{"name": "f"}])
WHOLE = {"chosen": [Q, A], "rejected": [Q, B]}
EARLY = [Q, assistant("x"), user("m")], [Q, assistant("y"), user("m")]
CONTEXT = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant:"
OTHER = "\n\nHuman: r\n\nAssistant:"
IN_TURNS = ranked([system("s"), user("hi"), assistant("yo"), user("bye")], A, B)
NEMO = [{"completion": "bad", "rank": 1}, {"completion": "good", "rank": 0}]
NEMO_MESSAGES = [item | {"completion": [assistant(item["completion"])]} for item in NEMO]
NEMO_RANKED = ranked(Q, assistant("bad"), assistant("good"), rewards=(-1.0, 0.0))
RATED = [{"response": "a", "overall_score": 3.0}, {"response": "b", "overall_score": 8.5}]
UNRATED = {"prompt": "p", "completions": [{"text": "a"}, {"text": "b"}]}
SEVERAL = pair("p", "a", ["b", "c"], score_chosen=3)
DIALOGUE = ["<|prompter|>q one ", "<|assistant|>r", "<|prompter|>two", "<|assistant|>"]
DIALOGUE_TEXT = "\n\nHuman: q one \n\nAssistant: r\n\nHuman: two\n\nAssistant:"
OFFICIAL = {"meta": {}, "suffix": ["good", "bad"], "reward": [0.75, -1], "sft_index": 0}
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
ALPACA = {"instruction": "add", "input": "1 2", "system": "s", "chosen": "3", "rejected": "4"}
PARTS = [{"type": "text", "text": "what "}, {"type": "text", "text": "now?"}]
NULLS = dict.fromkeys(
    ["prompt", "context", "completions", "rewards", "chosen", "rejected", "prefix", "suffix"]
)


def ab(**more: object) -> RankedList:
    """Of ``GOOD`` and ``PAIR``."""
    return ranked("p", "a", "b", **more)


ARRAYS = {"completions": np.array(["a", "b"]), "rewards": np.array([1.0, 2.0])}
MARKS = {"desirable": [1, False], "prompt_weight": "2.5"}
MIXED_NEMO = [NEMO_MESSAGES[0], NEMO[1]]
TOOL_TURN = {
    "chosen": [Q, CALL | {"tool_calls": None}, RESULT, A],
    "rejected": [Q, CALL, RESULT, B],
}
IN_COMMON = {"chosen": [*START, A], "rejected": [*START, B]}
PARAGRAPHS = {"chosen": f"{CONTEXT} four\n\nfive", "rejected": f"{CONTEXT} six"}
DIFFERENT = {"chosen": f"{CONTEXT} a", "rejected": [f"{CONTEXT} b", f"{OTHER} c"]}
SAID_TWICE = pair(CONTEXT, f"{CONTEXT} a", f"{CONTEXT} b")
SCORED = {"rewards": (0.75, -1.0), "sft_index": 0}
SUMMARIES = {"prefix": ["text TL;DR:"] * 2, "suffix": [" good", " bad"], "reward": [1.0, 0.0]}
GPT = {
    which: {"from": "gpt", "value": text} for which, text in (("chosen", "a"), ("rejected", "b"))
}
TOOLS = {"tools": [{"name": "f"}, {"name": "g"}]}
USED = pair([Q], [FIND, NAMED, A], "b", tools='[{"name": "f"}]', chat_template_kwargs=GLAD)

FORMS = {
    "rewards": (
        {**THREE, "rewards": [0, 2.5, np.float32(-1)]},
        ranked("p", "x", "y", "z", rewards=(0.0, 2.5, -1.0)),
    ),
    "scores": (GOOD | {"scores": [0, 2.5]}, ab(rewards=(0.0, 2.5))),
    "arrays of numpy": (
        GOOD | ARRAYS | {"sft_index": np.int64(1)},
        ab(rewards=(1.0, 2.0), sft_index=1),
    ),
    "marks and a weight": (GOOD | MARKS, ab(desirable=(True, False), weight=2.5)),
    "no rewards": (GOOD, ab()),
    "rewards of null": (GOOD | {"rewards": None}, ab()),
    "ranks": (THREE | {"ranks": [2, 0, 1]}, THREE_RANKED),
    "ranks by order": (THREE | {"order": [1, 2, 0]}, THREE_RANKED),  # y is the best, then z
    "ranks of NeMo": ({"context": [Q], "completions": NEMO_MESSAGES}, NEMO_RANKED),
    "ranks of NeMo, strings beside messages": (
        {"context": "q", "completions": MIXED_NEMO},
        NEMO_RANKED,
    ),
    "ranks of NeMo, strings": (
        {"context": "q", "completions": NEMO},
        ranked("q", "bad", "good", rewards=(-1.0, 0.0)),
    ),
    "objects without a score": (UNRATED, ab()),
    "objects, rewards beside": (UNRATED | {"rewards": [1, 2]}, ab(rewards=(1.0, 2.0))),
    "a pair": (PAIR, ab()),
    "a pair in a table of all formats": (NULLS | PAIR, ab()),
    "a list in a table of all formats": (NULLS | GOOD, ab()),
    "several rejected": (pair("p", "a", ["b", "c"]), ranked("p", "a", "b", "c")),
    "several rejected, messages": (
        pair([Q], [A], [[B], [assistant("c")]]),
        ranked(Q, A, B, assistant("c")),
    ),
    "a message alone": (pair([Q], A, B), ranked(Q, A, B)),
    "completions of a message": ({"prompt": [Q], "completions": [A, B]}, ranked(Q, A, B)),
    "conversations": (IN_COMMON, ranked(START, A, B)),
    "conversations, the question once more": (IN_COMMON | {"prompt": "q"}, ranked(START, A, B)),
    "a tool's turn in common": (TOOL_TURN, ranked([Q, CALL, RESULT], A, B)),
    "equal replies keep a message": ({"chosen": [Q, A], "rejected": [Q, A]}, ranked(Q, A, A)),
    "conversations that part early": (
        {"chosen": [*EARLY[0], A], "rejected": [*EARLY[1], B]},
        RankedList((tuple(EARLY[0]), tuple(EARLY[1])), ((A,), (B,))),
    ),
    "conversations beside a system text": (WHOLE | {"system": "s"}, ranked([system("s"), Q], A, B)),
    "transcripts of many paragraphs": (PARAGRAPHS, ranked(CONTEXT, " four\n\nfive", " six")),
    "transcripts that differ": (
        DIFFERENT,
        RankedList((CONTEXT, CONTEXT, OTHER), (" a", " b", " c")),
    ),
    "a transcript beside a system text": (pair(CONTEXT, "a", "b", system="s"), IN_TURNS),
    "transcripts beside a system text": (
        {"chosen": f"{CONTEXT} a", "rejected": f"{CONTEXT} b", "system": "s"},
        IN_TURNS,
    ),
    "a transcript said twice": (SAID_TWICE, ranked(CONTEXT, " a", " b")),
    "official": (
        OFFICIAL | {"prefix": [DIALOGUE] * 2},
        ranked(DIALOGUE_TEXT, " good", " bad", **SCORED),
    ),
    "official, dialogues that differ": (
        OFFICIAL | {"prefix": [DIALOGUE, ["<|prompter|>r", "<|assistant|>"]]},
        RankedList((DIALOGUE_TEXT, OTHER), (" good", " bad"), **SCORED),
    ),
    "official summaries": (SUMMARIES, ranked("text TL;DR:", " good", " bad", rewards=(1.0, 0.0))),
    "ShareGPT": (GPT | {"conversations": SHAREGPT}, ranked([system("s"), Q], A, B)),
    "a content of parts": (pair([user(PARTS)], "a", "b"), ranked(user("what now?"), A, B)),
    "Alpaca": (ALPACA, ranked([system("s"), user("add\n1 2")], assistant("3"), assistant("4"))),
    "Alpaca, empty columns": (ALPACA | {"system": "", "input": ""}, ranked("add", "3", "4")),
    "scores of several rejected": (
        SEVERAL | {"score_rejected": [2, 1]},
        ranked("p", "a", "b", "c", rewards=(3.0, 2.0, 1.0)),
    ),
    "tools as JSON each": (
        GOOD | {"tools": ['{"name": "f"}', {"name": "g"}]},
        ab(template=TOOLS),
    ),
    "tools, calls and keywords": (
        USED,
        ranked(Q, [FOUND, NAMED, A], B, template={"tools": [{"name": "f"}], **GLAD}),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_record_is_read_as_its_list(name):
    record, want = FORMS[name]
    parsed = parse_record(record)
    assert parsed.content == want and parsed.by_rank == name.startswith("ranks")


@pytest.mark.parametrize("name", ["score_{}", "{}_rating"])
def test_scores_of_a_pair_are_its_rewards(name):
    scored = PAIR | {name.format("chosen"): 7, name.format("rejected"): "3.5"}
    assert parse_record(scored).content == ab(rewards=(7.0, 3.5))
    parsed = parse_record(scored | {name.format("chosen"): 1})
    assert parsed.content.rewards == (1.0, 3.5)
    assert parsed.notes == ("'rejected' has the higher score, so it ranks first",)


@pytest.mark.parametrize("name", ["prompt", "instruction", "question", "query", "context"])
@pytest.mark.parametrize("completions", ["completions", "responses"])
def test_columns_have_the_names_that_are_in_use(name, completions):
    record = {name: "p", completions: ["a", "b"], "scores": [1, 2]}
    assert parse_record(record).content == ab(rewards=(1.0, 2.0))
    assert parse_record({name: "p", "chosen": "a", "rejected": "b"}).content == ab()


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({**GOOD, "id": 7, "nothing": None, "instruction": "again"}, {"id", "instruction"}),
        (GOOD | {"context": "c"}, {"context"}),
        (WHOLE | {"prompt": "q", "messages": [user("z")]}, {"messages"}),
        (WHOLE | {"prompt": "something else"}, {"prompt"}),
        (
            {"prompt": "q", "completions": [x | {"model": "x"} for x in RATED], "source": "s"},
            {"source", "completions[].model"},
        ),
    ],
)
def test_columns_that_nothing_uses_are_told(record, unused):
    assert set(parse_record(record).unused) == unused


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("\n\nHuman: q", "transcript"),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r", "transcript"),
        ([Q], "conversation"),
    ],
)
def test_what_ends_with_the_user_ranks_nothing(reply, name):
    parsed = parse_record({"chosen": reply, "rejected": reply})
    assert parsed.content == f"a {name} does not end with an assistant's turn"
    assert name == "conversation" or split_transcript(reply) is None


def listed(*completions: object, **more: object) -> dict:
    return {"prompt": "p", "completions": list(completions), **more}


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ([1], "must be a JSON object, got a list"),
        (None, "must be a JSON object, got null"),
        ({"text": "x"}, "columns .'text'.*Known are: prompt, completions, rewards; .*prefix, suf"),
        ({"prompt": "p"}, r"\['prompt'\]. The nearest is prompt, .*; 'completions' is missing"),
        ({"prefix": ["p"], "reward": [1]}, "nearest is prefix, suffix, .*; 'suffix' is missing"),
        ({"completions": ["a", "b"]}, "'prompt' is missing"),
        (GOOD | {"prompt": 3}, "'prompt' must be a string .* got a number"),
        (GOOD | {"prompt": []}, "'prompt' holds no messages"),
        (GOOD | {"completions": "ab"}, "'completions' must be a list, got a string"),
        (listed("a", None), r"completions\[1\] must be a string"),
        (listed("a", "\ud800"), r"completions\[1\].*lone surrogate"),
        (listed("a", ["b"]), r"completions\[1\]\[0\] must be a message"),
        (listed("a", [{"role": "x"}]), r"\[0\].content must be a string"),
        (listed("a", [user("b")]), "got the role 'user'"),
        (GOOD | {"rewards": 1}, "'rewards' must be a list of numbers, got a number"),
        (GOOD | {"rewards": [1]}, "2 completions but 1 rewards"),
        (GOOD | {"rewards": [1, "two"]}, r"rewards\[1\] must be a number, got a string"),
        (GOOD | {"rewards": [1, "nan"]}, r"rewards\[1\] must be finite, got nan"),
        (GOOD | {"rewards": [True, 1]}, r"rewards\[0\] must be a number, got a boolean"),
        (GOOD | {"rewards": [float("nan"), 1]}, r"rewards\[0\] must be finite, got nan"),
        (GOOD | {"scores": [1, float("-inf")]}, r"scores\[1\] must be finite, got -inf"),
        (GOOD | {"rewards": [1, 10**400]}, r"rewards\[1\] must be finite"),
        (GOOD | {"rewards": [1, 1e300]}, r"rewards\[1\] must fit fp32, got 1e\+300"),
        (GOOD | {"rewards": [1, 0], "ranks": [0, 1]}, "one of 'rewards' and 'ranks'"),
        (GOOD | {"order": [1, 1]}, "'order' must hold each index 0 to 1 once"),
        (GOOD | {"sft_index": 2}, "'sft_index' must be an index of the 2 completions, got 2"),
        (GOOD | {"sft_index": True}, "'sft_index' must be an index .* got True"),
        (GOOD | {"desirable": [True]}, "'desirable' must hold true or false for each of 2 comp"),
        (GOOD | {"desirable": [True, 2]}, r"'desirable' must .*, got \[True, 2\]"),
        (GOOD | {"prompt_weight": -1}, "'prompt_weight' must be >= 0, got -1"),
        (listed(NEMO[0], "b"), r"completions\[1\] must be an object with .* and with 'rank'"),
        (listed(RATED[0], {"response": "b"}), r"\[1\] must be .* and with 'overall_score' as oth"),
        (listed({"rank": 1}, {"rank": 0}), r"\[0\] must be an object with one of completion, resp"),
        (listed(*RATED, rewards=[1, 2]), "ranked by its completions or by a column beside them"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "'rejected' is missing"),
        ({"chosen": 1, "rejected": "x"}, "'chosen' must be a string .* got a number"),
        ({"chosen": [A], "rejected": [B]}, "no message of the user"),
        ({"chosen": [Q], "rejected": "b"}, "all strings or all lists of messages"),
        (
            {"topic": "t", "chosen": "a", "rejected": "b"},
            r"no transcripts .*\['chosen', 'rejected', 'topic'\]",
        ),
        (
            {"chosen": [user([{"type": "image"}]), A], "rejected": []},
            r"'chosen'\[0\].content\[0\] is of type 'image'; only text can be ranked",
        ),
        (SEVERAL, "'score_rejected' is missing"),
        (SEVERAL | {"score_rejected": 2}, "2 completions but 1 score_rejected"),
        ({"prefix": ["p"], "suffix": ["a", "b"]}, "2 'suffix' texts but 1 'prefix'"),
        ({"prefix": [["p"], [3]], "suffix": ["a", "b"]}, r"prefix\[1\] must be a string"),
        ({"prefix": ["p"] * 2, "suffix": ["a", "b"], "reward": [1]}, "but 1 reward"),
        (GOOD | {"tools": {"a": 1}}, "tools must be a list, got an object"),
        (GOOD | {"tools": "not json"}, "tools must be JSON where it is a string"),
        (GOOD | {"tools": ["x"]}, "tools must be JSON where it is a string"),
        (GOOD | {"tools": [["x"]]}, r"tools\[0\] must be an object, got a list"),
        (GOOD | {"tools": [{"a": "\ud800"}]}, "tools holds a lone surrogate"),
        (GOOD | {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, got a l"),
        (GOOD | {"chat_template_kwargs": {"tokenize": True}}, "variables of the template, .*'toke"),
    ],
)
def test_malformed_records_name_the_field(record, wrong):
    with pytest.raises(DataError, match=wrong) as error:
        parse_record(record)
    assert isinstance(error.value, ValueError)
