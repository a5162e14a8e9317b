"""Byte ranges of files behind URLs: many at once, each tried again by itself when it fails.

Anything that fsspec opens with range reads will do: http(s), gs and s3 (with their packages), memory. Credentials and
endpoints are fsspec's own affair (its configuration files and environment variables).
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
import tenacity
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from emu2_jax.errors import DataError

_T = TypeVar("_T")

_AT_ONCE = 32  # requests under way
_MERGED_GAP_BYTES = 1 << 16  # ranges this near to each other are read as one
_MERGED_BYTES = 16 << 20  # but no longer than this
_CACHE_BLOCK_BYTES = 4 << 20

#: What a second try cannot mend.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)
#: What a store says of a version of a file; any of them changes when the file does.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "Last-Modified",
    "LastModified",
    "mtime",
    "updated",
    "created",
)


class Range(NamedTuple):
    """Some bytes of a file."""

    url: str
    offset: int
    size: int


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried."""

    attempts: int = 8
    first_wait_s: float = 1.0  # at most, before the second attempt; doubles; drawn anew for each wait
    longest_wait_s: float = 30.0
    timeout_s: float = 60.0  # of one attempt


class ShortReadError(DataError):
    """A file ends before the bytes that its index promises."""


class _NoRangesError(Exception):
    """The server sends whole files."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL; local files are read without fsspec."""
    return "://" in path


class RemoteFiles:
    """Reads byte ranges of files behind URLs. Threads may share it."""

    def __init__(self, patience: Patience | None = None, cache_bytes: int = 0) -> None:
        self._patience = patience or Patience()
        self._running: asyncio.Semaphore | None = None
        self._cache = _BlockCache(self, cache_bytes) if cache_bytes else None
        self._lock = threading.Lock()
        #: Failed attempts that were tried again, by the name of the error.
        self.retries: collections.Counter[str] = collections.Counter()

    def info(self, url: str) -> tuple[int, str]:
        """Size in bytes and version of a file ("" where the store does not say). Raises `DataError`."""
        found = self._wait(self._try(url, "_info", "shard cannot be found"))
        if found.get("size") is None:
            raise DataError(f"{url}: the server does not say how many bytes the file has; read it as pipe: (a stream)")
        return int(found["size"]), " ".join(str(found[name]) for name in _VERSION_FIELDS if found.get(name))

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The bytes of one range. Raises `DataError`; `ShortReadError` when the file ends before."""
        return self.read_many([Range(url, offset, size)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, read at the same time; neighbours are read as one."""
        if self._cache is not None:
            return self._cache.read_many(ranges)
        return self.fetch(ranges)

    def fetch(self, ranges: Sequence[Range], *, to_the_end: bool = False) -> list[bytes]:
        """`read_many` without the cache; `to_the_end` allows the file to end within a range."""
        found = [b""] * len(ranges)
        merged = _merge(ranges)
        pieces = self._wait(_all([self._range(whole, to_the_end) for whole, _ in merged]))
        for (whole, numbers), piece in zip(merged, pieces, strict=True):
            for number in numbers:
                first = ranges[number].offset - whole.offset
                found[number] = piece[first : first + ranges[number].size]
        return found

    async def _range(self, wanted: Range, to_the_end: bool) -> bytes:
        if wanted.size == 0:
            return b""
        what = f"cannot read {wanted.size} bytes from byte {wanted.offset}"
        end = wanted.offset + wanted.size
        allowed = None if to_the_end else wanted.size
        return await self._try(wanted.url, "_cat_file", what, allowed, start=wanted.offset, end=end)

    async def _try(self, url: str, method: str, what: str, size: int | None = None, **arguments: Any) -> Any:
        """Calls an fsspec method until it answers, with `size` bytes where that is given."""
        patience = self._patience
        if self._running is None:
            self._running = asyncio.Semaphore(_AT_ONCE)  # in the loop, and so only ever by one thread
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(patience.attempts),
            wait=tenacity.wait_random_exponential(patience.first_wait_s, patience.longest_wait_s),
            retry=tenacity.retry_if_not_exception_type((*_PERMANENT, _NoRangesError)),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            filesystem, path = _filesystem(url)
            async for attempt in attempts:
                with attempt:
                    async with self._running:
                        call = getattr(filesystem, method)(path, **arguments)
                        answer = await asyncio.wait_for(call, patience.timeout_s)
                    if size is not None and len(answer) > size:
                        raise _NoRangesError
                    if size is not None and len(answer) < size:
                        raise ShortReadError(f"{url}: {what}: got {len(answer)}; the file has become shorter")
        except ShortReadError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{url}: shard does not exist") from error
        except _NoRangesError as error:
            raise DataError(f"{url}: the server ignores byte ranges; read it as pipe: (a stream)") from error
        except ImportError as error:
            raise DataError(f"{url}: reading it needs another package: {error}") from error
        except Exception as error:  # every store has its own errors
            permanent = isinstance(error, _PERMANENT)
            tries = "" if permanent else f" in {patience.attempts} attempts"
            raise DataError(f"{url}: {what}{tries}: {type(error).__name__} {error}".rstrip()) from error
        return answer

    def _count(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        with self._lock:
            self.retries[type(error).__name__] += 1

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, fsspec.asyn.get_loop()).result()


async def _all(work: Sequence[Coroutine[Any, Any, bytes]]) -> list[bytes]:
    return list(await asyncio.gather(*work))


def _filesystem(url: str) -> tuple[Any, str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    if not filesystem.async_impl:
        filesystem = AsyncFileSystemWrapper(filesystem)
    return filesystem, path


def _merge(ranges: Sequence[Range]) -> list[tuple[Range, list[int]]]:
    """Ranges that cover all of `ranges`, and the numbers of those that each covers."""
    merged: list[tuple[Range, list[int]]] = []
    for number in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        url, offset, size = ranges[number]
        if merged:
            whole, numbers = merged[-1]
            end = max(whole.offset + whole.size, offset + size)
            near = url == whole.url and offset - (whole.offset + whole.size) <= _MERGED_GAP_BYTES
            if near and end - whole.offset <= _MERGED_BYTES:
                merged[-1] = (Range(url, whole.offset, end - whole.offset), [*numbers, number])
                continue
        merged.append((ranges[number], [number]))
    return merged


class _BlockCache:
    """Reads ahead: whole blocks, kept while there is room, so that the neighbours of a sample come from memory."""

    def __init__(self, files: RemoteFiles, cache_bytes: int) -> None:
        self._files = files
        self._max_blocks = max(1, cache_bytes // _CACHE_BLOCK_BYTES)
        self._lock = threading.Lock()
        self._blocks: collections.OrderedDict[Range, Future[bytes]] = collections.OrderedDict()  # oldest use first

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        needed = [[_block(r.url, n) for n in _block_numbers(r)] for r in ranges]
        blocks = self._get({block for blocks in needed for block in blocks})
        return [_cut(r, names, blocks) for r, names in zip(ranges, needed, strict=True)]

    def _get(self, wanted: set[Range]) -> Mapping[Range, bytes]:
        with self._lock:
            missing = sorted(wanted - self._blocks.keys())
            self._blocks |= {block: Future() for block in missing}
            futures = {block: self._blocks[block] for block in wanted}
            for block in wanted:
                self._blocks.move_to_end(block)
            while len(self._blocks) > max(self._max_blocks, len(wanted)):
                self._blocks.popitem(last=False)
        try:
            if missing:  # other threads that want the same block wait for this one
                for block, data in zip(missing, self._files.fetch(missing, to_the_end=True), strict=True):
                    futures[block].set_result(data)
        except BaseException as error:
            with self._lock:
                for block in missing:
                    self._blocks.pop(block, None)
            for block in missing:
                if not futures[block].done():
                    futures[block].set_exception(error)
            raise
        return {block: future.result() for block, future in futures.items()}


def _block(url: str, number: int) -> Range:
    return Range(url, number * _CACHE_BLOCK_BYTES, _CACHE_BLOCK_BYTES)


def _block_numbers(wanted: Range) -> range:
    return range(wanted.offset // _CACHE_BLOCK_BYTES, -(-(wanted.offset + wanted.size) // _CACHE_BLOCK_BYTES))


def _cut(wanted: Range, names: Sequence[Range], blocks: Mapping[Range, bytes]) -> bytes:
    if not names:
        return b""
    joined = blocks[names[0]] if len(names) == 1 else b"".join(blocks[name] for name in names)
    first = wanted.offset - names[0].offset
    data = joined[first : first + wanted.size]
    if len(data) < wanted.size:
        raise ShortReadError(f"{wanted.url}: ends at byte {wanted.offset + len(data)}, wanted {wanted.size} bytes more")
    return data
