"""Indexes on disk: one file for each shard, beside it or in a directory of their own, built where one is missing.

Each is written when its shard is done, so a build that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from tqdm import tqdm

from data_pipelines.index import PART_COLUMNS, BadSample, SampleIndex, join, scan_shard
from data_pipelines.kinds import TEXT_SUFFIX, Kind
from data_pipelines.remote import Patience, RemoteFiles, is_remote
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

#: Changes whenever the arrays of an index change their meaning: older files are rebuilt.
INDEX_VERSION = 2


@dataclass(frozen=True)
class IndexRules:
    """What decides the content of a shard's index, besides the shard, and where it is kept."""

    kind: Kind
    tokenizer: Tokenizer | None  # None: texts are not counted in tokens
    caption: str = TEXT_SUFFIX  # where the text of a pair is: `SourceConfig.caption`
    salvage: bool = False  # use what is left of a damaged shard
    patience: Patience | None = None  # with reads behind URLs
    directory: str | None = None  # path or URL where indexes are kept; None: beside the shard, else the user's cache


def index_paths(path: str, rules: IndexRules) -> list[str]:
    """Where the index of a shard is looked for, and the places where it is stored, the first that can be written."""
    location = path if is_remote(path) else os.path.abspath(path)
    layout = rules.kind if rules.caption == TEXT_SUFFIX else f"{rules.kind}.{rules.caption}"
    name = f"{location.rpartition('/')[2]}.{layout}.index"
    own_name = f"{hashlib.sha256(os.fsencode(location)).hexdigest()[:16]}-{name}"
    if rules.directory is not None:
        return [f"{rules.directory.rstrip('/')}/{own_name}"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [f"{location.rpartition('/')[0]}/{name}", f"{cache}/emu2_jax/index/{own_name}"]


def load_index(path: str, rules: IndexRules) -> SampleIndex | None:
    """The stored index of a shard, or None when there is none that fits the shard as it is now.

    It fits when the shard has the same size and modification time (or version, behind a URL) and the tokens were
    counted by the same tokenizer; without a tokenizer any count will do.
    """
    return _load(path, rules, _identity(path, rules))


def _load(path: str, rules: IndexRules, identity: dict[str, object]) -> SampleIndex | None:
    for candidate in index_paths(path, rules):
        content = _read_whole(candidate)
        unpacked = _unpack(content) if content is not None else None
        if unpacked is None:
            continue  # it is only a cache, and is built again
        header, arrays = unpacked
        if not _fits(header, identity, rules.tokenizer):
            continue
        return SampleIndex(
            kind=rules.kind,
            paths=(path,),
            digests=(header["digest"],),
            shards=np.zeros(len(arrays["keys"]), np.int32),
            bad=tuple(BadSample(shard=path, **fields) for fields in header["bad"]),
            caption=rules.caption,
            **arrays,
        )
    return None


# A stored index is one line of JSON, the bytes of the arrays that it describes, and a checksum. A thousand of them are
# opened before a run goes on; an npz file takes six times as long.


def _pack(header: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> bytes:
    described = {name: (array.dtype.str, len(array)) for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": described}).encode()
    content = b"".join([text, b"\n", *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])
    return content + zlib.crc32(content).to_bytes(4)


def _unpack(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and arrays, or None when anything is damaged."""
    if zlib.crc32(memoryview(content)[:-4]).to_bytes(4) != content[-4:]:
        return None
    text, _, _ = content.partition(b"\n")
    header = json.loads(text)
    arrays = {}
    start = len(text) + 1
    for name, (dtype, size) in header["arrays"].items():
        arrays[name] = np.frombuffer(content, dtype, size, start)
        start += arrays[name].nbytes
    return header, arrays


def _identity(path: str, rules: IndexRules) -> dict[str, object]:
    if is_remote(path):
        size, version = RemoteFiles(rules.patience).info(path)
    else:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: shard does not exist") from error
        size, version = stat.st_size, str(stat.st_mtime_ns)
    return {
        "version": INDEX_VERSION,
        "kind": rules.kind,
        "caption": rules.caption,
        "salvage": rules.salvage,
        "shard_bytes": size,
        "shard_version": version,
    }


def _fits(header: object, identity: dict[str, object], tokenizer: Tokenizer | None) -> bool:
    if not isinstance(header, dict) or any(header.get(name) != value for name, value in identity.items()):
        return False
    return tokenizer is None or header.get("tokenizer") == tokenizer.fingerprint


def _store(index: SampleIndex, identity: dict[str, object], rules: IndexRules) -> None:
    bad = [{"cause": b.cause, "key": b.key, "offset": b.offset, "detail": b.detail} for b in index.bad]
    tokenizer = rules.tokenizer.fingerprint if rules.tokenizer else None
    header = {**identity, "tokenizer": tokenizer, "digest": index.digests[0], "bad": bad}
    content = _pack(header, {name: getattr(index, name) for name in ("keys", "starts", *PART_COLUMNS)})
    targets = index_paths(index.paths[0], rules)
    if not any(_write_whole(target, content) for target in targets):
        if rules.directory is not None:
            raise DataError(f"{targets[0]}: cannot be written; data.index_dir must be a place for indexes")
        logging.getLogger(__name__).warning("%s: no place to store its index; built at every start", index.paths[0])


def _read_whole(location: str) -> bytes | None:
    if not is_remote(location):
        try:
            return Path(location).read_bytes()
        except OSError:
            return None
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        return bytes(filesystem.cat_file(path))
    except Exception:  # every store has its own errors; an index that is not there is built
        return None


def _write_whole(location: str, content: bytes) -> bool:
    """Writes a file so that readers see all of it or nothing; False where it cannot be written."""
    if is_remote(location):
        try:
            filesystem, path = fsspec.core.url_to_fs(location)
            filesystem.pipe_file(path, content)  # object stores show a file when it is complete
        except Exception:  # every store has its own errors
            return False
        return True
    target = Path(location)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def open_shard(path: str, rules: IndexRules) -> SampleIndex:
    """Index of one shard: the stored one if it fits, else built now and stored."""
    identity = _identity(path, rules)  # taken before the scan: a shard that changes meanwhile is indexed again
    stored = _load(path, rules, identity)
    if stored is not None:
        return stored
    index = scan_shard(path, rules.kind, rules.tokenizer, rules.caption, salvage=rules.salvage, patience=rules.patience)
    _store(index, identity, rules)
    return index


def _attempt(rules: IndexRules, path: str) -> SampleIndex | DataError:
    try:
        return open_shard(path, rules)
    except DataError as error:
        return error


@contextlib.contextmanager
def _workers(processes: int, threads: int) -> Iterator[Executor]:
    if processes > 1:
        # Not forked: whoever calls may have threads.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield pool
    else:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            yield pool


def open_index(paths: Sequence[str], rules: IndexRules, *, threads: int = 2, processes: int = 1) -> SampleIndex:
    """Index over the samples of all `paths`, building what is missing, on `processes` cores if more than one.

    Raises `DataError` for the first broken shard, saying how many more there are.
    """
    if any(map(is_remote, paths)):
        threads = max(threads, 16)  # they wait, mostly
    with _workers(processes, threads) as pool:
        results = pool.map(functools.partial(_attempt, rules), paths)
        found = list(tqdm(results, "index", len(paths), unit="shard", leave=False, disable=None))
    errors = [result for result in found if isinstance(result, DataError)]
    if errors:
        more = f" (and {len(errors) - 1} more broken shards)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return join([result for result in found if not isinstance(result, DataError)])
