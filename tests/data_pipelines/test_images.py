from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tiny_shards import cut_picture, picture

from data_pipelines import images
from data_pipelines.images import ImageRules, decode_crop, decode_image
from data_pipelines.kinds import SampleError

FAST = ImageRules(decoding="fast")
UPRIGHT = ImageRules(apply_exif_orientation=True)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(seed: int, width: int, height: int) -> Image.Image:
    """A picture with a photograph's spectrum, amplitudes falling as 1 / frequency, and an edge through it."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) * falling
    pixels = np.fft.ifft2(spectrum).real
    pixels = pixels / pixels.std() * 45 + 120
    pixels[:, (np.arange(height)[:, None] * width > np.arange(width)[None] * height)] += 40
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(seed: int, width: int, height: int, **options: object) -> bytes:
    return encode(photo(seed, width, height), "JPEG", quality=int(75 + 4 * (seed % 6)), **options)


def by_pillow(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean(np.square(first.astype(np.float64) - second.astype(np.float64)))
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


# --- fidelity ---------------------------------------------------------------------------------------------------------


def test_pictures_of_the_right_size_are_left_alone() -> None:
    square = photo(0, 20, 20)
    assert np.array_equal(decode_image(encode(square), 20), np.asarray(square))


@pytest.mark.parametrize("size", [56, 112])
def test_faithful_pixels_are_those_of_pillow_to_a_rounding_step(size: int) -> None:
    files = [jpeg(seed, 100 + 37 * seed, 130 + 23 * seed) for seed in range(12)]
    against = [psnr_db(decode_image(data, size), by_pillow(data, size)) for data in files]
    assert np.median(against) >= 54 and min(against) >= 50, against


def test_fast_pixels_stay_near_pillow_and_are_scaled_by_halves_only() -> None:
    files = [jpeg(seed, 300 + 37 * seed, 330 + 23 * seed) for seed in range(12)]
    against = [psnr_db(decode_image(data, 112, FAST), by_pillow(data, 112)) for data in files]
    assert np.median(against) >= 30 and min(against) >= 24, against
    assert all(value < 50 for value in against[:3]), "decoded in full"
    small = jpeg(3, 223, 400)  # its half would be short of the target
    assert np.array_equal(decode_image(small, 112, FAST), decode_image(encode_half(small), 112))
    assert np.array_equal(decode_image(small, 113, FAST), decode_image(small, 113))


def encode_half(data: bytes) -> bytes:
    """What libjpeg gives at half the size, as a PNG."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        return encode(image.convert("RGB"))


@pytest.mark.parametrize(("stored", "wanted", "divisor"), [(448, 224, 2), (447, 224, 2), (446, 224, 1), (900, 112, 8)])
def test_a_side_is_never_scaled_below_the_target(stored: int, wanted: int, divisor: int) -> None:
    assert images._reduction(stored, wanted) == divisor
    assert -(-stored // divisor) >= wanted


def test_threads_share_the_reader() -> None:
    files = [jpeg(seed, 200 + seed, 150) for seed in range(24)]
    alone = [decode_image(data, 32) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, 32), files))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# --- what pictures are like -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    decoded = decode_image(encode(image, "JPEG" if mode == "CMYK" else "PNG"), 4)
    assert decoded.shape == (4, 4, 3) and decoded.dtype == np.uint8 and decoded.min() >= 254


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("rules", [ImageRules(), FAST])
def test_grey_and_cmyk_jpegs_agree_with_pillow(mode: str, rules: ImageRules) -> None:
    data = encode(photo(1, 64, 64).convert(mode), "JPEG", quality=95)
    assert np.abs(decode_image(data, 64, rules).astype(int) - by_pillow(data, 64)).max() <= 1


def test_transparency_is_dropped_and_not_blended() -> None:
    clear = Image.new("RGBA", (6, 6), (200, 10, 30, 0))
    assert (decode_image(encode(clear), 6) == (200, 10, 30)).all()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options: dict[str, object] = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decode_image(data, 8).astype(int) - (250, 0, 0)).max() <= 5


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP"])
def test_the_content_decides_and_not_the_name(file_format: str) -> None:
    """Whatever an archive calls .jpg arrives here as bytes."""
    data = encode(photo(2, 40, 30), file_format)
    assert psnr_db(decode_image(data, 16), by_pillow(data, 16)) >= 50


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_turns_only_where_the_setting_says_so(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(4, 48, 32), file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
        stored = np.asarray(image)
    assert np.abs(images._read(data, 1, UPRIGHT).pixels.astype(int) - upright).max() <= 1
    assert np.abs(images._read(data, 1, ImageRules()).pixels.astype(int) - stored).max() <= 1
    crop = decode_crop(data, 16, scale=1.0, top=0.0, left=0.0, rules=UPRIGHT)
    assert crop.time_ids.tolist()[:2] == list(upright.shape[:2])


def test_damaged_exif_leaves_the_pixels_as_they_are() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(4, 48, 32), "JPEG", exif=exif)
    broken = data.replace(b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0MM\0*\xff\xff\xff\xf8")
    assert broken != data
    assert np.array_equal(decode_image(broken, 24, UPRIGHT), decode_image(data, 24))


# --- damage -----------------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """A JPEG with a run of bytes inverted in the middle of its pixels."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 16]) + data[middle + 16 :]


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that say they are a picture of width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    data = jpeg(1, 16, 16)
    at = data.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision, then height and width
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (jpeg(3, 64, 64)[:-200], "damaged_image"),
        (jpeg(3, 64, 64)[:-1], "damaged_image"),
        (jpeg(3, 64, 64, progressive=True)[:-200], "damaged_image"),
        (flipped(jpeg(3, 200, 200)), "damaged_image"),
        (jpeg(3, 64, 64)[:300], "damaged_image"),
        (cut_picture(3), "damaged_image"),
        (encode(photo(1, 64, 64), "WEBP")[:-100], "damaged_image"),
        (picture(3)[:50].replace(b"IHDR", b"IHDX"), "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (encode(Image.new("I;16", (4, 4))), "unsupported_pixels"),
        (png_of_size(100_000, 100_000), "image_too_large"),
        (png_of_size(20_000, 20_000), "image_too_large"),
        (png_of_size(100_000, 3), "image_too_large"),
        (jpeg_of_size(65_000, 65_000), "image_too_large"),
    ],
)
@pytest.mark.parametrize("rules", [ImageRules(), FAST, UPRIGHT])
def test_bad_pictures_have_a_cause(data: bytes, cause: str, rules: ImageRules) -> None:
    for read in _READERS:
        with pytest.raises(SampleError) as caught:
            read(data, rules)
        assert caught.value.cause == cause


_READERS: list[Callable[[bytes, ImageRules], object]] = [
    lambda data, rules: decode_image(data, 8, rules),
    lambda data, rules: decode_crop(data, 8, 1.2, 0.5, 0.5, rules),
]


def test_picture_with_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    for file_format in ("PNG", "JPEG"):
        with pytest.raises(SampleError, match=r"image_too_large: 8 x 8 pixels; at most 63"):
            decode_image(picture(1, 8, file_format), 8)


def test_a_large_jpeg_of_endless_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_COUNT_SCANS_FROM_PIXELS", 64 * 64)
    data = jpeg(1, 64, 64, progressive=True)
    decode_image(data, 8)
    monkeypatch.setattr(images, "MAX_SCANS", 5)
    with pytest.raises(SampleError, match="image_too_large: a JPEG of 10 scans"):
        decode_image(data, 8)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_pictures_decode_or_raise_sample_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    rules = data.draw(st.sampled_from([ImageRules(), FAST, UPRIGHT]))
    content = bytearray(picture(5, 32, file_format))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(SampleError):
        assert decode_image(bytes(content), 8, rules).shape == (8, 8, 3)


# --- crops ------------------------------------------------------------------------------------------------------------


def test_crop_of_a_known_picture() -> None:
    # 40 wide and 20 high: to a short side of 10 x 1.2 = 12 the zoom is 0.6, so the scaled picture is 24 x 12.
    columns = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 20, axis=0).repeat(3, axis=2)
    crop = decode_crop(encode(Image.fromarray(columns)), 10, scale=1.2, top=0.99, left=0.5)
    assert crop.time_ids.tolist() == [20, 40, 2, 7, 10, 10]  # room of 2 rows and 14 columns
    assert crop.image.shape == (10, 10, 3) and not crop.upscaled
    # Column c of the crop shows the original around (7 + c + 0.5) / 0.6.
    shown = crop.image[5, :, 0] / 6
    assert np.abs(shown - ((7.5 + np.arange(10)) / 0.6 - 0.5)).max() < 0.3


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.25), (0.999, 0.999)])
def test_crops_agree_with_pillow_and_in_fast_mode_keep_their_place(place: tuple[float, float]) -> None:
    data = jpeg(7, 401, 303)
    faithful, fast = (decode_crop(data, 64, 1.25, *place, rules) for rules in (ImageRules(), FAST))
    top, left = faithful.time_ids[2:4] * 303 / 80  # the short side of 303 is scaled to 64 x 1.25
    box = (left, top, min(left + 64 * 303 / 80, 401), min(top + 64 * 303 / 80, 303))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=box))
    assert psnr_db(faithful.image, expected) >= 50
    assert 24 <= psnr_db(fast.image, expected) < 50
    assert np.array_equal(faithful.time_ids, fast.time_ids)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(8, 40),
    scale=st.floats(1, 2),
    top=st.floats(0, 1, exclude_max=True),
    left=st.floats(0, 1, exclude_max=True),
)
def test_every_crop_lies_within_its_picture(
    width: int, height: int, size: int, scale: float, top: float, left: float
) -> None:
    data = encode(Image.new("RGB", (width, height), (7, 8, 9)))
    assert (decode_crop(data, size, scale, top, left).image == (7, 8, 9)).all()


def test_small_pictures_are_scaled_up_and_extreme_ratios_hold() -> None:
    assert decode_crop(picture(9), 16, scale=1.0, top=0.0, left=0.999).upscaled
    thin = encode(Image.new("RGB", (1, 3000), (7, 7, 7)))
    crop = decode_crop(thin, 16, scale=1.25, top=0.999999, left=0.999999)
    assert (crop.image == 7).all() and crop.time_ids.tolist()[:2] == [3000, 1]
