"""Image-text shards for measuring loaders, cut out of a few photographs.

What a loader costs is decided by the files' sizes, qualities and encodings, so these are drawn as they are on the web:
short sides of 256 to 1024 pixels, qualities of 75 to 95, four of five with halved colour, 8 % progressive, 1 % grey.
"""

from __future__ import annotations

import io
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.shard_writer import ShardWriter, shard_name, shard_ranges
from emu2_jax.errors import DataError, UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})
SHORT_SIDES = (256, 1024)  # pixels, log-uniform
SMALLEST_PHOTO = 224  # pixels, short side
MAX_ENLARGEMENT = 1.4  # a photograph blown up further is smoother than a real one of that size
WORDS = (Path(__file__).read_text(encoding="utf-8")).split()  # captions need lengths, not sense


def make_shards(out: Path, photos: Sequence[Path], count: int, per_shard: int = 500, processes: int = 2) -> None:
    """Write `count` pairs into shards of `per_shard`; the same photographs give the same pairs."""
    files = find_photos(photos)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give another directory")
    ranges = shard_ranges(count, per_shard)
    # Not forked: a process that uses jax has threads, and a fork of one may hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_shard, repeat(out), range(len(ranges)), ranges, repeat(files)))


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """The pictures among files and in directories that are large enough. Raises `DataError` when there is none."""
    found: list[Path] = []
    for path in paths:
        found += sorted(file for file in path.rglob("*")) if path.is_dir() else [path]
    photos = [path for path in found if path.suffix.lower() in SUFFIXES and _short_side(path) >= SMALLEST_PHOTO]
    if not photos:
        raise DataError(f"no picture with a short side of {SMALLEST_PHOTO} pixels or more among {len(found)} files")
    return photos


def _short_side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except OSError:
        return 0


def _write_shard(out: Path, number: int, samples: range, files: Sequence[Path]) -> None:
    photos = [Image.open(path).convert("RGB") for path in files]
    with ShardWriter(out / shard_name("photos", number)) as shard:
        for sample in samples:
            rng = np.random.default_rng([7, sample])
            words = int(np.clip(round(math.exp(rng.normal(2.3, 0.72))), 2, 90))  # median 10, as in LAION
            start = int(rng.integers(len(WORDS) - words))
            caption = " ".join(WORDS[start : start + words])
            shard.write(f"{sample:08d}", {"jpg": _photo(rng, photos), "txt": caption.encode()})


def _photo(rng: np.random.Generator, photos: Sequence[Image.Image]) -> bytes:
    """A random part of a random photograph, at a random size and ratio, as a JPEG file."""
    short = math.exp(rng.uniform(*np.log(SHORT_SIDES)))
    ratio = float(np.clip(math.exp(rng.normal(0.15, 0.3)), 0.5, 2.2))
    width, height = round(short * max(ratio, 1)), round(short * max(1 / ratio, 1))
    least = np.array([max(width / photo.width, height / photo.height) for photo in photos])
    large_enough = np.flatnonzero(least <= MAX_ENLARGEMENT)
    chosen = int(rng.choice(large_enough)) if len(large_enough) else int(least.argmin())
    zoom = rng.uniform(least[chosen], max(1.0, least[chosen]))  # from all of the photograph to a part of it
    photo = photos[chosen]
    left, top = (
        rng.uniform(0, max(0.0, whole - kept / zoom)) for whole, kept in ((photo.width, width), (photo.height, height))
    )
    box = (left, top, min(left + width / zoom, photo.width), min(top + height / zoom, photo.height))
    image = photo.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if zoom > 1:
        noisy = np.asarray(image, np.float32) + rng.normal(0, 3, (height, width, 1))
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if rng.random() < 0.01:
        image = image.convert("L")
    buffer = io.BytesIO()
    colour = {} if image.mode == "L" else {"subsampling": 2 if rng.random() < 0.8 else 0}
    image.save(buffer, "JPEG", quality=int(rng.integers(75, 96)), progressive=bool(rng.random() < 0.08), **colour)
    return buffer.getvalue()
