"""Records as corpora are distributed: JSON lines, plain or compressed, and parquet."""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet
import zstandard

from emu2_jax.errors import DataError

#: Endings of the files that `read_records` opens.
FORMATS = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".jsonl.zip", ".parquet")

_PARQUET_ROWS = 256  # read at a time

#: What a damaged or cut compressed file raises.
_DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError, zipfile.BadZipFile)


class Record(NamedTuple):
    """One record: the fields of a JSON object or of a parquet row."""

    file: str  # its name
    number: int  # line or row, from 1
    fields: dict[str, Any]


def read_records(
    paths: Sequence[Path], counts: collections.Counter[str], columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of the files, in order; `columns` are all that is read of a parquet file.

    Lines that are no JSON object in UTF-8 are counted (`invalid_json`, `invalid_utf8`) and left out. Raises `DataError`
    for a file that is missing, of another format, damaged or cut: a half-read corpus must not pass for a whole one.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if not path.name.endswith(FORMATS):
            raise DataError(f"{path}: wanted a file that ends in one of {', '.join(FORMATS)}")
        records = _parquet_rows(path, columns) if path.suffix == ".parquet" else _json_lines(path, counts)
        yield from records


def _json_lines(path: Path, counts: collections.Counter[str]) -> Iterator[Record]:
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                fields = _json_object(line, counts) if line.strip() else None
                if fields is not None:
                    yield Record(path.name, number, fields)
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be read beyond line {number}: {error}") from error


def _json_object(line: bytes, counts: collections.Counter[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        counts["invalid_json"] += 1
        return None
    return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The lines of a file, decompressed. The MMC4 documents are zips of one file each."""
    with contextlib.ExitStack() as stack:
        if path.suffix == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(names) != 1:
                raise DataError(f"{path}: holds {len(names)} files; wanted one, of JSON lines")
            yield stack.enter_context(archive.open(names[0]))
            return
        file = stack.enter_context(path.open("rb"))
        if path.suffix == ".gz":
            yield stack.enter_context(gzip.open(file))  # type: ignore[arg-type]
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstandardStream(file), 1 << 20)
        else:
            yield file


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a file of zstd frames; unlike zstandard's own reader it does not take a cut for the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: Any = None  # of the frame that is being read; None between frames
        self._compressed = b""
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` as far as there is data at hand; 0 at the end of the last frame."""
        while not self._pending:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._pending = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: has no column {', '.join(missing)}; its columns: {found}")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(columns) if columns else None):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(path.name, number, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read beyond row {number}: {error}") from error
