"""Shards of a source, looked through before they are trained on: every part is read and decoded as training would."""

from __future__ import annotations

import collections
import functools
import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from data_pipelines import samples as samples_
from data_pipelines.corpora import KINDS, SOURCES
from data_pipelines.grounding import decode_grounded
from data_pipelines.images import decode_image
from data_pipelines.index import BadSample, SampleIndex, scan_shard
from data_pipelines.kinds import TEXT_SUFFIX, SampleError, check_text_size
from data_pipelines.shards import ShardReader
from data_pipelines.video import sample_frames
from emu2_jax.errors import DataError

#: Sources whose shards have a downloader's statistics beside them.
_DOWNLOADED = ("img2dataset", "video2dataset", "grit")

_IMAGE_SIZE = 32  # pixels; only whether a picture can be decoded matters here
_FRAMES = np.full(8, 0.5)


@dataclass
class Validation:
    """What was found in the shards of a source."""

    shards: int = 0  #: of the layout
    samples: int = 0  #: that can be used
    parts: collections.Counter[str] = field(default_factory=collections.Counter)  #: texts, images, videos
    bad: collections.Counter[str] = field(default_factory=collections.Counter)  #: samples or images, by cause
    remarks: collections.Counter[str] = field(default_factory=collections.Counter)  #: on shards, by what is odd
    examples: dict[str, str] = field(default_factory=dict)  #: the first one of each cause and remark
    broken: list[str] = field(default_factory=list)  #: what is wrong with shards that are not of the layout

    def add(self, other: Validation) -> None:
        """Counts what was found in more shards."""
        self.shards += other.shards
        self.samples += other.samples
        self.parts += other.parts
        self.bad += other.bad
        self.remarks += other.remarks
        self.examples = other.examples | self.examples
        self.broken += other.broken

    def lines(self) -> Iterator[str]:
        """The findings, for people to read."""
        parts = "".join(f", {count:,} {what}" for what, count in sorted(self.parts.items()))
        yield f"{self.shards:,} shards, {self.samples:,} samples that can be used{parts}"
        for cause, count in (self.bad + self.remarks).most_common():
            yield f"{cause} {count:,}; for example {self.examples[cause]}"
        yield from self.broken

    def check(self) -> None:
        """Raises `DataError` when a shard is not of the layout, or nothing in any of them can be used."""
        if self.broken:
            more = f" (and {len(self.broken) - 1} more broken shards)" if len(self.broken) > 1 else ""
            raise DataError(f"{self.broken[0]}{more}")
        if not self.samples:
            raise DataError(f"no sample can be used; for example {next(iter(self.examples.values()))}")


def validate(
    paths: Sequence[str],
    source: str,
    *,
    caption: str = TEXT_SUFFIX,
    samples_per_shard: int | None = None,
    threads: int = 1,
) -> Validation:
    """Reads and decodes the first samples of each shard (None = all) as training would.

    `source` is one of `SOURCES`, or a kind, for shards of no particular source.
    """
    check = functools.partial(_validate_shard, source=source, caption=caption, limit=samples_per_shard)
    total = Validation()
    with ThreadPoolExecutor(threads) as pool:  # decoders let other threads run
        for found in tqdm(pool.map(check, paths), "validate", len(paths), unit="shard", leave=False, disable=None):
            total.add(found)
    return total


def _validate_shard(path: str, *, source: str, caption: str, limit: int | None) -> Validation:
    found = Validation()
    try:
        index = scan_shard(path, SOURCES.get(source) or KINDS[source], None, caption=caption)
        reader = ShardReader([path])
        bad = list(index.bad)
        for sample in range(len(index) if limit is None else min(limit, len(index))):
            unusable = list(_bad_parts(index, reader, sample, found.parts))
            # A document goes on without an image; anything else is one sample with what makes it.
            goes_on = index.kind == "interleaved" and all(is_image for _, is_image in unusable)
            found.samples += goes_on or not unusable
            bad += [one for one, _ in unusable]
        reader.close()
    except DataError as error:
        return Validation(broken=[str(error)])
    found.shards = 1
    for one in bad:
        found.bad[one.cause] += 1
        found.examples.setdefault(one.cause, str(one))
    if source in _DOWNLOADED:
        for what, line in importlib.import_module(f"data_pipelines.corpora.{source}").remarks(index):
            found.remarks[what] += 1
            found.examples.setdefault(what, line)
    return found


def _bad_parts(
    index: SampleIndex, reader: ShardReader, sample: int, parts: collections.Counter[str]
) -> Iterator[tuple[BadSample, bool]]:
    """The parts of a sample that cannot be used, and whether each is an image; counts the others."""
    for part in range(int(index.starts[sample]), int(index.starts[sample + 1])):
        is_image = bool(index.is_image[part])
        try:
            _decode(index, reader, sample, part)
        except SampleError as error:
            yield index.bad_sample(sample, part, error), is_image
        else:
            parts[("videos" if index.kind == "video_text" else "images") if is_image else "texts"] += 1


def _decode(index: SampleIndex, reader: ShardReader, sample: int, part: int) -> None:
    if not index.is_image[part]:
        check_text_size(int(index.sizes[part]))
    if index.is_image[part] and index.kind == "video_text":
        sample_frames(samples_.read_part(reader, index, sample, part), _FRAMES, _IMAGE_SIZE)
    elif index.is_image[part]:
        decode_image(samples_.read_part(reader, index, sample, part), _IMAGE_SIZE)
    elif index.kind == "grounded":
        decode_grounded(samples_.read_part(reader, index, sample, part))
    else:
        samples_.read_text(reader, index, sample, part)
