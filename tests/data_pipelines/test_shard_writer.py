"""Shards are plain tars whose bytes depend on their samples alone."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data_pipelines.shard_writer import ShardWriter, shard_name, shard_ranges


def test_members_and_headers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / shard_name("pairs", 3)
    with ShardWriter(path) as writer:
        writer.write("a", {"png": b"123", "txt": "ä".encode()})
        writer.write("b", {"0.txt": b"", "0.png": b"4"})
    assert writer.num_samples == 2
    assert path.name == "pairs-000003.tar"
    with tarfile.open(path) as shard:
        members = shard.getmembers()
    assert [(m.name, m.size) for m in members] == [("a.png", 3), ("a.txt", 2), ("b.0.txt", 0), ("b.0.png", 1)]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_same_samples_give_same_bytes(tmp_path: Path) -> None:
    for name in ("first.tar", "second.tar"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("key", {"txt": b"text"})
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()


def test_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "x.tar") as writer:
        writer.write("key", {"txt": b"text"})
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "parts", "message"),
    [
        ("a.b", {"txt": b""}, "must not be empty nor hold"),
        ("a/b", {"txt": b""}, "must not be empty nor hold"),
        ("", {"txt": b""}, "must not be empty nor hold"),
        ("there", {"txt": b""}, "written twice"),
        ("empty", {}, "has no parts"),
    ],
)
def test_bad_samples(tmp_path: Path, key: str, parts: dict[str, bytes], message: str) -> None:
    with ShardWriter(tmp_path / "x.tar") as writer:
        writer.write("there", {"txt": b""})
        with pytest.raises(ValueError, match=message):
            writer.write(key, parts)


def test_shard_ranges() -> None:
    assert shard_ranges(5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert shard_ranges(4, 2) == [range(2), range(2, 4)]
    assert shard_ranges(0, 2) == []
