"""Batches by step number: the whole data side behind one function of (config, step).

The position in the data is the step number and nothing else. A step number gives the sources and row numbers it takes
(`order.Schedule`), a row number gives an epoch and the samples of that row (a plan over the index), and only then are
the bytes of those samples read. So a run resumes exactly, on any number of hosts and threads.
"""

from __future__ import annotations

import abc
import collections
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import grain
import numpy as np
from jaxtyping import Int64, UInt8

from data_pipelines import samples as samples_
from data_pipelines.index import BadSample, SampleIndex, open_index, scan_shard
from data_pipelines.interleave import DocumentRules, measure, outline, read_document
from data_pipelines.kinds import SampleError
from data_pipelines.order import Schedule, permutation, stream_seed, uniforms
from data_pipelines.packing import plan_rows, write_document
from data_pipelines.samples import SampleCounts
from data_pipelines.shards import ShardReader, expand_shards
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.sequence import RowShape, empty_batch
from emu2_jax.tokenizer import Tokenizer

_PLANNED_AT_ONCE = 4096  # samples whose lengths are worked out together
_EPOCHS_KEPT = 2  # plans in memory: read-ahead threads straddle the end of an epoch
_LAST_STEP = 1 << 60  # streams do not end


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedBatch:
    """This host's rows of one step, and what went into them."""

    step: int
    fields: dict[str, np.ndarray]  # emu2_jax.sequence.FIELDS
    sources: tuple[str, ...]  # name of the source of each row
    epochs: dict[str, int]  # of each source in `sources`: the furthest epoch that a row came from
    num_samples: int
    num_documents: int  # samples less those that could not be used
    num_cut: int  # documents that did not fit whole
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class ImageBatch:
    """This host's images of one decoder step."""

    step: int
    fields: dict[str, np.ndarray]  # images uint8 [B S S 3], time_ids int32 [B 6], weight float32 [B]: 0 = no image
    sources: tuple[str, ...]  # name of the source of each image
    epochs: dict[str, int]
    num_samples: int
    num_upscaled: int  # images whose short side is less than the target's
    bad: tuple[BadSample, ...]


_Batch = TypeVar("_Batch", PackedBatch, ImageBatch)


class _Stream(abc.ABC, Generic[_Batch]):
    """Batches by step number, read ahead by threads, with a ceiling on bad samples."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        #: Samples handed out so far and the bad ones among them, on this host. May be set, to go on from a checkpoint.
        self.counts = SampleCounts()

    @abc.abstractmethod
    def batch(self, step: int) -> _Batch:
        """The batch of a step; the same bits whenever, and in whatever order, it is asked for."""

    def iterate(self, start_step: int = 0) -> Iterator[_Batch]:
        """The batches from `start_step` on, without end, read ahead by `data.read_threads` threads.

        Counts each batch as it is handed out. Raises `DataError` when more samples are bad than `data.max_bad_share`
        allows, or when a shard can no longer be read.
        """
        ahead = self._config.prefetch_batches if self._config.read_threads else 0
        options = grain.ReadOptions(num_threads=min(self._config.read_threads, ahead), prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(start_step, _LAST_STEP)
        batches = iter(steps.map(self.batch).to_iter_dataset(options))
        try:
            # A batch is one element of the chain, so that its content cannot depend on the threads. After an error
            # Grain would go on with the next element; the error leaves this generator and so ends it.
            for batch in batches:
                self.counts.add(batch.num_samples, batch.bad)
                if batch.bad:
                    self.counts.check(self._config.max_bad_share, batch.bad[0], "data")
                yield batch
        finally:
            batches.close()


# --- rows of one source ----------------------------------------------------------------------------------------------


class _EpochPlan:
    """The rows of one epoch of one source, planned as far as they have been asked for."""

    def __init__(self, index: SampleIndex, rules: DocumentRules, shape: RowShape, pool: int, seed: int) -> None:
        self._samples = permutation(stream_seed(seed, "samples"), len(index))
        self.order_seed = stream_seed(seed, "order within slots")
        blocks = np.split(self._samples, range(_PLANNED_AT_ONCE, len(index), _PLANNED_AT_ONCE))
        measured = (measure(index, block, rules, self.order_seed) for block in blocks)
        self._rows = plan_rows(measured, length=shape.length, image_slots=shape.image_slots, pool=pool)
        self._members: list[np.ndarray] = []

    def row(self, number: int) -> Int64[np.ndarray, " n"] | None:
        """The samples of a row, or None after the last one."""
        while len(self._members) <= number:
            places = next(self._rows, None)
            if places is None:
                return None
            self._members.append(self._samples[places])
        return self._members[number]

    def num_rows(self) -> int:
        """Rows planned so far; those of the epoch once `row` has returned None."""
        return len(self._members)


class _PackedSource:
    """One source: its index, and its rows by number over all epochs."""

    def __init__(
        self, config: DataConfig, source: SourceConfig, index: SampleIndex, tokenizer: Tokenizer, shape: RowShape
    ) -> None:
        self.name = source.name
        self.index = index
        self.shape = shape
        self._reader = ShardReader(index.paths)
        self._tokenizer = tokenizer
        self._pool = config.packing_pool
        self._seed = config.seed
        self._rules = DocumentRules.of(config, source, shape)
        self._lock = threading.Lock()
        self._plans: collections.OrderedDict[int, _EpochPlan] = collections.OrderedDict()
        self._first_rows = [0]  # of each epoch that is known; an epoch's rows are counted by planning it

    def _plan(self, epoch: int) -> _EpochPlan:
        if epoch not in self._plans:
            seed = stream_seed(self._seed, self.name, epoch)
            self._plans[epoch] = _EpochPlan(self.index, self._rules, self.shape, self._pool, seed)
        self._plans.move_to_end(epoch)
        while len(self._plans) > _EPOCHS_KEPT:
            self._plans.popitem(last=False)
        return self._plans[epoch]

    def locate(self, row: int) -> tuple[int, int, Int64[np.ndarray, " n"]]:
        """Epoch, seed of the order within slots, and samples of row number `row`, counted over all epochs."""
        with self._lock:
            epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
            while True:
                plan = self._plan(epoch)
                members = plan.row(row - self._first_rows[epoch])
                if members is not None:
                    return epoch, plan.order_seed, members
                epoch += 1
                if epoch == len(self._first_rows):
                    self._first_rows.append(self._first_rows[-1] + plan.num_rows())

    def fill_row(
        self, fields: Mapping[str, np.ndarray], row: int, samples: Sequence[int], order_seed: int
    ) -> tuple[int, int, list[BadSample]]:
        """Writes the documents of `samples` into a row; number of documents, of cut ones, and the bad samples.

        A sample that cannot be used leaves its place in the row empty, so that the plan of the row holds.
        """
        start = slot = num_documents = num_cut = 0
        bad: list[BadSample] = []
        for sample in samples:
            plan = outline(self.index, sample, self._rules, order_seed)
            document, unusable = read_document(self.index, self._reader, self._tokenizer, sample, plan, self._rules)
            bad += unusable
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
        pad_id: int,
        hosts: int,
        host: int,
    ) -> None:
        super().__init__(config)
        self._sources = sources
        self._rows = rows  # of the global batch, when the step draws from this source
        self._pad_id = pad_id
        self._schedule = Schedule([source.weight for source in _used(config)])
        self._hosts, self._host = hosts, host

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

    def rows_of_step(self, step: int) -> list[tuple[int, int]]:
        """(source, row number within the source) of every row of this host; from the step number alone."""
        if self._config.mixing == "one_source_per_step":
            source = self._schedule.source(step)
            total = self._rows[self._sources[source].name]
            first = self._schedule.turns_before(step, source) * total
            return [(source, first + row) for row in _slice(total, self._hosts, self._host)]
        total = self._config.global_batch_rows
        turns = [step * total + row for row in _slice(total, self._hosts, self._host)]
        return [(i, self._schedule.turns_before(turn, i)) for turn in turns for i in [self._schedule.source(turn)]]

    def batch(self, step: int) -> PackedBatch:
        """The packed rows of a step on this host. Raises `DataError` when a shard cannot be read."""
        rows = self.rows_of_step(step)
        shape = self._sources[rows[0][0]].shape
        fields = empty_batch(len(rows), shape, self._pad_id)
        epochs: dict[str, int] = {}
        bad: list[BadSample] = []
        num_samples = num_documents = num_cut = 0
        for i, (number, row) in enumerate(rows):
            source = self._sources[number]
            epoch, order_seed, members = source.locate(row)
            documents, cut, unusable = source.fill_row(fields, i, members.tolist(), order_seed)
            epochs[source.name] = max(epoch, epochs.get(source.name, 0))
            num_samples += len(members)
            num_documents += documents
            num_cut += cut
            bad += unusable
        names = tuple(self._sources[number].name for number, _ in rows)
        return PackedBatch(step, fields, names, epochs, num_samples, num_documents, num_cut, tuple(bad))


def open_pipeline(
    config: DataConfig, *, visual_tokens: int, image_size: int, tokenizer: Tokenizer, hosts: int = 1, host: int = 0
) -> Pipeline:
    """Opens every source of `config`, building indexes that are missing, for rows with N = `visual_tokens`.

    Host number `host` of `hosts` gets its contiguous share of every global batch. Raises `ConfigError` for settings
    that do not go together and `DataError` for missing, cut or foreign shards, before anything is trained.
    """
    _check_sources(config, config.sources)
    shapes = {}
    rows = {}
    for source in _used(config):
        shapes[source.name] = _row_shape(config, source, visual_tokens, image_size)
        rows[source.name] = _rows_of_source(config, source, hosts)
    indexes = {source.name: _open_source(config, source, tokenizer) for source in _used(config)}
    sources = [
        _PackedSource(config, source, indexes[source.name], tokenizer, shapes[source.name]) for source in _used(config)
    ]
    return Pipeline(config, sources, rows=rows, pad_id=tokenizer.pad_id, hosts=hosts, host=host)


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


def _rows_of_source(config: DataConfig, source: SourceConfig, hosts: int) -> int:
    path, rows = "data.global_batch_rows", config.global_batch_rows
    if source.batch_rows is not None:
        path, rows = f"data.sources.{source.name}.batch_rows", source.batch_rows
        if config.mixing == "mixed":
            raise ConfigError(f"{path}: is for data.mixing = one_source_per_step; got mixed")
    if rows < 1 or rows % hosts:
        raise ConfigError(f"{path}: got {rows}; wanted a positive multiple of the number of hosts, {hosts}")
    return rows


def _open_source(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer | None) -> SampleIndex:
    paths = expand_shards(source.shards, f"data.sources.{source.name}.shards")
    index = open_index(paths, source.kind, tokenizer, threads=config.read_threads, caption=source.caption)
    where = f"data.sources.{source.name}"
    if index.bad:
        found = SampleCounts()
        found.add(len(index) + len(index.bad), index.bad)
        found.check(config.max_bad_share, index.bad[0], where)
    if not len(index):
        raise DataError(f"{where}: none of its samples can be used; for example {index.bad[0]}")
    return index


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
        weights: Sequence[float],
        *,
        image_size: int,
        batch_images: int,
        random_scale_max: float,
        hosts: int,
        host: int,
    ) -> None:
        super().__init__(config)
        self._sources = [(name, index, ShardReader(index.paths)) for name, index in sources]
        self._schedule = Schedule(weights)
        self._image_size = image_size
        self._batch_images = batch_images
        self._random_scale_max = random_scale_max
        self._share = _slice(batch_images, hosts, host)
        self._lock = threading.Lock()
        self._orders: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """For each source: shards, samples, and how many were left out when the index was built, by cause."""
        return {name: _summary(index) for name, index, _ in self._sources}

    def _sample(self, turn: int) -> tuple[int, int, int]:
        """Source, epoch and sample of image number `turn` of the run."""
        source = self._schedule.source(turn)
        name, index, _ = self._sources[source]
        epoch, place = divmod(self._schedule.turns_before(turn, source), len(index))
        with self._lock:
            if (source, epoch) not in self._orders:
                seed = stream_seed(self._config.seed, name, epoch, "images")
                self._orders[source, epoch] = permutation(seed, len(index))
            self._orders.move_to_end((source, epoch))
            while len(self._orders) > _EPOCHS_KEPT * len(self._sources):
                self._orders.popitem(last=False)
            return source, epoch, int(self._orders[source, epoch][place])

    def _crop(self, source: int, epoch: int, sample: int) -> samples_.Crop:
        name, index, reader = self._sources[source]
        part = _image_part(index, sample)
        data = samples_.read_part(reader, index, sample, part)
        seeds = [stream_seed(self._config.seed, name, epoch, draw) for draw in ("scale", "top", "left")]
        scale, top, left = (float(uniforms(seed, np.array([sample]))[0]) for seed in seeds)
        return samples_.decode_crop(data, self._image_size, 1 + scale * (self._random_scale_max - 1), top, left)

    def batch(self, step: int) -> ImageBatch:
        """The crops of a step on this host; an image that cannot be used is zeros with weight 0."""
        size = self._image_size
        fields: dict[str, np.ndarray] = {
            "images": np.zeros((len(self._share), size, size, 3), np.uint8),
            "time_ids": np.zeros((len(self._share), 6), np.int32),
            "weight": np.zeros(len(self._share), np.float32),
        }
        names: list[str] = []
        epochs: dict[str, int] = {}
        bad: list[BadSample] = []
        num_upscaled = 0
        for i, turn in enumerate(self._share):
            source, epoch, sample = self._sample(step * self._batch_images + turn)
            name, index, _ = self._sources[source]
            names.append(name)
            epochs[name] = max(epoch, epochs.get(name, 0))
            try:
                crop = self._crop(source, epoch, sample)
            except SampleError as error:
                bad.append(index.bad_sample(sample, _image_part(index, sample), error))
                continue
            fields["images"][i], fields["time_ids"][i], fields["weight"][i] = crop.image, crop.time_ids, 1.0
            num_upscaled += crop.upscaled
        return ImageBatch(step, fields, tuple(names), epochs, len(self._share), num_upscaled, tuple(bad))


def open_image_pipeline(
    config: DataConfig,
    *,
    image_size: int,
    batch_images: int,
    random_scale_max: float,
    tokenizer: Tokenizer | None = None,
    hosts: int = 1,
    host: int = 0,
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
    return ImagePipeline(
        config,
        [(source.name, _open_source(config, source, tokenizer)) for source in used],
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
    pattern: str, image_size: int, num: int, config_path: str = "evaluation.scenes"
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
            pairs.append(_read_pair(index, reader, sample, image_size))
        reader.close()
    return pairs


def _read_pair(index: SampleIndex, reader: ShardReader, sample: int, image_size: int) -> tuple[str, np.ndarray, str]:
    part = int(index.starts[sample])
    try:
        caption = samples_.read_text(reader, index, sample, part)
        part = _image_part(index, sample)
        image = samples_.decode_image(samples_.read_part(reader, index, sample, part), image_size)
    except SampleError as error:
        raise DataError(str(index.bad_sample(sample, part, error))) from error
    return index.key(sample), image, caption
