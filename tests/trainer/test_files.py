"""Rows from every kind of source, and every source that cannot be read to its end."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import io
import json
import lzma
import random
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from pro_trainer.data.fields import DataError
from pro_trainer.data.read import decode_line, rows

RECORDS = [{"prompt": f"p{i}", "completions": ["a", "b"]} for i in range(3)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
DATASET = datasets.Dataset.from_list(RECORDS)
PACK = {"gz": gzip.compress, "zst": zstd.compress, "xz": lzma.compress, "bz2": bz2.compress}


def records(source: object) -> list[dict]:
    return [decode_line(raw) if isinstance(raw, bytes) else raw for _, raw in rows(source)]


def incompressible(n: int) -> bytes:
    """Enough lines that do not shrink, so that half of the file breaks off amid them."""
    noise = random.Random(0)
    return b"".join(b'{"prompt": "%x"}\n' % noise.getrandbits(800) for _ in range(n))


def parquet(records: list[dict], **options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file, **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Write a file, packed as its name says, and return its path."""

    def written(name: str, content: bytes | str, packed: bool = True):
        content = content.encode() if isinstance(content, str) else content
        pack = PACK.get(name.split(".")[-1]) if packed else None
        (tmp_path / name).write_bytes(pack(content) if pack else content)
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("d.jsonl", LINES, "{}:2"),
        ("d.json", LINES, "{}:2"),
        ("d.jsonl.gz", LINES, "{}:2"),
        ("d.jsonl.zst", LINES, "{}:2"),
        ("x.csv.jsonl", LINES, "{}:2"),
        ("d.parquet", parquet(RECORDS), "{}: row 2"),
        ("d.json", "\n " + json.dumps(RECORDS, indent=1), "{}: record 2"),  # one array
        ("d.json.gz", json.dumps(RECORDS), "{}: record 2"),
    ],
)
def test_every_file_kind_gives_the_records(write, name, content, place):
    path = write(name, content)
    assert records(path) == records(str(path)) == RECORDS
    assert [where for where, _ in rows(path)][1] == place.format(path)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
def test_blank_lines_byte_order_mark_and_many_compressed_parts(write, name):
    parts = [b"\xef\xbb\xbf" + LINES, b"\n  \n", LINES, incompressible(3000)]
    pack = PACK[name.split(".")[-1]]
    found = list(rows(write(name, b"".join(map(pack, parts)), packed=False)))
    assert len(found) == 3006 and found[3][0].endswith(f"{name}:6")
    assert decode_line(found[0][1]) == RECORDS[0]


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("cut.jsonl.gz", "cut", "the gz file breaks off after line [1-9]"),
        ("bad.jsonl.gz", "bad", "damaged gz file, after line|breaks off"),
        ("plain.jsonl.gz", LINES, "damaged gz file, after line 0"),
        ("cut.jsonl.zst", "cut", "the zst file breaks off after line [1-9]"),
        ("bad.jsonl.zst", "bad", "damaged zst file"),
        ("plain.jsonl.zst", LINES, "damaged zst file"),
        ("cut.parquet", parquet(RECORDS * 1000)[:800], "damaged Parquet file, after row 0"),
        ("plain.parquet", LINES, "damaged Parquet file"),
        ("empty.parquet", b"", "damaged Parquet file"),
        ("cut.json", '[{"prompt": "p"}, {"prompt"', "not JSON: .*line 1 column"),
        ("long.csv", "a,b\n1,2\n1,2,3\n", r":3: a row must have .* got \['3'\] beyond"),
        # A cell beyond that is empty is none.
        ("short.csv", "a,b\n1,2,\n1\n", ":3: .* got none for 'b'"),
    ],
)
def test_truncated_and_damaged_files_are_named(write, name, content, wrong):
    if content in ("cut", "bad"):
        whole = PACK[name.split(".")[-1]](incompressible(5000))
        bad = whole[:40] + b"\0" * 40 + whole[80:]
        content = whole[: len(whole) // 2] if content == "cut" else bad
    with pytest.raises(DataError, match=f"{name}.*({wrong})"):
        list(rows(write(name, content, packed=False)))


def test_a_parquet_file_damaged_in_the_middle_names_the_row(write):
    whole = bytearray(parquet(RECORDS * 1000, row_group_size=1000, write_page_checksum=True))
    start = pq.read_metadata(io.BytesIO(whole)).row_group(2).column(0).data_page_offset
    whole[start + 30 : start + 60] = b"\xff" * 30
    with pytest.raises(DataError, match=r"d.parquet: damaged Parquet file, after row [12]\d\d\d"):
        list(rows(write("d.parquet", bytes(whole))))


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "missing.csv", "missing"])
def test_missing_files_are_not_taken_for_hub_names(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
        list(rows(tmp_path / name))
    with pytest.raises(DataError, match="data/train.jsonl.gz: cannot be read: No such file"):
        list(rows("data/train.jsonl.gz"))


def test_a_folder_of_files_is_read_in_name_order(write, tmp_path):
    write("README.md", "about")
    with pytest.raises(DataError, match=f"{tmp_path}: this folder holds no data files"):
        list(rows(tmp_path))
    write("b.jsonl", LINES)
    write("a.jsonl.gz", b'{"first": 1}\n')
    write(".hidden.jsonl", b"not json")
    (tmp_path / "inner").mkdir()
    assert records(tmp_path) == [{"first": 1}, *RECORDS]


def test_saved_data_sets(tmp_path):
    DATASET.select([2, 0]).save_to_disk(tmp_path / "one")
    assert records(tmp_path / "one") == [RECORDS[2], RECORDS[0]]
    splits = {"train": DATASET, "test": DATASET.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert records(tmp_path / "dict") == RECORDS  # train, where there is one
    assert records(tmp_path / "dict" / "test") == [RECORDS[1]]
    datasets.DatasetDict(x=DATASET, y=DATASET).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two: give one of its folders out of x, y"):
        list(rows(tmp_path / "two"))
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(DataError, match=r"one: damaged folder of Dataset.save_to_disk"):
        list(rows(tmp_path / "one"))


def test_iterables_name_the_record_and_data_sets_lose_their_format():
    assert list(rows(iter(RECORDS)))[2] == ("record 3", RECORDS[2])
    (found,) = records(datasets.Dataset.from_list([{"ids": [1, 2]}]).with_format("numpy"))
    assert found == {"ids": [1, 2]} and isinstance(found["ids"], list)
    for source in (3, None, RECORDS[0]):
        with pytest.raises(TypeError, match="a source must be a file, a folder, a hub name"):
            rows(source)


def test_hub_names_are_streamed(monkeypatch):
    with pytest.raises(DataError, match="no-org/nothing: no file or folder of this name, and as a"):
        list(rows("no-org/nothing"))
    calls = []

    def load_dataset(name, split=None, streaming=False):
        calls.append((name, split, streaming))
        stream = DATASET.to_iterable_dataset()
        return stream if split else datasets.IterableDatasetDict(train=stream, test=stream)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert records("org/some-name") == records("org/some-name:test") == RECORDS
    assert calls == [("org/some-name", None, True), ("org/some-name", "test", True)]
    assert next(iter(rows("org/some-name:test")))[0] == "org/some-name: row 1"


def test_a_missing_package_names_the_extra(write, monkeypatch):
    path = write("d.jsonl.zst", LINES)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(DataError, match=r"d.jsonl.zst: .* backports.zstd.*pro-kernels\[train\]"):
        list(rows(path))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.zst"])
def test_reading_streams(write, name):
    path = write(name, incompressible(20_000))
    stream = rows(path)
    next(stream)
    (file,) = (x for x in gc.get_objects() if type(x) is io.FileIO and x.name == str(path))
    assert file.tell() < path.stat().st_size / 4


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "D.CSV", "d.csv.gz", "d.csv.xz", "d.csv.bz2"])
def test_tables(write, name):
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t" if "tsv" in name else ",")
    table.writerow(["prompt", "completions", "scores", "chosen", "id"])
    table.writerow(["p, 1\nq", '["a", "b"]', "[1, 2.5]", "[not json", "007"])
    table.writerow(["p2", '["c"]', "", '{"a": 1}', "1"])
    path = write(name, text.getvalue())
    first = {"prompt": "p, 1\nq", "completions": ["a", "b"], "scores": [1, 2.5],
             "chosen": "[not json", "id": "007"}  # fmt: skip
    second = {"prompt": "p2", "completions": ["c"], "chosen": '{"a": 1}', "id": "1"}
    assert records(path) == [first, second]
    assert [place for place, _ in rows(path)][1] == f"{path}: row 2"
