"""Every record format, every malformed line, every reason to leave a list out."""

from __future__ import annotations

import gzip
import json

import pytest

from pro_trainer.data import DataError, DataReport, RankedList, read_lists, split_transcript

GOOD = {"prompt": "p", "completions": ["a", "b"]}


def read(path: str, **options) -> tuple[list[RankedList], DataReport]:
    report = DataReport()
    return list(read_lists([path], report, **options)), report


def transcripts(*turns: str, chosen: str, rejected: str) -> dict[str, str]:
    context = "".join(turns) + "\n\nAssistant:"
    return {"chosen": context + chosen, "rejected": context + rejected}


def test_reads_lists_with_and_without_rewards(write_lines):
    path = write_lines(
        {"prompt": "p", "completions": ["x", "y", "z"], "rewards": [0, 2.5, -1], "models": ["m"]},
        GOOD,
    )
    lists, report = read(path)
    assert lists == [
        RankedList("p", ("x", "y", "z"), (0.0, 2.5, -1.0)),
        RankedList("p", ("a", "b"), None),
    ]
    assert (report.records, report.lists, report.with_rewards, report.tied) == (2, 2, 1, 0)
    assert report.candidates == {3: 1, 2: 1}


def test_reads_gzip_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    line = json.dumps(GOOD).encode()
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + line + b"\n\n  \n" + line))
    lists, report = read(str(path))
    assert len(lists) == report.records == 2


def test_keeps_all_paragraphs_of_the_last_reply(write_lines):
    record = transcripts(
        "\n\nHuman: one", "\n\nAssistant: two", "\n\nHuman: three", chosen=" four\n\nfive",
        rejected=" six",
    )  # fmt: skip
    lists, _ = read(write_lines(record))
    context = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    assert lists == [RankedList(context, (" four\n\nfive", " six"), None)]


def test_drops_and_counts_transcripts_that_cannot_be_compared(write_lines):
    record = transcripts("\n\nHuman: q", chosen=" a", rejected=" b")
    other = {**record, "rejected": "\n\nHuman: else\n\nAssistant: b"}
    open_end = {**record, "rejected": record["rejected"] + "\n\nHuman: more"}
    lists, report = read(write_lines(record, other, open_end))
    assert len(lists) == 1 and report.records == 3
    assert report.dropped == {
        "chosen and rejected have different contexts": 1,
        "a transcript does not end with an assistant's turn": 1,
    }
    assert "lists dropped, chosen and rejected have different contexts: 1" in report.text()


def test_split_transcript_without_an_assistant_turn():
    assert split_transcript("\n\nHuman: q") is None


def test_drops_empty_and_repeated_completions_and_keeps_the_best_of_equals(write_lines):
    lists, report = read(
        write_lines(
            {"prompt": "p", "completions": ["a", " ", "b", "a"], "rewards": [1, 9, 2, 3]},
            {"prompt": "p", "completions": ["a", "a", ""]},
            {"prompt": "p", "completions": []},
            {"prompt": "p", "completions": ["alone"]},
        )
    )
    assert lists == [RankedList("p", ("b", "a"), (2.0, 3.0))]
    assert report.dropped == {"fewer than 2 different, non-empty completions": 3}
    assert report.dropped_completions == {"empty": 2, "repeats a better one of its list": 2}


def test_all_rewards_equal_is_dropped_refused_or_order(write_lines):
    equal = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 1, 1]}
    tied = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 1, 0]}
    path = write_lines(equal, tied)
    lists, report = read(path)
    assert len(lists) == 1 and report.tied == 1
    assert report.dropped == {"all rewards equal": 1}
    with pytest.raises(DataError, match=r":1: all 3 rewards are equal \(1.0\)"):
        read(path, all_equal="error")
    lists, _ = read(path, all_equal="order")
    assert lists[0] == RankedList("p", ("a", "b", "c"), None)


def test_candidate_cap_keeps_best_and_worst_evenly_spaced(write_lines):
    record = {"prompt": "p", "completions": list("abcde"), "rewards": [1, 5, 3, 2, 4]}
    lists, report = read(write_lines(record, {**record, "rewards": None}), num_candidates=3)
    assert lists[0] == RankedList("p", ("a", "b", "c"), (1.0, 5.0, 3.0))
    assert lists[1] == RankedList("p", ("a", "c", "e"), None)
    assert report.candidates == {3: 2}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b'{"prompt": "p", "completions": ["a", "b"]', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff", "completions": ["a", "b"]}', "not UTF-8"),
        (b"[1]", "must be a JSON object, got a list"),
        (b"null", "must be a JSON object, got null"),
        ({"text": "x"}, "needs 'prompt' and 'completions'.*keys .'text'"),
        ({"completions": ["a", "b"]}, "'prompt' is missing"),
        ({"prompt": 3, "completions": ["a", "b"]}, "'prompt' must be a string, got a number"),
        ({"prompt": "p"}, "'completions' must be a list of strings, got null"),
        ({"prompt": "p", "completions": "ab"}, "must be a list of strings, got a string"),
        ({"prompt": "p", "completions": ["a", None]}, r"completions\[1\] must be a string"),
        ({"prompt": "p", "completions": ["a", "\ud800"]}, r"completions\[1\].*lone surrogate"),
        ({**GOOD, "rewards": 1}, "'rewards' must be a list of numbers, got a number"),
        ({**GOOD, "rewards": [1]}, "2 completions but 1 rewards"),
        ({**GOOD, "rewards": [1, "2"]}, r"rewards\[1\] must be a number, got a string"),
        ({**GOOD, "rewards": [True, 1]}, r"rewards\[0\] must be a number, got a boolean"),
        ({**GOOD, "rewards": [float("nan"), 1]}, r"rewards\[0\] must be finite, got nan"),
        ({**GOOD, "rewards": [1, float("-inf")]}, r"rewards\[1\] must be finite, got -inf"),
        (b'{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 1e999]}', "must be finite"),
        ({**GOOD, "rewards": [1, 10**400]}, r"rewards\[1\] must be finite"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"}, "'rejected' is missing"),
        ({"chosen": 1, "rejected": "x"}, "'chosen' must be a string, got a number"),
    ],
)
def test_malformed_line_is_named_or_skipped_and_counted(write_lines, line, wrong):
    path = write_lines(GOOD, line, GOOD)
    with pytest.raises(DataError, match=rf"data.jsonl:2: (?s:.)*{wrong}") as error:
        read(path)
    assert isinstance(error.value, ValueError)
    lists, report = read(path, on_bad_line="skip")
    assert len(lists) == report.records == 2 and report.bad_lines == 1
    assert "data.jsonl:2:" in report.text() and "malformed lines skipped: 1" in report.text()


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_unreadable_files_are_errors_in_either_mode(tmp_path, write_lines, on_bad_line):
    whole = gzip.compress(b"\n".join(json.dumps(GOOD).encode() for _ in range(5000)))
    cases = {
        "truncated.jsonl.gz": (whole[: len(whole) // 2], "breaks off after line"),
        "damaged.jsonl.gz": (whole[:40] + b"\0" * 40 + whole[80:], "damaged gzip|breaks off"),
        "plain.jsonl.gz": (json.dumps(GOOD).encode(), "damaged gzip file"),
        "empty.jsonl": (b"", "holds no records"),
        "blank.jsonl": (b"\n \n", "holds no records"),
    }
    for name, (content, wrong) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*({wrong})"):
            read(str(tmp_path / name), on_bad_line=on_bad_line)
    with pytest.raises(DataError, match="missing.jsonl: cannot be read: No such file"):
        read(str(tmp_path / "missing.jsonl"), on_bad_line=on_bad_line)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read(str(tmp_path), on_bad_line=on_bad_line)


def test_reading_streams(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\nnot json\n")
    stream = read_lists([str(path)], DataReport())
    assert next(stream).prompt == "p"  # the bad second line is not reached yet
    with pytest.raises(DataError, match=":2: not JSON"):
        next(stream)


def test_real_files(shared):
    lists, report = read(str(shared / "data" / "hh-harmless-base-dev.jsonl.gz"))
    assert report.records == 1500 and len(lists) + sum(report.dropped.values()) == 1500
    assert report.dropped["chosen and rejected have different contexts"] == 4
    assert all(ranked.prompt.endswith("\n\nAssistant:") for ranked in lists)
    lists, report = read(str(shared / "data" / "alpaca-eval-ranked-dev.jsonl.gz"))
    assert report.records == 500 and report.lists == len(lists) == report.with_rewards
    assert report.tied > 0 and sum(report.dropped_completions.values()) > 0
