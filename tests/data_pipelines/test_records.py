"""Records as they are distributed: every compression, and no cut file that passes for a whole one."""

from __future__ import annotations

import collections
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipelines.corpora.records import read_records
from emu2_jax.errors import DataError

LINES = [{"text": f"line {i}", "n": i} for i in range(1000)]
CONTENT = "".join(json.dumps(line) + "\n" for line in LINES).encode()


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_no_face_shard_0_v3.jsonl", CONTENT)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(CONTENT),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(CONTENT)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(CONTENT)),
    "a.jsonl.zip": _zip,
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    counts: collections.Counter[str] = collections.Counter()
    records = list(read_records([tmp_path / name], counts))
    assert [record.fields for record in records] == LINES
    assert [record.number for record in records] == list(range(1, 1001)) and not counts


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.jsonl"])
def test_a_cut_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"^{path}: cannot be read beyond (line|row) \d+"):
        list(read_records([path], collections.Counter()))


def test_zstandard_in_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    middle = len(CONTENT) // 2
    path.write_bytes(zstandard.compress(CONTENT[:middle]) + zstandard.compress(CONTENT[middle:]))
    assert len(list(read_records([path], collections.Counter()))) == 1000


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1]\n{"a": \n\xff\xfe\n{"a": 2}')
    counts: collections.Counter[str] = collections.Counter()
    assert [(r.number, r.fields) for r in read_records([path], counts)] == [(1, {"a": 1}), (6, {"a": 2})]
    assert counts == {"invalid_json": 2, "invalid_utf8": 1}


def test_files_that_are_something_else(tmp_path: Path) -> None:
    counts: collections.Counter[str] = collections.Counter()
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        list(read_records([tmp_path / "gone.jsonl"], counts))
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"a\.csv: wanted a file that ends in one of \.jsonl"):
        list(read_records([tmp_path / "a.csv"], counts))
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has no column body; its columns: text, n"):
        list(read_records([tmp_path / "a.parquet"], counts, columns=("body",)))
    with zipfile.ZipFile(tmp_path / "two.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(DataError, match=r"two\.jsonl\.zip: holds 2 files; wanted one"):
        list(read_records([tmp_path / "two.jsonl.zip"], counts))
