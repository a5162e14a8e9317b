"""Joins the data pipeline to the trainer: the one place where both are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.pipeline import ImageBatch, ImagePipeline, PackedBatch, Pipeline, open_image_pipeline, open_pipeline
from data_pipelines.samples import SampleCounts
from emu2_jax.config import ExperimentConfig
from emu2_jax.diffusion.decoder import DecoderTask
from emu2_jax.errors import ConfigError
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import RowShape, batch_shapes
from emu2_jax.task import Task
from emu2_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from emu2_jax.train import HostBatch


class TrainingInput:
    """A pipeline as the trainer's `Input`."""

    def __init__(self, pipeline: Pipeline | ImagePipeline) -> None:
        self._pipeline = pipeline

    def iterate(self, start_step: int) -> Iterator[HostBatch]:
        """Batches with what is logged of them."""
        for batch in self._pipeline.iterate(start_step):
            info = _packed_info(batch) if isinstance(batch, PackedBatch) else _image_info(batch)
            bad = self._pipeline.counts.bad
            info |= {"bad_samples": bad.total(), **{f"bad_samples/{cause}": n for cause, n in sorted(bad.items())}}
            yield HostBatch(batch.fields, info)

    @property
    def summary(self) -> Mapping[str, Mapping[str, int]]:
        """For each source: shards, samples, and how many samples the index left out, by cause."""
        return self._pipeline.summary

    def state(self) -> Mapping[str, Any]:
        """Samples seen and bad ones by cause. The position itself is the step number."""
        return {"counts": self._pipeline.counts.to_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._pipeline.counts = SampleCounts.from_dict(state["counts"])


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


def open_input(config: ExperimentConfig, tokenizer: Tokenizer | None) -> TrainingInput:
    """Open (and, the first time, index) every shard of the run. Raises `DataError` before anything compiles.

    Only the decoder task does without a tokenizer.
    """
    hosts, host = jax.process_count(), jax.process_index()
    if config.train.task == "decoder":
        return TrainingInput(
            open_image_pipeline(
                config.data,
                image_size=config.decoder.image_size,
                batch_images=config.decoder.batch_images,
                random_scale_max=config.decoder.random_scale_max,
                hosts=hosts,
                host=host,
            )
        )
    assert tokenizer is not None, "pretraining needs a tokenizer"
    return TrainingInput(
        open_pipeline(
            config.data,
            visual_tokens=config.model.num_visual_tokens,
            image_size=config.model.vision.image_size,
            tokenizer=tokenizer,
            hosts=hosts,
            host=host,
        )
    )


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
        return {
            "images": ((count, size, size, 3), np.dtype(np.uint8)),
            "time_ids": ((count, 6), np.dtype(np.int32)),
            "weight": ((count,), np.dtype(np.float32)),
        }
    size, visual_tokens = config.model.vision.image_size, config.model.num_visual_tokens
    shape = RowShape(config.data.row_length, config.data.image_slots, visual_tokens, size)
    largest = batch_shapes(max(batch_rows(config).values()), shape)
    return {name: (dims, np.dtype(dtype)) for name, (dims, dtype) in largest.items()}
