"""Joins the data pipeline to the trainer: the one place where both are known."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from data_pipelines.batches import ImageBatch, PackedBatch
from data_pipelines.clips import Timing, open_clip_pipeline
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.embedding_store import image_settings
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.position import saved_of
from data_pipelines.samples import SampleCounts
from data_pipelines.streaming import StreamPipeline, is_stream, open_stream
from emu2_jax import hosts
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion.decoder import DecoderTask
from emu2_jax.diffusion.vae import stored_latent
from emu2_jax.diffusion.video import VideoDecoderTask
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.fingerprint import fingerprint
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import RowShape, batch_shapes
from emu2_jax.sharding import ALL_ROWS, RowShares
from emu2_jax.task import Params, Task
from emu2_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from emu2_jax.train import HostBatch


class TrainingInput:
    """A pipeline as the trainer's `Input`.

    `allowed_changes` are the settings that may differ from those of the run that is gone on with. `say` receives one
    line for what the user should know: a source begins a new epoch, say. What another host reads, too, is `counted`
    by one of them.
    """

    def __init__(
        self,
        pipeline: Pipeline | ImagePipeline | StreamPipeline,
        allowed_changes: Collection[str] = (),
        say: Callable[[str], None] = print,
        counted: bool = True,
    ) -> None:
        self._pipeline = pipeline
        self._allowed_changes = allowed_changes
        self._say = say if hosts.index() == 0 else lambda line: None
        self._counted = counted
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
                stored = len(self._pipeline.stores.get(name, ())) if isinstance(batch, ImageBatch) else 0
                again = f", with the stored crops of epoch {epoch % stored}" if stored else ""
                self._say(f"{name}: all samples have been read; epoch {epoch} goes through them in a new order{again}")
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
    def identity(self) -> str | None:
        """The samples, their order and how rows are made of them, as a digest; None for a stream, which has none."""
        if isinstance(self._pipeline, StreamPipeline):
            return None
        return hashlib.sha256(json.dumps(self._pipeline.state(0), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def summary(self) -> Mapping[str, Mapping[str, int]]:
        """For each source: shards, samples, and how many samples the index left out, by cause."""
        return self._pipeline.summary

    def check_encoder(self, params: Params) -> None:
        """Raises `DataError` when what is stored comes from another visual encoder or VAE than those in `params`."""
        own: dict[str, str] = {}
        for source, stores in self._pipeline.stores.items():
            for store in stores:
                for part, what, made_by in (
                    ("visual_encoder", "visual encoder", store.encoder),
                    ("vae", "VAE", store.vae),
                ):
                    if made_by is None:
                        continue
                    own[part] = own.get(part) or fingerprint(params[part])
                    if made_by != own[part]:
                        raise DataError(
                            f"data.sources.{source}.embeddings: {store.directory} was made by another {what} "
                            f"(fingerprint {made_by}) than this run's ({own[part]}); run `emu2 encode` with this "
                            "run's into a new directory, or train on pixels"
                        )

    def state(self) -> Mapping[str, Any]:
        """The position in the data, and samples seen and bad ones of all hosts, by source."""
        counts = {name: counts.to_dict() for name, counts in sorted(self._pipeline.counts.items())}
        told = hosts.gather("counts", counts if self._counted else {})
        return {"position": self._pipeline.state(), "counts": _summed(told)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and go on counting. Raises `DataError` when the data is not what it was."""
        if "position" not in state:
            raise DataError("checkpoint: holds no data position that this program reads; take another work directory")
        for line in self._pipeline.restore(state["position"], self._allowed_changes):
            self._say(line)
        self._epochs = {name: saved.epoch for name, saved in saved_of(state["position"]).items()}
        # The counts of the past are kept by the first host; their sum is what is saved.
        saved = state["counts"] if hosts.index() == 0 else {}
        self._pipeline.counts.clear()
        self._pipeline.counts.update({name: SampleCounts.from_dict(counts) for name, counts in saved.items()})


def _summed(told: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for host in told:
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
    images = batch.fields.get("images")
    frames = images.shape[1] if images is not None and images.ndim == 5 else 1  # of a clip
    return {
        "source": _joined(batch.sources),
        "images": int(batch.fields["weight"].sum()) * frames,
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
    if config.train.task == "video_decoder":
        return VideoDecoderTask(config)
    ids = (tokenizer.image_start_id, tokenizer.image_end_id) if tokenizer else (0, 0)
    return PretrainTask(config, image_start_id=ids[0], image_end_id=ids[1])


def open_input(
    config: ExperimentConfig,
    tokenizer: Tokenizer | None,
    allowed_changes: Collection[str] = (),
    shares: RowShares = ALL_ROWS,
) -> TrainingInput:
    """Open (and, the first time, index) every shard of the run. Raises `DataError` before anything compiles.

    The decoder tasks do without a tokenizer. For `allowed_changes` see `TrainingInput`; `shares` are the rows of each
    batch that are read here.
    """
    pipeline: Pipeline | ImagePipeline | StreamPipeline
    streams = any(is_stream(source.shards) for source in config.data.sources if source.weight > 0)
    if config.train.task == "decoder":
        pipeline = open_image_pipeline(
            config.data,
            image_size=config.decoder.image_size,
            batch_images=config.decoder.batch_images,
            random_scale_max=config.decoder.random_scale_max,
            min_image_side=config.decoder.min_image_side,
            hosts=shares.count,
            host=shares.mine,
            store_settings=store_settings(config),
        )
    elif config.train.task == "video_decoder":
        pipeline = open_clip_pipeline(
            config.data,
            image_size=config.decoder.image_size,
            batch_clips=config.decoder.video.batch_clips,
            timing=timing(config),
            random_scale_max=config.decoder.random_scale_max,
            min_image_side=config.decoder.min_image_side,
            hosts=shares.count,
            host=shares.mine,
        )
    else:
        assert tokenizer is not None, "pretraining needs a tokenizer"
        model = config.model
        common = {"visual_tokens": model.num_visual_tokens, "image_size": model.vision.image_size}
        if streams:
            share = _only_share(shares)
            pipeline = open_stream(config.data, **common, tokenizer=tokenizer, hosts=shares.count, host=share)
        else:
            pipeline = open_pipeline(
                config.data,
                **common,
                tokenizer=tokenizer,
                hosts=shares.count,
                host=shares.mine,
                store_settings=store_settings(config),
            )
    if isinstance(pipeline, StreamPipeline) and hosts.index() == 0:
        print(pipeline.warning)
    return TrainingInput(pipeline, allowed_changes, counted=shares.counted)


def _only_share(shares: RowShares) -> int:
    if len(shares.mine) > 1 or not shares.counted or shares.count < hosts.count():
        raise ConfigError(
            "mesh: with a stream, each host must hold rows of its own, in one piece; choose mesh.tensor so that it "
            "divides the devices of a host"
        )
    return shares.mine[0]


def timing(config: ExperimentConfig) -> Timing:
    """Which frames of a video the video decoder learns to draw, and draws."""
    return Timing(config.decoder.video.num_frames, config.decoder.video.frames_per_second)


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
    vae = {"vae_norm_groups": decoder.vae.norm_groups, "vae_norm_epsilon": decoder.vae.norm_epsilon}
    return settings | {
        "crop_size": decoder.image_size,
        "random_scale_max": decoder.random_scale_max,
        "seed": data.seed,
        "latent": decoder.latent,
        "latent_factor": decoder.latent_factor,
        "latent_scale": decoder.latent_scale,
        **(vae if decoder.latent == "autoencoder_kl" else {}),  # what the VAE's fingerprint does not see
    }


def batch_rows(config: ExperimentConfig) -> dict[str, int]:
    """Rows of every global batch that the run will see, by the config path that sets them."""
    if config.train.task == "decoder":
        return {"decoder.batch_images": config.decoder.batch_images}
    if config.train.task == "video_decoder":
        return {"decoder.video.batch_clips": config.decoder.video.batch_clips}
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
            latent = stored_latent(config.decoder)
            return {
                "embeddings": (embedding, np.dtype(ml_dtypes.bfloat16)),
                "latents": ((count, *latent.shape), np.dtype(latent.dtype)),
                **fields,
            }
        return {"images": ((count, size, size, 3), np.dtype(np.uint8)), **fields}
    if config.train.task == "video_decoder":
        size, video = config.decoder.image_size, config.decoder.video
        return {
            "images": ((video.batch_clips, video.num_frames, size, size, 3), np.dtype(np.uint8)),
            "time_ids": ((video.batch_clips, 6), np.dtype(np.int32)),
            "weight": ((video.batch_clips,), np.dtype(np.float32)),
        }
    shape = _row_shape(config, config.data.image_slots, embedded=_all_embedded(config))
    return _packed_shapes(max(batch_rows(config).values()), shape)


def source_shapes(config: ExperimentConfig) -> dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """Shape and dtype of every global batch that the run will see, by source; one, `all`, when sources are mixed."""
    sources = [source for source in config.data.sources if source.weight > 0]
    if config.train.task != "pretrain" or config.data.mixing == "mixed" or not sources:
        return {"all": example_shapes(config)}
    shapes = {}
    for source in sources:
        rows = config.data.global_batch_rows if source.batch_rows is None else source.batch_rows
        slots = config.data.image_slots if source.image_slots is None else source.image_slots
        embedded = _all_embedded(config) if source.kind == "text" else source.embeddings is not None
        shapes[source.name] = _packed_shapes(rows, _row_shape(config, slots, embedded=embedded))
    return shapes


def _all_embedded(config: ExperimentConfig) -> bool:
    """Whether every source of images that is read has stored embeddings."""
    seen = [source for source in config.data.sources if source.weight > 0 and source.kind != "text"]
    return bool(seen) and all(source.embeddings is not None for source in seen)


def _row_shape(config: ExperimentConfig, image_slots: int, *, embedded: bool) -> RowShape:
    width = config.model.vision.width if embedded else None
    size, visual_tokens = config.model.vision.image_size, config.model.num_visual_tokens
    return RowShape(config.data.row_length, image_slots, visual_tokens, size, width)


def _packed_shapes(rows: int, shape: RowShape) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in batch_shapes(rows, shape).items()}
