"""Shard files: which ones a pattern names, and byte ranges of them read by offset."""

from __future__ import annotations

import collections
import glob
import itertools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from emu2_jax.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


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
    """Paths of the shards that `pattern` names: braces in their order, globs sorted.

    `config_path` is the setting the pattern comes from, for messages. Raises `DataError` when a name with braces or
    without wildcards does not exist, when a glob matches nothing, and when a shard is named twice.
    """
    paths: list[str] = []
    for name in expand_braces(pattern):
        if glob.has_magic(name):
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


@dataclass
class _OpenFile:
    descriptor: int
    readers: int  # how many threads are reading just now; only a file without readers may be closed


class ShardReader:
    """Reads byte ranges of a list of shards. Threads may share it; at most about `max_open` files stay open."""

    def __init__(self, paths: Sequence[str], max_open: int = 64) -> None:
        self._paths = tuple(paths)
        self._max_open = max_open
        self._open: collections.OrderedDict[int, _OpenFile] = collections.OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes of shard number `shard` from byte `offset`.

        Raises `DataError` when the shard cannot be read or has become shorter.
        """
        file = self._acquire(shard)
        try:
            return self._read_fully(shard, file.descriptor, offset, size)
        except OSError as error:
            raise DataError(f"{self._paths[shard]}: cannot read at byte {offset}: {error.strerror}") from error
        finally:
            with self._lock:
                file.readers -= 1

    def _read_fully(self, shard: int, descriptor: int, offset: int, size: int) -> bytes:
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # one pread returns at most 2 GiB, and less on some network file systems
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                path = self._paths[shard]
                raise DataError(f"{path}: ends at byte {offset + len(data)}, wanted {size} bytes from byte {offset}")
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
