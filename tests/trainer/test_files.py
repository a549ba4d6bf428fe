"""Rows from every kind of source, and every source that cannot be read to its end."""

from __future__ import annotations

import bz2
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


def records(source: object) -> list[dict]:
    return [decode_line(raw) if isinstance(raw, bytes) else raw for _, raw in rows(source)]


def incompressible(n: int) -> bytes:
    """Enough lines that do not shrink, so that half of the file breaks off amid them."""
    noise = random.Random(0)
    return b"".join(b'{"prompt": "%x"}\n' % noise.getrandbits(800) for _ in range(n))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_every_file_kind_gives_the_records(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        pack = {"gz": gzip.compress, "zst": zstd.compress}.get(name.split(".")[-1], bytes)
        path.write_bytes(pack(LINES))
    assert records(path) == records(str(path)) == RECORDS
    where = [place for place, _ in rows(path)]
    assert where[1] == (f"{path}: row 2" if name.endswith("parquet") else f"{path}:2")


def test_blank_lines_byte_order_mark_and_many_compressed_parts(tmp_path):
    parts = [b"\xef\xbb\xbf" + LINES, b"\n  \n", LINES, incompressible(3000)]
    for name, pack in [("d.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstd.compress)]:
        (tmp_path / name).write_bytes(b"".join(map(pack, parts)))
        found = list(rows(tmp_path / name))
        assert len(found) == 3006 and found[3][0].endswith(f"{name}:6")


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("cut.jsonl.gz", "gzip cut", "the gz file breaks off after line [1-9]"),
        ("bad.jsonl.gz", "gzip bad", "damaged gz file, after line|breaks off"),
        ("plain.jsonl.gz", LINES, "damaged gz file, after line 0"),
        ("cut.jsonl.zst", "zstd cut", "the zst file breaks off after line [1-9]"),
        ("bad.jsonl.zst", "zstd bad", "damaged zst file"),
        ("plain.jsonl.zst", LINES, "damaged zst file"),
        ("cut.parquet", "parquet cut", "damaged Parquet file, after row 0"),
        ("plain.parquet", LINES, "damaged Parquet file"),
        ("empty.parquet", b"", "damaged Parquet file"),
    ],
)
def test_truncated_and_damaged_files_are_named(tmp_path, name, content, wrong):
    path = tmp_path / name
    if isinstance(content, str):
        if content.startswith("parquet"):
            pq.write_table(pa.Table.from_pylist(RECORDS * 1000), path)
            whole = path.read_bytes()
        else:
            pack = gzip.compress if content.startswith("gzip") else zstd.compress
            whole = pack(incompressible(5000))
        bad = whole[:40] + b"\0" * 40 + whole[80:]
        content = whole[: len(whole) // 2] if content.endswith("cut") else bad
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*({wrong})"):
        list(rows(path))


def test_a_parquet_file_damaged_in_the_middle_names_the_row(tmp_path):
    path = tmp_path / "d.parquet"
    table = pa.Table.from_pylist(RECORDS * 1000)
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True)
    whole = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    whole[start + 30 : start + 60] = b"\xff" * 30
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"d.parquet: damaged Parquet file, after row [12]\d\d\d"):
        list(rows(path))


def test_missing_files_are_not_taken_for_hub_names(tmp_path):
    for name in ("missing.jsonl", "missing.parquet", "missing"):
        with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
            list(rows(tmp_path / name))
    with pytest.raises(DataError, match="data/train.jsonl.gz: cannot be read: No such file"):
        list(rows("data/train.jsonl.gz"))


def test_a_folder_of_files_is_read_in_name_order(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"first": 1}\n'))
    (tmp_path / ".hidden.jsonl").write_bytes(b"not json")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "inner").mkdir()
    assert records(tmp_path) == [{"first": 1}, *RECORDS]


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match=f"{tmp_path}: this folder holds no data files"):
        list(rows(tmp_path))


def test_saved_data_sets(tmp_path):
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.select([2, 0]).save_to_disk(tmp_path / "one")
    assert records(tmp_path / "one") == [RECORDS[2], RECORDS[0]]
    splits = {"train": dataset, "test": dataset.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert records(tmp_path / "dict") == RECORDS  # train, where there is one
    assert records(tmp_path / "dict" / "test") == [RECORDS[1]]
    datasets.DatasetDict(x=dataset, y=dataset).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two: give one of its folders out of x, y"):
        list(rows(tmp_path / "two"))
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(DataError, match=r"one: damaged folder of Dataset.save_to_disk"):
        list(rows(tmp_path / "one"))


def test_iterables_name_the_record_and_data_sets_lose_their_format():
    assert list(rows(iter(RECORDS)))[2] == ("record 3", RECORDS[2])
    dataset = datasets.Dataset.from_list([{"ids": [1, 2]}]).with_format("numpy")
    assert records(dataset) == [{"ids": [1, 2]}]
    assert isinstance(records(dataset)[0]["ids"], list)


@pytest.mark.parametrize("source", [3, None, RECORDS[0]])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(TypeError, match="a source must be a file, a folder, a hub name"):
        rows(source)


def test_hub_names_are_streamed(monkeypatch):
    calls = []

    def load_dataset(name, split=None, streaming=False):
        calls.append((name, split, streaming))
        stream = datasets.Dataset.from_list(RECORDS).to_iterable_dataset()
        return stream if split else datasets.IterableDatasetDict(train=stream, test=stream)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert records("org/some-name") == records("org/some-name:test") == RECORDS
    assert calls == [("org/some-name", None, True), ("org/some-name", "test", True)]
    assert next(iter(rows("org/some-name:test")))[0] == "org/some-name: row 1"


def test_a_name_that_is_nothing_says_so():
    with pytest.raises(DataError, match="no-org/nothing: no file or folder of this name, and as a"):
        list(rows("no-org/nothing"))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl.zst").write_bytes(zstd.compress(LINES))
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(DataError, match=r"d.jsonl.zst: .* backports.zstd.*pro-kernels\[train\]"):
        list(rows(tmp_path / "d.jsonl.zst"))


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_reading_streams(tmp_path, suffix):
    path = tmp_path / f"d.jsonl{suffix}"
    lines = incompressible(20_000)
    path.write_bytes(zstd.compress(lines) if suffix else lines)
    stream = rows(path)
    next(stream)
    (file,) = (x for x in gc.get_objects() if type(x) is io.FileIO and x.name == str(path))
    assert file.tell() < path.stat().st_size / 4


def test_one_array_of_records(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("\n " + json.dumps(RECORDS, indent=1))
    assert records(path) == RECORDS
    assert next(iter(rows(path)))[0] == f"{path}: record 1"
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    assert records(tmp_path / "d.json.gz") == RECORDS
    path.write_text('[{"prompt": "p"}, {"prompt"')
    with pytest.raises(DataError, match=r"d.json: not JSON: .*line 1 column"):
        list(rows(path))


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.csv.gz", "d.csv.xz", "d.csv.bz2"])
def test_tables(tmp_path, name):
    import csv
    import io as text_io

    text = text_io.StringIO()
    table = csv.writer(text, delimiter="\t" if "tsv" in name else ",")
    table.writerow(["prompt", "completions", "scores", "chosen", "id"])
    table.writerow(["p, 1\nq", '["a", "b"]', "[1, 2.5]", "[not json", "007"])
    table.writerow(["p2", '["c"]', "", "", "1"])
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    (tmp_path / name).write_bytes(pack.get(name.split(".")[-1], bytes)(text.getvalue().encode()))
    first = {"prompt": "p, 1\nq", "completions": ["a", "b"], "scores": [1, 2.5],
             "chosen": "[not json", "id": "007"}  # fmt: skip
    assert records(tmp_path / name) == [first, {"prompt": "p2", "completions": ["c"], "id": "1"}]
    assert [place for place, _ in rows(tmp_path / name)][1] == f"{tmp_path / name}: row 2"


def test_a_table_with_a_broken_row_is_named(tmp_path):
    (tmp_path / "d.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"d.csv:3: a row must have .* got \['3'\] beyond"):
        list(rows(tmp_path / "d.csv"))
    (tmp_path / "d.csv").write_text("a,b\n1,2,\n1\n")  # a cell beyond that is empty is none
    with pytest.raises(DataError, match=r"d.csv:3: .* got none for 'b'"):
        list(rows(tmp_path / "d.csv"))
    (tmp_path / "D.CSV").write_text('a,chosen\n1,"{""a"": 1}"\n')
    assert records(tmp_path / "D.CSV") == [{"a": "1", "chosen": '{"a": 1}'}]
    (tmp_path / "x.csv.jsonl").write_bytes(LINES)
    assert records(tmp_path / "x.csv.jsonl") == RECORDS
    with pytest.raises(DataError, match="missing.csv: cannot be read: No such file"):
        list(rows(tmp_path / "missing.csv"))
