"""Shard files: which ones a pattern names, and byte ranges of them read by offset, wherever they lie.

Local files are read by pread; what has a URL, through fsspec (`remote.py`).
"""

from __future__ import annotations

import collections
import functools
import glob
import itertools
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import fsspec

from data_pipelines.remote import Patience, Range, RemoteFiles, ShortReadError, is_remote
from data_pipelines.tar import BLOCK, ForwardReader, scan_members
from emu2_jax.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

#: Bytes read at a time when a shard is scanned. Locally: a header, or one with a text or the head of an image. Behind a
#: URL a request costs more than a megabyte, so all but large members are read through.
_LOCAL_HEADER, _LOCAL_SCAN, _REMOTE_SCAN = BLOCK, 4096, 1 << 20


def expand_braces(pattern: str) -> list[str]:
    """Every name that a pattern with braces stands for, in order.

    A range keeps the width of its start ("a-{008..010}" gives a-008, a-009, a-010); a list is taken as it stands
    ("{train,extra}.tar"). Several groups multiply, the last one running fastest.
    """
    pieces = _BRACES.split(pattern)  # literal, group, literal, group, ..., literal
    choices: list[list[str]] = [_brace_choices(p) if i % 2 else [p] for i, p in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _brace_choices(group: str) -> list[str]:
    bounds = _RANGE.fullmatch(group)
    if bounds is None:
        return group.split(",")
    first, last = bounds.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def expand_shards(pattern: str, config_path: str) -> list[str]:
    """Paths or URLs of the shards that `pattern` names: braces in their order, globs sorted.

    `config_path` is the setting the pattern comes from, for messages. Raises `DataError` when a name with braces or
    without wildcards does not exist, when a glob matches nothing, and when a shard is named twice. A URL without
    wildcards is taken as it is: whether it exists shows when it is opened.
    """
    paths: list[str] = []
    for name in expand_braces(pattern):
        if name.startswith("pipe:"):
            raise DataError(
                f"{config_path}: a stream ({name}) can only be trained on alone, by pretraining; see docs/data.md"
            )
        if is_remote(name):
            paths += _expand_url(name, config_path)
        elif glob.has_magic(name):
            paths += sorted(glob.glob(name))
        elif os.path.exists(name):
            paths.append(name)
        else:
            raise DataError(f"{name}: shard does not exist (named by {config_path} = {pattern})")
    if not paths:
        raise DataError(f"{config_path}: no file matches {pattern!r}; wanted the path of tar shards, globs allowed")
    repeated = [path for path, count in collections.Counter(paths).items() if count > 1]
    if repeated:
        raise DataError(f"{repeated[0]}: shard is named twice by {config_path} = {pattern}")
    return paths


def _expand_url(url: str, config_path: str) -> list[str]:
    # "?" and "[" occur in URLs of web servers, which in any case cannot list what they hold.
    if "*" not in url:
        return [url]
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(path))
    except Exception as error:  # every store has its own errors
        raise DataError(f"{config_path}: cannot list {url}: {type(error).__name__} {error}; name the shards") from error


@contextmanager
def open_forward(path: str, *, contents: bool = True, patience: Patience | None = None) -> Iterator[ForwardReader]:
    """A shard, to be read once from front to back; without `contents`, its headers alone.

    Raises `DataError` when it cannot be read.
    """
    if is_remote(path):
        files = RemoteFiles(patience)
        size, _ = files.info(path)
        yield ForwardReader(
            lambda count, offset: files.read(path, offset, max(0, min(count, size - offset))), size, _REMOTE_SCAN
        )
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DataError(f"{path}: shard does not exist") from error
    except OSError as error:
        raise DataError(f"{path}: cannot open the shard: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        block = _LOCAL_SCAN if contents else _LOCAL_HEADER
        yield ForwardReader(functools.partial(os.pread, descriptor), size, block)
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
    finally:
        os.close(descriptor)


class Member(NamedTuple):
    """A regular file inside a tar; `header` and `offset` are the bytes where its header and its data start."""

    name: str
    header: int
    offset: int
    size: int


def scan_tar(path: str) -> list[Member]:
    """The regular files of an uncompressed tar, in their order. Raises `DataError` as `scan_members`."""
    with open_forward(path, contents=False) as file:
        members = scan_members(path, file)
    return [
        Member(*member) for member in zip(members.names, members.headers, members.offsets, members.sizes, strict=True)
    ]


@dataclass
class _OpenFile:
    descriptor: int
    readers: int  # how many threads are reading just now; only a file without readers may be closed


class ShardReader:
    """Reads byte ranges of a list of shards. Threads may share it; at most about `max_open` files stay open."""

    def __init__(self, paths: Sequence[str], max_open: int = 64, remote: RemoteFiles | None = None) -> None:
        self._paths = tuple(paths)
        self._max_open = max_open
        self._any_remote = any(map(is_remote, paths))
        self._remote = remote or RemoteFiles()
        self._open: collections.OrderedDict[int, _OpenFile] = collections.OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes of shard number `shard` from byte `offset`.

        Raises `DataError` when the shard cannot be read, `ShortReadError` when it has become shorter.
        """
        if is_remote(self._paths[shard]):
            return self._remote.read(self._paths[shard], offset, size)
        file = self._acquire(shard)
        try:
            return self._read_fully(shard, file.descriptor, offset, size)
        except OSError as error:
            raise DataError(f"{self._paths[shard]}: cannot read at byte {offset}: {error.strerror}") from error
        finally:
            with self._lock:
                file.readers -= 1

    def gather(self, ranges: Sequence[tuple[int, int, int]]) -> ShardReader:
        """A reader that has these ranges (shard, offset, size) at hand: those behind URLs are fetched now, together."""
        far = [r for r in ranges if is_remote(self._paths[r[0]])] if self._any_remote else []
        if not far:
            return self
        data = self._remote.read_many([Range(self._paths[shard], offset, size) for shard, offset, size in far])
        return GatheredReader(self, dict(zip(far, data, strict=True)))

    def _read_fully(self, shard: int, descriptor: int, offset: int, size: int) -> bytes:
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # one pread returns at most 2 GiB, and less on some network file systems
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                path = self._paths[shard]
                raise ShortReadError(
                    f"{path}: ends at byte {offset + len(data)}, wanted {size} bytes from byte {offset}"
                )
            data += more
        return data

    def _acquire(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                try:
                    file = _OpenFile(os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC), readers=0)
                except OSError as error:
                    raise DataError(f"{self._paths[shard]}: cannot open the shard: {error.strerror}") from error
                self._open[shard] = file
            file.readers += 1
            self._open.move_to_end(shard)
            self._close_idle()
            return file

    def _close_idle(self) -> None:
        idle = [shard for shard, file in self._open.items() if file.readers == 0]
        for shard in idle[: max(0, len(self._open) - self._max_open)]:
            os.close(self._open.pop(shard).descriptor)

    def close(self) -> None:
        """Closes every file that nobody is reading; a later read opens it again."""
        with self._lock:
            for shard in [shard for shard, file in self._open.items() if file.readers == 0]:
                os.close(self._open.pop(shard).descriptor)

    def __del__(self) -> None:
        self.close()


class GatheredReader(ShardReader):
    """Has some ranges at hand, and reads the others by another reader."""

    def __init__(self, reader: ShardReader, at_hand: Mapping[tuple[int, int, int], bytes]) -> None:
        super().__init__(())
        self._reader = reader
        self._at_hand = at_hand

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """As `ShardReader.read`."""
        data = self._at_hand.get((shard, offset, size))
        return self._reader.read(shard, offset, size) if data is None else data
