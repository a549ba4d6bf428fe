"""What becomes of every record: kept, cleaned, ranked, dropped and counted, or an error."""

from __future__ import annotations

import json

import pytest
from texts import assistant, pair, row, user

from pro_trainer.data.fields import DataError
from pro_trainer.data.lists import DIFFERENT_CONTEXTS, read_lists, select
from pro_trainer.data.rankings import Numbers
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.text.options import ListOptions
from pro_trainer.train.config import PROConfig

GOOD = {"prompt": "p", "completions": ["a", "b"]}
ONE, TWO = "\n\nHuman: q\n\nAssistant:", "\n\nHuman: r\n\nAssistant:"
FEW, EQUAL = "fewer than 2 different, non-empty completions", "all rewards equal"
EMPTY, REPEATS = "empty", "repeats a better one of its list"


def read(*sources: object, **options) -> tuple[list[RankedList], DataReport]:
    report = DataReport()
    return list(read_lists(sources, report, ListOptions(**options))), report


def listed(*completions: object, **more: object) -> dict:
    return {"prompt": "p", "completions": list(completions), **more}


def ranked(*completions: object, **more: object) -> RankedList:
    return RankedList(("p",), completions, **more)


def test_formats_may_be_mixed_in_one_file(write_lines):
    scored = [{"completion": "a", "rank": 1}, {"completion": "b", "rank": 0}]
    path = write_lines(
        listed("x", "y", "z", rewards=[0, 2, -1], models=["m"]),
        GOOD,
        pair("p", "a", ["b", "c"]),
        {"chosen": f"{ONE} a", "rejected": f"{ONE} b"},
        {"prefix": ["q"] * 2, "suffix": ["a", "b"], "reward": [1, 0], "sft_index": 1},
        {"context": "q", "completions": scored},
    )
    lists, report = read(path)
    assert lists == [
        ranked("x", "y", "z", rewards=(0.0, 2.0, -1.0)),
        ranked("a", "b"),
        ranked("a", "b", "c"),
        RankedList((ONE,), (" a", " b")),
        RankedList(("q",), ("a", "b"), (1.0, 0.0), 1),
        RankedList(("q",), ("b", "a")),
    ]
    assert [found.where for found in lists] == [f"{path}:{i}" for i in range(1, 7)]
    assert (report.records, report.lists, report.with_rewards, report.tied) == (6, 6, 2, 0)
    assert report.candidates == {2: 4, 3: 2}
    assert report.formats == {
        "prompt and completions": 2,
        "prompt, chosen, rejected": 1,
        "transcripts": 1,
        "official PRO files": 1,
        "prompt and completions with a score each": 1,
    }


A, B = assistant("a"), assistant("b")
ASKED, REPLIES = {"prompt": [user("q")]}, RankedList(((user("q"),),), ((A,), (B,)))
DIALOGUES = {"chosen": f"{ONE} a", "rejected": f"{TWO} a"}
OFFICIAL = {"prefix": ["q", "r"], "suffix": ["a", "b"]}
ONE_APART = {"prefix": ["q", "q", "r"], "reward": [2, 1, 0]}
THREE_EQUAL, TIED = listed(*"abc", rewards=[1, 1, 1]), listed(*"abc", rewards=[1, 1, 0])
RANKS = listed("", *"abcd", ranks=[1, 3, 1, 3, 2])
FIVE = listed(*"abcde", rewards=[1, 5, 3, 2, 4])
MARKED = listed("", "a", "b", "a", "c", rewards=[9, 1, 2, 3, 4])  # left: (b, a, c)
FAR = listed(*"abc", rewards=[1e9, 1e9 + 1, 1e9 + 1])  # equal in fp32, and their gaps are not


@pytest.mark.parametrize(
    ("records", "lists", "lost", "options"),
    [
        row(
            [listed("a", " ", "b", "a", rewards=[1, 9, 2, 3])],
            [ranked("b", "a", rewards=(2.0, 3.0))],
            {EMPTY: 1, REPEATS: 1},
        ),
        row([listed("a", "a", "")], [], {FEW: 1, EMPTY: 1, REPEATS: 1}),
        row([listed(), listed("alone")], [], {FEW: 2}),
        row([listed([A], [assistant(" ")], [B]) | ASKED], [REPLIES], {EMPTY: 1}),
        row([DIALOGUES, OFFICIAL], [], {DIFFERENT_CONTEXTS: 2}),
        # Equal replies to different prompts.
        row([DIALOGUES], [RankedList((ONE, TWO), (" a", " a"))], {}, different_contexts="keep"),
        row([OFFICIAL], [RankedList(("q", "r"), ("a", "b"))], {}, different_contexts="keep"),
        # Prompts that differ only in a dropped candidate are shared.
        row(
            [ONE_APART | {"suffix": ["a", "b", "b"]}],
            [RankedList(("q", "r"), ("a", "b"), (2.0, 0.0))],
            {},
            different_contexts="keep",
            num_candidates=2,
        ),
        row(
            [ONE_APART | {"suffix": ["a", "b", ""]}],
            [RankedList(("q",), ("a", "b"), (2.0, 1.0))],
            {EMPTY: 1},
        ),
        # Ranks become an order; of equal ranks the first stays.
        row([RANKS], [ranked("b", "d", "a")], {EMPTY: 1, "has the rank of an earlier one": 1}),
        row([GOOD | {"ranks": [2, 2]}], [], {EQUAL: 1}),
        row([GOOD | {"ranks": [2, 2]}], [ranked("a", "b")], {}, all_equal="order"),
        row([THREE_EQUAL, TIED], [ranked(*"abc", rewards=(1.0, 1.0, 0.0))], {EQUAL: 1}),
        row([THREE_EQUAL], [ranked(*"abc")], {}, all_equal="order"),
        row([FIVE], [ranked(*"abc", rewards=(1.0, 5.0, 3.0))], {}, num_candidates=3),
        row([listed(*"abcde")], [ranked(*"ace")], {}, num_candidates=3),
        row([FAR], [ranked(*"ab", rewards=(1e9, 1e9 + 1))], {}, num_candidates=2),
        # The SFT mark follows its candidate; 1 is repeated by the better 3.
        *(
            row(
                [MARKED | {"sft_index": mark}],
                [ranked(*"bac", rewards=(2.0, 3.0, 4.0), sft_index=index)],
                {EMPTY: 1, REPEATS: 1},
            )
            for mark, index in {0: None, 1: 1, 2: 0, 3: 1, 4: 2}.items()
        ),
        row(
            [listed(*"abc", ranks=[2, 1, 0], desirable=[True, False, False], prompt_weight=2)],
            [ranked(*"cba", desirable=(False, False, True), weight=2.0)],
            {},
        ),
        row([listed(*"abc", ranks=[2, 1, 0], sft_index=0)], [ranked(*"cba", sft_index=2)], {}),
    ],
)
def test_records_are_cleaned_and_counted(records, lists, lost, options):
    found, report = read(*[[record] for record in records], **options)
    assert found == lists and {**report.dropped, **report.dropped_completions} == lost
    assert all(f"dropped, {reason}: {n}" in report.text() for reason, n in report.dropped.items())
    assert report.tied == (TIED in records)
    unmarked = records[0].get("sft_index") is not None and lists[0].sft_index is None
    said = "sft_index marks a dropped completion, the best is used: 1"
    assert report.sft_marks_dropped == unmarked == (said in report.text())


def test_a_mark_that_is_not_selected_is_none():
    assert select(ranked(*"abc", sft_index=1), [2, 0]).sft_index is None


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        (GOOD | {"ranks": [2, 2]}, r"all 2 ranks are equal \(2.0\)"),
        (THREE_EQUAL, r"all 3 rewards are equal \(1.0\)"),
    ],
)
def test_all_equal_may_be_an_error(record, wrong):
    with pytest.raises(DataError, match=f"record 1: {wrong}"):
        read([record], all_equal="error")


ORDER = {"temperature": "1"}  # the loss takes the order alone


@pytest.mark.parametrize(
    ("rewards", "wrong", "without", "options"),
    [
        row([3e38, -3e38], "too far apart.*=1 must lie in", ORDER, reward_scale=1.0),
        row([1, 1 + 1e-10], "too close tog.*=1e-25 must lie in", ORDER, reward_scale=1e-25),
        row([1e20, 0], r"too far apart.*=1e\+20 must lie in", ORDER, reward_scale=1e20),
        row([65, 0], r"too large for the gain 2\^rew", {"gain": "linear"}, loss_type="lipo_lambda"),
    ],
)
def test_rewards_must_suit_the_loss(write_lines, tmp_path, rewards, wrong, without, options):
    path = write_lines(GOOD | {"rewards": [1, 0]}, GOOD | {"rewards": rewards})

    def read_for(**options):
        config = PROConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        return list(read_lists([path], DataReport(), config))

    with pytest.raises(DataError, match=f":2: rewards .*{wrong}"):
        read_for(**options)
    assert len(read_for(**options, **without)) == 2


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b'{"prompt": "p", "completions": ["a", "b"]', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff", "completions": ["a", "b"]}', "not UTF-8"),
        (b"[1]", "must be a JSON object, got a list"),
        ({"text": "x"}, "the columns .'text'"),
        (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 1e999]}', "must be finite"),
        (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [NaN, 1]}', "must be finite"),
    ],
)
def test_malformed_line_is_named_or_skipped_and_counted(write_lines, line, wrong):
    path = write_lines(GOOD, line, GOOD, *[b"x"] * 20)
    stream = read_lists([path], DataReport(), ListOptions())
    assert next(stream) == ranked("a", "b")  # the second line is not reached yet
    with pytest.raises(DataError, match=rf"data.jsonl:2: (?s:.)*{wrong}"):
        next(stream)
    lists, report = read(path, on_bad_line="skip")
    assert len(lists) == report.records == sum(report.formats.values()) == 2
    assert report.bad_lines == 21 and len(report.bad_line_messages) == 5  # the first few
    assert "data.jsonl:2:" in report.text() and "malformed records skipped: 21" in report.text()


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_sources_without_records_are_errors_in_either_mode(write_lines, on_bad_line):
    for source, wrong in (
        (write_lines(name="empty.jsonl"), "empty.jsonl: holds no records"),
        (write_lines(b"", b" ", name="blank.jsonl"), "blank.jsonl: holds no records"),
        ([], "a source of records: holds no records"),
        ("missing.jsonl", "missing.jsonl: cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=wrong):
            read(source, on_bad_line=on_bad_line)


@pytest.mark.parametrize(
    ("sources", "error", "wrong"),
    [
        ("data.jsonl", TypeError, "sources must be a list of sources"),
        (GOOD, TypeError, "sources must be a list of sources"),
        ([GOOD], TypeError, "a source is a whole set of records, got one record"),
        ([], ValueError, "sources is empty"),
    ],
)
def test_what_are_no_sources_is_refused_at_once(sources, error, wrong):
    with pytest.raises(error, match=wrong):
        read_lists(sources, DataReport(), ListOptions())


def test_the_report_can_be_printed_and_saved():
    _, report = read([GOOD, GOOD | {"rewards": [1, 0]}, listed("a")])
    assert report.text().splitlines() == [
        "records read: 3 (3 prompt and completions)",
        "lists kept: 2 (2 of 2 candidates)",
        "with rewards: 1, of these with ties: 0; in order only: 1",
        "rewards: min 0, median 0, p95 1, max 1",
        "  in ten equal steps from min to max: 1, 0, 0, 0, 0, 0, 0, 0, 0, 1",
        "margin of the best to the second: min 1, median 1, p95 1, max 1",
        "margin of the best to the worst: min 1, median 1, p95 1, max 1",
        "mean characters by rank, best first: 1, 1",
        f"lists dropped, {FEW}: 1",
    ]
    found = json.loads(json.dumps(report.as_dict()))
    assert found["candidates"] == {"2": 2} and found["order_only"] == 1
    assert found["prompt_tokens"] is None


def test_lengths_are_summed_up():
    lengths = Numbers()
    assert lengths.summary() is None
    lengths.update(range(1, 101))
    assert lengths.summary() == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert Numbers([7]).summary() == {"min": 7, "median": 7, "p95": 7, "max": 7}


@pytest.mark.shared
def test_real_files(shared):
    lists, report = read(str(shared / "data" / "hh-harmless-base-dev.jsonl.gz"))
    assert report.records == 1500 and len(lists) + sum(report.dropped.values()) == 1500
    assert report.dropped[DIFFERENT_CONTEXTS] == 4
    assert all(found.prompts[0].endswith("\n\nAssistant:") for found in lists)
    lists, report = read(str(shared / "data" / "alpaca-eval-ranked-dev.jsonl.gz"))
    assert report.records == 500 and report.lists == len(lists) == report.with_rewards
    assert report.tied > 0 and sum(report.dropped_completions.values()) > 0
