"""A stream that runs for weeks must not grow: neither the process, nor /dev/shm, nor the number of threads."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_shards import WORDS, WriteShard, picture

from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.pipeline import Pipeline, open_pipeline
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.tokenizer import Tokenizer

SIZE = 64  # pixels: a batch of 2 rows with 16 slots holds 393 kB
STEPS_PER_EPOCH = 3  # about: 60 pairs, at most 16 images a row
EPOCHS = 60


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shared_memory() -> set[str]:
    """Blocks of shared memory, and the named semaphores of this process: others' come and go beside this test."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    blocks = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}
    return blocks | set(re.findall(r"/dev/shm/(sem\.\S+)", mapped))


@pytest.fixture
def config(write_shard: WriteShard) -> DataConfig:
    files = [picture(i, 80, "JPEG") for i in range(60)]
    members = [m for i, d in enumerate(files) for m in ((f"{i}.jpg", d), (f"{i}.txt", WORDS[i % 10].encode()))]
    source = SourceConfig(name="pairs", kind="image_text", shards=write_shard("a.tar", members))
    return DataConfig(
        sources=(source,), row_length=160, image_slots=16, global_batch_rows=2, read_threads=2, prefetch_batches=3
    )


def packed(config: DataConfig, tokenizer: Tokenizer) -> Pipeline:
    return open_pipeline(config, visual_tokens=4, image_size=SIZE, tokenizer=tokenizer)


def drawn(config: DataConfig, tokenizer: Tokenizer) -> ImagePipeline:
    return open_image_pipeline(config, image_size=SIZE, batch_images=20, random_scale_max=1.2)


@pytest.mark.parametrize("open_stream", [packed, drawn])
def test_nothing_grows_over_epochs(
    config: DataConfig, tokenizer: Tokenizer, open_stream: Callable[[DataConfig, Tokenizer], Pipeline | ImagePipeline]
) -> None:
    pipeline = open_stream(config, tokenizer)
    threads, shared = threading.active_count(), shared_memory()
    stream = pipeline.iterate()
    for _ in itertools.islice(stream, 10 * STEPS_PER_EPOCH):
        pass
    before = resident_bytes()
    for batch in itertools.islice(stream, EPOCHS * STEPS_PER_EPOCH):
        handed_out = sum(array.nbytes for array in batch.fields.values())
    grown = resident_bytes() - before
    assert max(batch.epochs.values()) >= EPOCHS
    # One batch kept in each epoch would be 60 of them; a few MB come and go with the allocator.
    assert grown < 0.2 * EPOCHS * handed_out, f"{grown:,} bytes in {EPOCHS} epochs"
    assert shared_memory() <= shared
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads, [thread.name for thread in threading.enumerate()]


def test_queue_depth_tells_a_slow_reader_from_a_fast_one(config: DataConfig, tokenizer: Tokenizer) -> None:
    pipeline = packed(config, tokenizer)
    stream = pipeline.iterate()
    next(stream)
    assert pipeline.queue_depth == 0  # nobody had read ahead
    deadline = time.monotonic() + 10
    while pipeline.queue_depth < config.prefetch_batches and time.monotonic() < deadline:
        time.sleep(0.02)  # a slow step
        next(stream)
    assert config.prefetch_batches <= pipeline.queue_depth <= config.prefetch_batches + 1
    stream.close()  # type: ignore[attr-defined]
