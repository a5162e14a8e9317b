"""Shards in an object store, against a server on this machine that speaks S3.

Needs what no run on a disk does, and is skipped without it: `pip install s3fs 'moto[server,s3]'`.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tiny_shards import picture

from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.shards import expand_shards
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer


@pytest.fixture
def name() -> str:
    """Of a bucket: a server's buckets may outlive it."""
    return f"emu2-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket of S3's."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "test")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def put(path: str, url: str) -> None:
    fsspec.filesystem("s3").pipe_file(url, Path(path).read_bytes())


def opened(shards: str, tokenizer: Tokenizer, **settings: Any) -> Pipeline:
    source = SourceConfig(name="s", kind="image_text", shards=shards)
    values = {"row_length": 16, "image_slots": 3, "global_batch_rows": 2, "read_threads": 2, **settings}
    return open_pipeline(DataConfig(sources=(source,), **values), visual_tokens=2, image_size=8, tokenizer=tokenizer)


@pytest.mark.parametrize("settings", [{}, {"shuffle_window": 16, "shuffle_run": 4}], ids=["ranges", "blocks"])
def test_the_bits_are_those_of_local_shards(
    bucket: str, pairs: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Indexed there, found by pattern, the index kept in the bucket; a run of several epochs."""
    for number in range(3):
        put(pairs(f"p-{number}.tar", 20, 20 * number), f"{bucket}/a/p-{number}.tar")
    urls = expand_shards(f"{bucket}/a/p-*.tar", "data.sources.s.shards")
    assert urls == [f"{bucket}/a/p-{number}.tar" for number in range(3)]
    index_dir = f"{bucket}/indexes"
    local = opened(str(tmp_path / "p-*.tar"), tokenizer, **settings)
    there = opened(f"{bucket}/a/p-*.tar", tokenizer, index_dir=index_dir, **settings)
    again = opened(f"{bucket}/a/p-*.tar", tokenizer, index_dir=index_dir, **settings)
    assert len(fsspec.filesystem("s3").ls(index_dir)) == 3
    batches = [pipeline.iterate(0) for pipeline in (local, there, again)]
    for _ in range(40):
        expected, *found = (next(one).fields for one in batches)
        for fields in found:
            assert all(np.array_equal(expected[name], fields[name]) for name in expected)
    assert there.state() == local.state()
    assert there.read_retries == 0
    for one in batches:
        one.close()  # type: ignore[attr-defined]


def test_a_shard_that_is_written_again_is_indexed_again(bucket: str, pairs: Callable[..., str], tmp_path: Path) -> None:
    url, rules = f"{bucket}/p.tar", IndexRules("image_text", None, directory=str(tmp_path / "indexes"))
    put(pairs("p.tar", 5), url)
    before = open_index([url], rules)
    put(pairs("p.tar", 5, 100), url)  # of the same size
    after = open_index([url], dataclasses.replace(rules))
    assert (before.key(0), after.key(0)) == ("0000", "0100")


def test_what_is_not_there_is_named(bucket: str) -> None:
    rules = IndexRules("image_text", None)
    with pytest.raises(DataError, match=r"/a/none\.tar: shard does not exist"):
        open_index([f"{bucket}/a/none.tar"], rules)
    with pytest.raises(DataError, match="no file matches"):
        expand_shards(f"{bucket}/a/none-*.tar", "data.sources.s.shards")


def test_a_foreign_object_is_named(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(3))
    put(str(tmp_path / "x.png"), f"{bucket}/x.tar")
    with pytest.raises(DataError, match=r"/x\.tar"):
        open_index([f"{bucket}/x.tar"], IndexRules("image_text", None, directory=str(tmp_path / "indexes")))
