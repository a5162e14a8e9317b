"""From the bytes of a picture to pixels: which decoder reads it, at which size, and what is refused.

JPEGs, nearly all pictures of the web, are decoded strictly by libjpeg-turbo: a file whose pixels are damaged is
refused, where most readers hand out half-grey ones. Everything else is read by Pillow, by what it is and not by what it
is called. Resizing is Pillow's antialiased bicubic, computed by SIMD code to within a rounding step.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import cykooz_resizer
import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8
from PIL import ExifTags, Image

from data_pipelines.kinds import SampleError
from emu2_jax.config import DataConfig

#: Formats found in image shards, whatever the suffix says; a list, because Pillow also knows formats that run programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
Image.init()  # Pillow loads its plugins on first use, which is not safe in several threads at once

#: What Pillow raises for damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

#: Pixels; larger pictures would take gigabytes while they are decoded. Pillow warns above the same number.
MAX_PIXELS = 89_478_485
#: Pixels; the longest side that a JPEG can have. A longer one is a strip, not a picture.
MAX_SIDE = 65_535
#: Passes of a progressive JPEG over its pixels; encoders make about 10, a file made to stall its reader thousands.
MAX_SCANS = 100

_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN = b"\xff\xda"
#: Smaller files than both cannot hold enough scans, over enough pixels, to take more than seconds: they go uncounted.
_COUNT_SCANS_FROM_BYTES, _COUNT_SCANS_FROM_PIXELS = 1 << 19, 1 << 22

#: Pixels of an upright picture, from those stored under an EXIF orientation. Source: EXIF 2.3, tag 0x0112.
_TURNS: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}

#: Catmull-Rom is the cubic with a = -0.5, which is Pillow's BICUBIC; "convolution" widens it when shrinking.
_BICUBIC = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)
_WHOLE = cykooz_resizer.ResizeOptions(resize_alg=_BICUBIC, use_alpha=False)
_of_thread = threading.local()  # a resizer keeps its buffers, and serves one thread at a time


@dataclass(frozen=True)
class ImageRules:
    """What is open about turning a file into pixels."""

    decoding: Literal["faithful", "fast"] = "faithful"
    apply_exif_orientation: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> ImageRules:
        """The rules that a config asks for."""
        return cls(config.image_decoding, config.apply_exif_orientation)


RELEASE_RULES = ImageRules()


@dataclass(frozen=True)
class _Picture:
    pixels: UInt8[np.ndarray, "H W 3"]  # upright if asked for; smaller than height x width after a scaled decode
    height: int  # of the original, turned like the pixels
    width: int


def decode_image(data: bytes, image_size: int, rules: ImageRules = RELEASE_RULES) -> UInt8[np.ndarray, "S S 3"]:
    """RGB pixels of a picture, squeezed to a square of `image_size` pixels with antialiased bicubic.

    The whole picture is kept and its ratio is not, as in the release. Raises `SampleError`.
    """
    return squeeze(_read(data, image_size, rules).pixels, image_size)


def squeeze(pixels: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A whole picture as a square of `image_size` pixels, by antialiased bicubic."""
    return pixels if pixels.shape[:2] == (image_size, image_size) else _resize(pixels, image_size)


@dataclass(frozen=True)
class Crop:
    """A square cut out of a scaled picture, and the six sizes that SDXL's U-Net is conditioned on."""

    image: UInt8[np.ndarray, "S S 3"]
    time_ids: Int32[np.ndarray, " 6"]  # original height, width; crop top, left; target height, width: pixels
    upscaled: bool  # the original's short side is less than the square's


def decode_crop(
    data: bytes, size: int, scale: float, top: float, left: float, rules: ImageRules = RELEASE_RULES
) -> Crop:
    """A square of `size` pixels from a picture scaled, keeping its ratio, to a short side of `scale` x `size`.

    `scale` is at least 1. `top` and `left` in [0, 1) place the square within the room there is. Raises `SampleError`.
    """
    return _cut(_read(data, size * scale, rules), size, scale, top, left)


def crop(pixels: UInt8[np.ndarray, "H W 3"], size: int, scale: float, top: float, left: float) -> Crop:
    """As `decode_crop`, from pixels: frames of a video, say."""
    return _cut(_Picture(pixels, *pixels.shape[:2]), size, scale, top, left)


def _cut(picture: _Picture, size: int, scale: float, top: float, left: float) -> Crop:
    height, width = picture.height, picture.width
    zoom = size * scale / min(width, height)
    room_x, room_y = round(width * zoom) - size, round(height * zoom) - size
    crop_top, crop_left = int(top * (room_y + 1)), int(left * (room_x + 1))
    # One resize of the square's own part of the original: the rest of the scaled picture would be thrown away.
    zoom_x, zoom_y = (
        zoom * whole / kept for whole, kept in zip((width, height), picture.pixels.shape[1::-1], strict=True)
    )
    box = (crop_left / zoom_x, crop_top / zoom_y, (crop_left + size) / zoom_x, (crop_top + size) / zoom_y)
    pixels = _resize(picture.pixels, size, box)
    time_ids = np.array([height, width, crop_top, crop_left, size, size], np.int32)
    return Crop(pixels, time_ids, upscaled=min(width, height) < size)


def _read(data: bytes, short_side: float, rules: ImageRules) -> _Picture:
    """The pixels of a picture; a fast reading may shrink it, but never to a short side of less than `short_side`."""
    if data.startswith(_JPEG):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # damaged, or of a make that only Pillow knows: it will tell
        else:
            _check_size(width, height)
            _check_scans(data, width, height)
            reduction = _reduction(min(width, height), short_side) if rules.decoding == "fast" else 1
            return _turned(data, _decode_jpeg(data, height, width, reduction), height, width, rules)
    pixels = _decode_other(data)
    return _turned(data, pixels, pixels.shape[0], pixels.shape[1], rules)


def _reduction(stored: int, wanted: float) -> int:
    """By how much a side of `stored` pixels may be divided while decoding. Halves only: those have SIMD code."""
    return next((divisor for divisor in (8, 4, 2) if -(-stored // divisor) >= wanted), 1)


def _decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> UInt8[np.ndarray, "H W 3"]:
    try:
        if reduction == 1:
            return simplejpeg.decode_jpeg(data, "RGB")
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        return simplejpeg.decode_jpeg(data, "RGB", **least, min_factor=reduction)
    except ValueError as error:
        raise SampleError("damaged_image", str(error)) from error


def _decode_other(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of the first frame; transparency is dropped."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.width, image.height)
            if image.mode[0] in "IF":  # Pillow clips these to white when it makes them RGB
                raise SampleError("unsupported_pixels", f"pixels of mode {image.mode}; wanted 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise SampleError("not_an_image", f"{len(data)} bytes that are no {', '.join(_FORMATS)} picture") from error
    except _DAMAGE as error:
        raise SampleError("damaged_image", str(error)) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError("image_too_large", f"{width} x {height} pixels; at most {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise SampleError("image_too_large", f"{width} x {height} pixels; at most {MAX_SIDE} a side")


def _check_scans(data: bytes, width: int, height: int) -> None:
    if len(data) < _COUNT_SCANS_FROM_BYTES and width * height < _COUNT_SCANS_FROM_PIXELS:
        return
    scans = data.count(_START_OF_SCAN)
    if scans > MAX_SCANS:
        raise SampleError("image_too_large", f"a JPEG of {scans} scans over its pixels; at most {MAX_SCANS}")


def _turned(data: bytes, pixels: UInt8[np.ndarray, "H W 3"], height: int, width: int, rules: ImageRules) -> _Picture:
    orientation = _orientation(data) if rules.apply_exif_orientation else 1
    if orientation not in _TURNS:
        return _Picture(pixels, height, width)
    lies = orientation >= 5
    return _Picture(_TURNS[orientation](pixels), width if lies else height, height if lies else width)


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1 (upright) where there is none: damaged EXIF does not spoil the pixels beside it."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_DAMAGE, TypeError, KeyError):
        return 1


def _resize(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, box: tuple[float, float, float, float] | None = None
) -> UInt8[np.ndarray, "S S 3"]:
    """A picture, or the part of it within `box` (left, top, right, bottom), as a square of `size` pixels."""
    height, width = pixels.shape[:2]
    source = cykooz_resizer.ImageData(width, height, cykooz_resizer.PixelType.U8x3, pixels.tobytes())
    square = cykooz_resizer.ImageData(size, size, cykooz_resizer.PixelType.U8x3)
    _resizer().resize(source, square, _WHOLE if box is None else _part(box, width, height))
    return np.frombuffer(square.get_buffer(), np.uint8).reshape(size, size, 3)


def _resizer() -> cykooz_resizer.Resizer:
    if not hasattr(_of_thread, "resizer"):
        _of_thread.resizer = cykooz_resizer.Resizer()
    return _of_thread.resizer


def _part(box: tuple[float, float, float, float], width: int, height: int) -> cykooz_resizer.ResizeOptions:
    left, top, right, bottom = box
    crop = cykooz_resizer.CropBox(left, top, _within(left, right, width), _within(top, bottom, height))
    return cykooz_resizer.ResizeOptions(resize_alg=_BICUBIC, crop_box=crop, use_alpha=False)


def _within(first: float, last: float, length: int) -> float:
    """Length of a stretch that ends at `length` at most, also after the rounding of first + length."""
    stretch = min(last, length) - first
    return stretch if first + stretch <= length else math.nextafter(stretch, 0.0)
