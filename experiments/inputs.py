"""Joins the data pipeline to the trainer: the one place where both are known."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.batches import ImageBatch, PackedBatch
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.embedding_store import image_settings
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.position import saved_of
from data_pipelines.samples import SampleCounts
from data_pipelines.streaming import StreamPipeline, is_stream, open_stream
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion.decoder import DecoderTask
from emu2_jax.diffusion.vae import latent_channels
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.fingerprint import fingerprint
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import RowShape, batch_shapes
from emu2_jax.task import Params, Task
from emu2_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from emu2_jax.train import HostBatch


class TrainingInput:
    """A pipeline as the trainer's `Input`.

    `allowed_changes` are the settings that may differ from those of the run that is gone on with. `say` receives one
    line for what the user should know: a source begins a new epoch, say.
    """

    def __init__(
        self,
        pipeline: Pipeline | ImagePipeline | StreamPipeline,
        allowed_changes: Collection[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self._pipeline = pipeline
        self._allowed_changes = allowed_changes
        self._say = say if jax.process_index() == 0 else lambda line: None
        self._epochs: dict[str, int] = {}  # that each source has reached

    def iterate(self, start_step: int) -> Iterator[HostBatch]:
        """Batches with what is logged of them."""
        for batch in self._pipeline.iterate(start_step):
            self._note_epochs(batch)
            info = _packed_info(batch) if isinstance(batch, PackedBatch) else _image_info(batch)
            info["data_queue_depth"] = self._pipeline.queue_depth
            yield HostBatch(batch.fields, {**info, **self._counters()})

    def _note_epochs(self, batch: PackedBatch | ImageBatch) -> None:
        for name, epoch in batch.epochs.items():
            if epoch > self._epochs.get(name, 0):
                self._say(f"{name}: all samples have been read; epoch {epoch} goes through them in a new order")
            self._epochs[name] = max(epoch, self._epochs.get(name, 0))

    def _counters(self) -> dict[str, float | str]:
        """Totals of this host since the run began."""
        counters: dict[str, float | str] = {}
        causes: collections.Counter[str] = collections.Counter()
        for name, counts in sorted(self._pipeline.counts.items()):
            counters[f"samples/{name}"] = counts.seen
            counters[f"bad_of_source/{name}"] = counts.bad.total()
            counters[f"epoch/{name}"] = self._epochs.get(name, 0)
            causes += counts.bad
        counters |= {
            "bad_samples": causes.total(),
            **{f"bad_samples/{cause}": n for cause, n in sorted(causes.items())},
        }
        if self._pipeline.read_retries:
            counters["read_retries"] = self._pipeline.read_retries
        return counters

    @property
    def summary(self) -> Mapping[str, Mapping[str, int]]:
        """For each source: shards, samples, and how many samples the index left out, by cause."""
        return self._pipeline.summary

    def check_encoder(self, params: Params) -> None:
        """Raises `DataError` when stored embeddings come from another visual encoder than the one in `params`."""
        if not self._pipeline.stores:
            return
        own = fingerprint(params["visual_encoder"])
        for source, store in self._pipeline.stores.items():
            if store.encoder != own:
                raise DataError(
                    f"data.sources.{source}.embeddings: {store.directory} was made by another visual encoder "
                    f"(fingerprint {store.encoder}) than this run's ({own}); run `emu2 encode` with this run's encoder "
                    "into a new directory, or train on pixels"
                )

    def state(self) -> Mapping[str, Any]:
        """The position in the data, and samples seen and bad ones of all hosts, by source."""
        counts = {name: counts.to_dict() for name, counts in sorted(self._pipeline.counts.items())}
        return {"position": self._pipeline.state(), "counts": _summed(_of_all_hosts(counts))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and go on counting. Raises `DataError` when the data is not what it was."""
        if "position" not in state:
            raise DataError("checkpoint: holds no data position that this program reads; take another work directory")
        for line in self._pipeline.restore(state["position"], self._allowed_changes):
            self._say(line)
        self._epochs = {name: saved.epoch for name, saved in saved_of(state["position"]).items()}
        # The counts of the past are kept by the first host; their sum is what is saved.
        saved = state["counts"] if jax.process_index() == 0 else {}
        self._pipeline.counts.clear()
        self._pipeline.counts.update({name: SampleCounts.from_dict(counts) for name, counts in saved.items()})


def _of_all_hosts(value: Any) -> list[Any]:
    """A small JSON value of every host, on every host."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    room = int(multihost_utils.process_allgather(np.array(len(text), np.int32)).max())
    padded = np.frombuffer(text.ljust(room), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def _summed(hosts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for host in hosts:
        for name, counts in host.items():
            totals[name].update(counts)
    return {name: dict(sorted(counts.items())) for name, counts in sorted(totals.items())}


def _packed_info(batch: PackedBatch) -> dict[str, float | str]:
    used = batch.fields["segment_ids"] > 0
    slots = batch.fields["image_mask"]
    return {
        "source": _joined(batch.sources),
        "tokens": int(used.sum()),
        "images": int(slots.sum()),
        "documents": batch.num_documents,
        "padding_share": 1.0 - float(used.mean()),
        "empty_slot_share": 1.0 - float(slots.mean()) if slots.size else 0.0,
        "cut_documents": batch.num_cut,
        "epoch": max(batch.epochs.values()),
    }


def _image_info(batch: ImageBatch) -> dict[str, float | str]:
    return {
        "source": _joined(batch.sources),
        "images": int(batch.fields["weight"].sum()),
        "upscaled_images": batch.num_upscaled,
        "small_images": batch.num_small,
        "epoch": max(batch.epochs.values()),
    }


def _joined(names: tuple[str, ...]) -> str:
    return "+".join(sorted(set(names)))


def open_tokenizer(config: ExperimentConfig) -> Tokenizer:
    """The run's tokenizer. Raises `ConfigError` when the model's vocabulary is of another size."""
    if not config.data.tokenizer:
        raise ConfigError("data.tokenizer: names no file; give the path of a SentencePiece model")
    tokenizer = Tokenizer(config.data.tokenizer, SPECIAL_TOKENS[config.data.special_tokens])
    if tokenizer.vocab_size != config.model.language.vocab_size:
        raise ConfigError(
            f"model.language.vocab_size: is {config.model.language.vocab_size}, but {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} with data.special_tokens = {config.data.special_tokens}; set it to "
            f"{tokenizer.vocab_size}"
        )
    return tokenizer


def make_task(config: ExperimentConfig, tokenizer: Tokenizer | None) -> Task:
    """The run's task. Without a tokenizer it is good for shapes alone: the ids of [IMG] and [/IMG] are unknown."""
    if config.train.task == "decoder":
        return DecoderTask(config)
    ids = (tokenizer.image_start_id, tokenizer.image_end_id) if tokenizer else (0, 0)
    return PretrainTask(config, image_start_id=ids[0], image_end_id=ids[1])


def open_input(
    config: ExperimentConfig, tokenizer: Tokenizer | None, allowed_changes: Collection[str] = ()
) -> TrainingInput:
    """Open (and, the first time, index) every shard of the run. Raises `DataError` before anything compiles.

    Only the decoder task does without a tokenizer. For `allowed_changes` see `TrainingInput`.
    """
    hosts, host = jax.process_count(), jax.process_index()
    pipeline: Pipeline | ImagePipeline | StreamPipeline
    streams = any(is_stream(source.shards) for source in config.data.sources if source.weight > 0)
    if config.train.task == "decoder":
        pipeline = open_image_pipeline(
            config.data,
            image_size=config.decoder.image_size,
            batch_images=config.decoder.batch_images,
            random_scale_max=config.decoder.random_scale_max,
            min_image_side=config.decoder.min_image_side,
            hosts=hosts,
            host=host,
            store_settings=store_settings(config),
        )
    else:
        assert tokenizer is not None, "pretraining needs a tokenizer"
        opened = functools.partial(open_pipeline, store_settings=store_settings(config))
        pipeline = (open_stream if streams else opened)(
            config.data,
            visual_tokens=config.model.num_visual_tokens,
            image_size=config.model.vision.image_size,
            tokenizer=tokenizer,
            hosts=hosts,
            host=host,
        )
    if isinstance(pipeline, StreamPipeline):
        print(pipeline.warning)
    elif any(position != pipeline.state(0) for position in _of_all_hosts(pipeline.state(0))):
        raise DataError("data: hosts see different samples; do all read the same shards, with indexes of the same age?")
    return TrainingInput(pipeline, allowed_changes)


def store_settings(config: ExperimentConfig) -> dict[str, str | int | float | bool]:
    """What embeddings of this run's images have to have been made with, besides the encoder's parameters."""
    vision, data = config.model.vision, config.data
    settings = image_settings(
        visual_tokens=config.model.num_visual_tokens,
        width=vision.width,
        image_size=vision.image_size,
        decoding=data.image_decoding,
        exif=data.apply_exif_orientation,
        dtypes=f"{config.model.compute_dtype} from {config.model.frozen_dtype}",
    )
    if config.train.task == "pretrain":
        return settings
    decoder = config.decoder
    return settings | {
        "crop_size": decoder.image_size,
        "random_scale_max": decoder.random_scale_max,
        "seed": data.seed,
        "latent": decoder.latent,
        "latent_factor": decoder.latent_factor,
        "latent_scale": decoder.latent_scale,
    }


def latent_shape(config: ExperimentConfig) -> tuple[int, int, int]:
    """Height, width and channels of what the decoder's codec makes of an image."""
    side = config.decoder.image_size // config.decoder.latent_factor
    return side, side, latent_channels(config.decoder)


def batch_rows(config: ExperimentConfig) -> dict[str, int]:
    """Rows of every global batch that the run will see, by the config path that sets them."""
    if config.train.task == "decoder":
        return {"decoder.batch_images": config.decoder.batch_images}
    rows = {"data.global_batch_rows": config.data.global_batch_rows}
    if config.data.mixing == "mixed":
        return rows
    own = {f"data.sources.{source.name}.batch_rows": source.batch_rows for source in config.data.sources}
    default = rows if None in own.values() else {}
    return {**default, **{path: count for path, count in own.items() if count is not None}}


def example_shapes(config: ExperimentConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of a step's largest global batch, without reading data."""
    if config.train.task == "decoder":
        size, count = config.decoder.image_size, config.decoder.batch_images
        fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "time_ids": ((count, 6), np.dtype(np.int32)),
            "weight": ((count,), np.dtype(np.float32)),
        }
        if any(source.embeddings is not None for source in config.data.sources):
            embedding = (count, config.model.num_visual_tokens, config.model.vision.width)
            bfloat16 = np.dtype(ml_dtypes.bfloat16)
            return {
                "embeddings": (embedding, bfloat16),
                "latents": ((count, *latent_shape(config)), bfloat16),
                **fields,
            }
        return {"images": ((count, size, size, 3), np.dtype(np.uint8)), **fields}
    size, visual_tokens = config.model.vision.image_size, config.model.num_visual_tokens
    seen = [source for source in config.data.sources if source.weight > 0 and source.kind != "text"]
    stored = bool(seen) and all(source.embeddings is not None for source in seen)
    width = config.model.vision.width if stored else None
    shape = RowShape(config.data.row_length, config.data.image_slots, visual_tokens, size, width)
    largest = batch_shapes(max(batch_rows(config).values()), shape)
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in largest.items()}
