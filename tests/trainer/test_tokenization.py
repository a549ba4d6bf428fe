"""Token ids: the boundary, special tokens, chat templates, cutting, and what is dropped."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pro_trainer.data.fields import DataError
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.text.encode import MERGED, RENDERED, Encoder, TokenizedList
from pro_trainer.text.options import ListOptions

EOS = 1
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'odd' %}{{ raise_exception('no odd roles') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


@pytest.fixture(scope="module")
def byte_level():
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture(scope="module")
def fast():
    """A byte-level BPE with merges, BOS before each text and EOS after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
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
    yield fast
    fast.chat_template = None


def run(tokenizer, *lists: RankedList, **options) -> tuple[list[TokenizedList], DataReport]:
    report = DataReport()
    for ranked in lists:
        report.records += 1
        report.count(ranked)
    stream = Encoder(tokenizer, ListOptions(**options), report).lists(lists)
    return list(stream), report


def conversation(*completions: str, prompt: str = "the question") -> RankedList:
    return RankedList(
        (({"role": "user", "content": prompt},),),
        tuple(({"role": "assistant", "content": text},) for text in completions),
        where="d.jsonl:7",
    )


def test_ids_are_joined_and_eos_appended(byte_level):
    ranked = RankedList(("ab",), ("c", "dé"), (1.0, 0.0), 1)
    found, report = run(byte_level, ranked)
    # no EOS after the prompt, though the tokenizer adds one
    want = [[*ids("c"), EOS], [*ids("dé"), EOS]]
    assert found == [TokenizedList([ids("ab")], want, [1.0, 0.0], 1)]
    assert report.prompt_lengths.summary() == {"min": 2, "median": 2, "p95": 2, "max": 2}
    assert report.completion_lengths.summary()["max"] == 4
    found, _ = run(byte_level, ranked, append_eos=False)
    assert found[0].completions == [ids("c"), ids("dé")]


def test_the_whole_text_is_tokenised_naturally(fast):
    ranked = RankedList(("the question",), (" is good", " is bad"))
    found, report = run(fast, ranked)
    assert not report.notes and found[0].prompts == [fast("the question").input_ids[:-1]]
    for text, completion in zip(ranked.completions, found[0].completions, strict=True):
        assert found[0].prompts[0] + completion == fast("the question" + text).input_ids


def test_a_merge_across_the_boundary_is_tokenised_apart_and_counted(fast):
    # "ques" + "tion" merge to tokens that cross the cut, " is" does not
    found, report = run(
        fast, RankedList(("the ques",), ("tion", " is")), RankedList(("x",), ("a", "b"))
    )
    assert report.notes == {MERGED: 1}
    assert f"{MERGED}: 1" in report.text()
    apart = fast("tion", add_special_tokens=False).input_ids
    assert found[0].completions[0] == [*apart, EOS]
    assert found[0].prompts[0] == [0, *fast("the ques", add_special_tokens=False).input_ids]
    for tokens, text in zip(found[0].completions, ("tion", " is"), strict=True):
        whole = fast.decode(found[0].prompts[0][1:] + tokens[:-1])
        assert whole == "the ques" + text


def test_batches_of_lists_keep_their_own_texts(fast):
    words = ["good", "bad", "the", "answer", "is"]
    lists = [
        RankedList(
            (f"{words[i % 5]}",), tuple(f" {w} {i}" for w in words[: 2 + i % 3]), None, i % 2
        )
        for i in range(150)
    ]
    lists[70] = RankedList(("p one", "p two"), (" a", " b"))
    together, _ = run(fast, *lists)
    alone = [run(fast, ranked)[0][0] for ranked in lists]
    assert together == alone
    assert together[70].prompts == [fast(p).input_ids[:-1] for p in ("p one", "p two")]


def test_a_conversation_goes_through_the_template_and_gets_nothing_appended(chat):
    found, report = run(chat, conversation("good", "bad"))
    encode = chat.backend_tokenizer.encode
    text = "<s><user>the question</s><assistant>"
    assert found[0].prompts == [encode(text, add_special_tokens=False).ids]
    assert found[0].prompts[0][0] == 0 and found[0].prompts[0].count(0) == 1
    assert found[0].completions == [
        encode(f"{word}</s>", add_special_tokens=False).ids for word in ("good", "bad")
    ]
    assert found[0].completions[0][-1] == EOS and not report.notes


def test_a_template_that_renders_replies_differently_ends_the_prompt_where_they_agree(chat):
    chat.chat_template = CHAT.replace("<assistant>{%", "<assistant>think:{%")
    found, report = run(chat, conversation("good", "bad"))
    assert report.notes[RENDERED] == 1
    decoded = [chat.decode(found[0].prompts[0] + ids) for ids in found[0].completions]
    assert decoded == [
        f"<s><user>the question</s><assistant>{word}</s>" for word in ("good", "bad")
    ]


def test_conversations_the_tokenizer_cannot_render(byte_level, chat):
    with pytest.raises(DataError, match="d.jsonl:7: .*chat template.*ByT5.*tokenizer.chat_templ"):
        run(byte_level, conversation("good", "bad"), on_bad_line="skip")
    odd = conversation("good", "bad")
    odd.prompts[0][0]["role"] = "odd"
    with pytest.raises(DataError, match="d.jsonl:7: the chat template refuses .*: no odd roles"):
        run(chat, odd)
    found, report = run(chat, odd, conversation("good", "bad"), on_bad_line="skip")
    assert len(found) == report.lists == report.records == report.bad_lines == 1
    assert "d.jsonl:7: the chat template refuses" in report.text()


def test_the_prompt_is_cut_at_the_side_asked_for_and_completions_at_the_end(byte_level):
    ranked = RankedList(("abcdef",), ("12345", "123", "4321"))
    found, report = run(byte_level, ranked, max_length=8)
    assert found[0].prompts == [ids("cdef")]
    # 4 tokens are left: a completion that is cut has no EOS, not even where only EOS went
    assert found[0].completions == [ids("1234"), [*ids("123"), EOS], ids("4321")]
    assert (report.prompts_cut, report.completions_cut) == (1, 2)
    found, _ = run(byte_level, ranked, max_length=8, truncation_mode="keep_start")
    assert found[0].prompts == [ids("abcd")]


def test_bos_stays_when_the_prompt_is_cut(fast):
    ranked = RankedList(("abcdef",), ("x", "y"))
    bare = fast("abcdef", add_special_tokens=False).input_ids
    found, report = run(fast, ranked, max_length=8)
    assert found[0].prompts == [[0, *bare[-5:]]] and report.prompts_cut == 1
    found, report = run(fast, ranked, max_length=8, max_prompt_length=4)
    assert found[0].prompts == [[0, *bare[-3:]]] and report.prompts_cut == 1
    found, _ = run(fast, ranked, max_length=8, max_prompt_length=4, truncation_mode="keep_start")
    assert found[0].prompts == [[0, *bare[:3]]]
    found, _ = run(fast, ranked, max_length=8, max_prompt_length=1)
    assert found[0].prompts == [[0]]


def test_an_empty_prompt_begins_with_bos_or_eos(byte_level, fast):
    ranked = RankedList(("",), ("a", "b"))
    assert run(byte_level, ranked)[0][0].prompts == [[EOS]]
    assert run(fast, ranked)[0][0].prompts == [[0]]
    bare = PreTrainedTokenizerFast(tokenizer_object=fast.backend_tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(DataError, match="the prompt is empty, and .* neither a BOS nor an EOS"):
        run(bare, ranked, append_eos=False)


def test_what_the_tokenizer_lacks_is_said_before_any_work(fast):
    bare = PreTrainedTokenizerFast(tokenizer_object=fast.backend_tokenizer)
    with pytest.raises(ValueError, match="has no EOS token.*append_eos=False"):
        Encoder(bare, ListOptions())
    with pytest.raises(ValueError, match="1 tokens, which has no room for the 2 special"):
        two = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
        old, fast.backend_tokenizer.post_processor = fast.backend_tokenizer.post_processor, two
        try:
            Encoder(fast, ListOptions(max_prompt_length=1))
        finally:
            fast.backend_tokenizer.post_processor = old


def test_lists_that_do_not_fit_are_cut_or_dropped_and_counted(byte_level):
    lists = [
        RankedList(("ab",), ("c", "d"), (1.0, 0.0)),
        RankedList(("ab",), ("same start, a", "same start, b"), (1.0, 0.0)),
        RankedList(("ab",), ("long enough", "d")),
    ]
    found, report = run(byte_level, *lists, max_length=8)
    assert len(found) == report.lists == 2 and report.completions_cut == 1
    assert report.dropped == {"completions equal once cut to max_length": 1}
    assert report.completion_lengths.summary()["max"] == 12  # before the cut
    found, report = run(byte_level, *lists, max_length=8, too_long="drop")
    assert len(found) == report.lists == 1 and report.candidates == {2: 1}
    assert report.dropped == {"longer than max_length=8": 2}


def test_candidates_with_prompts_of_their_own_have_rooms_of_their_own(byte_level):
    found, report = run(byte_level, RankedList(("abcdef", "a"), ("12345678",) * 2), max_length=8)
    assert found[0].prompts == [ids("cdef"), ids("a")]
    assert found[0].completions == [ids("1234"), ids("1234567")]
    assert (report.prompts_cut, report.completions_cut) == (1, 2)


def test_completions_the_tokenizer_makes_equal_or_empty_are_dropped(fast):
    from tokenizers import normalizers

    fast.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("#", "")]
    )
    lists = [RankedList(("p",), ("Good", "good")), RankedList(("p",), ("#", "good"))]
    found, report = run(fast, *lists)
    fast.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert not found and report.lists == 0
    assert report.dropped == {
        "completions equal as token ids": 1,
        "a completion has no tokens": 1,
    }
