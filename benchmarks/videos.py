"""What a video costs from its bytes to 8 frames, in processor time, beside decoding all of it.

    python -m benchmarks.videos

The clips are made here: a picture of smooth noise that pans, 596 x 336 pixels (WebVid's size), 25 frames a second,
H.264 with a key frame every second, every ten (x264's default), or one in all. JSON lines; medians over rounds.
"""

from __future__ import annotations

import functools
import io
import json
import statistics
import time
from collections.abc import Callable

import av
import numpy as np
from PIL import Image

from data_pipelines.images import squeeze
from data_pipelines.order import uniforms
from data_pipelines.video import frame_numbers, sample_frames

WIDTH, HEIGHT, FRAMES_PER_SECOND = 596, 336, 25
NUM_SAMPLED = 8
ROUNDS = 5
DRAWS = uniforms(0, np.arange(NUM_SAMPLED))


def make_clip(seconds: int, key_every: int) -> bytes:
    """An mp4 file with `seconds` of a panning picture and a key frame at least every `key_every` frames."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", key_every
        for i in range(seconds * FRAMES_PER_SECOND):
            left = i * WIDTH // (seconds * FRAMES_PER_SECOND)
            pixels = np.ascontiguousarray(scene[:, left : left + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decode_all(data: bytes, image_size: int) -> list[np.ndarray]:
    """The same frames by decoding every one, which is what a reader without a plan does."""
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].thread_type = "NONE"
        frames = list(container.decode(video=0))
    numbers = frame_numbers(len(frames), DRAWS)
    return [squeeze(frames[number].to_ndarray(format="rgb24"), image_size) for number in numbers]


def milliseconds(function: Callable[[], object]) -> float:
    """Processor time of one call, median over rounds."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def main() -> None:
    """Print a line for each kind of clip and size of frame."""
    for seconds in (5, 20):
        for key_every in (25, 250, 10_000):
            clip = make_clip(seconds, key_every)
            for image_size in (224, 448):
                ours = milliseconds(functools.partial(sample_frames, clip, DRAWS, image_size))
                everything = milliseconds(functools.partial(decode_all, clip, image_size))
                result = {
                    "case": f"video-{seconds}s-key{key_every}-{image_size}",
                    "file_kb": len(clip) // 1000,
                    "ms_per_video": round(ours, 1),
                    "ms_decoding_all": round(everything, 1),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
