"""What the small shards of these tests are made of."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Members = Sequence[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]

#: Each is one token of the tests' tokenizer.
WORDS = ("cat", "dog", "red", "blue", "one", "two", "three", "four", "on", "and")


def picture(colour: int, size: int = 8, file_format: str = "PNG") -> bytes:
    """An image file of one grey, or of noise for lossy formats, so that cutting it loses pixels."""
    rng = np.random.default_rng(colour)
    pixels = np.full((size, size, 3), colour, np.uint8)
    if file_format == "JPEG":
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def cut_picture(colour: int) -> bytes:
    """A picture's file that ends within its pixels."""
    return picture(colour)[:45]  # 33 bytes of signature and header, 8 of the next chunk's head
