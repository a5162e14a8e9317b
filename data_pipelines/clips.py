"""Clips of the video decoder by step number: a few frames of a video, evenly spaced, all cut to the same square."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt8

from data_pipelines.crops import ImagePipeline
from data_pipelines.images import crop
from data_pipelines.kinds import SampleError
from data_pipelines.order import stream_seed, uniforms
from data_pipelines.samples import image_part, read_part
from data_pipelines.shards import ShardReader
from data_pipelines.sources import check_sources, open_source
from data_pipelines.video import read_frames
from emu2_jax.config import DataConfig
from emu2_jax.errors import ConfigError


@dataclass(frozen=True)
class Timing:
    """Which frames make a clip."""

    num_frames: int  #: T
    frames_per_second: float | None  #: None = T frames, evenly over the whole video


@dataclass(frozen=True)
class Clip:
    """Frames of a video, all cut to the same square."""

    frames: UInt8[np.ndarray, "T S S 3"]
    time_ids: Int32[np.ndarray, " 6"]  # as `images.Crop` has them
    seconds_per_frame: float


def clip_numbers(times: Float64[np.ndarray, " F"], timing: Timing, start: float) -> Int64[np.ndarray, " T"]:
    """Which of the frames shown at `times` (seconds) make a clip; `start` in [0, 1) says where it begins.

    Without a rate the video is T equal stretches, and one frame is taken from the same place of each: 40 frames, T = 8
    and start 0.5 give 2, 7, 12, ..., 37. With one, the clip begins at any time that leaves room for all of it. Raises
    `SampleError` where the video has fewer frames, or is shorter.
    """
    count, wanted = len(times), timing.num_frames
    if count < wanted:
        raise SampleError(
            "too_few_frames", f"the video has {count} frames, the clip (decoder.video.num_frames) {wanted}"
        )
    if timing.frames_per_second is None:
        return ((np.arange(wanted) + start) * (count / wanted)).astype(np.int64)
    length = (wanted - 1) / timing.frames_per_second
    spacing = float(np.median(np.diff(times)))
    room = times[-1] - length
    if room < -spacing / 2:
        raise SampleError(
            "too_few_frames",
            f"the video is {times[-1] + spacing:.2f} s long; {wanted} frames (decoder.video.num_frames) at "
            f"{timing.frames_per_second:g} a second are {wanted / timing.frames_per_second:.2f} s",
        )
    shown_at = start * max(room, 0.0) + np.arange(wanted) / timing.frames_per_second
    # The frame that is on the screen then, with half a frame's tolerance for times that are rounded.
    return np.clip(np.searchsorted(times, shown_at + spacing / 2, side="right") - 1, 0, count - 1)


def decode_clip(
    data: bytes,
    size: int,
    timing: Timing,
    *,
    start: float = 0.5,
    scale: float = 1.0,
    top: float = 0.5,
    left: float = 0.5,
) -> Clip:
    """Frames of a video, cut as `images.decode_crop` cuts a picture. Raises `SampleError`."""
    spacings: list[float] = []

    def choose(times: Float64[np.ndarray, " F"]) -> Int64[np.ndarray, " T"]:
        numbers = clip_numbers(times, timing, start)
        spacings.append(float(times[numbers[-1]] - times[numbers[0]]) / max(len(numbers) - 1, 1))
        return numbers

    crops = read_frames(data, choose, functools.partial(crop, size=size, scale=scale, top=top, left=left))
    sizes = {tuple(one.time_ids.tolist()) for one in crops}
    if len(sizes) > 1:
        raise SampleError("changing_size", "the frames of the video are of several sizes")
    return Clip(np.stack([one.image for one in crops]), crops[0].time_ids, spacings[0])


class ClipPipeline(ImagePipeline):
    """Randomly placed clips of the videos of video-text sources; made by `open_clip_pipeline`.

    A clip stands where an image stands in a batch of `ImagePipeline`, and is counted, ordered and resumed like it.
    """

    def __init__(self, *arguments: Any, timing: Timing, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._timing = timing

    def _empty_fields(self) -> dict[str, np.ndarray]:
        fields = super()._empty_fields()
        count, *square = fields["images"].shape
        return {**fields, "images": np.zeros((count, self._timing.num_frames, *square), np.uint8)}

    def _values(self, source: int, reader: ShardReader, epoch: int, sample: int) -> dict[str, np.ndarray]:
        name, index, _ = self._sources[source]
        data = read_part(reader, index, sample, image_part(index, sample))
        draws = ("start", "scale", "top", "left")
        seeds = [stream_seed(self._config.seed, name, epoch, draw) for draw in draws]
        start, scale, top, left = (float(uniforms(seed, np.array([sample]))[0]) for seed in seeds)
        factor = 1 + scale * (self._random_scale_max - 1)
        clip = decode_clip(data, self._image_size, self._timing, start=start, scale=factor, top=top, left=left)
        return {"images": clip.frames, "time_ids": clip.time_ids}


def open_clip_pipeline(
    config: DataConfig,
    *,
    image_size: int,
    batch_clips: int,
    timing: Timing,
    random_scale_max: float,
    min_image_side: int | None = None,
    hosts: int = 1,
    host: int | Sequence[int] = 0,
) -> ClipPipeline:
    """Opens the video-text sources of `config` for the video decoder; sources of other kinds are left aside.

    Videos with a side shorter than `min_image_side` are left out, and counted. Raises as `open_pipeline`.
    """
    videos = [source for source in config.sources if source.kind == "video_text"]
    if not videos:
        raise ConfigError("data.sources: the video decoder trains on sources of kind video_text; there is none")
    check_sources(videos)
    if batch_clips < 1 or batch_clips % hosts:
        raise ConfigError(
            f"decoder.video.batch_clips: got {batch_clips}; wanted a positive multiple of the number of hosts, {hosts}"
        )
    if random_scale_max < 1:
        raise ConfigError(f"decoder.random_scale_max: got {random_scale_max:g}; wanted 1 or more")
    used = [source for source in videos if source.weight > 0]
    indexes = {source.name: open_source(config, source, None) for source in used}
    return ClipPipeline(
        config,
        list(indexes.items()),
        {},
        [source.weight for source in used],
        image_size=image_size,
        batch_images=batch_clips,
        random_scale_max=random_scale_max,
        min_image_side=min_image_side or 0,
        hosts=hosts,
        host=host,
        timing=timing,
    )
