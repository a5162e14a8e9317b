from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_shards import cut_picture, picture

from data_pipelines import samples
from data_pipelines.index import BadSample
from data_pipelines.kinds import SampleError, decode_text
from data_pipelines.samples import SampleCounts, decode_crop, decode_image
from emu2_jax.errors import DataError


def _encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def test_text_loses_white_space_at_its_ends_only() -> None:
    assert decode_text(b" a  cat\n") == "a  cat"


def test_picture_is_squeezed_to_a_square_like_the_release() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_image(_encode(image), 14), expected)
    square = image.crop((0, 0, 20, 20))
    assert np.array_equal(decode_image(_encode(square), 20), np.asarray(square))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    decoded = decode_image(_encode(image, "JPEG" if mode == "CMYK" else "PNG"), 4)
    assert decoded.shape == (4, 4, 3) and decoded.dtype == np.uint8 and decoded.min() >= 254


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (picture(3, 64, "JPEG")[:-200], "damaged_image"),
        (cut_picture(3), "damaged_image"),
        (picture(3)[:50].replace(b"IHDR", b"IHDX"), "not_an_image"),
        (b"", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (_encode(Image.new("I;16", (4, 4))), "unsupported_pixels"),
    ],
)
def test_bad_pictures_have_a_cause(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(data, 8)
    assert caught.value.cause == cause


def test_picture_with_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_PIXELS", 63)
    with pytest.raises(SampleError, match=r"image_too_large: 8 x 8 pixels; at most 63"):
        decode_image(picture(1), 8)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_pictures_decode_or_raise_sample_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    content = bytearray(picture(5, 16, file_format))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(SampleError):
        assert decode_image(bytes(content), 8).shape == (8, 8, 3)


def test_crop_of_a_known_picture() -> None:
    # 40 wide and 20 high: to a short side of 10 x 1.2 = 12 the zoom is 0.6, so the scaled picture is 24 x 12.
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 20, axis=0).repeat(3, axis=2)
    data = _encode(Image.fromarray(columns))
    crop = decode_crop(data, 10, scale=1.2, top=0.99, left=0.5)
    assert crop.time_ids.tolist() == [20, 40, 2, 7, 10, 10]  # room of 2 rows and 14 columns
    assert crop.image.shape == (10, 10, 3) and not crop.upscaled
    # Column c of the crop shows the original around (7 + c + 0.5) / 0.6.
    shown = crop.image[5, :, 0] / 6
    assert np.abs(shown - ((7.5 + np.arange(10)) / 0.6 - 0.5)).max() < 0.3


def test_small_pictures_are_scaled_up_and_extreme_ratios_hold() -> None:
    assert decode_crop(picture(9), 16, scale=1.0, top=0.0, left=0.999).upscaled
    thin = _encode(Image.new("RGB", (1, 3000), (7, 7, 7)))
    crop = decode_crop(thin, 16, scale=1.25, top=0.999999, left=0.999999)
    assert (crop.image == 7).all() and crop.time_ids.tolist()[:2] == [3000, 1]


_BAD = BadSample("damaged_image", "a.tar", "7", 512, "truncated")


def test_few_bad_samples_pass_and_many_stop() -> None:
    counts = SampleCounts()
    counts.add(40, [_BAD] * 5)
    counts.check(0.01, _BAD, "data")  # judged as 5 of 500
    counts.add(10, [_BAD])
    with pytest.raises(DataError, match=r"6 of 50 samples are bad \(damaged_image 6\).*a\.tar, sample '7', byte 512"):
        counts.check(0.01, _BAD, "data")
    counts.seen = 600
    counts.check(0.01, _BAD, "data")
    with pytest.raises(DataError, match="max_bad_share = 0 allows"):
        counts.check(0.0, _BAD, "data")


def test_counts_survive_a_checkpoint() -> None:
    counts = SampleCounts()
    counts.add(9, [_BAD])
    assert counts.to_dict() == {"seen": 9, "damaged_image": 1}
    assert SampleCounts.from_dict(counts.to_dict()) == counts
