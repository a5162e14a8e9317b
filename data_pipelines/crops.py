"""Images of the visual decoder by step number: random square crops, or what was worked out of them beforehand."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.batches import BatchStream, ImageBatch
from data_pipelines.embedding_store import EMBEDDINGS, LATENT, TIME_IDS, EmbeddingStore, Settings
from data_pipelines.images import Crop, ImageRules, decode_crop
from data_pipelines.index import BadSample, SampleIndex
from data_pipelines.kinds import SampleError
from data_pipelines.order import Schedule, stream_seed, uniforms
from data_pipelines.planning import SampleOrder
from data_pipelines.position import Identity, Position, Track, digest
from data_pipelines.samples import image_part, read_part
from data_pipelines.shards import ShardReader
from data_pipelines.sources import check_sources, open_crop_stores, open_source, remote_files, share_of_host, summary_of
from emu2_jax.config import DataConfig
from emu2_jax.errors import ConfigError
from emu2_jax.tokenizer import Tokenizer


class ImagePipeline(BatchStream[ImageBatch]):
    """Randomly scaled square crops of the pictures of image-text sources; made by `open_image_pipeline`."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[tuple[str, SampleIndex]],
        stores: Mapping[str, Sequence[EmbeddingStore]],
        weights: Sequence[float],
        *,
        image_size: int,
        batch_images: int,
        random_scale_max: float,
        min_image_side: int,
        hosts: int,
        host: int | Sequence[int],
    ) -> None:
        remote = remote_files(config)
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
        #: Embeddings and latents of the crops of each source, a store for each epoch; of all sources or of none.
        self.stores = stores
        self._schedule = Schedule(weights)
        self._image_size = image_size
        self._batch_images = batch_images
        self._random_scale_max = random_scale_max
        self._min_image_side = min_image_side
        self._share = share_of_host(batch_images, hosts, host)

    @property
    def indexes(self) -> dict[str, SampleIndex]:
        """The index of each source."""
        return {name: index for name, index, _ in self._sources}

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """For each source: shards, samples, how many the index left out, by cause, and epochs that are in a store."""
        stored = {name: {"stored epochs of crops": len(stores)} for name, stores in self.stores.items()}
        return {name: {**summary_of(index), **stored.get(name, {})} for name, index, _ in self._sources}

    def _rows_in(self, steps: int, source: int) -> int:
        return self._schedule.turns_before(steps * self._batch_images, source)

    def crop(self, name: str, epoch: int, sample: int) -> Crop:
        """The crop of a sample of source `name` in an epoch. Raises `SampleError`."""
        number = next(i for i, source in enumerate(self._sources) if source[0] == name)
        return self._crop(number, self._sources[number][2], epoch, sample)

    def _sample(self, turn: int) -> tuple[int, int, int]:
        """Source, epoch and sample of image number `turn` of the schedule."""
        source = self._schedule.source(turn)
        number = self._position.start(source) + self._schedule.turns_before(turn, source)
        return source, *self._orders[source].locate(number)

    def _crop(self, source: int, reader: ShardReader, epoch: int, sample: int) -> Crop:
        name, index, _ = self._sources[source]
        part = image_part(index, sample)
        data = read_part(reader, index, sample, part)
        seeds = [stream_seed(self._config.seed, name, epoch, draw) for draw in ("scale", "top", "left")]
        scale, top, left = (float(uniforms(seed, np.array([sample]))[0]) for seed in seeds)
        factor = 1 + scale * (self._random_scale_max - 1)
        return decode_crop(data, self._image_size, factor, top, left, ImageRules.of(self._config))

    def batch(self, step: int) -> ImageBatch:
        """The crops of a step on this host; an image that is too small or cannot be used is zeros with weight 0.

        Where they were encoded beforehand, embeddings and latents stand in for the pixels: of the crops of this epoch,
        or of an earlier one when all that are stored have been seen.
        """
        fields = self._empty_fields()
        names: list[str] = []
        epochs: dict[str, int] = {}
        bad: list[BadSample] = []
        num_upscaled = num_small = 0
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
                found = index.bad_sample(sample, image_part(index, sample), error)
                bad.append(dataclasses.replace(found, source=name))
                continue
            short_side = min(values["time_ids"][:2])
            if short_side < self._min_image_side:
                num_small += 1
                continue
            for field, value in values.items():
                fields[field][i] = value
            fields["weight"][i] = 1.0
            num_upscaled += int(short_side < self._image_size)
        samples = dict(collections.Counter(names))
        return ImageBatch(step, fields, tuple(names), epochs, samples, num_upscaled, num_small, tuple(bad))

    def _gather(self, source: int, drawn: Sequence[tuple[int, int, int]]) -> ShardReader:
        _, index, reader = self._sources[source]
        parts = [(s, image_part(index, s)) for number, _, s in drawn if number == source and not self.stores]
        ranges = [(int(index.shards[s]), int(index.offsets[part]), int(index.sizes[part])) for s, part in parts]
        return reader.gather(ranges)

    def _empty_fields(self) -> dict[str, np.ndarray]:
        count, size = len(self._share), self._image_size
        sizes = {"time_ids": np.zeros((count, 6), np.int32), "weight": np.zeros(count, np.float32)}
        if not self.stores:
            return {"images": np.zeros((count, size, size, 3), np.uint8), **sizes}
        members = {member.suffix: member for member in next(iter(self.stores.values()))[0].members}
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
        stores = self.stores[name]
        record = stores[epoch % len(stores)].read(sample, image_part(index, sample))
        return {"embeddings": record[EMBEDDINGS], "latents": record[LATENT], "time_ids": record[TIME_IDS]}


def open_image_pipeline(
    config: DataConfig,
    *,
    image_size: int,
    batch_images: int,
    random_scale_max: float,
    min_image_side: int | None = None,
    tokenizer: Tokenizer | None = None,
    hosts: int = 1,
    host: int | Sequence[int] = 0,
    store_settings: Settings | None = None,
) -> ImagePipeline:
    """Opens the image-text sources of `config` for the visual decoder; sources of other kinds are left aside.

    Pictures with a side shorter than `min_image_side` are left out, and counted. A tokenizer is not needed; with one,
    indexes are built so that pretraining finds them ready. Raises as `open_pipeline`.
    """
    pairs = [source for source in config.sources if source.kind == "image_text"]
    if not pairs:
        raise ConfigError("data.sources: the decoder trains on sources of kind image_text; there is none")
    check_sources(pairs)
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
    stores = {
        source.name: open_crop_stores(source, indexes[source.name], store_settings)
        for source in used
        if source.embeddings is not None
    }
    return ImagePipeline(
        config,
        list(indexes.items()),
        stores,
        [source.weight for source in used],
        image_size=image_size,
        batch_images=batch_images,
        random_scale_max=random_scale_max,
        min_image_side=min_image_side or 0,
        hosts=hosts,
        host=host,
    )
