"""Tokenised lists on disk: types, lifetime, memory, and a split that shares no prompt."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import subprocess
import sys

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from pro_trainer.data.fields import DataError
from pro_trainer.text.encode import TokenizedList
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset, split_held_out, write_lists

RECORDS = [
    {"prompt": f"p{i}", "completions": [f"a{i}", "bb", "c"][: 2 + i % 2], "sft_index": 1}
    for i in range(30)
]
MEASURE = """
import json, os, resource, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from pro_trainer.text.options import ListOptions
from pro_trainer.text.store import load_dataset, split_held_out

words = [f"w{i}" for i in range(1000)]
core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", *words])}, unk_token="</s>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def load(count):
    path = os.path.join(sys.argv[2], "data.jsonl")
    with open(path, "w") as file:
        for i in range(count):
            text = " ".join(words[(i * 31 + j * 7) % 1000] for j in range(20))
            completions = [f" {words[i % 1000]} {text} {words[k]}" for k in range(2)]
            record = {"prompt": f"{i % 1000} {text}", "completions": completions}
            file.write(json.dumps({**record, "rewards": [1, 0]}) + "\\n")
    return load_dataset([path], tokenizer, ListOptions())

load(3000)
before = peak()
dataset, report = load(int(sys.argv[1]))
after = peak()
train, held_out = split_held_out(dataset, 0.1, 0)
print(json.dumps({
    "lists": report.lists, "rows": len(train) + len(held_out), "load_mb": after - before,
    "file_mb": dataset.data.nbytes / 2**20, "split_mb": peak() - after}))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer(extra_ids=0)


@pytest.fixture
def loaded(tokenizer):
    return load_dataset([RECORDS], tokenizer, ListOptions())[0]


@pytest.fixture
def write(tmp_path):
    """The data set of some lists of two completions, by their prompts."""

    def written(*prompts: list[list[int]]) -> Dataset:
        lists = [
            TokenizedList(ids, [[i, 1], [2]], [1.0, 0.0], None) for i, ids in enumerate(prompts)
        ]
        write_lists(lists, tmp_path / "x.arrow")
        return Dataset.from_file(str(tmp_path / "x.arrow"))

    return written


def prompts(dataset: Dataset) -> set[tuple[int, ...]]:
    return {tuple(ids) for row in dataset["prompts"] for ids in row}


def test_rows_are_the_tokenised_lists_with_int32_ids(tokenizer):
    loaded, report = load_dataset([RECORDS], tokenizer, ListOptions())
    assert report.lists == len(loaded) == 30
    assert loaded[1] == {
        "prompts": [tokenizer("p1", add_special_tokens=False).input_ids],
        "completions": [tokenizer(text).input_ids for text in ("a1", "bb", "c")],
        "rewards": None,
        "sft_index": 1,
        "desirable": None,
        "weight": 1.0,
        "cut": None,
        "length": 10,  # 2 of the prompt, 3 + 3 + 2 of the completions, EOS included
    }
    ids, rewards = pa.large_list(pa.large_list(pa.int32())), pa.large_list(pa.float64())
    marks = [pa.large_list(pa.bool_()), pa.float64()]
    types = [ids, ids, rewards, pa.int32(), *marks, pa.string(), pa.int32()]
    assert [field.type for field in loaded.data.schema] == types


def test_files_and_records_make_one_data_set(tokenizer, write_lines):
    path = write_lines(*RECORDS[:2])
    rewarded = [{"prompt": "p", "completions": ["a", "b"], "rewards": [0.1, 1]}]
    dataset, report = load_dataset([path, rewarded], tokenizer, ListOptions(append_eos=False))
    assert len(dataset) == report.lists == 3 and report.with_rewards == 1
    assert dataset[2]["rewards"] == [0.1, 1.0] and dataset[2]["completions"] == [[100], [101]]


def test_many_batches_keep_their_order(write):
    dataset = write(*([[i]] for i in range(2500)))
    assert dataset.data.column("prompts").num_chunks == 3
    assert [row[0][0] for row in dataset["prompts"]] == list(range(2500))


def _drop(dataset: Dataset) -> None:
    del dataset.temporary_folder
    gc.collect()


def test_the_folder_goes_with_the_data_set(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for bad, wrong in (
        ([*RECORDS, {}], "record 31"),
        ([{"prompt": "p", "completions": ["a"]}], "no usable list in the data:\nrecords read: 1"),
    ):
        with pytest.raises(DataError, match=wrong):
            load_dataset([bad], tokenizer, ListOptions())
    assert list(tmp_path.iterdir()) == []  # nothing stays behind after an error
    dataset, _ = load_dataset([RECORDS], tokenizer, ListOptions())
    (folder,) = tmp_path.iterdir()
    forked = multiprocessing.get_context("fork").Process(target=_drop, args=(dataset,))
    forked.start()
    forked.join()
    assert forked.exitcode == 0 and folder.exists()
    train, held_out = split_held_out(dataset, 0.5, 0)
    del dataset, forked
    gc.collect()
    assert pickle.loads(pickle.dumps(train))[0] == train[0]  # as a spawned data loader needs it
    copied = copy.deepcopy(held_out)
    del train, held_out
    gc.collect()
    assert folder.exists() and len(copied) == 15
    del copied
    gc.collect()
    assert not folder.exists()


def test_the_hugging_face_cache_is_not_written(tokenizer, tmp_path, monkeypatch):
    cache, temporary, saved = (tmp_path / name for name in ("cache", "temporary", "saved"))
    for folder in (cache, temporary, saved):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache)
    datasets.Dataset.from_list(RECORDS).save_to_disk(saved)
    before = sorted(saved.iterdir())
    dataset, _ = load_dataset([saved], tokenizer, ListOptions())
    split_held_out(dataset, 0.3, 0)
    dataset.map(lambda row: {"n": len(row["completions"])})
    assert list(cache.iterdir()) == [] and sorted(saved.iterdir()) == before
    del dataset
    gc.collect()
    assert list(temporary.glob("pro_trainer_*")) == []


def test_split_keeps_lists_together_that_share_one_of_their_prompts(write):
    dataset = write(*([[i % 10]] for i in range(40)))
    train, held_out = split_held_out(dataset, 0.2, seed=0)
    assert len(train) == 32 and len(held_out) == 8
    assert not prompts(train) & prompts(held_out)
    again, _ = split_held_out(dataset.shuffle(seed=3), 0.2, seed=0)
    assert prompts(again) == prompts(train)  # the choice does not hang on the order of the rows
    other = [prompts(split_held_out(dataset, 0.2, seed=seed)[1]) for seed in range(8)]
    assert len(set(map(frozenset, other))) > 1

    linked = [[[2 * i], [2 * i + 1]] for i in range(20)] + [[[1], [2]], [[3], [4]]]
    dataset = write(*linked, *([[i]] for i in range(40)))
    for seed in range(5):
        train, held_out = split_held_out(dataset, 0.4, seed)
        assert len(train) + len(held_out) == 62 and len(held_out)
        assert not prompts(train) & prompts(held_out)


def test_split_of_nothing_and_of_too_little(loaded):
    train, held_out = split_held_out(loaded, 0.0, seed=0)
    assert train["prompts"] == loaded["prompts"] and len(held_out) == 0
    assert held_out.column_names == loaded.column_names
    train, held_out = split_held_out(loaded, 0.999, seed=0)
    assert len(train) == 1 and len(held_out) == 29
    with pytest.raises(DataError, match="at least 2 different prompts, got 1"):
        split_held_out(loaded.select([0, 0]), 0.2, seed=0)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            split_held_out(loaded, fraction, seed=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(tmp_path):
    argv = [sys.executable, "-c", MEASURE, "100000", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["lists"] == found["rows"] == 100_000
    assert found["file_mb"] > 20  # in Python these ids would be nine times as much
    assert found["load_mb"] < 40 and found["split_mb"] < 60, found
