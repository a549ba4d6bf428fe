"""The data recipe on tiny models: what is written, and that a cut-short run ends the same."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_generation import TEMPLATE
from trainer_runs import held
from transformers import HfArgumentParser, LlamaConfig, LlamaForSequenceClassification

from pro_trainer.cli import commands as cli
from pro_trainer.cli.prepare import PrepareArguments, prepare
from pro_trainer.data.lists import read_lists
from pro_trainer.data.records import RankedList
from pro_trainer.data.report import DataReport
from pro_trainer.models import tiny_llama
from pro_trainer.prepare import output, recipe
from pro_trainer.prepare.recipe import Pool
from pro_trainer.prepare.scoring import RewardModel
from pro_trainer.text.options import ListOptions


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two tiny generators and a tiny reward model (with a chat template)."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("small", "other")):
        model, tokenizer = tiny_llama(seed)
        tokenizer.chat_template = TEMPLATE
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


def transcript(i):
    start = f"\n\nHuman: question {i}?\n\nAssistant:"
    return {"chosen": f"{start} good {i}.\n\nTwo paragraphs.", "rejected": f"{start} bad {i}"}


@pytest.fixture
def arguments(models, write_lines, tmp_path):
    """Builds arguments for a run of seven transcripts through one generator."""
    transcripts = write_lines(*map(transcript, range(7)), name="transcripts.jsonl")

    def build(*, data=transcripts, **changes):
        values = {
            "data": [data],
            "output": str(tmp_path / "out.jsonl"),
            "generator": [str(models / "small")],
            "reward_model": str(models / "rm"),
            "num_samples": 3,
            "max_new_tokens": 8,
            "batch_size": 2,
            "seed": 5,  # one that makes no empty sample
            "device": "cpu",
            "chat_template": "off",
        }
        return PrepareArguments(**{**values, **changes})

    return build


def records(path):
    opened = gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")
    with opened as file:
        return [json.loads(line) for line in file]


def test_transcripts_become_longer_ranked_lists(arguments, models, tmp_path, capsys):
    report = prepare(arguments())
    made = records(tmp_path / "out.jsonl")
    assert len(made) == 7 and report.kept == 7
    as_written = ListOptions(chat_template="off", append_eos=False)
    reward_model = RewardModel.from_path(str(models / "rm"), batch_size=1, options=as_written)
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
    # The rest of the trainer reads it as it stands.
    lists = list(read_lists([str(tmp_path / "out.jsonl")], DataReport(), ListOptions()))
    assert [list(x.completions) for x in lists] == [record["completions"] for record in made]
    assert [list(x.rewards) for x in lists] == [record["rewards"] for record in made]
    assert [x.sft_index for x in lists] == [0] * 7
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.report.json", "transcripts.jsonl",
    ]  # fmt: skip
    assert "lists written: 7 of 7 (7 of 5 candidates)" in capsys.readouterr().out


def test_the_report_counts(arguments, tmp_path):
    report = prepare(arguments())
    made = records(tmp_path / "out.jsonl")
    written = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert written["data"]["lists"] == written["lists"] == written["kept"] == 7
    assert (
        written["samples"] == {"small": {"made": 21, "empty": 0, "repeated": 0, "prompts_cut": 0}}
        or written["samples"]["small"]["made"] == 21
    )
    assert written["reward_count"] == {"data": 14, "small": 21}
    for source in ("data", "small"):
        of_source = [
            reward
            for record in made
            for reward, name in zip(record["rewards"], record["sources"], strict=True)
            if name == source
        ]
        assert written["reward_mean"][source] == pytest.approx(sum(of_source) / len(of_source))
    first = [record["chosen_index"] == 0 for record in made]
    of_data = [record["sources"].index("data") == record["chosen_index"] for record in made]
    assert written["chosen_first"] == report.chosen_first == sum(first) / 7
    assert written["chosen_first_of_data"] == sum(of_data) / 7


def test_the_ranking_length_keeps_best_worst_and_between(arguments, tmp_path):
    four = {"num_samples": 4, "limit": 3}
    prepare(arguments(output=str(tmp_path / "all.jsonl"), **four))
    for length in (2, 3, 5, 9):
        report = prepare(arguments(ranking_length=length, overwrite=True, **four))
        pairs = zip(records(tmp_path / "all.jsonl"), records(tmp_path / "out.jsonl"), strict=True)
        for whole, chosen in pairs:
            n = len(whole["completions"])
            places = [whole["completions"].index(c) for c in chosen["completions"]]
            assert len(places) == min(length, n) and places == sorted(places)
            assert places[0] == 0 and places[-1] == n - 1
            assert chosen["rewards"] == [whole["rewards"][place] for place in places]
            assert chosen["sources"] == [whole["sources"][place] for place in places]
        assert report.shorter == (3 if length == 9 else 0)


@pytest.mark.parametrize("length", [None, 2, 3])
def test_sft_on_the_chosen_one_of_the_data(arguments, tmp_path, length):
    prepare(arguments(sft="chosen", ranking_length=length))
    made = records(tmp_path / "out.jsonl")
    for i, record in enumerate(made):
        assert record["completions"][record["sft_index"]].startswith(f" good {i}.")
        assert record["sft_index"] == record["chosen_index"]
        assert record["rewards"] == sorted(record["rewards"], reverse=True)
    assert any(record["sft_index"] for record in made)  # not always the best
    lists = read_lists([str(tmp_path / "out.jsonl")], DataReport(), ListOptions())
    assert [x.sft_index for x in lists] == [record["sft_index"] for record in made]


def test_sft_on_the_best_forgets_where_the_chosen_one_was(arguments, tmp_path):
    prepare(arguments(sft="best", ranking_length=2))
    made = records(tmp_path / "out.jsonl")
    assert all(record["sft_index"] == 0 for record in made)
    assert None in [record["chosen_index"] for record in made]


def test_several_generators_and_their_names(arguments, models, tmp_path):
    prepare(arguments(generator=[str(models / "small"), str(models / "other")], num_samples=2))
    for record in records(tmp_path / "out.jsonl"):
        assert sorted(record["sources"]) == ["data"] * 2 + ["other"] * 2 + ["small"] * 2
    alone = arguments(output=str(tmp_path / "alone.jsonl"), num_samples=2)
    prepare(alone)  # a generator's samples are its own, whoever else is there
    both, one = records(tmp_path / "out.jsonl"), records(tmp_path / "alone.jsonl")
    for with_other, by_itself in zip(both, one, strict=True):
        assert set(by_itself["completions"]) < set(with_other["completions"])


def test_empty_and_repeated_samples_are_dropped_and_counted(arguments, monkeypatch, tmp_path):
    texts = [" fresh ", "\n", " bad 0  ", "fresh", " fresh two"]
    monkeypatch.setattr(
        recipe, "sample", lambda model, tokenizer, prompts, **_: [list(texts) for _ in prompts]
    )
    report = prepare(arguments(limit=1, num_samples=5))
    (record,) = records(tmp_path / "out.jsonl")
    good, bad = " good 0.\n\nTwo paragraphs.", " bad 0"
    assert set(record["completions"]) == {good, bad, " fresh", " fresh two"}
    counts = {"made": 5, "empty": 1, "repeated": 2, "prompts_cut": 0}
    assert dict(report.samples["small"]) == counts
    assert "samples of small: 5 (dropped: 1 empty, 2 repeated)" in report.text()


def test_conversations(arguments, write_lines, tmp_path):
    lists = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for i in range(3)
    ]
    prepare(arguments(data=write_lines(*lists), chat_template="auto"))
    lists = list(read_lists([str(tmp_path / "out.jsonl")], DataReport(), ListOptions()))
    assert [x.prompts[0][0]["content"] for x in lists] == [f"question {i}" for i in range(3)]
    for ranked in lists:
        assert len(ranked.completions) == 5
        assert all(c[0]["role"] == "assistant" and len(c) == 1 for c in ranked.completions)


def test_rewards_of_the_data_and_order_alone(arguments, write_lines, tmp_path):
    data = write_lines(
        {"prompt": "p", "completions": ["b", "a", "d", "c"], "rewards": [3, 4, 1, 2]},
        {"prompt": "q", "completions": ["first", "second", "third"]},
    )
    alone = {"generator": [], "reward_model": None, "data": data}
    report = prepare(arguments(**alone, ranking_length=3))
    first, second = records(tmp_path / "out.jsonl")
    assert first["completions"] == ["a", "b", "d"] and first["rewards"] == [4.0, 3.0, 1.0]
    assert first["chosen_index"] == 0 and first["sources"] == ["data"] * 3
    assert second["completions"] == ["first", "second", "third"] and "rewards" not in second
    assert report.chosen_first is None


def test_only_a_reward_model(arguments, tmp_path):
    report = prepare(arguments(generator=[]))
    assert all(record["sources"] == ["data"] * 2 for record in records(tmp_path / "out.jsonl"))
    assert report.samples == {} and report.chosen_first == report.chosen_first_of_data


def test_equal_rewards_of_the_data_do_not_matter_to_a_reward_model(
    arguments, write_lines, tmp_path
):
    data = write_lines({"prompt": "p", "completions": ["b", "a"], "rewards": [1, 1]})
    prepare(arguments(generator=[], data=data))
    (record,) = records(tmp_path / "out.jsonl")
    assert record["rewards"][0] > record["rewards"][1]


def test_the_marked_candidate_of_the_data_is_the_chosen_one():
    ranked = RankedList(("p",), ("a", "b", "c"), (1.0, 3.0, 2.0), sft_index=2)
    assert Pool.of(ranked).chosen == 2
    assert Pool.of(RankedList(("p",), ("a", "b"), (1.0, 3.0))).chosen == 1
    assert Pool.of(RankedList(("p",), ("a", "b"))).chosen == 0


def test_lists_the_reward_model_cannot_tell_apart_are_dropped(arguments, monkeypatch, tmp_path):
    plain = RewardModel.score_ids
    monkeypatch.setattr(
        RewardModel, "score_ids", lambda self, texts: [*plain(self, texts[:-5]), *[0.5] * 5]
    )  # the last list of every group
    first = prepare(arguments())
    assert (first.kept, dict(first.dropped)) == (3, {"all rewards equal": 4})
    assert len(records(tmp_path / "out.jsonl")) == 3
    assert "lists dropped, all rewards equal: 4" in first.text()
    monkeypatch.setattr(RewardModel, "score_ids", lambda self, texts: [0.5] * len(texts))
    with pytest.raises(ValueError, match="every list was dropped: {'all rewards equal': 7}"):
        prepare(arguments(output=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "none.jsonl").exists()


def test_gzip_output_has_the_same_lines_and_no_time_stamp(arguments, tmp_path):
    prepare(arguments())
    prepare(arguments(output=str(tmp_path / "out.jsonl.gz")))
    packed = (tmp_path / "out.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "out.jsonl").read_bytes()
    assert packed[4:8] == bytes(4)  # the header's time
    assert len(list(read_lists([str(tmp_path / "out.jsonl.gz")], DataReport(), ListOptions()))) == 7


def interrupted(arguments, monkeypatch, groups):
    """Run until so many groups are saved, and stop as a kill would."""
    with monkeypatch.context() as patch:
        plain, done = recipe.Recipe.lines, []

        def lines(self, lists, first_index):
            if len(done) == groups:
                raise KeyboardInterrupt
            done.append(first_index)
            return plain(self, lists, first_index)

        patch.setattr(recipe.Recipe, "lines", lines)
        with pytest.raises(KeyboardInterrupt):
            prepare(arguments)
        return done


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_resumed_run_ends_with_the_same_bytes(arguments, monkeypatch, tmp_path, suffix):
    drop_some(monkeypatch)
    prepare(arguments(output=str(tmp_path / f"whole{suffix}")))
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    report = (tmp_path / f"whole{suffix}.report.json").read_bytes()
    broken = arguments(output=str(tmp_path / f"broken{suffix}"))
    interrupted(broken, monkeypatch, 3)
    partial = tmp_path / f"broken{suffix}.partial"
    saved = partial.read_bytes()
    lines = saved.splitlines(keepends=True)
    assert len(lines) == 6 and any(json.loads(line)["record"] is None for line in lines)
    settings = tmp_path / f"broken{suffix}.partial.json"
    begun_with = settings.read_bytes()
    # Whole groups; inside a group; in mid-line; a newline short; within the first line; nothing.
    at = [sum(map(len, lines[:k])) for k in range(7)]
    cuts = [(at[6], 6), (at[5], 4), (at[4] + 7, 4), (at[6] - 1, 4), (5, 0), (0, 0)]
    for cut, kept in cuts if suffix == ".jsonl" else cuts[1:3]:
        partial.write_bytes(saved[:cut])
        settings.write_bytes(begun_with)
        redone = spy(monkeypatch)
        prepare(broken)
        assert redone == list(range(kept, 7, 2)), cut  # nothing that is finished is done again
        assert (tmp_path / f"broken{suffix}").read_bytes() == whole
        assert (tmp_path / f"broken{suffix}.report.json").read_bytes() == report
        assert not partial.exists() and not settings.exists()
        (tmp_path / f"broken{suffix}").unlink()


def drop_some(monkeypatch):
    """Give the first list of each second group equal rewards, so that a marker is saved."""
    plain = RewardModel.score_ids

    def score_ids(self, texts):
        scores = plain(self, texts)
        if self.tokenizer.decode(texts[0], True).startswith("\n\nHuman: question 2"):
            scores[:5] = [0.25] * 5
        return scores

    monkeypatch.setattr(RewardModel, "score_ids", score_ids)


def spy(monkeypatch):
    """The first index of every group that is computed from here on."""
    seen, plain = [], recipe.Recipe._extend

    def extend(self, pools, generator, first_index):
        seen.append(first_index)
        return plain(self, pools, generator, first_index)

    monkeypatch.setattr(recipe.Recipe, "_extend", extend)
    return seen


def test_a_killed_process_is_resumed(arguments, tmp_path, write_lines):
    data = write_lines(*map(transcript, range(24)))
    whole = arguments(data=data, output=str(tmp_path / "whole.jsonl"), max_new_tokens=12)
    prepare(whole)
    flags = [
        "--data", data, "--output", str(tmp_path / "killed.jsonl"), "--generator",
        *whole.generator, "--reward_model", whole.reward_model, "--num_samples", "3",
        "--max_new_tokens", "12", "--batch_size", "2", "--seed", "5", "--device", "cpu",
        "--chat_template", "off",
    ]  # fmt: skip
    # One thread, as in this process: the sums of a matmul are ordered by it.
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); import sys; "
        "from pro_trainer.cli.commands import prepare; sys.exit(prepare(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.DEVNULL)
    partial = tmp_path / "killed.jsonl.partial"
    try:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.read_bytes().count(b"\n") >= 6):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed.jsonl").exists()
    with open(partial, "ab") as file:
        file.write(b'{"record": {"prompt": "half wri')
    prepare(arguments(data=data, output=str(tmp_path / "killed.jsonl"), max_new_tokens=12))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_settings_are_an_error_naming_them(arguments, monkeypatch, tmp_path):
    interrupted(arguments(), monkeypatch, 1)
    saved = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(ValueError) as error:
        prepare(arguments(temperature=0.5, seed=1))
    message = str(error.value)
    assert "seed was 5, is 1; temperature was 1.0, is 0.5" in message and "--overwrite" in message
    assert "top_p" not in message
    assert (tmp_path / "out.jsonl.partial").read_bytes() == saved
    prepare(arguments(seed=1, overwrite=True))
    prepare(arguments(seed=1, output=str(tmp_path / "anew.jsonl")))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "anew.jsonl").read_bytes()


def test_changed_files_are_other_settings(arguments, monkeypatch, tmp_path, write_lines):
    data = write_lines(*map(transcript, range(7)))
    interrupted(arguments(data=data), monkeypatch, 1)
    write_lines(*map(transcript, range(1, 8)))  # as long as before
    with pytest.raises(ValueError, match=f"other settings: the files of {data} was"):
        prepare(arguments(data=data))


def test_overwrite_goes_on_where_the_settings_are_the_same(arguments, monkeypatch, tmp_path):
    prepare(arguments())
    before = (tmp_path / "out.jsonl").read_bytes()
    interrupted(arguments(overwrite=True), monkeypatch, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == before  # untouched until the end
    redone = spy(monkeypatch)
    prepare(arguments(overwrite=True))
    assert redone == [4, 6]
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_output_that_exists(arguments, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="out.jsonl exists; --overwrite replaces it"):
        prepare(arguments())
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    prepare(arguments(overwrite=True))
    assert len(records(tmp_path / "out.jsonl")) == 7
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl is a folder"):
        prepare(arguments(output=str(tmp_path / "folder.jsonl")))


def test_a_damaged_partial_file(arguments, monkeypatch, tmp_path):
    interrupted(arguments(), monkeypatch, 3)
    partial, settings = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    lines = partial.read_bytes().splitlines(keepends=True)
    for foreign in (b"garbage\n", b"[]\n", b'{"prompt": "p"}\n'):
        for behind in (lines[3:], []):
            partial.write_bytes(b"".join([*lines[:2], foreign, *behind]))
            with pytest.raises(ValueError, match=r"out.jsonl.partial:3: damaged, .*--overwrite"):
                prepare(arguments())
    partial.write_bytes(b"".join(lines))
    settings.write_text("[]")
    with pytest.raises(ValueError, match="not what it was begun with .*: not a JSON object"):
        prepare(arguments())
    settings.unlink()
    with pytest.raises(ValueError, match="is there, but not what it was begun with"):
        prepare(arguments())
    prepare(arguments(overwrite=True))
    assert len(records(tmp_path / "out.jsonl")) == 7


def test_a_malformed_line_shows_before_any_work(arguments, write_lines, tmp_path):
    data = write_lines(*map(transcript, range(7)), b'{"prompt": 3}')
    with pytest.raises(ValueError, match=r"data.jsonl:8: "):
        prepare(arguments(data=data, reward_model="not loaded"))
    assert not (tmp_path / "out.jsonl.partial").exists()
    report = prepare(arguments(data=data, on_bad_line="skip"))
    assert report.kept == 7 and report.data.bad_lines == 1


def test_an_error_of_a_model_names_the_lists(arguments, models, write_lines, tmp_path):
    lists = [{"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}]
    data = write_lines(*map(transcript, range(2)), *lists)
    no_template = tmp_path / "no_template"
    model, tokenizer = tiny_llama(0)
    model.save_pretrained(no_template)
    tokenizer.save_pretrained(no_template)
    with pytest.raises(ValueError, match=r"data.jsonl:3 to .*data.jsonl:3: .*a chat template"):
        prepare(arguments(data=data, generator=[str(no_template)]))
    # What was finished before is kept for when the cause is gone.
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 2


def test_limit_and_long_prompts(arguments, tmp_path):
    report = prepare(arguments(limit=3, max_prompt_length=5))
    assert [r["prompt"][16] for r in records(tmp_path / "out.jsonl")] == ["n"] * 3
    assert report.lists == 3 and report.samples["small"]["prompts_cut"] == 3
    assert "prompts cut to its length: 3" in report.text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "cannot be read|no such|not found|data"),
        ({"output": "out.csv"}, r"must end in .jsonl or .jsonl.gz, got 'out.csv'"),
        ({"reward_model": None}, "a generator needs a reward_model"),
        ({"generator_tokenizer": ["a", "b"]}, "one for each of the 1 generators, got 2"),
        ({"num_samples": 0}, "num_samples must be finite and > 0, got 0"),
        ({"batch_size": 0}, "batch_size must be finite and > 0, got 0"),
        ({"limit": 0}, "limit must be finite and > 0, got 0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"temperature": float("nan")}, "temperature must be finite and > 0, got nan"),
        ({"ranking_length": 1}, "ranking_length must be at least 2, got 1"),
        ({"stop": [""]}, "stop: an empty string"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"reward_model": "no/such"}, "no/such: not a reward model"),
        ({"generator": ["no/such"]}, "no/such: not a causal LM"),
    ],
)
def test_bad_arguments(arguments, changes, message, tmp_path):
    values = dict(changes)
    built = arguments()
    for name, value in values.items():
        setattr(built, name, [] if name == "data" else value)
    with pytest.raises(ValueError, match=message):
        prepare(built)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_output_is_not_one_of_the_inputs(arguments, write_lines, models, tmp_path):
    data = write_lines(transcript(0))
    link = tmp_path / "link"
    link.symlink_to(models / "rm")
    for path in (data, str(models / "small" / "out.jsonl"), str(link / "sub" / "out.jsonl")):
        with pytest.raises(ValueError, match="output .*: writing there would change .* give anoth"):
            prepare(arguments(data=data, output=path, overwrite=True))
    report = write_lines(transcript(0), name="x.jsonl.report.json")
    with pytest.raises(ValueError, match="would change .*x.jsonl.report.json, which this run read"):
        prepare(arguments(data=report, output=str(tmp_path / "x.jsonl")))
    assert {p.name for p in (models / "rm").iterdir()} >= {"config.json"}
    assert not list(models.rglob("*.lock")) and not (models / "rm" / "sub").exists()


def test_a_second_run_is_refused_while_one_writes_the_output(arguments, tmp_path):
    lock = tmp_path / "out.jsonl.lock"
    with held(lock) as holder:
        with pytest.raises(ValueError, match=f"written by another run .process {holder.pid} on "):
            prepare(arguments())
        assert not (tmp_path / "out.jsonl.partial").exists()
    assert lock.exists()  # its holder was killed
    prepare(arguments(limit=2))
    assert not lock.exists()


def test_a_link_to_nothing_and_a_folder_without_permission(arguments, monkeypatch, tmp_path):
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="out.jsonl is a link to .*gone, which is not there: remo"):
        prepare(arguments())

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pro_trainer.files.os.open", refuse)
    with pytest.raises(ValueError, match=r"cannot be written .Permission denied.: give another ou"):
        prepare(arguments(output=str(tmp_path / "a" / "b" / "out.jsonl")))


def run(arguments):
    """``pro-kernels prepare`` in this process."""
    given = {name: x for name, x in vars(arguments).items() if x not in (None, [], False)}
    flags = [[f"--{name}", *map(str, x if isinstance(x, list) else [x])]
             for name, x in given.items() if name != "stop"]  # fmt: skip
    return cli.prepare([flag for part in flags for flag in part])


def test_an_interrupted_command_says_how_to_go_on(arguments, monkeypatch, tmp_path, capsys):
    plain = recipe.Recipe.lines

    def lines(self, lists, first_index):
        if first_index == 4:
            raise KeyboardInterrupt
        return plain(self, lists, first_index)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Recipe, "lines", lines)
        assert run(arguments()) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "interrupted after 4 of 7 lists; the same command goes on from there"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl.partial", "out.jsonl.partial.json", "transcripts.jsonl",
    ]  # fmt: skip
    assert run(arguments()) == 0


@pytest.mark.parametrize("at", ["the settings", "a line", "the output"])
def test_a_full_disk_is_one_line_and_what_is_whole_stays(
    arguments, monkeypatch, tmp_path, capsys, at
):
    whole = {"the settings": 0, "a line": 0, "the output": 2}[at]  # calls of fsync that succeed

    def full(*_):
        nonlocal whole
        whole -= 1
        if whole < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "a line":
            patch.setattr(output.PartialFile, "append", full)
        else:
            patch.setattr(output.os, "fsync", full)
        assert run(arguments()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no space is left ([Errno 28] No space left on device); stopped")
    kept = ["out.jsonl.partial", "out.jsonl.partial.json"] if at == "the output" else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, "transcripts.jsonl"]
    assert ("after 7 of 7 lists" in error) == bool(kept)
    assert run(arguments()) == 0


def test_the_flags(tmp_path):
    parser = HfArgumentParser(PrepareArguments)
    flags = (
        "--data a b --output o.jsonl --generator m n --ranking_length 3 --sft chosen --overwrite"
    )
    (parsed,) = parser.parse_args_into_dataclasses(flags.split(), look_for_args_file=False)
    assert parsed.data == ["a", "b"] and parsed.generator == ["m", "n"]
    assert parsed.ranking_length == 3 and parsed.sft == "chosen" and parsed.overwrite is True
    assert parsed.stop == ["\n\nHuman:"]


@pytest.mark.shared
def test_real_transcripts(arguments, shared, tmp_path):
    data = Path(shared) / "data" / "hh-harmless-base-dev.jsonl.gz"
    report = prepare(
        arguments(data=str(data), limit=8, num_samples=1, batch_size=4, max_prompt_length=64)
    )
    assert report.lists == 8 and os.path.exists(tmp_path / "out.jsonl")
    assert all(r["prompt"].endswith("Assistant:") for r in records(tmp_path / "out.jsonl"))
