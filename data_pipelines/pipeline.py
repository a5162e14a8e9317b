"""Batches by step number: the whole data side behind one function of (config, step).

A step number gives the sources and row numbers it takes (`order.Schedule`), a row number gives an epoch and the
samples of that row (`planning.RowPlan`, over the index), and only then are the bytes of those samples read. So a run
resumes exactly, on any number of hosts and threads; `position.Position` is what a checkpoint keeps of it.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from jaxtyping import Int64, UInt8

from data_pipelines import samples as samples_
from data_pipelines.embedding_store import EMBEDDINGS, LATENT, TIME_IDS, EmbeddingStore, Settings
from data_pipelines.images import RELEASE_RULES, Crop, ImageRules, decode_crop, decode_image
from data_pipelines.index import BadSample, SampleIndex, scan_shard
from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.interleave import DocumentRules, measure, outline, read_document, read_texts
from data_pipelines.kinds import SampleError
from data_pipelines.order import Schedule, stream_seed, uniforms
from data_pipelines.packing import write_document
from data_pipelines.planning import PLANNER, RowLimits, RowPlan, SampleOrder
from data_pipelines.position import Identity, Position, Track, digest
from data_pipelines.remote import Patience, RemoteFiles
from data_pipelines.samples import SampleCounts
from data_pipelines.shards import ShardReader, expand_shards
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.sequence import RowShape, clear_empty_slots, empty_batch
from emu2_jax.tokenizer import Tokenizer

_LAST_STEP = 1 << 60  # streams do not end

#: Rules of a document that no row depends on.
_OF_PIXELS = ("image_size", "images")


# --- batches ---------------------------------------------------------------------------------------------------------


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
    bad: tuple[BadSample, ...]


_Batch = TypeVar("_Batch", PackedBatch, ImageBatch)


class _Stream(abc.ABC, Generic[_Batch]):
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


# --- rows of one source ----------------------------------------------------------------------------------------------


class _PackedSource:
    """One source: its index, its rows by number over all epochs, and how they are filled."""

    def __init__(
        self,
        config: DataConfig,
        source: SourceConfig,
        index: SampleIndex,
        tokenizer: Tokenizer,
        shape: RowShape,
        remote: RemoteFiles,
        store: EmbeddingStore | None,
    ) -> None:
        self.name = source.name
        self.index = index
        self.shape = shape
        self.store = store
        self._reader = ShardReader(index.paths, remote=remote)
        self._tokenizer = tokenizer
        rules = self._rules = DocumentRules.of(config, source, shape)
        limits = RowLimits(shape.length, shape.image_slots, config.packing_pool)
        self.plan = RowPlan(
            source.name,
            config.seed,
            len(index),
            lambda samples, seed: measure(index, samples, rules, seed),  # no method: a cycle would keep shards open
            limits,
            shuffle_window=config.shuffle_window,
            shuffle_run=config.shuffle_run,
        )
        lengths = hashlib.sha256(np.ascontiguousarray(index.tokens).tobytes()).hexdigest()
        order = config.seed, config.shuffle_window, config.shuffle_window and config.shuffle_run
        self.identity = Identity(
            data=digest(index.digest, lengths),
            rules=digest(
                {name: v for name, v in vars(rules).items() if name not in _OF_PIXELS}, limits, order, PLANNER
            ),
            shards=len(index.paths),
            samples=len(index),
        )

    @property
    def rules(self) -> DocumentRules:
        """What decides the shape of its documents."""
        return self._rules

    def fill_row(
        self, fields: Mapping[str, np.ndarray], row: int, samples: Sequence[int], order_seed: int
    ) -> tuple[int, int, list[BadSample]]:
        """Writes the documents of `samples` into a row; number of documents, of cut ones, and the bad samples.

        A sample that cannot be used leaves its place in the row empty, so that the plan of the row holds.
        """
        start = slot = num_documents = num_cut = 0
        bad: list[BadSample] = []
        index = self.index
        plans = [outline(index, sample, self._rules, order_seed) for sample in samples]
        reader = self._reader.gather(
            [
                (int(index.shards[sample]), int(index.offsets[part]), int(index.sizes[part]))
                for sample, plan in zip(samples, plans, strict=True)
                for part in plan.parts
                if self.store is None or not index.is_image[part]
            ]
        )
        parts_of_data = (index, reader, self._tokenizer)
        texts = [
            read_texts(*parts_of_data, sample, plan, self._rules) for sample, plan in zip(samples, plans, strict=True)
        ]
        for sample, plan, ids in zip(samples, plans, texts, strict=True):
            document, unusable = read_document(*parts_of_data, sample, plan, self._rules, ids, self.store)
            bad += [dataclasses.replace(one, source=self.name) for one in unusable]
            if document is not None:
                num_documents += 1
                num_cut += plan.is_cut
                write_document(fields, self.shape, document, row=row, start=start, segment=num_documents, slot=slot)
            start += plan.length
            slot += plan.num_images
        return num_documents, num_cut, bad


# --- pretraining -----------------------------------------------------------------------------------------------------


class Pipeline(_Stream[PackedBatch]):
    """Packed batches of interleaved documents; made by `open_pipeline`."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[_PackedSource],
        *,
        rows: Mapping[str, int],
        tokenizer: Tokenizer,
        remote: RemoteFiles,
        hosts: int,
        host: int,
    ) -> None:
        used = _used(config)
        turns = config.mixing, config.global_batch_rows if config.mixing == "mixed" else tuple(rows.values())
        position = Position(
            [Track(source.name, source.identity, source.plan) for source in sources],
            schedule=digest(turns, [(source.name, source.weight) for source in used]),
            tokenizer=tokenizer.fingerprint,
        )
        super().__init__(config, position, remote)
        self._sources = sources
        self._rows = rows  # of the global batch, when the step draws from this source
        self._pad_id = tokenizer.pad_id
        self._schedule = Schedule([source.weight for source in used])
        self._hosts, self._host = hosts, host

    @property
    def indexes(self) -> dict[str, SampleIndex]:
        """The index of each source."""
        return {source.name: source.index for source in self._sources}

    @property
    def stores(self) -> dict[str, EmbeddingStore]:
        """The embeddings of the sources that have them."""
        return {source.name: source.store for source in self._sources if source.store is not None}

    def measure(self, name: str, samples: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Positions and images that the documents of some samples of source `name` take, from the index alone."""
        source = next(source for source in self._sources if source.name == name)
        return measure(source.index, samples, source.rules, self._config.seed)

    @property
    def row_shapes(self) -> dict[str, tuple[int, RowShape]]:
        """Global rows of a step and shape of a row, by the source of the step ("mixed" where a step has them all).

        Each different value is one compilation of the training step.
        """
        if self._config.mixing == "mixed":
            return {"mixed": (self._config.global_batch_rows, self._sources[0].shape)}
        return {source.name: (self._rows[source.name], source.shape) for source in self._sources}

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """For each source: shards, samples, and how many were left out when the index was built, by cause."""
        return {source.name: _summary(source.index) for source in self._sources}

    def _rows_in(self, steps: int, source: int) -> int:
        if self._config.mixing == "one_source_per_step":
            return self._schedule.turns_before(steps, source) * self._rows[self._sources[source].name]
        return self._schedule.turns_before(steps * self._config.global_batch_rows, source)

    def rows_of_step(self, step: int) -> list[tuple[int, int]]:
        """(source, row number within the source) of every row of this host; from the step number alone."""
        since = step - self._position.since
        if self._config.mixing == "one_source_per_step":
            source = self._schedule.source(since)
            first = self._position.start(source) + self._rows_in(since, source)
            total = self._rows[self._sources[source].name]
            return [(source, first + row) for row in _slice(total, self._hosts, self._host)]
        total = self._config.global_batch_rows
        turns = [since * total + row for row in _slice(total, self._hosts, self._host)]
        sources = [self._schedule.source(turn) for turn in turns]
        return [
            (source, self._position.start(source) + self._schedule.turns_before(turn, source))
            for source, turn in zip(sources, turns, strict=True)
        ]

    def batch(self, step: int) -> PackedBatch:
        """The packed rows of a step on this host. Raises `DataError` when a shard cannot be read."""
        rows = self.rows_of_step(step)
        shape = self._sources[rows[0][0]].shape
        fields = empty_batch(len(rows), shape, self._pad_id, clear_slots=False)
        epochs: dict[str, int] = {}
        samples: collections.Counter[str] = collections.Counter()
        bad: list[BadSample] = []
        num_documents = num_cut = 0
        for i, (number, row) in enumerate(rows):
            source = self._sources[number]
            epoch, order_seed, members = source.plan.locate(row)
            documents, cut, unusable = source.fill_row(fields, i, members.tolist(), order_seed)
            epochs[source.name] = max(epoch, epochs.get(source.name, 0))
            samples[source.name] += len(members)
            num_documents += documents
            num_cut += cut
            bad += unusable
        clear_empty_slots(fields)
        names = tuple(self._sources[number].name for number, _ in rows)
        return PackedBatch(step, fields, names, epochs, dict(samples), num_documents, num_cut, tuple(bad))


def open_pipeline(
    config: DataConfig,
    *,
    visual_tokens: int,
    image_size: int,
    tokenizer: Tokenizer,
    hosts: int = 1,
    host: int = 0,
    store_settings: Settings | None = None,
) -> Pipeline:
    """Opens every source of `config`, building indexes that are missing, for rows with N = `visual_tokens`.

    `store_settings` are those that the embeddings of a source must have been made with, where it names any.
    Host number `host` of `hosts` gets its contiguous share of every global batch. Raises `ConfigError` for settings
    that do not go together and `DataError` for missing, cut or foreign shards, before anything is trained.
    """
    _check_sources(config, config.sources)
    shapes = {}
    rows = {}
    for source in _used(config):
        shape = _row_shape(config, source, visual_tokens, image_size)
        shapes[source.name] = _with_embeddings(config, source, shape, store_settings)
        rows[source.name] = _rows_of_source(config, source, hosts)
    remote = _remote_files(config)
    sources = []
    for source in _used(config):
        index = open_source(config, source, tokenizer)
        store = _open_store(source, index, store_settings)
        sources.append(_PackedSource(config, source, index, tokenizer, shapes[source.name], remote, store))
    return Pipeline(config, sources, rows=rows, tokenizer=tokenizer, remote=remote, hosts=hosts, host=host)


def _remote_files(config: DataConfig) -> RemoteFiles:
    # Neighbours are worth keeping only where they come soon.
    return RemoteFiles(_patience(config), cache_bytes=config.read_ahead_mb << 20 if config.shuffle_window else 0)


def _patience(config: DataConfig) -> Patience:
    return Patience(attempts=config.read_attempts, timeout_s=config.read_timeout_s)


def _used(config: DataConfig) -> list[SourceConfig]:
    return [source for source in config.sources if source.weight > 0]


def _check_sources(config: DataConfig, sources: Sequence[SourceConfig]) -> None:
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources: names must be unique; got {', '.join(names)}")
    for source in sources:
        if source.weight < 0:
            raise ConfigError(f"data.sources.{source.name}.weight: got {source.weight:g}; wanted 0 or more")
    if not any(source.weight > 0 for source in sources):
        raise ConfigError("data.sources: no source has a weight above 0")


def _row_shape(config: DataConfig, source: SourceConfig, visual_tokens: int, image_size: int) -> RowShape:
    own = source.max_document_positions
    limit = config.max_document_positions if own is None else own
    limited_by = "data.max_document_positions" if own is None else f"data.sources.{source.name}.max_document_positions"
    if limit is not None and not 2 < limit <= config.row_length:
        raise ConfigError(f"{limited_by}: got {limit}; wanted 3 ... data.row_length = {config.row_length}")
    if config.mixing == "mixed" and source.image_slots is not None:
        raise ConfigError(
            f"data.sources.{source.name}.image_slots: is for data.mixing = one_source_per_step; "
            "rows of a mixed batch all have data.image_slots"
        )
    slots = config.image_slots if source.image_slots is None else source.image_slots
    if source.kind == "text":
        return RowShape(config.row_length, slots, visual_tokens, image_size)
    path = "data.image_slots" if source.image_slots is None else f"data.sources.{source.name}.image_slots"
    if slots < 1:
        raise ConfigError(f"{path}: got {slots}, but source {source.name!r} has images; wanted 1 or more")
    if source.kind == "video_text":
        _check_video(source, slots, limit or config.row_length, visual_tokens)
    if (limit or config.row_length) < visual_tokens + 3:
        path = "data.row_length" if limit is None else limited_by
        wanted = f"at least {visual_tokens + 3}: <s> and an image of {visual_tokens} positions with [IMG] and [/IMG]"
        raise ConfigError(f"{path}: got {limit or config.row_length}; wanted {wanted}")
    return RowShape(config.row_length, slots, visual_tokens, image_size)


def _check_video(source: SourceConfig, slots: int, room: int, visual_tokens: int) -> None:
    """A video goes into a document whole or not at all, so one that never fits is a mistake."""
    path, frames = f"data.sources.{source.name}.video_frames", source.video_frames
    if not 1 <= frames <= slots:
        raise ConfigError(f"{path}: got {frames}; wanted 1 to the {slots} image slots of a row")
    needed = 3 + frames * (visual_tokens + 2)  # <s> [VIDEO] ... </s>
    if room < needed:
        raise ConfigError(f"{path}: {frames} frames take {needed} positions; a document has {room}")


def _with_embeddings(
    config: DataConfig, source: SourceConfig, shape: RowShape, store_settings: Settings | None
) -> RowShape:
    """The shape of a row whose slots hold embeddings, if they do. The rows of one batch have one shape."""
    stored = [one.name for one in _used(config) if one.embeddings is not None]
    pixels = [one.name for one in _used(config) if one.embeddings is None and one.kind != "text"]
    if config.mixing == "mixed" and stored and pixels:
        raise ConfigError(
            f"data.sources.{pixels[0]}.embeddings: not set, while {stored[0]} has them; in a mixed batch every source "
            "of images has embeddings or none has (or take data.mixing = one_source_per_step)"
        )
    if config.mixing == "mixed" or source.kind == "text":
        embedded = bool(stored) and not pixels  # the empty slots of a text need no encoder either
    else:
        embedded = source.embeddings is not None
    width = int(_needed(store_settings, stored[0])["width"]) if embedded else None
    return dataclasses.replace(shape, embedding_width=width)


def _needed(settings: Settings | None, source: str) -> Settings:
    if settings is None:
        raise ConfigError(f"data.sources.{source}.embeddings: this command reads pixels; unset it")
    return settings


def _open_store(source: SourceConfig, index: SampleIndex, store_settings: Settings | None) -> EmbeddingStore | None:
    if source.embeddings is None:
        return None
    path = f"data.sources.{source.name}.embeddings"
    return EmbeddingStore(source.embeddings, index, _needed(store_settings, source.name), path)


def _rows_of_source(config: DataConfig, source: SourceConfig, hosts: int) -> int:
    path, rows = "data.global_batch_rows", config.global_batch_rows
    if source.batch_rows is not None:
        path, rows = f"data.sources.{source.name}.batch_rows", source.batch_rows
        if config.mixing == "mixed":
            raise ConfigError(f"{path}: is for data.mixing = one_source_per_step; got mixed")
    if rows < 1 or rows % hosts:
        raise ConfigError(f"{path}: got {rows}; wanted a positive multiple of the number of hosts, {hosts}")
    return rows


def open_source(
    config: DataConfig, source: SourceConfig, tokenizer: Tokenizer | None, *, processes: int = 1
) -> SampleIndex:
    """The index of a source, built where it is missing, on `processes` cores if more than one.

    Raises `DataError` for shards that are missing or, unless they are to be salvaged, damaged; when more samples are
    bad than `data.max_bad_share` allows; and when none is left.
    """
    paths = expand_shards(source.shards, f"data.sources.{source.name}.shards")
    rules = IndexRules(
        source.kind,
        tokenizer,
        salvage=config.damaged_shards == "salvage",
        caption=source.caption,
        patience=_patience(config),
        directory=config.index_dir,
    )
    index = open_index(paths, rules, threads=config.read_threads, processes=processes)
    where = f"data.sources.{source.name}"
    if index.bad:
        found = SampleCounts()
        found.add(len(index) + len(index.bad), index.bad)
        found.lose(_lost(index))
        found.check(config.max_bad_share, index.bad[0], where)
    if not len(index):
        raise DataError(f"{where}: none of its samples can be used; for example {index.bad[0]}")
    return index


def _lost(index: SampleIndex) -> int:
    """An estimate of the samples in shards of which nothing is left: as many as in the others."""
    empty = len(index.paths) - len(np.unique(index.shards))
    return round(empty * len(index) / max(1, len(index.paths) - empty))


def _summary(index: SampleIndex) -> dict[str, int]:
    causes = collections.Counter(bad.cause for bad in index.bad)
    return {"shards": len(index.paths), "samples": len(index), **causes}


def _slice(total: int, hosts: int, host: int) -> range:
    return range(total * host // hosts, total * (host + 1) // hosts)


# --- the visual decoder ----------------------------------------------------------------------------------------------


class ImagePipeline(_Stream[ImageBatch]):
    """Randomly scaled square crops of the pictures of image-text sources; made by `open_image_pipeline`."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[tuple[str, SampleIndex]],
        stores: Mapping[str, EmbeddingStore],
        weights: Sequence[float],
        *,
        image_size: int,
        batch_images: int,
        random_scale_max: float,
        hosts: int,
        host: int,
    ) -> None:
        remote = _remote_files(config)
        window, run = config.shuffle_window, config.shuffle_run
        names = [name for name, _ in sources]
        self._orders = [
            SampleOrder(name, config.seed, len(index), shuffle_window=window, shuffle_run=run)
            for name, index in sources
        ]
        rules = digest(config.seed, window, window and run)
        identities = [Identity(index.digest, rules, len(index.paths), len(index)) for _, index in sources]
        position = Position(
            [Track(*track) for track in zip(names, identities, self._orders, strict=True)],
            schedule=digest(batch_images, list(zip(names, weights, strict=True))),
            tokenizer="",
        )
        super().__init__(config, position, remote)
        self._sources = [(name, index, ShardReader(index.paths, remote=remote)) for name, index in sources]
        #: The embeddings and latents of the sources, of all or of none.
        self.stores = stores
        self._schedule = Schedule(weights)
        self._image_size = image_size
        self._batch_images = batch_images
        self._random_scale_max = random_scale_max
        self._share = _slice(batch_images, hosts, host)

    @property
    def indexes(self) -> dict[str, SampleIndex]:
        """The index of each source."""
        return {name: index for name, index, _ in self._sources}

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """For each source: shards, samples, and how many were left out when the index was built, by cause."""
        return {name: _summary(index) for name, index, _ in self._sources}

    def _rows_in(self, steps: int, source: int) -> int:
        return self._schedule.turns_before(steps * self._batch_images, source)

    def first_crop(self, name: str, sample: int) -> Crop:
        """The crop of a sample of source `name` in the first epoch. Raises `SampleError`."""
        number = next(i for i, source in enumerate(self._sources) if source[0] == name)
        return self._crop(number, self._sources[number][2], 0, sample)

    def _sample(self, turn: int) -> tuple[int, int, int]:
        """Source, epoch and sample of image number `turn` of the schedule."""
        source = self._schedule.source(turn)
        number = self._position.start(source) + self._schedule.turns_before(turn, source)
        return source, *self._orders[source].locate(number)

    def _crop(self, source: int, reader: ShardReader, epoch: int, sample: int) -> Crop:
        name, index, _ = self._sources[source]
        part = _image_part(index, sample)
        data = samples_.read_part(reader, index, sample, part)
        seeds = [stream_seed(self._config.seed, name, epoch, draw) for draw in ("scale", "top", "left")]
        scale, top, left = (float(uniforms(seed, np.array([sample]))[0]) for seed in seeds)
        factor = 1 + scale * (self._random_scale_max - 1)
        return decode_crop(data, self._image_size, factor, top, left, ImageRules.of(self._config))

    def batch(self, step: int) -> ImageBatch:
        """The crops of a step on this host; an image that cannot be used is zeros with weight 0.

        Where they were encoded beforehand, embeddings and latents of the first epoch's crops stand in for the pixels.
        """
        fields = self._empty_fields()
        names: list[str] = []
        epochs: dict[str, int] = {}
        bad: list[BadSample] = []
        num_upscaled = 0
        first = (step - self._position.since) * self._batch_images
        drawn = [self._sample(first + turn) for turn in self._share]
        readers = [self._gather(source, drawn) for source in range(len(self._sources))]
        for i, (source, epoch, sample) in enumerate(drawn):
            name, index, _ = self._sources[source]
            names.append(name)
            epochs[name] = max(epoch, epochs.get(name, 0))
            try:
                values = self._values(source, readers[source], epoch, sample)
            except SampleError as error:
                found = index.bad_sample(sample, _image_part(index, sample), error)
                bad.append(dataclasses.replace(found, source=name))
                continue
            for field, value in values.items():
                fields[field][i] = value
            fields["weight"][i] = 1.0
            num_upscaled += int(min(values["time_ids"][:2]) < self._image_size)
        samples = dict(collections.Counter(names))
        return ImageBatch(step, fields, tuple(names), epochs, samples, num_upscaled, tuple(bad))

    def _gather(self, source: int, drawn: Sequence[tuple[int, int, int]]) -> ShardReader:
        _, index, reader = self._sources[source]
        parts = [(s, _image_part(index, s)) for number, _, s in drawn if number == source and not self.stores]
        ranges = [(int(index.shards[s]), int(index.offsets[part]), int(index.sizes[part])) for s, part in parts]
        return reader.gather(ranges)

    def _empty_fields(self) -> dict[str, np.ndarray]:
        count, size = len(self._share), self._image_size
        sizes = {"time_ids": np.zeros((count, 6), np.int32), "weight": np.zeros(count, np.float32)}
        if not self.stores:
            return {"images": np.zeros((count, size, size, 3), np.uint8), **sizes}
        members = {member.suffix: member for member in next(iter(self.stores.values())).members}
        stored = {
            field: np.zeros((count, *members[suffix].shape), members[suffix].numpy_dtype)
            for field, suffix in (("embeddings", EMBEDDINGS), ("latents", LATENT))
        }
        return {**stored, **sizes}

    def _values(self, source: int, reader: ShardReader, epoch: int, sample: int) -> dict[str, np.ndarray]:
        """What an image puts into the fields of a batch."""
        name, index, _ = self._sources[source]
        if not self.stores:
            crop = self._crop(source, reader, epoch, sample)
            return {"images": crop.image, "time_ids": crop.time_ids}
        record = self.stores[name].read(sample, _image_part(index, sample))
        return {"embeddings": record[EMBEDDINGS], "latents": record[LATENT], "time_ids": record[TIME_IDS]}


def open_image_pipeline(
    config: DataConfig,
    *,
    image_size: int,
    batch_images: int,
    random_scale_max: float,
    tokenizer: Tokenizer | None = None,
    hosts: int = 1,
    host: int = 0,
    store_settings: Settings | None = None,
) -> ImagePipeline:
    """Opens the image-text sources of `config` for the visual decoder; sources of other kinds are left aside.

    A tokenizer is not needed; with one, indexes are built so that pretraining finds them ready. Raises as
    `open_pipeline`.
    """
    pairs = [source for source in config.sources if source.kind == "image_text"]
    if not pairs:
        raise ConfigError("data.sources: the decoder trains on sources of kind image_text; there is none")
    _check_sources(config, pairs)
    if batch_images < 1 or batch_images % hosts:
        raise ConfigError(
            f"decoder.batch_images: got {batch_images}; wanted a positive multiple of the number of hosts, {hosts}"
        )
    if random_scale_max < 1:
        raise ConfigError(f"decoder.random_scale_max: got {random_scale_max:g}; wanted 1 or more")
    used = [source for source in pairs if source.weight > 0]
    if len({source.embeddings is None for source in used}) > 1:
        without = next(source.name for source in used if source.embeddings is None)
        raise ConfigError(f"data.sources.{without}.embeddings: not set; of the decoder's sources all have them or none")
    indexes = {source.name: open_source(config, source, tokenizer) for source in used}
    stores: dict[str, EmbeddingStore] = {}
    for source in used:
        settings = store_settings and {**store_settings, "source": source.name}
        store = _open_store(source, indexes[source.name], settings)
        stores |= {} if store is None else {source.name: store}
    return ImagePipeline(
        config,
        list(indexes.items()),
        stores,
        [source.weight for source in used],
        image_size=image_size,
        batch_images=batch_images,
        random_scale_max=random_scale_max,
        hosts=hosts,
        host=host,
    )


def _image_part(index: SampleIndex, sample: int) -> int:
    return int(index.starts[sample]) + 1  # an image-text sample is stored as text, image


# --- evaluation ------------------------------------------------------------------------------------------------------


def read_pairs(
    pattern: str,
    image_size: int,
    num: int,
    config_path: str = "evaluation.scenes",
    images: ImageRules = RELEASE_RULES,
) -> list[tuple[str, UInt8[np.ndarray, "S S 3"], str]]:
    """Key, image and caption of the first `num` image-text pairs of the shards, in their order; fewer if there are.

    Held-out pairs decide what is reported, so a bad one raises `DataError` instead of being skipped.
    """
    pairs: list[tuple[str, np.ndarray, str]] = []
    for path in expand_shards(pattern, config_path):
        if len(pairs) >= num:
            break
        index = scan_shard(path, "image_text", tokenizer=None)
        if index.bad:
            raise DataError(str(index.bad[0]))
        reader = ShardReader(index.paths)
        for sample in range(min(len(index), num - len(pairs))):
            pairs.append(_read_pair(index, reader, sample, image_size, images))
        reader.close()
    return pairs


def _read_pair(
    index: SampleIndex, reader: ShardReader, sample: int, image_size: int, images: ImageRules
) -> tuple[str, np.ndarray, str]:
    part = int(index.starts[sample])
    try:
        caption = samples_.read_text(reader, index, sample, part)
        part = _image_part(index, sample)
        image = decode_image(samples_.read_part(reader, index, sample, part), image_size, images)
    except SampleError as error:
        raise DataError(str(index.bad_sample(sample, part, error))) from error
    return index.key(sample), image, caption
