"""Small videos for these tests."""

from __future__ import annotations

import io

import av
import numpy as np

#: Grey levels from one frame to the next: frame i of a test video is all of grey 6 i.
STEP = 6


def video(num_frames: int, *, codec: str = "libx264", file_format: str = "mp4", key_every: int = 250) -> bytes:
    """A video of 64 x 64 pixels whose frame i is one grey, STEP * i."""
    file = io.BytesIO()
    with av.open(file, "w", format=file_format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.gop_size = key_every
        container.start_encoding()  # writes a header even if no frame follows
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), STEP * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def noisy_video() -> bytes:
    """A video whose damage can be seen: every frame is noise of its own."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(24):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An mp4 file without a video stream."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
