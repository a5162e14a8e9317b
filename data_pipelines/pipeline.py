"""Batches by step number: the whole data side behind one function of (config, step).

A step number gives the sources and row numbers it takes (`order.Schedule`), a row number gives an epoch and the
samples of that row (`planning.RowPlan`, over the index), and only then are the bytes of those samples read. So a run
resumes exactly, on any number of hosts and threads; `position.Position` is what a checkpoint keeps of it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from data_pipelines.batches import BatchStream, PackedBatch
from data_pipelines.embedding_store import EmbeddingStore, Settings
from data_pipelines.index import BadSample, SampleIndex
from data_pipelines.interleave import DocumentRules, measure, outline, read_document, read_texts
from data_pipelines.order import Schedule
from data_pipelines.packing import write_document
from data_pipelines.planning import PLANNER, RowLimits, RowPlan
from data_pipelines.position import Identity, Position, Track, digest
from data_pipelines.remote import RemoteFiles
from data_pipelines.shards import ShardReader
from data_pipelines.sources import (
    check_sources,
    open_source,
    open_store,
    remote_files,
    share_of_host,
    store_settings_of,
    summary_of,
    used_sources,
)
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError
from emu2_jax.sequence import RowShape, clear_empty_slots, empty_batch
from emu2_jax.tokenizer import Tokenizer

#: Rules of a document that no row depends on.
_OF_PIXELS = ("image_size", "images")


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


class Pipeline(BatchStream[PackedBatch]):
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
        host: int | Sequence[int],
    ) -> None:
        used = used_sources(config)
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
    def stores(self) -> dict[str, Sequence[EmbeddingStore]]:
        """The embeddings of the sources that have them: one store, of all epochs."""
        return {source.name: [source.store] for source in self._sources if source.store is not None}

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
        return {source.name: summary_of(source.index) for source in self._sources}

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
            return [(source, first + row) for row in share_of_host(total, self._hosts, self._host)]
        total = self._config.global_batch_rows
        turns = [since * total + row for row in share_of_host(total, self._hosts, self._host)]
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
    host: int | Sequence[int] = 0,
    store_settings: Settings | None = None,
) -> Pipeline:
    """Opens every source of `config`, building indexes that are missing, for rows with N = `visual_tokens`.

    `store_settings` are those that the embeddings of a source must have been made with, where it names any.
    Host number `host` of `hosts` gets its contiguous share of every global batch, or several of them. Raises
    `ConfigError` for settings that do not go together and `DataError` for missing, cut or foreign shards, before
    anything is trained.
    """
    check_sources(config.sources)
    shapes = {}
    rows = {}
    for source in used_sources(config):
        shape = _row_shape(config, source, visual_tokens, image_size)
        shapes[source.name] = _with_embeddings(config, source, shape, store_settings)
        rows[source.name] = _rows_of_source(config, source, hosts)
    remote = remote_files(config)
    sources = []
    for source in used_sources(config):
        index = open_source(config, source, tokenizer)
        store = open_store(source, index, store_settings)
        sources.append(_PackedSource(config, source, index, tokenizer, shapes[source.name], remote, store))
    return Pipeline(config, sources, rows=rows, tokenizer=tokenizer, remote=remote, hosts=hosts, host=host)


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
    stored = [one.name for one in used_sources(config) if one.embeddings is not None]
    pixels = [one.name for one in used_sources(config) if one.embeddings is None and one.kind != "text"]
    if config.mixing == "mixed" and stored and pixels:
        raise ConfigError(
            f"data.sources.{pixels[0]}.embeddings: not set, while {stored[0]} has them; in a mixed batch every source "
            "of images has embeddings or none has (or take data.mixing = one_source_per_step)"
        )
    if config.mixing == "mixed" or source.kind == "text":
        embedded = bool(stored) and not pixels  # the empty slots of a text need no encoder either
    else:
        embedded = source.embeddings is not None
    width = int(store_settings_of(store_settings, stored[0])["width"]) if embedded else None
    return dataclasses.replace(shape, embedding_width=width)


def _rows_of_source(config: DataConfig, source: SourceConfig, hosts: int) -> int:
    path, rows = "data.global_batch_rows", config.global_batch_rows
    if source.batch_rows is not None:
        path, rows = f"data.sources.{source.name}.batch_rows", source.batch_rows
        if config.mixing == "mixed":
            raise ConfigError(f"{path}: is for data.mixing = one_source_per_step; got mixed")
    if rows < 1 or rows % hosts:
        raise ConfigError(f"{path}: got {rows}; wanted a positive multiple of the number of hosts, {hosts}")
    return rows
