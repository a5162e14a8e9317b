"""The bytes and the text of a sample's parts, and the count of what could not be used."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data_pipelines.index import BadSample, SampleIndex
from data_pipelines.kinds import SampleError, decode_caption
from data_pipelines.remote import ShortReadError
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError

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


def image_part(index: SampleIndex, sample: int) -> int:
    """Number of the image of an image-text sample, which is stored as text, image."""
    return int(index.starts[sample]) + 1


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
