"""Token ids: the boundary, special tokens, chat templates, cutting, and what is dropped."""

from __future__ import annotations

import pytest
from texts import assistant, row, user
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pro_trainer.data.fields import DataError
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.text.encode import MERGED, Encoder, TokenizedList
from pro_trainer.text.options import ListOptions

EOS = 1
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'odd' %}{{ raise_exception('no odd roles') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BYTES = ByT5Tokenizer(extra_ids=0)


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


@pytest.fixture
def fast() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, BOS before each text and EOS after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the answer is good and the question is bad"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chat(fast):
    fast.chat_template = CHAT
    return fast


def run(tokenizer, *lists: RankedList, **options) -> tuple[list[TokenizedList], DataReport]:
    report = DataReport()
    for ranked in lists:
        report.records += 1
        report.count(ranked)
    stream = Encoder(tokenizer, ListOptions(**options), report).lists(lists)
    return list(stream), report


def conversation(role: str = "user") -> RankedList:
    prompt = (user("the question") | {"role": role},)
    replies = (assistant("good"),), (assistant("bad"),)
    return RankedList((prompt,), replies, where="d.jsonl:7")


def test_ids_are_joined_and_eos_appended():
    ranked = RankedList(("ab",), ("c", "dé"), (1.0, 0.0), 1)
    found, report = run(BYTES, ranked)
    # no EOS after the prompt, though the tokenizer adds one
    want = [[*ids("c"), EOS], [*ids("dé"), EOS]]
    assert found == [TokenizedList([ids("ab")], want, [1.0, 0.0], 1)]
    assert report.prompt_lengths.summary() == {"min": 2, "median": 2, "p95": 2, "max": 2}
    assert report.completion_lengths.summary()["max"] == 4
    found, _ = run(BYTES, ranked, append_eos=False)
    assert found[0].completions == [ids("c"), ids("dé")]


def test_the_whole_text_is_tokenised_naturally_unless_tokens_merge_across_the_boundary(fast):
    # "ques" + "tion" merge to tokens that cross the cut, " is" does not
    lists = [
        RankedList(("the question",), (" is good", " is bad")),
        RankedList(("the ques",), (" is", "tion")),
        RankedList(("x",), ("a", "b")),
    ]
    (natural, merged, _), report = run(fast, *lists)
    assert report.notes == {MERGED: 1} and f"{MERGED}: 1" in report.text()
    for ranked, found in zip(lists, (natural, merged), strict=False):
        (prompt,) = ranked.prompts
        assert found.prompts == [fast(prompt).input_ids[:-1]]
        for text, completion in zip(ranked.completions, found.completions, strict=True):
            if text == "tion":
                assert completion == fast(text).input_ids[1:]
            else:
                assert found.prompts[0] + completion == fast(prompt + text).input_ids
            whole = found.prompts[0][1:] + completion[:-1]
            assert fast.decode(whole) == prompt + text


def test_batches_of_lists_keep_their_own_texts(fast):
    words = ["good", "bad", "the", "answer", "is"]
    lists = [
        RankedList((words[i % 5],), tuple(f" {w} {i}" for w in words[: 2 + i % 3]), None, i % 2)
        for i in range(150)
    ]
    lists[70] = RankedList(("p one", "p two"), (" a", " b"))
    together, _ = run(fast, *lists)
    assert together == [run(fast, ranked)[0][0] for ranked in lists]
    assert together[70].prompts == [fast(p).input_ids[:-1] for p in ("p one", "p two")]


def test_conversations_the_tokenizer_cannot_render(chat):
    with pytest.raises(DataError, match="d.jsonl:7: .*chat template.*ByT5.*tokenizer.chat_templ"):
        run(BYTES, conversation(), on_bad_line="skip")
    refused = "d.jsonl:7: the chat template refuses"
    with pytest.raises(DataError, match=f"{refused} .*: no odd roles"):
        run(chat, conversation("odd"))
    found, report = run(chat, conversation("odd"), conversation(), on_bad_line="skip")
    assert len(found) == report.lists == report.records == report.bad_lines == 1
    assert refused in report.text()


THREE = ("12345", "123", "4321")
THREE_CUT = ["1234", "123$", "4321"]  # one that is cut has no EOS ($), not even where only EOS went


@pytest.mark.parametrize(
    ("prompts", "completions", "kept", "kept_completions", "lost", "options"),
    [
        # A prompt keeps half of the length.
        row(("abcdef",), THREE, ["cdef"], THREE_CUT, "the prompt lost its first 2 tokens of 6"),
        row(
            ("abcdef",),
            THREE,
            ["abcd"],
            THREE_CUT,
            "the prompt lost its last 2 tokens of 6",
            truncation_mode="keep_start",
        ),
        row(("a",), THREE + ("12345678",), ["a"], ["12345$", "123$", "4321$", "1234567"], ""),
        # Candidates with prompts of their own have rooms of their own.
        row(("abcdef", "a"), ("12345678",) * 2, ["cdef", "a"], ["1234", "1234567"], "the prompt"),
    ],
)
def test_the_prompt_is_cut_at_the_side_asked_for_and_completions_at_the_end(
    prompts, completions, kept, kept_completions, lost, options
):
    (found,), report = run(BYTES, RankedList(prompts, completions), max_length=8, **options)
    assert found.prompts == [ids(text) for text in kept]
    ends = [ids(text.rstrip("$")) + [EOS] * text.count("$") for text in kept_completions]
    assert found.completions == ends
    cut = sum("$" not in text for text in kept_completions)
    assert (report.prompts_cut, report.completions_cut) == (bool(lost), cut)
    said = f"{cut} of {len(ends)} completions lost their end"
    assert found.cut.startswith(lost) and found.cut.endswith(said)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, slice(-5, None)),
        ({"max_prompt_length": 4}, slice(-3, None)),
        ({"max_prompt_length": 4, "truncation_mode": "keep_start"}, slice(3)),
        ({"max_prompt_length": 1}, slice(0)),
    ],
)
def test_bos_stays_when_the_prompt_is_cut(fast, options, kept):
    found, report = run(fast, RankedList(("abcdef",), ("x", "y")), max_length=8, **options)
    bare = fast("abcdef", add_special_tokens=False).input_ids
    assert found[0].prompts == [[0, *bare[kept]]] and report.prompts_cut == 1


def test_what_stands_for_an_empty_prompt_and_what_a_tokenizer_lacks(fast):
    ranked = RankedList(("",), ("a", "b"))
    assert run(BYTES, ranked)[0][0].prompts == [[EOS]]
    assert run(fast, ranked)[0][0].prompts == [[0]]
    two = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    fast.backend_tokenizer.post_processor = two
    with pytest.raises(ValueError, match="1 tokens, which has no room for the 2 special"):
        Encoder(fast, ListOptions(max_prompt_length=1))
    bare = PreTrainedTokenizerFast(tokenizer_object=fast.backend_tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(DataError, match="the prompt is empty, and .* neither a BOS nor an EOS"):
        run(bare, ranked, append_eos=False)
    with pytest.raises(ValueError, match="has no EOS token.*append_eos=False"):
        Encoder(bare, ListOptions())


def test_lists_that_do_not_fit_are_cut_or_dropped_and_counted():
    lists = [
        RankedList(("ab",), ("c", "d"), (1.0, 0.0)),
        RankedList(("ab",), ("same start, a", "same start, b"), (1.0, 0.0)),
        RankedList(("ab",), ("long enough", "d")),
    ]
    found, report = run(BYTES, *lists, max_length=8)
    assert len(found) == report.lists == 2 and report.completions_cut == 1
    assert report.dropped == {"completions equal once cut to max_length": 1}
    assert report.completion_lengths.summary()["max"] == 12  # before the cut
    found, report = run(BYTES, *lists, max_length=8, too_long="drop")
    assert len(found) == report.lists == 1 and report.candidates == {2: 1}
    assert report.dropped == {"longer than max_length=8": 2}


def test_completions_the_tokenizer_makes_equal_or_empty_are_dropped(fast):
    fast.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("#", "")]
    )
    lists = [RankedList(("p",), ("Good", "good")), RankedList(("p",), ("#", "good"))]
    found, report = run(fast, *lists)
    assert not found and report.lists == 0
    equal, empty = "completions equal as token ids", "a completion has no tokens"
    assert report.dropped == {equal: 1, empty: 1}
