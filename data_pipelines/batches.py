"""Batches by step number, whatever they hold: read ahead by threads, counted, and resumed at a position."""

from __future__ import annotations

import abc
import collections
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from data_pipelines.index import BadSample
from data_pipelines.position import Position
from data_pipelines.remote import RemoteFiles
from data_pipelines.samples import SampleCounts
from emu2_jax.config import DataConfig

_LAST_STEP = 1 << 60  # streams do not end


@dataclass(frozen=True)
class PackedBatch:
    """This host's rows of one step, and what went into them."""

    step: int
    fields: dict[str, np.ndarray]  # emu2_jax.sequence.FIELDS
    sources: tuple[str, ...]  # name of the source of each row
    epochs: dict[str, int]  # of each source in `sources`: the furthest epoch that a row came from
    samples: dict[str, int]  # that went in, by source
    num_documents: int  # samples less those that could not be used
    num_cut: int  # documents that did not fit whole
    bad: tuple[BadSample, ...]

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(self.samples.values())


@dataclass(frozen=True)
class ImageBatch:
    """This host's images of one decoder step."""

    step: int
    fields: dict[str, np.ndarray]  # images uint8 [B S S 3], time_ids int32 [B 6], weight float32 [B]: 0 = no image
    sources: tuple[str, ...]  # name of the source of each image
    epochs: dict[str, int]
    samples: dict[str, int]
    num_upscaled: int  # images whose short side is less than the target's
    num_small: int  # images left out, with weight 0, because a side is shorter than decoder.min_image_side
    bad: tuple[BadSample, ...]


_Batch = TypeVar("_Batch", PackedBatch, ImageBatch)


class BatchStream(abc.ABC, Generic[_Batch]):
    """Batches by step number, read ahead by threads, with a ceiling on bad samples."""

    def __init__(self, config: DataConfig, position: Position, reader: RemoteFiles) -> None:
        self._config = config
        self._position = position
        self._remote = reader
        self._next_step = 0
        #: Samples handed out so far and the bad ones among them, on this host, by source.
        self.counts: collections.defaultdict[str, SampleCounts] = collections.defaultdict(SampleCounts)
        #: Batches that lay ready when the last one was asked for: 0 again and again means that the reader is too slow.
        self.queue_depth = 0
        self._num_built = 0
        self._built = threading.Lock()

    def _build(self, step: int) -> _Batch:
        batch = self.batch(step)
        with self._built:
            self._num_built += 1
        return batch

    @abc.abstractmethod
    def batch(self, step: int) -> _Batch:
        """The batch of a step; the same bits whenever, and in whatever order, it is asked for."""

    @abc.abstractmethod
    def _rows_in(self, steps: int, source: int) -> int:
        """Rows (or images) that a source gives in the first `steps` steps of the schedule."""

    @property
    def read_retries(self) -> int:
        """Reads behind URLs that failed on this host and were tried again."""
        return self._remote.retries.total()

    def iterate(self, start_step: int = 0) -> Iterator[_Batch]:
        """The batches from `start_step` on, without end, read ahead by `data.read_threads` threads.

        Counts each batch as it is handed out. Raises `DataError` when more samples of a source are bad than
        `data.max_bad_share` allows, or when a shard can no longer be read.
        """
        ahead = self._config.prefetch_batches if self._config.read_threads else 0
        options = grain.ReadOptions(num_threads=min(self._config.read_threads, ahead), prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(start_step, _LAST_STEP)
        batches = iter(steps.map(self._build).to_iter_dataset(options))
        taken = self._num_built
        try:
            # A batch is one element of the chain, so that its content cannot depend on the threads. After an error
            # Grain would go on with the next element; the error leaves this generator and so ends it.
            while True:
                self.queue_depth = self._num_built - taken
                batch = next(batches)
                taken += 1
                self._count(batch)
                self._next_step = batch.step + 1
                yield batch
        finally:
            batches.close()

    def _count(self, batch: _Batch) -> None:
        bad: dict[str, list[BadSample]] = collections.defaultdict(list)
        for sample in batch.bad:
            bad[sample.source].append(sample)
        for name, seen in batch.samples.items():
            self.counts[name].add(seen, bad[name])
            if bad[name]:
                self.counts[name].check(self._config.max_bad_share, bad[name][0], f"data.sources.{name}")

    def state(self, step: int | None = None) -> dict[str, Any]:
        """The position before `step` (the one after the last batch handed out), the same on all hosts (JSON)."""
        step = self._next_step if step is None else step
        since = step - self._position.since
        return self._position.state(
            step, [self._rows_in(since, source) for source in range(self._position.num_sources)]
        )

    def restore(self, state: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
        """Goes on from a saved position, on any number of hosts; a line for everything that is not as it was.

        `allowed` are the settings that may have changed; see `Position.restore`. Raises `DataError`.
        """
        notes = self._position.restore(state, allowed)
        self._next_step = state["step"]
        return notes
