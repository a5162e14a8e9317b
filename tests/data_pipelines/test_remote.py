from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from range_server import RangeServer
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines import remote as remote_module
from data_pipelines import sources as sources_module
from data_pipelines.index import scan_shard
from data_pipelines.index_files import IndexRules, index_paths, load_index, open_index
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.remote import Patience, Range, RemoteFiles, ShortReadError
from data_pipelines.shards import ShardReader, expand_shards
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

#: Waits of a test: short, but several attempts.
QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.05, timeout_s=0.5)
CONTENT = bytes(range(256)) * 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with RangeServer(tmp_path / "served").running() as running:
        yield running


def _ranges(url: str) -> list[Range]:
    return [Range(url, offset, size) for offset, size in [(0, 10), (5000, 700), (12, 3), (16380, 4), (7, 0)]]


def test_ranges_are_read_and_neighbours_as_one(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_MERGED_GAP_BYTES", 100)
    files = RemoteFiles(QUICK)
    url = f"{server.url}/a.bin"
    assert files.info(url)[0] == len(CONTENT) and '"' in files.info(url)[1]
    server.requests.clear()
    assert files.read_many(_ranges(url)) == [CONTENT[r.offset : r.offset + r.size] for r in _ranges(url)]
    assert sorted((first, last) for _, first, last in server.requests) == [(0, 14), (5000, 5699), (16380, 16383)]
    assert files.retries.total() == 0


@pytest.mark.parametrize(
    ("faults", "errors"),
    [
        (["503", "503"], {"ClientResponseError": 2}),
        (["drop"], {"ClientPayloadError": 1}),
        (["stall"], {"TimeoutError": 1}),
        (["503", "drop", "stall"], {"ClientResponseError": 1, "ClientPayloadError": 1, "TimeoutError": 1}),
    ],
)
def test_failed_reads_are_tried_again_alone_and_counted(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, faults: list[str], errors: dict[str, int]
) -> None:
    monkeypatch.setattr(remote_module, "_MERGED_GAP_BYTES", 100)
    files = RemoteFiles(QUICK)
    url = f"{server.url}/a.bin"
    server.faults += faults
    assert files.read_many(_ranges(url)) == [CONTENT[r.offset : r.offset + r.size] for r in _ranges(url)]
    assert files.retries == errors
    assert len(server.requests) == 3 + len(faults)  # those that were answered are not asked for again


def test_reads_are_given_up_with_url_place_and_cause(server: RangeServer) -> None:
    files = RemoteFiles(QUICK)
    server.faults += ["503"] * 4
    with pytest.raises(DataError, match=r"^http.*/a\.bin: cannot read 5 bytes from byte 7 in 4 attempts: .*503"):
        files.read(f"{server.url}/a.bin", 7, 5)
    with pytest.raises(DataError, match=r"/none\.bin: shard does not exist$"):
        files.read(f"{server.url}/none.bin", 7, 5)
    with pytest.raises(ShortReadError, match=r"/a\.bin: cannot read 100 bytes from byte 16300: got 84"):
        files.read(f"{server.url}/a.bin", 16300, 100)
    server.ranges = False
    with pytest.raises(DataError, match=r"/a\.bin: the server ignores byte ranges; read it as pipe:"):
        files.read(f"{server.url}/a.bin", 7, 5)
    with pytest.raises(DataError, match=r"gs://.* needs another package"):
        files.read("gs://bucket/a.tar", 0, 1)


def test_blocks_are_read_ahead_once(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_CACHE_BLOCK_BYTES", 1000)
    # A machine with other work takes longer than half a second now and then, and what is late is asked for again.
    files = RemoteFiles(dataclasses.replace(QUICK, timeout_s=30), cache_bytes=20_000)
    url = f"{server.url}/a.bin"
    places = [(offset * 331 % 16000, 300) for offset in range(200)]

    def read(place: tuple[int, int]) -> bool:
        return files.read(url, *place) == CONTENT[place[0] : sum(place)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, places))
    fetched = collections.Counter(
        first // 1000 for _, first, last in server.requests for first in range(first, last, 1000)
    )
    assert set(fetched.values()) == {1} and len(fetched) == 17
    with pytest.raises(ShortReadError):
        files.read(url, 16300, 100)
    small = RemoteFiles(QUICK, cache_bytes=2000)
    assert all(small.read(url, *place) == CONTENT[place[0] : sum(place)] for place in places[:50])
    server.faults += ["503"] * 10
    failing = RemoteFiles(QUICK, cache_bytes=20_000)
    with pytest.raises(DataError, match="in 4 attempts"):
        failing.read(url, 0, 10)
    server.faults.clear()
    assert failing.read(url, 0, 10) == CONTENT[:10]  # what failed is not kept


# --- shards -----------------------------------------------------------------------------------------------------------


def _write_shards(write_shard: WriteShard, folder: Path) -> None:
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for i in range(20 * shard, 20 * shard + 20):
            members += [(f"{i:03d}.png", picture(i)), (f"{i:03d}.txt", " ".join(WORDS[: 1 + i % 4]).encode())]
        write_shard(str(folder / f"pairs-{shard}.tar"), members)


def _open(tokenizer: Tokenizer, shards: str, index_dir: Path, **settings: Any) -> Pipeline:
    source = SourceConfig(name="pairs", kind="image_text", shards=shards)
    config = DataConfig(
        sources=(source,), row_length=24, image_slots=3, global_batch_rows=4, packing_pool=16, read_threads=2,
        index_dir=str(index_dir), **settings,
    )  # fmt: skip
    return open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer)


@pytest.mark.parametrize("window", [None, 16])
def test_training_from_a_web_server_gives_the_same_bits(
    server: RangeServer, write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path, window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sources_module, "Patience", lambda **_: QUICK)
    _write_shards(write_shard, tmp_path / "served")
    settings = {"shuffle_window": window, "shuffle_run": 4}
    local = _open(tokenizer, str(tmp_path / "served" / "pairs-*.tar"), tmp_path / "i", **settings)
    far = _open(tokenizer, server.url + "/pairs-{0..2}.tar", tmp_path / "i", **settings)
    far.restore(local.state(0))  # the same data: it may move
    server.faults += ["drop", "503", "503"]
    for ours, theirs in zip(itertools.islice(far.iterate(), 8), local.iterate(), strict=False):
        assert dataclasses.replace(ours, fields={}) == dataclasses.replace(theirs, fields={})
        assert all(np.array_equal(array, theirs.fields[name]) for name, array in ours.fields.items())
    assert far.read_retries == 3


def test_a_shard_is_indexed_in_few_requests(
    server: RangeServer, write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _write_shards(write_shard, tmp_path / "served")
    path, url = str(tmp_path / "served" / "pairs-0.tar"), f"{server.url}/pairs-0.tar"
    far, near = scan_shard(url, "image_text", tokenizer), scan_shard(path, "image_text", tokenizer)
    assert far.digest == near.digest and np.array_equal(far.offsets, near.offsets)
    assert len(server.requests) == 1
    rules = IndexRules("image_text", tokenizer, directory=str(tmp_path / "indexes"))
    open_index([url], rules)
    assert os.listdir(tmp_path / "indexes") and load_index(url, rules) is not None
    os.utime(path, ns=(1, 1))  # another ETag
    fsspec.filesystem("http").invalidate_cache()
    assert load_index(url, rules) is None


def test_memory_shards_with_their_index_beside_them(
    write_shard: WriteShard, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _write_shards(write_shard, tmp_path)
    memory = fsspec.filesystem("memory")
    for shard in range(3):
        memory.pipe(f"/bucket/pairs-{shard}.tar", (tmp_path / f"pairs-{shard}.tar").read_bytes())
    paths = expand_shards("memory://bucket/pairs-*.tar", "data.sources.pairs.shards")
    assert paths == [f"memory:///bucket/pairs-{shard}.tar" for shard in range(3)] or paths == [
        f"memory://bucket/pairs-{shard}.tar" for shard in range(3)
    ]
    rules = IndexRules("image_text", tokenizer)
    index = open_index(paths, rules)
    assert len(index) == 60 and all(memory.exists(index_paths(path, rules)[0]) for path in paths)
    assert load_index(paths[1], rules) is not None
    reader = ShardReader(index.paths)
    ranges = [(int(index.shards[s]), int(index.offsets[2 * s]), int(index.sizes[2 * s])) for s in (3, 47)]
    assert [reader.gather(ranges).read(*r) for r in ranges] == [b"cat dog red blue", b"cat dog red blue"]
    with pytest.raises(DataError, match=r"no file matches 'memory://bucket/none-\*\.tar'"):
        expand_shards("memory://bucket/none-*.tar", "data.sources.pairs.shards")
    memory.rm("/bucket", recursive=True)
