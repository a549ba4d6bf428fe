"""Every record format, and every record that is none."""

from __future__ import annotations

import numpy as np
import pytest

from pro_trainer.data.fields import DataError
from pro_trainer.data.formats import parse_record
from pro_trainer.data.records import RankedList
from pro_trainer.data.transcripts import split_transcript

GOOD = {"prompt": "p", "completions": ["a", "b"]}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parse(record: object) -> tuple[RankedList, bool]:
    parsed = parse_record(record)
    assert isinstance(parsed.content, RankedList), parsed.content
    return parsed.content, parsed.by_rank


@pytest.mark.parametrize("key", ["rewards", "scores"])
def test_rewards_and_scores_are_taken_as_they_stand(key):
    record = {"prompt": "p", "completions": ["x", "y", "z"], key: [0, 2.5, np.float32(-1)]}
    assert parse(record) == (RankedList(("p",), ("x", "y", "z"), (0.0, 2.5, -1.0)), False)


def test_no_rewards_or_null_means_in_order():
    assert (
        parse(GOOD)
        == parse({**GOOD, "rewards": None})
        == (
            RankedList(("p",), ("a", "b")),
            False,
        )
    )


def test_ranks_and_order_only_order():
    record = {"prompt": "p", "completions": ["x", "y", "z"]}
    ranked, by_rank = parse({**record, "ranks": [2, 0, 1]})
    assert by_rank and ranked.rewards == (-2.0, 0.0, -1.0)
    same, by_rank = parse({**record, "order": [1, 2, 0]})  # y is the best, then z
    assert by_rank and same == ranked


def test_nemo_context_and_ranked_completions():
    record = {
        "context": [user("q")],
        "completions": [
            {"completion": [assistant("bad")], "rank": 1},
            {"completion": [assistant("good")], "rank": 0},
        ],
    }
    want = RankedList(((user("q"),),), ((assistant("bad"),), (assistant("good"),)), (-1.0, 0.0))
    assert parse(record) == (want, True)
    record["context"] = "q"  # strings beside messages become messages
    record["completions"][1]["completion"] = "good"
    assert parse(record) == (want, True)
    record["completions"][0]["completion"] = "bad"
    assert parse(record) == (RankedList(("q",), ("bad", "good"), (-1.0, 0.0)), True)


def test_explicit_prompt_with_one_or_many_rejected():
    record = {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}
    assert parse(record)[0] == RankedList(("The sky is",), (" blue", " green"))
    record["rejected"] = [" green", " loud"]
    assert parse(record)[0].completions == (" blue", " green", " loud")
    messages = {
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [[assistant("b")], [assistant("c")]],
    }
    assert parse(messages)[0] == RankedList(
        ((user("q"),),), ((assistant("a"),), (assistant("b"),), (assistant("c"),))
    )


def test_implicit_prompt_is_what_conversations_share():
    start = [{"role": "system", "content": "s"}, user("q"), assistant("r"), user("more")]
    chosen, rejected = [*start, assistant("a")], [*start, assistant("b")]
    want = RankedList((tuple(start),), ((assistant("a"),), (assistant("b"),)))
    assert parse({"chosen": chosen, "rejected": rejected})[0] == want
    # the question once more as a string, as some binarised sets have it
    assert parse({"prompt": "q", "chosen": chosen, "rejected": rejected})[0] == want
    # a common tool turn belongs to the prompt, and extra keys of messages are left out
    tool = [{**assistant("call"), "tool_calls": None}, {"role": "tool", "content": "42"}]
    chosen, rejected = [user("q"), *tool, assistant("a")], [user("q"), *tool, assistant("b")]
    ranked, _ = parse({"chosen": chosen, "rejected": rejected})
    assert ranked.prompts == ((user("q"), assistant("call"), tool[1]),)
    assert ranked.completions == ((assistant("a"),), (assistant("b"),))
    same, _ = parse({"chosen": chosen, "rejected": chosen})  # equal replies keep a message each
    assert same.completions == ((assistant("a"),), (assistant("a"),))


def test_conversations_that_part_early_keep_prompts_of_their_own():
    chosen = [user("q"), assistant("x"), user("m"), assistant("a")]
    rejected = [user("q"), assistant("y"), user("m"), assistant("b")]
    ranked, _ = parse({"chosen": chosen, "rejected": rejected})
    assert ranked.prompts == (tuple(chosen[:3]), tuple(rejected[:3]))
    assert ranked.completions == ((assistant("a"),), (assistant("b"),))


def test_transcripts_keep_all_paragraphs_of_the_last_reply():
    context = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    ranked, _ = parse({"chosen": context + " four\n\nfive", "rejected": context + " six"})
    assert ranked == RankedList((context,), (" four\n\nfive", " six"))
    other = "\n\nHuman: else\n\nAssistant:"
    ranked, _ = parse({"chosen": context + " a", "rejected": [context + " b", other + " c"]})
    assert ranked == RankedList((context, context, other), (" a", " b", " c"))


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("\n\nHuman: q", "transcript"),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r", "transcript"),
        ([user("q")], "conversation"),
    ],
)
def test_what_ends_with_the_user_ranks_nothing(reply, name):
    parsed = parse_record({"chosen": reply, "rejected": reply})
    assert parsed.content == f"a {name} does not end with an assistant's turn"


def test_split_transcript_without_an_assistant_turn():
    assert split_transcript("\n\nHuman: q") is None


def test_official_dialogue_and_summarisation():
    turns = ["<|prompter|>q one ", "<|assistant|>r", "<|prompter|>two", "<|assistant|>"]
    record = {
        "meta": {"source": "x"},
        "prefix": [turns, turns],
        "suffix": ["good", "bad"],
        "reward": [0.75, -1],
        "sft_index": 0,
    }
    prompt = "\n\nHuman: q one \n\nAssistant: r\n\nHuman: two\n\nAssistant:"
    want = RankedList((prompt,), (" good", " bad"), (0.75, -1.0), 0)
    assert parse(record) == (want, False)
    record["prefix"] = [turns, ["<|prompter|>else", "<|assistant|>"]]
    assert parse(record)[0].prompts == (prompt, "\n\nHuman: else\n\nAssistant:")
    plain = {"prefix": ["text TL;DR:"] * 2, "suffix": [" good", " bad"], "reward": [1.0, 0.0]}
    assert parse(plain)[0] == RankedList(("text TL;DR:",), (" good", " bad"), (1.0, 0.0))


def test_null_keys_are_absent_so_that_one_table_may_hold_all_formats():
    nulls = dict.fromkeys(
        ["prompt", "context", "completions", "rewards", "chosen", "rejected", "prefix", "suffix"]
    )
    assert parse({**nulls, **GOOD}) == parse(GOOD)
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert parse({**nulls, **pair})[0] == RankedList(("p",), ("a", "b"))


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ([1], "must be a JSON object, got a list"),
        (None, "must be a JSON object, got null"),
        (
            {"text": "x"},
            "columns .'text'.*Known are: prompt, completions, rewards; .*prefix, suffix",
        ),
        (
            {"prompt": "p", "completions": None},
            r"columns \['prompt'\]. The nearest is prompt, .*; 'completions' is missing",
        ),
        (
            {"prefix": ["p"], "reward": [1]},
            "nearest is prefix, suffix, reward; 'suffix' is missing",
        ),
        ({"completions": ["a", "b"]}, "'prompt' is missing"),
        ({"prompt": 3, "completions": ["a", "b"]}, "'prompt' must be a string .* got a number"),
        ({"prompt": [], "completions": ["a", "b"]}, "'prompt' holds no messages"),
        ({"prompt": "p", "completions": "ab"}, "'completions' must be a list, got a string"),
        ({"prompt": "p", "completions": ["a", None]}, r"completions\[1\] must be a string"),
        ({"prompt": "p", "completions": ["a", "\ud800"]}, r"completions\[1\].*lone surrogate"),
        ({"prompt": "p", "completions": ["a", ["b"]]}, r"completions\[1\]\[0\] must be a message"),
        ({"prompt": "p", "completions": ["a", [{"role": "x"}]]}, r"\[0\].content must be a string"),
        ({"prompt": "p", "completions": ["a", [user("b")]]}, "got the role 'user'"),
        ({**GOOD, "rewards": 1}, "'rewards' must be a list of numbers, got a number"),
        ({**GOOD, "rewards": [1]}, "2 completions but 1 rewards"),
        ({**GOOD, "rewards": [1, "two"]}, r"rewards\[1\] must be a number, got a string"),
        ({**GOOD, "rewards": [1, "nan"]}, r"rewards\[1\] must be finite, got nan"),
        ({**GOOD, "rewards": [True, 1]}, r"rewards\[0\] must be a number, got a boolean"),
        ({**GOOD, "rewards": [float("nan"), 1]}, r"rewards\[0\] must be finite, got nan"),
        ({**GOOD, "scores": [1, float("-inf")]}, r"scores\[1\] must be finite, got -inf"),
        ({**GOOD, "rewards": [1, 10**400]}, r"rewards\[1\] must be finite"),
        ({**GOOD, "rewards": [1, 1e300]}, r"rewards\[1\] must fit fp32, got 1e\+300"),
        ({**GOOD, "rewards": [1, 0], "ranks": [0, 1]}, "one of 'rewards' and 'ranks'"),
        ({**GOOD, "order": [1, 1]}, "'order' must hold each index 0 to 1 once"),
        ({**GOOD, "sft_index": 2}, "'sft_index' must be an index of the 2 completions, got 2"),
        ({**GOOD, "sft_index": True}, "'sft_index' must be an index .* got True"),
        (
            {"context": "c", "completions": [{"completion": "a", "rank": 0}, "b"]},
            r"completions\[1\] must be an object with one of completion, .* and with 'rank'",
        ),
        (
            {"context": "c", "completions": [{"response": "a", "score": 1}, {"response": "b"}]},
            r"completions\[1\] must be .* and with 'score' as others of its list are",
        ),
        (
            {"context": "c", "completions": [{"rank": 1}, {"rank": 0}]},
            r"completions\[0\] must be an object with one of completion, response",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "'rejected' is missing"),
        ({"chosen": 1, "rejected": "x"}, "'chosen' must be a string .* got a number"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no message of the user"),
        ({"chosen": [user("q")], "rejected": "b"}, "all strings or all lists of messages"),
        (
            {"chosen": [user([{"type": "image"}]), assistant("a")], "rejected": []},
            r"'chosen'\[0\].content\[0\] is of type 'image'; only text can be ranked",
        ),
        ({"prefix": ["p"], "suffix": ["a", "b"]}, "2 'suffix' texts but 1 'prefix'"),
        ({"prefix": [["p"], [3]], "suffix": ["a", "b"]}, r"prefix\[1\] must be a string"),
        ({"prefix": ["p"] * 2, "suffix": ["a", "b"], "reward": [1]}, "but 1 reward"),
    ],
)
def test_malformed_records_name_the_field(record, wrong):
    with pytest.raises(DataError, match=wrong) as error:
        parse_record(record)
    assert isinstance(error.value, ValueError)


def test_scores_of_a_pair_are_its_rewards():
    for names in (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")):
        pair = {"prompt": "p", "chosen": "a", "rejected": "b", names[0]: 7, names[1]: "3.5"}
        assert parse(pair)[0] == RankedList(("p",), ("a", "b"), (7.0, 3.5))
        parsed = parse_record(pair | {names[0]: 1})
        assert parsed.content.rewards == (1.0, 3.5)
        assert parsed.notes == ("'rejected' has the higher score, so it ranks first",)
    several = {"prompt": "p", "chosen": "a", "rejected": ["b", "c"], "score_chosen": 3}
    assert parse(several | {"score_rejected": [2, 1]})[0].rewards == (3.0, 2.0, 1.0)
    with pytest.raises(DataError, match="'score_rejected' is missing"):
        parse_record(several)
    with pytest.raises(DataError, match="2 completions but 1 score_rejected"):
        parse_record(several | {"score_rejected": 2})


@pytest.mark.parametrize("name", ["prompt", "instruction", "question", "query", "context"])
@pytest.mark.parametrize("completions", ["completions", "responses"])
def test_columns_have_the_names_that_are_in_use(name, completions):
    record = {name: "p", completions: ["a", "b"], "scores": [1, 2]}
    assert parse(record)[0] == RankedList(("p",), ("a", "b"), (1.0, 2.0))
    assert parse({name: "p", "chosen": "a", "rejected": "b"})[0] == RankedList(("p",), ("a", "b"))


def test_completions_may_hold_their_score():
    rated = [{"response": "a", "overall_score": 3.0, "model": "x"},
             {"response": "b", "overall_score": 8.5, "model": "y"}]  # fmt: skip
    parsed = parse_record({"instruction": "q", "completions": rated, "source": "s"})
    assert parsed.content == RankedList(("q",), ("a", "b"), (3.0, 8.5))
    assert set(parsed.unused) == {"source", "completions[].model"}
    unrated = [{"text": "a"}, {"text": "b"}]
    assert parse({"prompt": "q", "completions": unrated})[0] == RankedList(("q",), ("a", "b"))
    assert parse({"prompt": "q", "completions": unrated, "rewards": [1, 2]})[0].rewards == (1, 2)
    with pytest.raises(DataError, match="ranked by its completions or by a column beside them"):
        parse_record({"prompt": "q", "completions": rated, "rewards": [1, 2]})


def test_sharegpt_turns_and_one_message_alone():
    record = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
        ],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    system = {"role": "system", "content": "s"}
    ranked = parse(record)[0]
    assert ranked == RankedList(((system, user("q")),), ((assistant("a"),), (assistant("b"),)))
    one = {"prompt": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")}
    assert parse(one)[0] == RankedList(((user("q"),),), ((assistant("a"),), (assistant("b"),)))
    completions = {"prompt": [user("q")], "completions": [assistant("a"), assistant("b")]}
    assert parse(completions)[0] == parse(one)[0]


def test_a_content_of_parts_is_their_text():
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "now?"}]
    pair = {"prompt": [user(parts)], "chosen": "a", "rejected": "b"}
    assert parse(pair)[0].prompts == ((user("what now?"),),)


def test_what_messages_hold_beside_role_and_content_stays():
    call = assistant(None) | {"tool_calls": [{"name": "f", "arguments": None}], "name": None}
    tool = {"role": "tool", "content": "3", "name": "f"}
    pair = {"prompt": [user("q")], "chosen": [call, tool, assistant("a")], "rejected": "b",
            "tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "glad"}}  # fmt: skip
    ranked = parse(pair)[0]
    assert ranked.completions[0] == (
        assistant("") | {"tool_calls": [{"name": "f"}]}, tool, assistant("a"),
    )  # fmt: skip
    assert ranked.template == {"tools": [{"name": "f"}], "mood": "glad"}
    for wrong, said in (("tools", "not json"), ("chat_template_kwargs", [1])):
        with pytest.raises(DataError, match=wrong):
            parse_record(pair | {wrong: said})


def test_alpaca_and_system_columns():
    record = {"instruction": "add", "input": "1 2", "system": "s", "chosen": "3", "rejected": "4"}
    system = {"role": "system", "content": "s"}
    assert parse(record)[0] == RankedList(
        ((system, user("add\n1 2")),), ((assistant("3"),), (assistant("4"),))
    )
    assert parse(record | {"system": "", "input": ""})[0] == RankedList(("add",), ("3", "4"))


def test_columns_that_nothing_uses_are_told():
    record = {**GOOD, "id": 7, "prompt_id": "x", "nothing": None, "instruction": "again"}
    assert parse_record(record).unused == ("id", "prompt_id", "instruction")
    whole = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert parse_record(whole | {"prompt": "q", "messages": [user("z")]}).unused == ("messages",)
    assert parse_record(whole | {"prompt": "something else"}).unused == ("prompt",)


def test_strings_without_a_prompt_that_are_no_transcripts_are_named():
    with pytest.raises(DataError, match=r"no transcripts .*\['chosen', 'rejected', 'topic'\]"):
        parse_record({"topic": "t", "chosen": "a", "rejected": "b"})


def test_a_transcript_is_turns_beside_a_system_text_and_is_not_said_twice():
    context = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant:"
    system = {"role": "system", "content": "s"}
    expected = ((system, user("hi"), assistant("yo"), user("bye")),)
    replies = ((assistant("x"),), (assistant("y"),))
    pair = {"prompt": context, "chosen": "x", "rejected": "y", "system": "s"}
    assert parse(pair)[0] == RankedList(expected, replies)
    whole = {"chosen": context + " x", "rejected": context + " y", "system": "s"}
    assert parse(whole)[0] == RankedList(expected, replies)
    twice = {"prompt": context, "chosen": context + " x", "rejected": context + " y"}
    assert parse(twice)[0] == RankedList((context,), (" x", " y"))
    chat = {"chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("y")]}
    assert parse(chat | {"system": "s"})[0].prompts == ((system, user("q")),)


def test_a_question_is_the_prompt_and_a_context_beside_it_is_named():
    parsed = parse_record({"question": "q", "context": "c", "completions": ["a", "b"]})
    assert parsed.content.prompts == ("q",) and parsed.unused == ("context",)


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"tools": {"a": 1}}, "tools must be a list, got an object"),
        ({"tools": ["x"]}, "tools must be JSON where it is a string"),
        ({"tools": [["x"]]}, r"tools\[0\] must be an object, got a list"),
        ({"tools": [{"a": "\ud800"}]}, "tools holds a lone surrogate"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, got a list"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"variables of the template, .*'tokenize'"),
    ],
)
def test_what_is_given_to_the_template_is_checked(more, wrong):
    with pytest.raises(DataError, match=wrong):
        parse_record(GOOD | more)
    tools = GOOD | {"tools": ['{"name": "f"}', {"name": "g"}]}
    assert parse(tools)[0].template == {"tools": [{"name": "f"}, {"name": "g"}]}


def test_arrays_of_numpy_are_lists():
    record = {"prompt": "p", "completions": np.array(["a", "b"]), "rewards": np.array([1.0, 2.0])}
    ranked = parse(record | {"sft_index": np.int64(1)})[0]
    assert ranked == RankedList(("p",), ("a", "b"), (1.0, 2.0), 1)
