"""From the bytes of a video to a few of its frames."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeVar

import av
import numpy as np
from jaxtyping import Float64, Int64, UInt8

from data_pipelines.images import MAX_PIXELS, squeeze
from data_pipelines.kinds import SampleError

av.logging.set_level(av.logging.PANIC)  # FFmpeg writes of damaged files to stderr; here they are counted

#: A damaged packet is an error, as a damaged image is: by default FFmpeg paints over it. And frames may grow within a
#: stream.
_STRICT = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}


_Finished = TypeVar("_Finished")


class _Packets(NamedTuple):
    """The pictures of a video in the order they are shown, from its packets alone."""

    times: Int64[np.ndarray, " F"]  # in units of the stream
    is_key: np.ndarray  # [F] bool: decoding can begin here


def frame_numbers(num_frames: int, draws: Float64[np.ndarray, " T"]) -> Int64[np.ndarray, " T"]:
    """Which of `num_frames` frames are taken: one from each of T equal stretches, at a place that `draws` decide.

    A video of fewer than T frames repeats some. With draws 0.5 these are the middles: 8 frames, T = 2 give 2 and 6.
    """
    stretches = (np.arange(len(draws)) + draws) / len(draws)
    return np.minimum((stretches * num_frames).astype(np.int64), num_frames - 1)


def sample_frames(data: bytes, draws: Float64[np.ndarray, " T"], image_size: int) -> list[UInt8[np.ndarray, "S S 3"]]:
    """T frames of a video, RGB, each squeezed to a square of `image_size` pixels as images are.

    Which ones is up to `draws` (`frame_numbers`). The frames are those that the packets hold, whatever the file's
    header says of their number. Rotation written in the header is not applied. Raises `SampleError`.
    """
    return read_frames(data, lambda times: frame_numbers(len(times), draws), lambda frame: squeeze(frame, image_size))


def read_frames(
    data: bytes,
    choose: Callable[[Float64[np.ndarray, " F"]], Int64[np.ndarray, " T"]],
    finish: Callable[[UInt8[np.ndarray, "H W 3"]], _Finished],
) -> list[_Finished]:
    """What `finish` makes of some frames of a video, RGB and whole.

    `choose` is given when each frame is shown, in seconds after the first, and gives the numbers of those to decode, in
    rising order. Raises `SampleError`.
    """
    try:
        with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise SampleError("no_video_stream", "the file has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise SampleError("damaged_video", "the video stream is of no known codec")
            packets = _packets(container, stream)
            times = (packets.times - packets.times[0]) * float(stream.time_base or 0)
            numbers = choose(times)
            return [finish(frame) for frame in _decode(container, stream, packets, numbers.tolist())]
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise SampleError("damaged_video", f"{len(data)} bytes: {getattr(error, 'strerror', None) or error}") from error


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> _Packets:
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise SampleError("image_too_large", f"frames of {size} pixels; at most {MAX_PIXELS}")
    found = [
        (packet.pts if packet.pts is not None else packet.dts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    times = np.array([time for time, _ in found if time is not None], np.int64)
    if not len(times):
        raise SampleError("no_frames", "the video stream holds no frames")
    order = np.argsort(times, kind="stable")
    is_key = np.array([key for time, key in found if time is not None], np.bool_)
    return _Packets(times[order], is_key[order])


def _decode(
    container: av.container.InputContainer, stream: av.VideoStream, packets: _Packets, numbers: Sequence[int]
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The frames with these numbers, which rise; seeks only where a key frame lies between two of them."""
    stream.codec_context.options = _STRICT
    stream.thread_type = "NONE"  # the loader's own threads decode several videos at once
    key_numbers = np.flatnonzero(packets.is_key)
    frames: Iterator[av.VideoFrame] = iter(())
    frame: av.VideoFrame | None = None
    wanted_times = frozenset(packets.times[list(numbers)].tolist())
    at = -1  # number of the frame that was decoded last
    for number in numbers:
        before = key_numbers[key_numbers <= number]
        start = int(before[-1]) if len(before) else 0
        if frame is None or start > at:
            container.seek(int(packets.times[start]), stream=stream)
            frames = _frames(container, stream, wanted_times)
            frame = next(frames, None)
            at = start
        wanted = int(packets.times[number])
        while frame is not None and (frame.pts is None or frame.pts < wanted):
            frame = next(frames, None)
            if frame is not None and frame.pts is not None:
                at = int(np.searchsorted(packets.times, frame.pts))
        if frame is None:
            raise SampleError("damaged_video", f"frame {number} of {len(packets.times)} cannot be decoded")
        yield frame.to_ndarray(format="rgb24")


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, wanted_times: Collection[int]
) -> Iterator[av.VideoFrame]:
    """Decodes on from where the container is; of what no other frame depends on, only the wanted frames."""
    for packet in container.demux(stream):
        wanted = packet.pts is None or packet.pts in wanted_times
        stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
        yield from packet.decode()
