"""Clips of the video decoder: which frames, all cut alike, and a cause for videos of which no clip can be made."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from tiny_videos import STEP, sound, video

from data_pipelines.clips import ClipPipeline, Timing, clip_numbers, decode_clip, open_clip_pipeline
from data_pipelines.kinds import SampleError
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError

EIGHT_A_SECOND = np.arange(40) / 8
WHOLE = Timing(num_frames=8, frames_per_second=None)


def test_one_frame_from_the_same_place_of_each_equal_stretch() -> None:
    assert clip_numbers(EIGHT_A_SECOND, WHOLE, 0.5).tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert clip_numbers(EIGHT_A_SECOND, WHOLE, 0.0).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert clip_numbers(EIGHT_A_SECOND, WHOLE, 0.999).tolist() == [4, 9, 14, 19, 24, 29, 34, 39]
    assert clip_numbers(np.arange(8) / 8, WHOLE, 0.7).tolist() == list(range(8))


def test_frames_so_many_a_second_from_any_start_that_leaves_room() -> None:
    four_a_second = Timing(num_frames=8, frames_per_second=4.0)
    assert clip_numbers(EIGHT_A_SECOND, four_a_second, 0.0).tolist() == list(range(0, 16, 2))
    assert clip_numbers(EIGHT_A_SECOND, four_a_second, 0.9999).tolist() == list(range(25, 41, 2))
    uneven = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 1.1])  # what is on the screen then
    assert clip_numbers(uneven, Timing(num_frames=3, frames_per_second=2.0), 0.0).tolist() == [0, 3, 4]


@pytest.mark.parametrize("timing", [WHOLE, Timing(num_frames=8, frames_per_second=4.0)])
def test_a_video_with_too_few_frames_gives_no_clip(timing: Timing) -> None:
    with pytest.raises(SampleError, match=r"^too_few_frames: the video has 5 frames, the clip .*num_frames\) 8$"):
        clip_numbers(EIGHT_A_SECOND[:5], timing, 0.5)


def test_nor_does_one_that_is_too_short_for_the_rate() -> None:
    with pytest.raises(
        SampleError, match=r"too_few_frames: the video is 1\.25 s long; 8 frames .* 4 a second are 2\.0"
    ):
        clip_numbers(EIGHT_A_SECOND[:10], Timing(num_frames=8, frames_per_second=4.0), 0.5)


def test_the_frames_are_those_and_the_time_between_them_is_known() -> None:
    clip = decode_clip(video(40), 16, WHOLE)
    greys = clip.frames.mean((1, 2, 3)) / STEP
    assert greys == pytest.approx(clip_numbers(EIGHT_A_SECOND, WHOLE, 0.5), abs=1)
    assert (clip.frames.shape, clip.frames.dtype) == ((8, 16, 16, 3), np.uint8)
    assert clip.time_ids.tolist() == [64, 64, 0, 0, 16, 16]
    assert clip.seconds_per_frame == pytest.approx(5 / 8)


def test_all_frames_are_cut_to_the_same_square() -> None:
    file = io.BytesIO()
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (64, 128, 3))
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp), format="rgb24")))
        container.mux(stream.encode())
    whole, left = (decode_clip(file.getvalue(), 64, WHOLE, left=place) for place in (0.5, 0.0))
    assert whole.time_ids.tolist() == [64, 128, 0, 32, 64, 64]
    assert left.time_ids.tolist() == [64, 128, 0, 0, 64, 64]
    assert np.abs(np.diff(whole.frames.mean((1, 2, 3)))).max() < 1
    assert whole.frames.mean() - left.frames.mean() == pytest.approx(32, abs=3)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (video(0, codec="mpeg4", file_format="avi"), "no_frames"),
        (sound(), "no_video_stream"),
        (b"words", "damaged_video"),
    ],
)
def test_what_holds_no_frames_is_named(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as error:
        decode_clip(data, 16, WHOLE)
    assert error.value.cause == cause


@pytest.fixture
def shard(write_shard: Callable[..., str]) -> str:
    videos = [video(n) for n in (40, 24, 5, 16, 12)]  # one is too short
    return write_shard(
        "videos.tar",
        [(f"{i}.{name}", data) for i, mp4 in enumerate(videos) for name, data in (("mp4", mp4), ("txt", b"x"))],
    )


def pipeline(shard: str, **settings: Any) -> ClipPipeline:
    config = DataConfig(
        sources=(SourceConfig(name="videos", kind="video_text", shards=shard),), read_threads=0, max_bad_share=1.0
    )
    arguments = {"image_size": 16, "batch_clips": 4, "timing": WHOLE, "random_scale_max": 1.25, **settings}
    return open_clip_pipeline(config, **arguments)


def test_batches_are_a_function_of_the_step_and_what_cannot_be_used_has_no_weight(shard: str) -> None:
    one, other = pipeline(shard), pipeline(shard)
    later = other.batch(3)
    batches = [one.batch(step) for step in range(5)]
    assert all(np.array_equal(later.fields[name], array) for name, array in batches[3].fields.items())
    assert batches[0].fields["images"].shape == (4, 8, 16, 16, 3)
    bad = [sample for batch in batches for sample in batch.bad]
    assert {sample.cause for sample in bad} == {"too_few_frames"} and len(bad) == 4  # once in each epoch of five
    assert sum(batch.fields["weight"].sum() for batch in batches) == 20 - 4
    for batch in batches:
        empty = batch.fields["weight"] == 0
        assert (batch.fields["images"][empty] == 0).all()


def test_videos_that_are_too_small_are_left_out_and_counted(shard: str) -> None:
    batch = pipeline(shard, min_image_side=65).batch(0)
    assert batch.num_small == 4 - len(batch.bad)
    assert batch.fields["weight"].sum() == 0


def test_two_hosts_share_the_clips_of_one(shard: str) -> None:
    whole = pipeline(shard).batch(1).fields
    halves = [pipeline(shard, hosts=2, host=host).batch(1).fields for host in (0, 1)]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([half[name] for half in halves]), array)


def test_settings_that_cannot_work(shard: str) -> None:
    with pytest.raises(ConfigError, match=r"kind video_text; there is none"):
        open_clip_pipeline(DataConfig(), image_size=8, batch_clips=1, timing=WHOLE, random_scale_max=1.0)
    with pytest.raises(ConfigError, match=r"decoder\.video\.batch_clips: got 3; wanted a positive multiple .* 2"):
        pipeline(shard, batch_clips=3, hosts=2)
    with pytest.raises(ConfigError, match=r"decoder\.random_scale_max"):
        pipeline(shard, random_scale_max=0.5)
