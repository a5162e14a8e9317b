"""Frames of a video: which ones, the right ones in every container, and a cause for everything that is wrong."""

from __future__ import annotations

import contextlib
import io

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_videos import STEP, noisy_video, sound, video

from data_pipelines import video as video_
from data_pipelines.kinds import SampleError
from data_pipelines.video import frame_numbers, sample_frames

MIDDLES = np.full(8, 0.5)


def greys(data: bytes, draws: np.ndarray) -> list[float]:
    """Which frame each of the sampled frames is, by its grey."""
    return [float(frame.mean()) / STEP for frame in sample_frames(data, draws, 16)]


def test_one_frame_from_each_equal_stretch() -> None:
    assert frame_numbers(40, MIDDLES).tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert frame_numbers(8, np.array([0.5, 0.5])).tolist() == [2, 6]
    assert frame_numbers(40, np.zeros(8)).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert frame_numbers(40, np.full(8, 0.999)).tolist() == [4, 9, 14, 19, 24, 29, 34, 39]
    assert frame_numbers(3, MIDDLES).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("key_every", [250, 5])
@pytest.mark.parametrize(
    ("codec", "file_format"),
    [("libx264", "mp4"), ("libx264", "matroska"), ("libvpx-vp9", "webm"), ("mpeg4", "avi"), ("mpeg4", "mov")],
)
def test_the_frames_are_those_asked_for(codec: str, file_format: str, key_every: int) -> None:
    data = video(40, codec=codec, file_format=file_format, key_every=key_every)
    for draws in (MIDDLES, np.linspace(0, 0.99, 8)):
        assert np.round(greys(data, draws)).tolist() == pytest.approx(frame_numbers(40, draws), abs=1)
    frames = sample_frames(data, MIDDLES, 16)
    assert all(frame.shape == (16, 16, 3) and frame.dtype == np.uint8 for frame in frames)


def test_short_videos_repeat_frames() -> None:
    assert np.round(greys(video(3), MIDDLES)).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert np.round(greys(video(1), MIDDLES)).tolist() == [0] * 8


def test_equal_draws_give_equal_pixels() -> None:
    data, draws = noisy_video(), np.random.default_rng(0).random(8)
    first, second = (np.stack(sample_frames(data, draws, 32)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, np.stack(sample_frames(data, draws[::-1].copy(), 32)))


def test_frames_that_are_skipped_on_the_way_change_nothing() -> None:
    data = noisy_video()  # 24 frames, with B-frames that others do and do not depend on
    with av.open(io.BytesIO(data), "r") as container:
        everything = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for count in (1, 3, 8, 24):
        draws = np.random.default_rng(count).random(count)
        expected = [everything[number] for number in frame_numbers(24, draws)]
        assert np.array_equal(sample_frames(data, draws, 64), expected)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "damaged_video"),
        (b"<html>not found</html>", "damaged_video"),
        (noisy_video()[:-2000], "damaged_video"),  # an mp4's index lies at its end
        (noisy_video().replace(b"moov", b"none"), "damaged_video"),
        (sound(), "no_video_stream"),
        (video(0), "no_video_stream"),  # an mp4 lists only what it has packets of
        (video(0, codec="mpeg4", file_format="avi"), "no_frames"),
    ],
)
def test_bad_videos_have_a_cause(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as caught:
        sample_frames(data, MIDDLES, 16)
    assert caught.value.cause == cause


def test_frames_of_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(SampleError, match=r"image_too_large: frames of 64 x 64 pixels"):
        sample_frames(video(2), MIDDLES, 16)


def test_damaged_packets_are_an_error_and_not_painted_over() -> None:
    data = bytearray(noisy_video())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    with pytest.raises(SampleError, match="damaged_video"):
        sample_frames(bytes(data), np.full(24, 0.5), 16)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_videos_decode_or_raise_sample_error(data: st.DataObject) -> None:
    content = bytearray(_SMALL)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(SampleError):
        assert len(sample_frames(bytes(content), MIDDLES, 8)) == 8


_SMALL = video(12)
