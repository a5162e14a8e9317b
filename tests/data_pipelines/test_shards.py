from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines.shards import ShardReader, expand_braces, expand_shards
from emu2_jax.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("a-{098..100}.tar", ["a-098.tar", "a-099.tar", "a-100.tar"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
    ],
)
def test_braces_expand_in_order(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_globs_are_sorted_and_braces_are_not(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tar"):
        (tmp_path / name).touch()
    assert [Path(p).name for p in expand_shards(f"{tmp_path}/*.tar", "p")] == ["a.tar", "b.tar", "c.tar"]
    assert [Path(p).name for p in expand_shards(f"{tmp_path}/{{c,a}}.tar", "p")] == ["c.tar", "a.tar"]


def test_pattern_errors_name_the_setting(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"data\.sources\.x\.shards: no file matches"):
        expand_shards(f"{tmp_path}/*.zip", "data.sources.x.shards")
    with pytest.raises(DataError, match=r"1\.tar: shard does not exist .*data\.sources\.x\.shards"):
        expand_shards(f"{tmp_path}/{{0..1}}.tar", "data.sources.x.shards")
    with pytest.raises(DataError, match=r"0\.tar: shard is named twice"):
        expand_shards(f"{tmp_path}/{{0,0}}.tar", "data.sources.x.shards")


def test_reader_keeps_few_files_open_under_many_threads(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}") for i in range(20)]
    for i, path in enumerate(paths):
        Path(path).write_bytes(bytes([i]) * 100)
    reader = ShardReader(paths, max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: reader.read(i % 20, 10, 20), range(400)))
    assert read == [bytes([i % 20]) * 20 for i in range(400)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3 + 8
    reader.read(0, 0, 1)
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.tar"
    path.write_bytes(b"x" * 10)
    with pytest.raises(DataError, match=r"short\.tar: ends at byte 10, wanted 8 bytes from byte 5"):
        ShardReader([str(path)]).read(0, 5, 8)
    with pytest.raises(DataError, match=r"gone\.tar: cannot open"):
        ShardReader([str(tmp_path / "gone.tar")]).read(0, 0, 1)
