from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.image_header import FORMATS, HEAD_BYTES, image_header


def _picture(file_format: str, **settings: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file_format", "settings"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0" + bytes(600)}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(20)}),
        ("GIF", {}),
        ("BMP", {}),
    ],
)
def test_sizes_are_those_that_pillow_reads(file_format: str, settings: dict[str, object]) -> None:
    header = image_header(_picture(file_format, **settings)[:HEAD_BYTES])
    assert (FORMATS[header.format], header.width, header.height) == (file_format, 300, 70)


def test_a_size_beyond_the_head_is_not_known() -> None:
    header = image_header(_picture("JPEG", exif=b"Exif\0\0" + bytes(5000))[:HEAD_BYTES])
    assert (FORMATS[header.format], header.width, header.height) == ("JPEG", 0, 0)


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.binary(max_size=60), st.integers(0, 40))
def test_damage_gives_some_header(file_format: str, data: bytes, start: int) -> None:
    header = image_header(_HEADS[file_format][:start] + data)
    assert 0 <= header.format < len(FORMATS) and header.width >= 0 and header.height >= 0


_HEADS = {name: _picture(name)[:64] for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}
