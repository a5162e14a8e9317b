from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import WriteShard

from data_pipelines import index_files
from data_pipelines.index import PART_COLUMNS, SampleIndex
from data_pipelines.index_files import IndexRules, index_paths, load_index, open_index, open_shard
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer


def test_every_broken_shard_is_counted(write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = write_shard("good.tar", [("a.txt", b"cat")])
    broken = [str(tmp_path / f"{i}.tar") for i in range(3)]
    for path in broken:
        Path(path).write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.tar: shard has 0 bytes.*\(and 2 more broken shards\)"):
        open_index([good, *broken], IndexRules("text", tokenizer))


def _same(a: SampleIndex, b: SampleIndex) -> bool:
    names = ("keys", "starts", *PART_COLUMNS)
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names) and (a.bad, a.digest) == (b.bad, b.digest)


def test_index_is_stored_beside_the_shard_and_read_back(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat"), ("b.txt", b"\xff")])
    built = open_shard(path, IndexRules("text", tokenizer))
    assert os.listdir(Path(path).parent) and index_paths(path, IndexRules("text", None))[0] == f"{path}.text.index"
    assert sorted(os.listdir(Path(path).parent)) == ["a.tar", "a.tar.text.index"]
    stored = load_index(path, IndexRules("text", tokenizer))
    assert stored is not None and _same(stored, built)
    assert load_index(path, IndexRules("text", None)) is not None
    assert load_index(path, IndexRules("interleaved", tokenizer)) is None


def test_index_is_rebuilt_when_shard_or_tokenizer_change(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    open_shard(path, IndexRules("text", tokenizer))
    write_shard("a.tar", [("b.txt", b"dog")])  # as many bytes as before
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_index(path, IndexRules("text", tokenizer)) is None
    assert open_shard(path, IndexRules("text", tokenizer)).key(0) == "b"
    other = object.__new__(Tokenizer)
    other.__dict__.update(tokenizer.__dict__, fingerprint="another")
    assert load_index(path, IndexRules("text", other)) is None


@pytest.mark.parametrize("damage", [b"", b"x", b"\x93NUMPY and no more"])
def test_damaged_index_is_rebuilt(write_shard: WriteShard, tokenizer: Tokenizer, damage: bytes) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    built = open_shard(path, IndexRules("text", tokenizer))
    sidecar = Path(index_paths(path, IndexRules("text", None))[0])
    sidecar.write_bytes(damage or sidecar.read_bytes()[:-50])
    assert load_index(path, IndexRules("text", tokenizer)) is None
    assert _same(open_shard(path, IndexRules("text", tokenizer)), built)
    assert load_index(path, IndexRules("text", tokenizer)) is not None


def test_index_goes_to_the_cache_when_the_data_cannot_be_written(
    write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    beside, cached = map(Path, index_paths(path, IndexRules("text", None)))
    (beside / "in the way").mkdir(parents=True)  # a directory cannot be replaced by a file, not even by root
    built = open_shard(path, IndexRules("text", tokenizer))
    assert cached.exists()
    stored = load_index(path, IndexRules("text", tokenizer))
    assert stored is not None and _same(stored, built)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_samples_of_several_shards_are_numbered_through(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    paths = [write_shard(f"{i}.tar", [(f"{i}{j}.txt", b"cat " * (j + 1)) for j in range(i + 1)]) for i in range(3)]
    index = open_index(paths, IndexRules("text", tokenizer))
    assert [index.key(s) for s in range(6)] == ["00", "10", "11", "20", "21", "22"]
    assert index.shards.tolist() == [0, 1, 1, 2, 2, 2]
    assert index.num_tokens.tolist() == [1, 1, 2, 1, 2, 3]
    assert index.starts.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_directory_of_their_own(write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_shard("a.tar", [("a.txt", b"red cat")])
    rules = IndexRules("text", tokenizer, directory=str(tmp_path / "indexes"))
    built = open_shard(path, rules)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "indexes"]
    stored = load_index(path, rules)
    assert stored is not None and _same(stored, built)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/.*cannot be written; data\.index_dir"):
        open_shard(path, IndexRules("text", tokenizer, directory=str(tmp_path / "file")))


def test_a_build_goes_on_where_it_was_stopped(
    write_shard: WriteShard, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_shard(f"{i}.tar", [(f"{i}.txt", b"cat")]) for i in range(4)]
    rules = IndexRules("text", tokenizer)
    open_index(paths[:2], rules)
    scanned: list[str] = []
    scan = index_files.scan_shard
    monkeypatch.setattr(index_files, "scan_shard", lambda path, *a, **k: scanned.append(path) or scan(path, *a, **k))
    assert len(open_index(paths, rules)) == 4 and sorted(scanned) == paths[2:]


def test_processes_build_the_same_index(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    paths = [write_shard(f"{i}.tar", [(f"{i}{j}.txt", b"cat " * (j + 1)) for j in range(3)]) for i in range(3)]
    built = open_index(paths, IndexRules("text", tokenizer), processes=2)
    assert all(load_index(path, IndexRules("text", tokenizer)) is not None for path in paths)
    assert _same(built, open_index(paths, IndexRules("text", tokenizer)))


def test_salvaged_shards_have_indexes_of_their_own(write_shard: WriteShard, tokenizer: Tokenizer) -> None:
    path = write_shard("a.tar", [(f"{i}.txt", b"cat") for i in range(5)])
    Path(path).write_bytes(Path(path).read_bytes()[: 3 * 1024 + 100])
    empty = write_shard("b.tar", [])
    Path(empty).write_bytes(b"")
    rules = IndexRules("text", tokenizer, salvage=True)
    built = open_index([path, empty], rules)
    assert (len(built), [bad.cause for bad in built.bad]) == (3, ["cut_shard", "empty_shard"])
    stored = load_index(path, rules), load_index(empty, rules)
    assert all(index is not None for index in stored) and _same(open_index([path, empty], rules), built)
    with pytest.raises(DataError, match="cut: the file ends"):
        open_shard(path, IndexRules("text", tokenizer))
