from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines.batches import PackedBatch
from data_pipelines.pipeline import open_pipeline
from data_pipelines.streaming import StreamPipeline, open_stream
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.tokenizer import Tokenizer


@pytest.fixture
def shards(write_shard: WriteShard, tmp_path: Path) -> Path:
    """Pairs 0 ... 79, each with its own grey, in four shards."""
    for shard in range(4):
        members: list[tuple[str, bytes]] = []
        for i in range(20 * shard, 20 * shard + 20):
            members += [(f"{i:03d}.png", picture(i)), (f"{i:03d}.txt", " ".join(WORDS[: 1 + i % 4]).encode())]
        write_shard(f"pairs-{shard}.tar", members)
    return tmp_path


def _open(
    tokenizer: Tokenizer, shards: str, hosts: int = 1, host: int = 0, sources: Any = None, **settings: Any
) -> StreamPipeline:
    settings = {"row_length": 24, "image_slots": 3, "global_batch_rows": 4, "packing_pool": 8, **settings}
    config = DataConfig(sources=sources or (SourceConfig(name="pairs", kind="image_text", shards=shards),), **settings)
    return open_stream(config, visual_tokens=2, image_size=4, tokenizer=tokenizer, hosts=hosts, host=host)


def _take(pipeline: StreamPipeline, count: int, start: int = 0) -> list[PackedBatch]:
    stream = pipeline.iterate(start)
    batches = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return batches


def _greys(batches: list[PackedBatch]) -> collections.Counter[int]:
    return collections.Counter(
        int(grey) for b in batches for grey in b.fields["images"][b.fields["image_mask"]][:, 0, 0, 0]
    )


def test_samples_come_once_a_pass_in_rows_that_fit(shards: Path, tokenizer: Tokenizer) -> None:
    command = f"pipe:cat {shards}/pairs-{{0..3}}.tar"
    batches = _take(_open(tokenizer, command), 7)
    assert set(_greys(batches).values()) == {1} and sum(_greys(batches).values()) > 60
    for batch in batches:
        fields = batch.fields
        assert (fields["segment_ids"] > 0).any(axis=1).all() and fields["image_mask"].sum(axis=1).max() <= 3
    later = _take(_open(tokenizer, command), 12)
    assert later[-1].epochs == {"pairs": 1} and max(_greys(later).values()) == 2
    assert _greys(later[:7]) == _greys(batches)  # the same from the start, but not from the middle
    again = _take(_open(tokenizer, command), 3, start=4)
    assert [batch.step for batch in again] == [4, 5, 6] and _greys(again) != _greys(batches[4:7])


def test_documents_are_those_of_an_index(shards: Path, tokenizer: Tokenizer) -> None:
    stream = _take(_open(tokenizer, f"pipe:cat {shards}/pairs-0.tar", image_first_probability=1.0), 2)
    source = SourceConfig(name="pairs", kind="image_text", shards=f"{shards}/pairs-0.tar")
    config = DataConfig(sources=(source,), row_length=24, image_slots=3, global_batch_rows=4, image_first_probability=1)
    planned = open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer)

    def documents(batches: list[PackedBatch]) -> set[tuple[int, ...]]:
        found = set()
        for batch in batches:
            for tokens, segments in zip(batch.fields["tokens"], batch.fields["segment_ids"], strict=True):
                found |= {tuple(tokens[segments == n].tolist()) for n in range(1, segments.max() + 1)}
        return found

    assert documents(stream) == documents([planned.batch(step) for step in range(2)])


def test_hosts_read_streams_of_their_own(shards: Path, tokenizer: Tokenizer) -> None:
    command = f"pipe:cat {shards}/pairs-{{0..3}}.tar"
    halves = [_greys(_take(_open(tokenizer, command, 2, host), 6)) for host in range(2)]
    assert not halves[0].keys() & halves[1].keys()
    with pytest.raises(ConfigError, match=r"data\.sources\.pairs\.shards: has fewer streams than there are hosts, 5"):
        _open(tokenizer, command, 5, 4, global_batch_rows=5)


def test_cut_streams_and_failing_commands_are_counted(shards: Path, tokenizer: Tokenizer) -> None:
    cut = shards / "pairs-1.tar"
    cut.write_bytes(cut.read_bytes()[:20000])
    (shards / "pairs-3.tar").unlink()
    command = f"pipe:cat {shards}/pairs-{{0..3}}.tar 2>/dev/null"
    pipeline = _open(tokenizer, command, max_bad_share=0.5)
    greys = _greys(_take(pipeline, 9))
    assert sum(grey < 20 or 40 <= grey < 60 for grey in greys) > 35 and any(20 <= grey < 33 for grey in greys)
    causes = pipeline.counts["pairs"].bad
    assert causes["cut_shard"] >= 2 and causes["failed_command"] >= 1
    joined = _open(tokenizer, f"pipe:cat {shards}/pairs-0.tar {shards}/pairs-2.tar", max_bad_share=0.5)
    assert all(grey < 20 for grey in _greys(_take(joined, 4))) and joined.counts["pairs"].bad["data_after_end"] >= 1
    with pytest.raises(DataError, match=r"data\.sources\.pairs: its streams hold no sample that can be used"):
        _take(_open(tokenizer, "pipe:exit 3"), 1)


def test_what_a_stream_cannot_do_is_said(shards: Path, tokenizer: Tokenizer) -> None:
    pipeline = _open(tokenizer, f"pipe:cat {shards}/pairs-0.tar")
    notes = pipeline.restore(pipeline.state(7))
    assert "begins anew" in notes[0] and pipeline.state()["step"] == 7
    both = (
        SourceConfig(name="pairs", kind="image_text", shards="pipe:cat a.tar"),
        SourceConfig(name="other", kind="text", shards="b.tar"),
    )
    with pytest.raises(ConfigError, match=r"a stream \(pairs\) cannot be mixed with other sources"):
        _open(tokenizer, "", sources=both)
    config = DataConfig(sources=both[:1])
    with pytest.raises(DataError, match=r"data\.sources\.pairs\.shards: a stream .* only be trained on alone"):
        open_pipeline(config, visual_tokens=2, image_size=4, tokenizer=tokenizer)
