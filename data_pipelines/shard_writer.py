"""Writing webdataset tar shards that are the same bytes whenever their samples are.

A sample is a run of tar members `{key}.{part}`; everything that would vary between machines and runs (times, owners,
modes) is fixed, so two builds can be compared by checksum.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class ShardWriter:
    """Writes samples to one tar shard; a context manager.

    The shard lies at `path` once the block ends without an exception; until then it is `path` + ".partial", so an
    unfinished shard never passes for a whole one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self._partial = path.with_name(path.name + ".partial")
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # ustar headers carry no extended attributes, and every tar reader knows them.
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Appends one sample: member `{key}.{part}` for each of `parts`, in the order given.

        `key` must be new to this shard and hold neither "." (readers cut the key there) nor "/"; `parts` are
        extensions without the leading dot ("png", "0.txt").
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"sample key {key!r}: must not be empty nor hold '.' or '/'")
        if key in self._keys:
            raise ValueError(f"sample key {key!r}: written twice to {self.path}")
        if not parts:
            raise ValueError(f"sample {key!r}: has no parts")
        self._keys.add(key)
        for part, payload in parts.items():
            member = tarfile.TarInfo(f"{key}.{part}")  # a fresh TarInfo has time, owner and group 0
            member.size = len(payload)
            member.mode = 0o644
            self._tar.addfile(member, io.BytesIO(payload))
        self.num_samples += 1


def shard_name(prefix: str, number: int) -> str:
    """File name of shard `number`: shard_name("pairs", 3) = "pairs-000003.tar"."""
    return f"{prefix}-{number:06d}.tar"


def shard_ranges(num_samples: int, samples_per_shard: int) -> list[range]:
    """Which samples go to which shard: shard_ranges(5, 2) = [0..1, 2..3, 4..4]."""
    return [range(i, min(i + samples_per_shard, num_samples)) for i in range(0, num_samples, samples_per_shard)]
