"""What becomes of every record: kept, cleaned, ranked, dropped and counted, or an error."""

from __future__ import annotations

import json

import pytest

from pro_trainer.data.fields import DataError
from pro_trainer.data.lists import DIFFERENT_CONTEXTS, read_lists, select
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport, Lengths
from pro_trainer.text.options import ListOptions
from pro_trainer.train.config import PROConfig

GOOD = {"prompt": "p", "completions": ["a", "b"]}


def read(*sources: object, **options) -> tuple[list[RankedList], DataReport]:
    report = DataReport()
    return list(read_lists(sources, report, ListOptions(**options))), report


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_formats_may_be_mixed_in_one_file(write_lines):
    path = write_lines(
        {"prompt": "p", "completions": ["x", "y", "z"], "rewards": [0, 2, -1], "models": ["m"]},
        GOOD,
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prefix": ["q"] * 2, "suffix": ["a", "b"], "reward": [1, 0], "sft_index": 1},
        {"context": "q", "completions": [{"completion": "a", "rank": 1},
                                         {"completion": "b", "rank": 0}]},
    )  # fmt: skip
    lists, report = read(path)
    assert lists == [
        RankedList(("p",), ("x", "y", "z"), (0.0, 2.0, -1.0)),
        RankedList(("p",), ("a", "b")),
        RankedList(("p",), ("a", "b", "c")),
        RankedList(("\n\nHuman: q\n\nAssistant:",), (" a", " b")),
        RankedList(("q",), ("a", "b"), (1.0, 0.0), 1),
        RankedList(("q",), ("b", "a")),
    ]
    assert [ranked.where for ranked in lists] == [f"{path}:{i}" for i in range(1, 7)]
    assert (report.records, report.lists, report.with_rewards, report.tied) == (6, 6, 2, 0)
    assert report.candidates == {2: 4, 3: 2}
    assert report.formats == {
        "prompt and completions": 2,
        "prompt, chosen, rejected": 1,
        "transcripts": 1,
        "official PRO files": 1,
        "prompt and completions with a score each": 1,
    }


def test_drops_empty_and_repeated_completions_and_keeps_the_best_of_equals():
    lists, report = read(
        [
            {"prompt": "p", "completions": ["a", " ", "b", "a"], "rewards": [1, 9, 2, 3]},
            {"prompt": "p", "completions": ["a", "a", ""]},
            {"prompt": "p", "completions": []},
            {"prompt": "p", "completions": ["alone"]},
            {"prompt": "p", "completions": [[assistant("a")], [assistant(" ")], [assistant("b")]]},
        ]
    )
    assert lists[0] == RankedList(("p",), ("b", "a"), (2.0, 3.0))
    assert lists[1].completions == ((assistant("a"),), (assistant("b"),))
    assert len(lists) == 2
    assert report.dropped == {"fewer than 2 different, non-empty completions": 3}
    assert report.dropped_completions == {"empty": 3, "repeats a better one of its list": 2}


def test_different_contexts_are_dropped_or_kept_with_their_own_prompts():
    one, two = "\n\nHuman: q\n\nAssistant:", "\n\nHuman: r\n\nAssistant:"
    records = [{"chosen": one + " a", "rejected": two + " a"}]
    records.append({"prefix": [["<|prompter|>q"], ["<|prompter|>r"]], "suffix": ["a", "b"]})
    lists, report = read(records)
    assert not lists and report.dropped == {DIFFERENT_CONTEXTS: 2}
    assert f"lists dropped, {DIFFERENT_CONTEXTS}: 2" in report.text()
    lists, report = read(records, different_contexts="keep")
    assert lists[0] == RankedList((one, two), (" a", " a"))  # equal replies to different prompts
    assert lists[1].prompts == ("\n\nHuman: q", "\n\nHuman: r") and not report.dropped


def test_prompts_that_differ_only_in_a_dropped_candidate_are_shared():
    record = {"prefix": [["q"], ["q"], ["r"]], "suffix": ["a", "b", "b"], "reward": [2, 1, 0]}
    lists, _ = read([record], different_contexts="keep", num_candidates=2)
    assert lists[0] == RankedList(("q", "r"), (" a", " b"), (2.0, 0.0))
    lists, _ = read([{**record, "suffix": ["a", "b", ""]}])
    assert lists[0] == RankedList(("q",), (" a", " b"), (2.0, 1.0))


def test_ranks_become_an_order_and_of_equal_ranks_the_first_stays():
    record = {"prompt": "p", "completions": ["", "a", "b", "c", "d"], "ranks": [1, 3, 1, 3, 2]}
    lists, report = read([record])
    assert lists == [RankedList(("p",), ("b", "d", "a"))]
    assert report.dropped_completions == {"empty": 1, "has the rank of an earlier one": 1}
    equal = {**GOOD, "ranks": [2, 2]}
    lists, report = read([record, equal])
    assert len(lists) == 1 and report.dropped == {"all rewards equal": 1}
    assert read([equal], all_equal="order")[0] == [RankedList(("p",), ("a", "b"))]
    with pytest.raises(DataError, match=r"record 1: all 2 ranks are equal \(2.0\)"):
        read([equal], all_equal="error")


def test_all_rewards_equal_is_dropped_refused_or_order():
    equal = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 1, 1]}
    tied = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 1, 0]}
    lists, report = read([equal, tied])
    assert len(lists) == 1 and report.tied == 1
    assert report.dropped == {"all rewards equal": 1}
    with pytest.raises(DataError, match=r"record 1: all 3 rewards are equal \(1.0\)"):
        read([equal, tied], all_equal="error")
    lists, _ = read([equal, tied], all_equal="order")
    assert lists[0] == RankedList(("p",), ("a", "b", "c"))


def test_reward_gaps_are_what_counts_and_must_suit_the_loss(write_lines, tmp_path):
    far = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1e9, 1e9 + 1, 1e9 + 1]}
    lists, report = read([far], num_candidates=2)
    assert lists[0].rewards == (1e9, 1e9 + 1) and not report.dropped

    def read_for(rewards, **options):
        config = PROConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        path = write_lines(GOOD | {"rewards": [1, 0]}, GOOD | {"rewards": rewards})
        return list(read_lists([path], DataReport(), config))

    for rewards, scale, wrong in (
        ([3e38, -3e38], 1.0, "far apart.*=1 must"),
        ([1, 1 + 1e-10], 1e-25, "close together.*=1e-25 must"),
        ([1e20, 0], 1e20, r"far apart.*=1e\+20 must"),
    ):
        with pytest.raises(DataError, match=f":2: rewards .* too {wrong} lie in"):
            read_for(rewards, reward_scale=scale)
        assert read_for(rewards, reward_scale=scale, temperature="1")  # the order alone
    with pytest.raises(DataError, match=r":2: rewards 0 to 65 are too large for the gain 2\^rew"):
        read_for([65, 0], loss_type="lipo_lambda")
    assert read_for([65, 0], loss_type="lipo_lambda", gain="linear")


def test_candidate_cap_keeps_best_and_worst_evenly_spaced():
    record = {"prompt": "p", "completions": list("abcde"), "rewards": [1, 5, 3, 2, 4]}
    lists, report = read([record, {**record, "rewards": None}], num_candidates=3)
    assert lists[0] == RankedList(("p",), ("a", "b", "c"), (1.0, 5.0, 3.0))
    assert lists[1] == RankedList(("p",), ("a", "c", "e"))
    assert report.candidates == {3: 2}


def test_the_sft_mark_follows_its_candidate():
    record = {"prompt": "p", "completions": ["", "a", "b", "a", "c"], "rewards": [9, 1, 2, 3, 4]}
    expected = {1: 1, 2: 0, 3: 1, 4: 2}  # in (b, a, c); 1 is repeated by the better 3
    for mark, index in expected.items():
        lists, report = read([{**record, "sft_index": mark}])
        assert lists == [RankedList(("p",), ("b", "a", "c"), (2.0, 3.0, 4.0), index)]
        assert not report.sft_marks_dropped
    lists, report = read([{**record, "sft_index": 0}, {**record, "sft_index": 2}, record])
    assert [ranked.sft_index for ranked in lists] == [None, 0, None]
    assert report.sft_marks_dropped == 1
    assert "sft_index marks a dropped completion, the best is used: 1" in report.text()
    ranked = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 0], "sft_index": 0}
    assert read([ranked])[0] == [RankedList(("p",), ("c", "b", "a"), None, 2)]
    assert select(RankedList(("p",), ("a", "b", "c"), None, 1), [2, 0]).sft_index is None


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
    path = write_lines(GOOD, line, GOOD)
    with pytest.raises(DataError, match=rf"data.jsonl:2: (?s:.)*{wrong}"):
        read(path)
    lists, report = read(path, on_bad_line="skip")
    assert len(lists) == report.records == 2 and report.bad_lines == 1
    assert "data.jsonl:2:" in report.text() and "malformed records skipped: 1" in report.text()
    assert sum(report.formats.values()) == 2


def test_only_the_first_few_bad_lines_are_shown(write_lines):
    _, report = read(write_lines(GOOD, *[b"x"] * 20), on_bad_line="skip")
    assert report.bad_lines == 20 and len(report.bad_line_messages) == 5


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_sources_without_records_are_errors_in_either_mode(tmp_path, on_bad_line):
    for content in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="empty.jsonl: holds no records"):
            read(str(tmp_path / "empty.jsonl"), on_bad_line=on_bad_line)
    with pytest.raises(DataError, match="a source of records: holds no records"):
        read([], on_bad_line=on_bad_line)
    with pytest.raises(DataError, match="missing.jsonl: cannot be read: No such file"):
        read(str(tmp_path / "missing.jsonl"), on_bad_line=on_bad_line)


def test_what_are_no_sources_is_refused_at_once(data_file):
    for wrong in (data_file, GOOD):
        with pytest.raises(TypeError, match="sources must be a list of sources"):
            read_lists(wrong, DataReport(), ListOptions())
    with pytest.raises(TypeError, match="a source is a whole set of records, got one record"):
        read_lists([GOOD], DataReport(), ListOptions())
    with pytest.raises(ValueError, match="sources is empty"):
        read_lists([], DataReport(), ListOptions())


def test_reading_streams(write_lines):
    stream = read_lists([write_lines(GOOD, b"not json")], DataReport(), ListOptions())
    assert next(stream).prompts == ("p",)  # the bad second line is not reached yet
    with pytest.raises(DataError, match=":2: not JSON"):
        next(stream)


def test_the_report_can_be_printed_and_saved():
    _, report = read([GOOD, {**GOOD, "rewards": [1, 0]}, {"prompt": "p", "completions": ["a"]}])
    assert report.text().splitlines() == [
        "records read: 3 (3 prompt and completions)",
        "lists kept: 2 (2 of 2 candidates)",
        "with rewards: 1, of these with ties: 0; in order only: 1",
        "lists dropped, fewer than 2 different, non-empty completions: 1",
    ]
    found = json.loads(json.dumps(report.as_dict()))
    assert found["candidates"] == {"2": 2} and found["order_only"] == 1
    assert found["prompt_tokens"] is None


def test_lengths_are_summed_up():
    lengths = Lengths()
    assert lengths.summary() is None
    lengths.update(range(1, 101))
    assert lengths.summary() == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert Lengths([7]).summary() == {"min": 7, "median": 7, "p95": 7, "max": 7}


@pytest.mark.shared
def test_real_files(shared):
    lists, report = read(str(shared / "data" / "hh-harmless-base-dev.jsonl.gz"))
    assert report.records == 1500 and len(lists) + sum(report.dropped.values()) == 1500
    assert report.dropped[DIFFERENT_CONTEXTS] == 4
    assert all(ranked.prompts[0].endswith("\n\nAssistant:") for ranked in lists)
    lists, report = read(str(shared / "data" / "alpaca-eval-ranked-dev.jsonl.gz"))
    assert report.records == 500 and report.lists == len(lists) == report.with_rewards
    assert report.tied > 0 and sum(report.dropped_completions.values()) > 0
