"""The data recipe on tiny models: what is written, and that a cut-short run ends the same."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path

import pytest
from texts import pair, records, save, user
from trainer_runs import held

from pro_trainer.cli.prepare import prepare
from pro_trainer.data.lists import read_lists
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.models import tiny_llama
from pro_trainer.prepare import output, recipe
from pro_trainer.prepare.pool import Pool
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.options import ListOptions


def transcript(i):
    start = f"\n\nHuman: question {i}?\n\nAssistant:"
    return {"chosen": f"{start} good {i}.\n\nTwo paragraphs.", "rejected": f"{start} bad {i}"}


def write_transcripts(folder: Path, numbers=range(7)) -> str:
    path = folder / "transcripts.jsonl"
    path.write_text("".join(f"{json.dumps(transcript(i))}\n" for i in numbers))
    return str(path)


@pytest.fixture(scope="module")
def build(recipe_models, make_arguments, tmp_path_factory):
    """Builds arguments for a run of seven transcripts through one generator."""
    transcripts = write_transcripts(tmp_path_factory.mktemp("data"))

    def built(folder: Path, name: str = "out.jsonl", *, data=transcripts, **changes):
        options = {"generator": [str(recipe_models / "small")], "num_samples": 3, **changes}
        return make_arguments(folder, name, data=[data], **options)

    return built


@pytest.fixture
def arguments(build, tmp_path):
    return lambda name="out.jsonl", **changes: build(tmp_path, name, **changes)


@pytest.fixture(scope="module")
def plain(build, tmp_path_factory):
    """The folder of a run without changes, and its report."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, prepare(build(folder))


def lists_of(path):
    """What the rest of the trainer reads of it, as it stands."""
    return list(read_lists([str(path)], DataReport(), ListOptions()))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_transcripts_become_longer_ranked_lists_and_are_counted(plain, recipe_models):
    folder, report = plain
    made = records(folder / "out.jsonl")
    assert len(made) == 7 and report.kept == 7
    as_written = ListOptions(chat_template="off", append_eos=False)
    reward_model = RewardModel.from_path(
        str(recipe_models / "rm"), batch_size=1, options=as_written
    )
    for i, record in enumerate(made):
        n = len(record["completions"])
        assert record["prompt"] == f"\n\nHuman: question {i}?\n\nAssistant:"
        assert n == 5 and len(set(record["completions"])) == n
        assert record["rewards"] == sorted(record["rewards"], reverse=True)
        scores = reward_model.score([record["prompt"]] * n, record["completions"])
        assert record["rewards"] == pytest.approx(scores, abs=1e-5)
        assert sorted(record["sources"]) == ["data"] * 2 + ["small"] * 3
        assert record["completions"][record["chosen_index"]].startswith(f" good {i}.\n\nTwo")
        assert record["sft_index"] == 0
    assert len({c for record in made for c in record["completions"]}) == 7 * 5
    lists = lists_of(folder / "out.jsonl")
    assert [list(x.completions) for x in lists] == [record["completions"] for record in made]
    assert [list(x.rewards) for x in lists] == [record["rewards"] for record in made]
    assert [x.sft_index for x in lists] == [0] * 7
    assert names(folder) == ["out.jsonl", "out.jsonl.report.json"]
    assert "lists written: 7 of 7 (7 of 5 candidates)" in report.text()

    written = json.loads((folder / "out.jsonl.report.json").read_text())
    assert written["data"]["lists"] == written["lists"] == written["kept"] == 7
    assert written["samples"]["small"]["made"] == 21
    assert written["reward_count"] == {"data": 14, "small": 21}
    found = [pair for x in made for pair in zip(x["rewards"], x["sources"], strict=True)]
    for source, n in written["reward_count"].items():
        mean = sum(reward for reward, name in found if name == source) / n
        assert written["reward_mean"][source] == pytest.approx(mean)
    first = [record["chosen_index"] == 0 for record in made]
    of_data = [record["sources"].index("data") == record["chosen_index"] for record in made]
    assert written["chosen_first"] == report.chosen_first == sum(first) / 7
    assert written["chosen_first_of_data"] == sum(of_data) / 7


@pytest.mark.parametrize("sft", ["best", "chosen"])
@pytest.mark.parametrize("length", [2, 3, 9])
def test_the_ranking_length_keeps_best_worst_between_and_the_sft_candidate(
    plain, arguments, tmp_path, length, sft
):
    report = prepare(arguments(ranking_length=length, sft=sft))
    made, whole = records(tmp_path / "out.jsonl"), records(plain[0] / "out.jsonl")
    for i, (record, all_of_it) in enumerate(zip(made, whole, strict=True)):
        places = [all_of_it["completions"].index(c) for c in record["completions"]]
        assert len(places) == min(length, 5) and places == sorted(places)
        for name in ("rewards", "sources"):
            assert record[name] == [all_of_it[name][place] for place in places]
        if sft == "best" or length > 2:  # of two the chosen one may take the place of either
            assert places[0] == 0 and places[-1] == 4
        if sft == "chosen":
            assert record["completions"][record["sft_index"]].startswith(f" good {i}.")
            assert record["sft_index"] == record["chosen_index"]
        else:
            assert record["sft_index"] == 0
    found = [x.sft_index for x in lists_of(tmp_path / "out.jsonl")]
    assert found == [record["sft_index"] for record in made]
    assert any(found) == (sft == "chosen")  # which is not always the best
    forgotten = [record["chosen_index"] for record in made].count(None)
    assert (forgotten > 0) == (sft == "best" and length < 5)
    assert report.shorter == (7 if length == 9 else 0)


def test_several_generators_and_their_names(arguments, recipe_models, tmp_path):
    both = [str(recipe_models / "small"), str(recipe_models / "other")]
    prepare(arguments("both.jsonl", generator=both, num_samples=2, limit=3))
    prepare(arguments("alone.jsonl", num_samples=2, limit=3))
    made = [records(tmp_path / name) for name in ("both.jsonl", "alone.jsonl")]
    for with_other, alone in zip(*made, strict=True):
        assert sorted(with_other["sources"]) == ["data"] * 2 + ["other"] * 2 + ["small"] * 2
        # A generator's samples are its own, whoever else is there.
        assert set(alone["completions"]) < set(with_other["completions"])


def test_empty_and_repeated_samples_are_dropped_and_counted(arguments, monkeypatch, tmp_path):
    texts = [" fresh ", "\n", " bad 0  ", "fresh", " fresh two"]
    monkeypatch.setattr(
        recipe, "sample", lambda model, encoder, prompts, *_: [list(texts) for _ in prompts]
    )
    report = prepare(arguments(limit=1, num_samples=5))
    (record,) = records(tmp_path / "out.jsonl")
    good, bad = " good 0.\n\nTwo paragraphs.", " bad 0"
    assert set(record["completions"]) == {good, bad, " fresh", " fresh two"}
    counts = {"made": 5, "empty": 1, "repeated": 2, "prompts_cut": 0}
    assert dict(report.samples["small"]) == counts
    assert "samples of small: 5 (dropped: 1 empty, 2 repeated)" in report.text()


def test_rewards_of_the_data_and_order_alone(arguments, write_lines, tmp_path):
    data = write_lines(
        {"prompt": "p", "completions": ["b", "a", "d", "c"], "rewards": [3, 4, 1, 2]},
        {"prompt": "q", "completions": ["first", "second", "third"], "prompt_weight": 2.5},
    )
    report = prepare(arguments(generator=[], reward=[], data=data, ranking_length=3))
    first, second = records(tmp_path / "out.jsonl")
    assert first["completions"] == ["a", "b", "d"] and first["rewards"] == [4.0, 3.0, 1.0]
    assert first["chosen_index"] == 0 and first["sources"] == ["data"] * 3
    assert second["completions"] == ["first", "second", "third"] and "rewards" not in second
    assert report.chosen_first is None
    assert second["prompt_weight"] == 2.5 and "prompt_weight" not in first


def test_only_a_reward_model_to_which_equal_rewards_of_the_data_do_not_matter(
    arguments, write_lines, tmp_path
):
    equal = {"prompt": "p", "completions": ["b", "a"], "rewards": [1, 1]}
    data = write_lines(transcript(0), equal)
    report = prepare(arguments(generator=[], data=data))
    made = records(tmp_path / "out.jsonl")
    assert [record["sources"] for record in made] == [["data"] * 2] * 2
    assert report.samples == {} and report.chosen_first == report.chosen_first_of_data
    assert made[1]["rewards"][0] > made[1]["rewards"][1]


def test_near_duplicates_of_lists_with_rewards(arguments, write_lines, tmp_path):
    data = write_lines({"prompt": "p", "completions": ["a long way off", "a long way of", "b"],
                        "rewards": [2, 1, 0]})  # fmt: skip
    report = prepare(arguments(data=data, near_duplicates=0.8))
    assert report.lost == {"near-duplicates": 1}
    assert len(records(tmp_path / "out.jsonl")[0]["completions"]) == 5


def test_the_marked_candidate_of_the_data_is_the_chosen_one():
    ranked = RankedList(("p",), ("a", "b", "c"), (1.0, 3.0, 2.0), sft_index=2)
    assert Pool.of(ranked).chosen == 2
    assert Pool.of(RankedList(("p",), ("a", "b"), (1.0, 3.0))).chosen == 1
    assert Pool.of(RankedList(("p",), ("a", "b"))).chosen == 0


def drop_some(monkeypatch, *numbers):
    """Give those of these lists equal rewards that stand first in a group."""
    plain, starts = RewardModel.score_ids, tuple(f"\n\nHuman: question {i}" for i in numbers)

    def score_ids(self, texts):
        scores = plain(self, texts)
        if self.tokenizer.decode(texts[0], True).startswith(starts):
            scores[:5] = [0.25] * 5
        return scores

    monkeypatch.setattr(RewardModel, "score_ids", score_ids)


def stop_at(patch, index):
    """Interrupt the work, as ctrl-C would, before the group that begins with this list."""
    plain = recipe.Recipe.lines

    def lines(self, lists, first_index):
        if first_index == index:
            raise KeyboardInterrupt
        return plain(self, lists, first_index)

    patch.setattr(recipe.Recipe, "lines", lines)


def interrupted(arguments, monkeypatch, index):
    """The unfinished file of a run that was stopped, and what that file was begun with."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, index)
        prepare(arguments)
    return Path(f"{arguments.output}.partial"), Path(f"{arguments.output}.partial.json")


def spy(monkeypatch):
    """The first index of every group that is computed from here on."""
    seen, plain = [], recipe.Recipe.lines

    def lines(self, lists, first_index):
        seen.append(first_index)
        return plain(self, lists, first_index)

    monkeypatch.setattr(recipe.Recipe, "lines", lines)
    return seen


def test_a_resumed_run_ends_with_the_same_bytes(arguments, monkeypatch, tmp_path):
    drop_some(monkeypatch, 2)
    counted = prepare(arguments("whole.jsonl"))
    assert (counted.kept, dict(counted.dropped)) == (6, {"all rewards equal": 1})
    assert "lists dropped, all rewards equal: 1" in counted.text()
    whole = (tmp_path / "whole.jsonl").read_bytes()
    report = (tmp_path / "whole.jsonl.report.json").read_bytes()
    for name in ("broken.jsonl", "broken.jsonl.gz"):
        broken = arguments(name)
        partial, settings = interrupted(broken, monkeypatch, 6)
        saved, begun_with = partial.read_bytes(), settings.read_bytes()
        lines = saved.splitlines(keepends=True)
        assert len(lines) == 6 and any(json.loads(line)["record"] is None for line in lines)
        at = [sum(map(len, lines[:k])) for k in range(7)]
        # Inside a group; whole groups; in mid-line; a newline short; within the first line; nothing
        cuts = [(at[5], 4), (at[6], 6), (at[4] + 7, 4), (at[6] - 1, 4), (5, 0), (0, 0)]
        for cut, kept in cuts if name.endswith("jsonl") else cuts[:1]:
            partial.write_bytes(saved[:cut])
            settings.write_bytes(begun_with)
            redone = spy(monkeypatch)
            prepare(broken)
            assert redone == list(range(kept, 7, 2)), cut  # nothing finished is done again
            made = (tmp_path / name).read_bytes()
            if name.endswith("gz"):
                assert made[4:8] == bytes(4)  # the header's time
                assert len(lists_of(tmp_path / name)) == 6
                made = gzip.decompress(made)
            assert made == whole
            assert (tmp_path / f"{name}.report.json").read_bytes() == report
            assert not partial.exists() and not settings.exists()
            (tmp_path / name).unlink()


def test_other_settings_and_changed_files_are_an_error_naming_them(
    arguments, monkeypatch, tmp_path
):
    data = write_transcripts(tmp_path)
    partial, _ = interrupted(arguments(data=data), monkeypatch, 2)
    saved = partial.read_bytes()
    with pytest.raises(ValueError) as error:
        prepare(arguments(data=data, temperature=[0.5], seed=1))
    message = str(error.value)
    assert (
        "seed was 5, is 1; temperature was [1.0], is [0.5]" in message and "--overwrite" in message
    )
    assert "top_p" not in message
    write_transcripts(tmp_path, range(1, 8))  # as long as before
    with pytest.raises(ValueError, match=f"other settings: the files of {data} was"):
        prepare(arguments(data=data))
    assert partial.read_bytes() == saved
    prepare(arguments(data=data, seed=1, limit=2, overwrite=True))
    prepare(arguments("anew.jsonl", data=data, seed=1, limit=2))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "anew.jsonl").read_bytes()


def test_overwrite_goes_on_where_the_settings_are_the_same(arguments, monkeypatch, plain, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="out.jsonl exists; --overwrite replaces it"):
        prepare(arguments())
    interrupted(arguments(overwrite=True), monkeypatch, 4)
    assert (tmp_path / "out.jsonl").read_text() == "precious"  # untouched until the end
    redone = spy(monkeypatch)
    prepare(arguments(overwrite=True))
    assert redone == [4, 6]
    assert (tmp_path / "out.jsonl").read_bytes() == (plain[0] / "out.jsonl").read_bytes()


def test_a_damaged_partial_file(arguments, monkeypatch, tmp_path):
    partial, settings = interrupted(arguments(limit=4), monkeypatch, 2)
    lines = partial.read_bytes().splitlines(keepends=True)
    for foreign in (b"garbage\n", b"[]\n", b'{"prompt": "p"}\n'):
        for behind in (lines[1:], []):
            partial.write_bytes(b"".join([*lines[:1], foreign, *behind]))
            with pytest.raises(ValueError, match=r"out.jsonl.partial:2: damaged, .*--overwrite"):
                prepare(arguments(limit=4))
    partial.write_bytes(b"".join(lines))
    settings.write_text("[]")
    with pytest.raises(ValueError, match="not what it was begun with .*: not a JSON object"):
        prepare(arguments(limit=4))
    settings.unlink()
    with pytest.raises(ValueError, match="is there, but not what it was begun with"):
        prepare(arguments(limit=4))
    prepare(arguments(limit=4, overwrite=True))
    assert len(records(tmp_path / "out.jsonl")) == 4


def test_a_malformed_line_shows_before_any_work(arguments, write_lines, tmp_path):
    data = write_lines(*map(transcript, range(2)), b'{"prompt": 3}')
    with pytest.raises(ValueError, match=r"data.jsonl:3: "):
        prepare(arguments(data=data, reward=["not loaded"]))
    assert not (tmp_path / "out.jsonl.partial").exists()
    marked = write_lines(
        {"prompt": "p", "completions": ["a", "b"], "desirable": [True, False]}, name="marked.jsonl"
    )
    with pytest.raises(
        ValueError, match="1 lists have a column 'desirable', which says nothing of"
    ):
        prepare(arguments(data=marked, reward=["not loaded"]))
    report = prepare(arguments(data=data, on_bad_line="skip"))
    assert report.kept == 2 and report.data.bad_lines == 1


def test_an_error_of_a_model_names_the_lists(arguments, write_lines, tmp_path):
    data = write_lines(*map(transcript, range(2)), pair([user("x")], "a", "b"))
    no_template = save(tmp_path / "no_template", *tiny_llama(0))
    with pytest.raises(ValueError, match=r"data.jsonl:3 to .*data.jsonl:3: .*a chat template"):
        prepare(arguments(data=data, generator=[no_template]))
    # What was finished before is kept for when the cause is gone.
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 2


def test_limit_and_long_prompts(arguments, tmp_path):
    report = prepare(arguments(limit=3, max_prompt_length=5))
    assert [r["prompt"][16] for r in records(tmp_path / "out.jsonl")] == ["n"] * 3
    assert report.lists == 3 and report.samples["small"]["prompts_cut"] == 3
    assert "prompts cut to its length: 3" in report.text()


SERVED = {"generator": [], "server": ["http://h.invalid"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "data: no file, folder or hub name given"),
        ({"output": "out.csv"}, r"must end in .jsonl or .jsonl.gz, got 'out.csv'"),
        ({"reward": []}, "a generator needs a reward"),
        ({"generator_tokenizer": ["a", "b"]}, "one for each of the 1 generators, got 2"),
        ({"num_samples": 0}, "num_samples must be finite and > 0, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be finite and > 0, got 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be finite and > 0, got 0"),
        ({"batch_size": 0}, "batch_size must be finite and > 0, got 0"),
        ({"limit": 0}, "limit must be finite and > 0, got 0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"temperature": [float("nan")]}, "temperature must be finite and > 0, got nan"),
        ({"temperature": []}, "temperature: none was given"),
        ({"temperature": [0.5, 1, 2, 3]}, "temperature: 4 of them for 3 samples"),
        ({"ranking_length": 1}, "ranking_length must be at least 2, got 1"),
        ({"stop": [""]}, "stop: an empty string"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"reward": ["no/such"]}, "no/such: not a reward model"),
        ({"generator": ["no/such"]}, "no/such: not a causal LM"),
        # Rewards
        ({"reward": [], "normalize": "rank"}, "normalize is for scores: give a reward"),
        ({"reward": [], "length_penalty": 0.1}, "length_penalty is for scores"),
        ({"length_penalty": float("inf")}, "length_penalty must be finite, got inf"),
        ({"judge": "pairs"}, "judge is for a judge: give a reward with a URL"),
        ({"judge_template": "t"}, "judge_template is for a judge"),
        ({"reward_api_key_env": "KEY"}, "reward_api_key_env is for servers that score"),
        ({"near_duplicates": 1.5}, r"near_duplicates must lie in \(0, 1\], got 1.5"),
        ({"near_duplicates": 0}, "near_duplicates must be finite and > 0, got 0"),
        ({"select": "top"}, "select says which candidates are kept: give ranking_length, too"),
        ({"bottom": 1, "ranking_length": 2}, "bottom is for select=top or diverse"),
        ({"bottom": 2, "ranking_length": 2, "select": "top"}, r"bottom must lie in \[0, .*=2\)"),
        ({"normalize": "minmax"}, "normalize must be one of 'none', 'zscore', 'rank'"),
        # Servers
        ({"server_timeout": 5.0}, "server_timeout is about servers"),
        ({"concurrency": 3}, "concurrency is about servers"),
        ({"cut_samples": "drop"}, "cut_samples is about servers"),
        ({"server": ["h:1"]}, "server: a URL http"),
        ({"server": ["http://h", "http://h"]}, "server: one is named twice"),
        ({**SERVED, "server_api": "chats"}, "server_api must be one of 'chat', 'completions', got"),
        ({**SERVED, "server_fields": "{"}, "server_fields must be a JSON object: "),
        ({**SERVED, "server_fields": "[1]"}, r"server_fields must be a JSON object, got \[1\]"),
        ({**SERVED, "server_fields": '{"n": 3}'}, r"server_fields names \['n'\], which other opt"),
        ({**SERVED, "server_retries": -1}, "server_retries must be at least 0, got -1"),
        ({**SERVED, "concurrency": 0}, "concurrency must be finite and > 0, got 0"),
        ({**SERVED, "concurrency": 1.5}, "concurrency must be an integer, got 1.5"),
        ({**SERVED, "server_timeout": float("nan")}, "server_timeout must be finite and > 0, got"),
        ({**SERVED, "requests_per_second": 0}, "requests_per_second must be finite and > 0, got 0"),
        ({**SERVED, "max_prompt_length": 9}, "max_prompt_length cuts the prompts of a generator"),
        ({**SERVED, "reward": []}, "a server needs a reward"),
        ({**SERVED, "api_key_env": "NOT_SET"}, "api_key_env: there is no environment variable"),
        ({**SERVED, "server_patience": 0.1}, "no answer .* in 0 seconds; http://h.invalid/v1/m"),
    ],
)
def test_bad_arguments(arguments, changes, message, tmp_path):
    built = arguments()
    vars(built).update(changes)
    with pytest.raises((ValueError, TypeError, ConnectionError), match=message):
        prepare(built)
    assert not list(tmp_path.glob("out*"))


def test_the_output_is_not_one_of_the_inputs(arguments, write_lines, recipe_models, tmp_path):
    data = write_lines(transcript(0))
    link = tmp_path / "link"
    link.symlink_to(recipe_models / "rm")
    for path in (data, str(recipe_models / "small" / "out.jsonl"), str(link / "sub" / "out.jsonl")):
        with pytest.raises(ValueError, match="output .*: writing there would change .* give anoth"):
            prepare(arguments(data=data, output=path, overwrite=True))
    report = write_lines(transcript(0), name="x.jsonl.report.json")
    with pytest.raises(ValueError, match="would change .*x.jsonl.report.json, which this run read"):
        prepare(arguments("x.jsonl", data=report))
    assert {p.name for p in (recipe_models / "rm").iterdir()} >= {"config.json"}
    assert not list(recipe_models.rglob("*.lock")) and not (recipe_models / "rm" / "sub").exists()


def test_an_output_that_cannot_be_written(arguments, monkeypatch, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl is a folder"):
        prepare(arguments("folder.jsonl"))
    lock = tmp_path / "out.jsonl.lock"
    with held(lock) as holder:
        with pytest.raises(ValueError, match=f"written by another run .process {holder.pid} on "):
            prepare(arguments())
        assert not (tmp_path / "out.jsonl.partial").exists()
    assert lock.exists()  # its holder was killed
    prepare(arguments(limit=2))
    assert not lock.exists()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="link.jsonl is a link to .*gone, which is not there: rem"):
        prepare(arguments("link.jsonl"))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pro_trainer.files.os.open", refuse)
    with pytest.raises(ValueError, match=r"cannot be written .Permission denied.: give another ou"):
        prepare(arguments("a/b/out.jsonl"))


PARTIAL = ["out.jsonl.partial", "out.jsonl.partial.json"]


def test_an_interrupted_command_says_how_to_go_on(
    arguments, run_prepare, monkeypatch, tmp_path, capsys
):
    options = {"ranking_length": 3, "sft": "chosen", "overwrite": True, "num_samples": 1}
    full = arguments(limit=4, **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run_prepare(full) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "interrupted after 2 of 4 lists; the same command goes on from there"
    assert names(tmp_path) == PARTIAL
    redone = spy(monkeypatch)
    prepare(full)  # of the settings that the flags gave
    assert redone == [2]


@pytest.mark.parametrize(("at", "kept"), [("settings", []), ("line", []), ("output", PARTIAL)])
def test_a_full_disk_is_one_line_and_what_is_whole_stays(
    arguments, run_prepare, monkeypatch, tmp_path, capsys, at, kept
):
    whole = 2 if at == "output" else 0  # calls of fsync that succeed

    def full(*_):
        nonlocal whole
        whole -= 1
        if whole < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "line":
            patch.setattr(output.PartialFile, "append", full)
        else:
            patch.setattr(output.os, "fsync", full)
        assert run_prepare(arguments(limit=2)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no space is left ([Errno 28] No space left on device); stopped")
    assert names(tmp_path) == kept and ("after 2 of 2 lists" in error) == bool(kept)
    assert run_prepare(arguments(limit=2)) == 0


@pytest.mark.shared
def test_real_transcripts(arguments, shared, tmp_path):
    data = str(shared / "data" / "hh-harmless-base-dev.jsonl.gz")
    report = prepare(
        arguments(data=data, limit=8, num_samples=1, batch_size=4, max_prompt_length=64)
    )
    assert report.lists == 8
    assert all(r["prompt"].endswith("Assistant:") for r in records(tmp_path / "out.jsonl"))
