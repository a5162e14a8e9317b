"""What a source would give a training run: what of it can be used, how full its rows are, how long an epoch is.

The index says which samples are whole and the planner how they fill rows; some samples are also read and decoded,
because nothing but decoding tells whether a picture is damaged.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.batches import PackedBatch
from data_pipelines.clips import Timing, open_clip_pipeline
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.index import BadSample
from data_pipelines.packing import plan_rows
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.sources import used_sources
from emu2_jax.config import DataConfig, SampleKind, SourceConfig
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

#: Samples of an epoch that are planned; more of them change the shares no longer, and would take minutes.
MAX_PLANNED = 200_000
EXAMPLES = 3  # bad samples shown for each cause


@dataclass
class Causes:
    """Bad samples by cause, the first few with their places."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, list[BadSample]] = field(default_factory=dict)

    def add(self, bad: Iterable[BadSample]) -> None:
        """Counts bad samples."""
        for sample in bad:
            self.counts[sample.cause] += 1
            shown = self.examples.setdefault(sample.cause, [])
            if len(shown) < EXAMPLES:
                shown.append(sample)


@dataclass(frozen=True)
class Rows:
    """How the samples of an epoch fill packed rows."""

    per_epoch: float  # rows
    samples_per_row: float
    padding_share: float  # of positions
    empty_slot_share: float  # of image slots
    image_slots: int  # of a row
    num_planned: int  # samples that this was worked out from


@dataclass
class SourceCheck:
    """What was found out about one source."""

    source: SourceConfig
    error: str | None = None  # why it cannot be opened at all
    num_shards: int = 0
    num_samples: int = 0  # that can be used, by the index
    left_out: Causes = field(default_factory=Causes)  # when the index was built
    rows: Rows | None = None  # None for the visual decoder, which packs nothing
    num_read: int = 0  # samples that were read and decoded
    num_cut: int = 0  # documents among them that did not fit whole
    unreadable: Causes = field(default_factory=Causes)  # of those read
    share_of_steps: float = 0.0  # that this source has in the run; of a mixed batch, of its rows
    rows_of_step: int = 1  # packed rows of one of its steps
    steps_per_epoch: float = 0.0  # steps of the run until every sample was seen once

    @property
    def share_of_rows(self) -> float:
        """Rows of this source in the run, relative to the other sources'."""
        return self.share_of_steps * self.rows_of_step

    @property
    def bad_share(self) -> float:
        """Share of the samples that cannot be used, as far as they were looked at."""
        left_out, unreadable = self.left_out.counts.total(), self.unreadable.counts.total()
        by_index = left_out / max(1, left_out + self.num_samples)
        return by_index + (1 - by_index) * unreadable / max(1, self.num_read)


def check_packed(
    config: DataConfig, *, visual_tokens: int, image_size: int, tokenizer: Tokenizer, num_read: int
) -> list[SourceCheck]:
    """Looks at every source of weight above 0 by itself, reading about `num_read` samples of each."""
    checks = []
    for source in used_sources(config):
        rows = config.global_batch_rows if source.batch_rows is None else source.batch_rows
        check = SourceCheck(source, share_of_steps=_share(config, source), rows_of_step=rows)
        try:
            pipeline = open_pipeline(
                _alone(config, source), visual_tokens=visual_tokens, image_size=image_size, tokenizer=tokenizer
            )
            _take_index(check, pipeline)
            check.rows = _plan_epoch(pipeline, source.name, config.packing_pool)
            _read_rows(check, pipeline, num_read)
        except DataError as error:
            check.error = str(error)
        else:
            check.steps_per_epoch = check.rows.per_epoch / check.share_of_rows
        checks.append(check)
    return checks


def check_images(
    config: DataConfig, *, image_size: int, batch_images: int, random_scale_max: float, num_read: int
) -> list[SourceCheck]:
    """The same for the visual decoder, which reads the pictures of the image-text sources one by one."""
    open_alone = functools.partial(
        open_image_pipeline, image_size=image_size, batch_images=1, random_scale_max=random_scale_max
    )
    return _check_one_by_one(config, "image_text", open_alone, per_step=batch_images, num_read=num_read)


def check_clips(
    config: DataConfig, *, image_size: int, batch_clips: int, timing: Timing, random_scale_max: float, num_read: int
) -> list[SourceCheck]:
    """The same for the video decoder, which reads the videos of the video-text sources one by one."""
    open_alone = functools.partial(
        open_clip_pipeline, image_size=image_size, batch_clips=1, timing=timing, random_scale_max=random_scale_max
    )
    return _check_one_by_one(config, "video_text", open_alone, per_step=batch_clips, num_read=num_read)


def _check_one_by_one(
    config: DataConfig,
    kind: SampleKind,
    open_alone: Callable[[DataConfig], ImagePipeline],
    *,
    per_step: int,
    num_read: int,
) -> list[SourceCheck]:
    config = dataclasses.replace(config, sources=tuple(source for source in config.sources if source.kind == kind))
    checks = []
    for source in used_sources(config):
        check = SourceCheck(source, share_of_steps=_share(config, source))
        try:
            pipeline = open_alone(_alone(config, source))
            _take_index(check, pipeline)
            _read_rows(check, pipeline, num_read)
        except DataError as error:
            check.error = str(error)
        else:
            check.steps_per_epoch = check.num_samples / (per_step * check.share_of_steps)
        checks.append(check)
    return checks


def _share(config: DataConfig, source: SourceConfig) -> float:
    return source.weight / sum(one.weight for one in used_sources(config))


def _alone(config: DataConfig, source: SourceConfig) -> DataConfig:
    """A config that reads one source, a row at a time, and is put off by nothing: the check is to see it all."""
    source = dataclasses.replace(source, weight=1.0, batch_rows=None, embeddings=None)
    return dataclasses.replace(config, sources=(source,), global_batch_rows=1, max_bad_share=1.0)


def _take_index(check: SourceCheck, pipeline: Pipeline | ImagePipeline) -> None:
    index = pipeline.indexes[check.source.name]
    check.num_shards, check.num_samples = len(index.paths), len(index)
    check.left_out.add(index.bad)


def _plan_epoch(pipeline: Pipeline, name: str, pool: int) -> Rows:
    """The rows of an epoch of a source, from lengths alone."""
    num_samples = len(pipeline.indexes[name])
    # Any order will do for the shares; the run's own would have to be asked for a row at a time.
    planned = np.random.default_rng(0).permutation(num_samples)[:MAX_PLANNED]
    lengths, images = pipeline.measure(name, planned)
    (_, shape) = pipeline.row_shapes["mixed" if "mixed" in pipeline.row_shapes else name]
    limits = {"length": shape.length, "image_slots": shape.image_slots}
    num_rows = sum(1 for _ in plan_rows([(lengths, images)], **limits, pool=pool))
    slots = num_rows * shape.image_slots
    return Rows(
        per_epoch=num_rows * num_samples / len(planned),
        samples_per_row=len(planned) / num_rows,
        padding_share=1 - int(lengths.sum()) / (num_rows * shape.length),
        empty_slot_share=1 - int(images.sum()) / slots if slots else 0.0,
        image_slots=shape.image_slots,
        num_planned=len(planned),
    )


def _read_rows(check: SourceCheck, pipeline: Pipeline | ImagePipeline, num_read: int) -> None:
    """Reads rows from the front of the run until `num_read` samples, or all of them, were seen."""
    step = 0
    while check.num_read < min(num_read, check.num_samples):
        batch = pipeline.batch(step)
        check.num_read += sum(batch.samples.values())
        if isinstance(batch, PackedBatch):
            check.num_cut += batch.num_cut
        check.unreadable.add(batch.bad)
        step += 1
