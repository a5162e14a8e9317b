"""Where a converted corpus goes: a directory of shards of equal size that appears when it is complete.

Web documents, whose pictures were downloaded apart, are also read here: their sources differ in the layout of a record
alone.
"""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.corpora.downloaded import DownloadedImages
from data_pipelines.corpora.records import Record, read_records
from data_pipelines.shard_writer import ShardWriter, shard_name
from emu2_jax.errors import DataError

SUMMARY = "convert.json"

#: The members of a document's sample, "0.txt", "0.jpg", ..., and how many images are among them; counts what it leaves
#: out by cause. None for a record that is not of the layout.
Slots = Callable[[Record, DownloadedImages, collections.Counter[str]], tuple[dict[str, bytes], int] | None]


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


def convert_documents(
    source: str,
    documents: Sequence[Path],
    images: Sequence[Path],
    out_dir: Path,
    slots: Slots,
    provenance: Callable[[Record], Mapping[str, Any]],
    *,
    samples_per_shard: int,
    columns: Sequence[str] | None = None,
) -> collections.Counter[str]:
    """Writes web documents with the pictures found in `images` into shards in the new directory `out_dir`.

    `slots` makes a sample of a record, `provenance` what its `json` member says; `columns` are all that is read of a
    parquet file. Returns how many documents and images were written and what was left out, by cause. Raises `DataError`
    for files that cannot be read.
    """
    downloaded = DownloadedImages(images)
    settings = {"documents": [str(path) for path in documents], "images": [str(path) for path in images]}
    with new_corpus(out_dir, source, samples_per_shard, settings) as corpus:
        for record in read_records(documents, corpus.counts, columns=columns):
            found = slots(record, downloaded, corpus.counts)
            if found is None:
                corpus.counts["malformed_document"] += 1
                continue
            parts, num_images = found
            if not parts:
                corpus.counts["empty_document"] += 1
                continue
            corpus.counts["images"] += num_images
            corpus.counts["documents_without_images"] += not num_images
            corpus.write({**parts, "json": json.dumps(provenance(record)).encode()})
    return corpus.counts


def _write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
