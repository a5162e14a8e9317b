"""From the bytes of a sample's parts to text and pixels, and the count of what could not be used."""

from __future__ import annotations

import collections
import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from data_pipelines.index import BadSample, SampleIndex
from data_pipelines.kinds import SampleError, decode_caption
from data_pipelines.remote import ShortReadError
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError

#: Formats found in image shards, whatever the suffix says; a list, because Pillow also knows formats that run programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
Image.init()  # Pillow loads its plugins on first use, which is not safe in several threads at once

#: What Pillow raises for damaged bytes, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)

#: Pixels; larger pictures would take gigabytes while they are decoded. Pillow warns above the same number.
MAX_PIXELS = 89_478_485

#: Bad samples are judged as if at least this many had been seen, so that one among the first few does not stop a run.
MIN_SEEN_FOR_SHARE = 500


def read_text(reader: ShardReader, index: SampleIndex, sample: int, part: int) -> str:
    """Text of part number `part` of the index. Raises `SampleError`."""
    return decode_caption(read_part(reader, index, sample, part), index.caption)


def read_part(reader: ShardReader, index: SampleIndex, sample: int, part: int) -> bytes:
    """Bytes of part number `part` (counted over the whole index), which belongs to `sample`. Raises `SampleError`."""
    try:
        return reader.read(int(index.shards[sample]), int(index.offsets[part]), int(index.sizes[part]))
    except ShortReadError as error:
        raise SampleError("shorter_shard", str(error)) from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture in `data`, with whatever goes wrong in reading it as a `SampleError`."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SampleError("image_too_large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS}")
            if image.mode[0] in "IF":  # Pillow clips these to white when it makes them RGB
                raise SampleError("unsupported_pixels", f"pixels of mode {image.mode}; wanted 8 bits a channel")
            yield image
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError("image_too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise SampleError("not_an_image", f"{len(data)} bytes that are no {', '.join(_FORMATS)} picture") from error
    except _DAMAGE as error:
        raise SampleError("damaged_image", str(error)) from error


def decode_image(data: bytes, image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """RGB pixels of a picture, squeezed to a square of `image_size` pixels with antialiased bicubic.

    The whole picture is kept and its ratio is not, as in the release. Raises `SampleError`.
    """
    with _opened(data) as image:
        return squeeze(np.asarray(image.convert("RGB")), image_size)


def squeeze(pixels: UInt8[np.ndarray, "H W 3"], image_size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A picture squeezed to a square with antialiased bicubic; its ratio is not kept."""
    if pixels.shape[:2] == (image_size, image_size):
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Crop:
    """A square cut out of a scaled picture, and the six sizes that SDXL's U-Net is conditioned on."""

    image: UInt8[np.ndarray, "S S 3"]
    time_ids: Int32[np.ndarray, " 6"]  # original height, width; crop top, left; target height, width: pixels
    upscaled: bool  # the original's short side is less than the square's


def decode_crop(data: bytes, size: int, scale: float, top: float, left: float) -> Crop:
    """A square of `size` pixels from a picture scaled, keeping its ratio, to a short side of `scale` x `size`.

    `scale` is at least 1. `top` and `left` in [0, 1) place the square within the room there is. Raises `SampleError`.
    """
    with _opened(data) as image:
        rgb = image.convert("RGB")
    width, height = rgb.size
    zoom = size * scale / min(width, height)
    room_x, room_y = round(width * zoom) - size, round(height * zoom) - size
    crop_top, crop_left = int(top * (room_y + 1)), int(left * (room_x + 1))
    # One resize of the square's own part of the original: the rest of the scaled picture would be thrown away.
    box = (crop_left / zoom, crop_top / zoom, (crop_left + size) / zoom, (crop_top + size) / zoom)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    pixels = np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box))
    time_ids = np.array([height, width, crop_top, crop_left, size, size], np.int32)
    return Crop(pixels, time_ids, upscaled=min(width, height) < size)


@dataclass
class SampleCounts:
    """How many samples were handed to training, and how many of them were bad, by cause."""

    seen: int = 0
    bad: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: int = 0  # bad as well: an estimate of those in shards that cannot be read at all

    def add(self, seen: int, bad: Iterable[BadSample]) -> None:
        """Counts the samples of one batch."""
        self.seen += seen
        self.bad.update(sample.cause for sample in bad)

    def lose(self, samples: int) -> None:
        """Counts samples that nobody has seen."""
        self.seen += samples
        self.lost += samples

    def check(self, max_bad_share: float, example: BadSample, where: str) -> None:
        """Raises `DataError` when more than `max_bad_share` of the samples seen were bad; `where` names the stream."""
        num_bad = self.bad.total() + self.lost
        if num_bad > max_bad_share * max(self.seen, MIN_SEEN_FOR_SHARE):
            causes = ", ".join(f"{cause} {count}" for cause, count in self.bad.most_common())
            causes += f", in unusable shards about {self.lost}" if self.lost else ""
            raise DataError(
                f"{where}: {num_bad} of {self.seen} samples are bad ({causes}), more than "
                f"data.max_bad_share = {max_bad_share:g} allows; for example {example}"
            )

    def to_dict(self) -> dict[str, int]:
        """The counts as plain integers, "seen" and one entry a cause, for a checkpoint."""
        return {"seen": self.seen, **dict(sorted(self.bad.items()))}

    @classmethod
    def from_dict(cls, counts: Mapping[str, int]) -> SampleCounts:
        """The inverse of `to_dict`."""
        bad = collections.Counter({cause: int(count) for cause, count in counts.items() if cause != "seen"})
        return cls(seen=int(counts.get("seen", 0)), bad=bad)
