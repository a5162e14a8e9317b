"""Where a converted corpus goes: a directory of shards of equal size that appears when it is complete."""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.shard_writer import ShardWriter, shard_name
from emu2_jax.errors import DataError

SUMMARY = "convert.json"


class ShardSeries:
    """Writes samples to one shard after the other; made by `new_corpus`. Keys are the numbers of the samples."""

    def __init__(self, directory: Path, prefix: str, samples_per_shard: int) -> None:
        self.counts: collections.Counter[str] = collections.Counter()  #: samples, and what was left out, by cause
        self._directory = directory
        self._prefix = prefix
        self._samples_per_shard = samples_per_shard
        self._writer: ShardWriter | None = None
        self._open = contextlib.ExitStack()
        self._num_shards = 0

    def write(self, parts: Mapping[str, bytes]) -> None:
        """Appends a sample: suffix of each member -> content."""
        if self._writer is None or self._writer.num_samples == self._samples_per_shard:
            self._open.close()
            path = self._directory / shard_name(self._prefix, self._num_shards)
            self._writer = self._open.enter_context(ShardWriter(path))
            self._num_shards += 1
        self._writer.write(f"{self.counts['samples']:09d}", parts)
        self.counts["samples"] += 1

    def close(self) -> None:
        """Finishes the last shard."""
        self._open.close()


@contextlib.contextmanager
def new_corpus(
    out_dir: Path, source: str, samples_per_shard: int, settings: Mapping[str, Any]
) -> Iterator[ShardSeries]:
    """A series of shards `SOURCE-000000.tar`, ... in a new directory; a context manager.

    The directory lies at `out_dir` once the block ends without an exception; until then it grows at `out_dir` +
    ".partial", where a later conversion starts anew. `convert.json` in it keeps `settings` and the counts. Raises
    `DataError` when something is in the way, or when nothing was written.
    """
    if samples_per_shard < 1:
        raise DataError(f"--samples_per_shard: got {samples_per_shard}, wanted at least 1")
    if out_dir.exists():
        raise DataError(f"{out_dir}: exists already; wanted the name of a new directory")
    partial = out_dir.with_name(out_dir.name + ".partial")
    if partial.exists():
        if not (partial / SUMMARY).is_file():
            raise DataError(f"{partial}: is in the way and no unfinished conversion; wanted it moved or removed")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    summary = {"source": source, **settings}
    _write_summary(partial, summary)
    series = ShardSeries(partial, source, samples_per_shard)
    try:
        yield series
    finally:
        series.close()
    if not series.counts["samples"]:
        left_out = ", ".join(f"{cause} {count}" for cause, count in series.counts.most_common() if count)
        raise DataError(f"{out_dir}: no sample could be written ({left_out or 'the input is empty'})")
    _write_summary(partial, {**summary, "counts": dict(sorted(series.counts.items()))})
    partial.rename(out_dir)


def _write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
