"""The sidecar index of a tar shard: where each part of each sample lies, and how long its text is.

One pass over the headers finds the members; samples are grouped by key wherever their parts lie. With the number of
text tokens and images of every sample known, packing is planned before any image is read (`packing.py`).
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import logging
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tqdm import tqdm

from data_pipelines.grounding import count_grounded, decode_grounded
from data_pipelines.kinds import PAIR_KINDS, TEXT_SUFFIX, Kind, SampleError, check_text_size, decode_caption, part_slot
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

#: Changes whenever the arrays of an index change their meaning: older files are rebuilt.
INDEX_VERSION = 1

_BLOCK = 512  # bytes; everything in a tar starts on a multiple of it
_ZEROS = bytes(_BLOCK)  # the end mark of a tar
_MAX_NAME_BYTES = 1 << 20  # a longer "long name" is damage, not a name
_REGULAR = (b"0", b"\0", b"7")  # type flags of plain files
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
_EXTENDED = (b"L", b"K", b"x", b"g")  # headers about other members
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # gzip, zstd, bzip2, xz
_ARRAYS = ("keys", "starts", "offsets", "sizes", "is_image", "slots", "tokens")


# --- members of a tar ------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A regular file inside a tar; `header` and `offset` are the bytes where its header and its data start."""

    name: str
    header: int
    offset: int
    size: int


def scan_tar(path: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar (ustar, GNU, pax), reading headers only.

    Raises `DataError` naming file, member and byte offset when the file is missing, empty, not a tar, damaged or cut.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DataError(f"{path}: shard does not exist") from error
    except OSError as error:
        raise DataError(f"{path}: cannot open the shard: {error.strerror}") from error
    try:
        yield from _scan_members(path, descriptor, os.fstat(descriptor).st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Extended:
    """What a GNU or pax header says about the member after it."""

    name: str | None = None
    size: int | None = None


def _scan_members(path: str, descriptor: int, file_size: int) -> Iterator[Member]:
    if file_size == 0:
        raise DataError(f"{path}: shard has 0 bytes; wanted a tar file")
    position = 0
    last: Member | None = None
    extended = _Extended()
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if header == _ZEROS:
            return _check_end(path, descriptor, position)
        fault = _fault(header, position)
        if fault is not None:
            after = f", after member {last.name!r}" if last else ""
            raise DataError(f"{path}: {fault} at byte {position}{after}")
        member = _member(header, position, extended)
        kind = header[156:157]
        if member.offset + member.size > file_size:
            raise DataError(
                f"{path}: cut: member {member.name!r} at byte {position} has {member.size} bytes, "
                f"but the file ends at byte {file_size}"
            )
        if kind in (b"L", b"x"):
            _read_extended(path, descriptor, kind, member, extended)
        elif kind not in (b"K", b"g"):  # long names of link targets, and pax headers for the whole file
            if kind in _REGULAR and not member.name.endswith("/"):
                yield member
            extended.name = extended.size = None
            last = member
        position = member.offset + -(-member.size // _BLOCK) * _BLOCK


def _fault(header: bytes, position: int) -> str | None:
    """What is wrong with a header, to be followed by its place; None if nothing is."""
    if position == 0 and header.startswith(_COMPRESSED):
        return "is compressed; wanted a plain tar, because samples are read by their offset; no tar header"
    if len(header) < _BLOCK:
        return "cut: the file ends without the end mark of a tar"
    if not _checksum_is_right(header):
        return "is not a tar file: no tar header" if position == 0 else "damaged: no tar header"
    if _number(header[124:136]) is None:
        return "damaged: no number for the size of the member"
    return "wanted plain files, but there is a sparse one" if header[156:157] == b"S" else None


def _member(header: bytes, position: int, extended: _Extended) -> Member:
    kind = header[156:157]
    name, size = _name(header), _number(header[124:136]) or 0
    if kind not in _EXTENDED:
        name = name if extended.name is None else extended.name
        size = size if extended.size is None else extended.size
    if kind in _WITHOUT_DATA:
        size = 0  # links may repeat the size of their target
    return Member(name, position, position + _BLOCK, size)


def _read_extended(path: str, descriptor: int, kind: bytes, member: Member, extended: _Extended) -> None:
    if member.size > _MAX_NAME_BYTES:
        raise DataError(f"{path}: damaged: the name given at byte {member.header} has {member.size} bytes")
    data = os.pread(descriptor, member.size, member.offset)
    if kind == b"L":
        extended.name = _text(data)
    else:
        _read_pax(path, member.header, data, extended)


def _checksum_is_right(header: bytes) -> bool:
    expected = _number(header[148:156])
    if expected is None:
        return False
    blanked = header[:148] + b"        " + header[156:]
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521: the tar checksum at the speed of C.
    if zlib.adler32(blanked) & 0xFFFF == (1 + expected) % 65521:
        return True
    return sum(blanked) - 256 * sum(byte > 127 for byte in blanked) == expected  # old tars sum signed bytes


def _check_end(path: str, descriptor: int, position: int) -> None:
    """Refuses data after the end mark: a reader would lose it without a word."""
    padding = os.pread(descriptor, 1 << 20, position)
    if padding.strip(b"\0"):
        first = len(padding) - len(padding.lstrip(b"\0"))
        raise DataError(
            f"{path}: data at byte {position + first} after the end mark at byte {position}; "
            "wanted one tar a file (were several joined with cat?)"
        )


def _number(field: bytes) -> int | None:
    """A number of a tar header: octal digits, or base 256 when the first bit is set (sizes of 8 GiB and more)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not digits:
        return 0
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:  # 8 and 9
        return None


def _text(data: bytes) -> str:
    # Names that are not UTF-8 still have to be told apart, so their bytes are kept.
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    # GNU tars ("ustar  ") keep times where POSIX ones ("ustar\0") keep the first part of a long path.
    return f"{_text(prefix)}/{name}" if header[257:263] == b"ustar\0" and prefix[:1] != b"\0" else name


def _read_pax(path: str, position: int, data: bytes, extended: _Extended) -> None:
    """Takes `path` and `size` out of a pax header's records, "<length> <keyword>=<value>\\n"."""
    rest = data
    while rest.strip(b"\0"):
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = rest[len(digits) + 1 : length]
        keyword, equals, value = record[:-1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise DataError(f"{path}: damaged: pax header at byte {position} is malformed")
        if keyword == b"path":
            extended.name = _text(value)
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 18:
                raise DataError(f"{path}: damaged: pax header at byte {position} has size {value!r}")
            extended.size = int(value)
        rest = rest[length:]


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadSample:
    """A sample (or one image of a document) that was left out: why, and where it lies."""

    cause: str
    shard: str  # path
    key: str
    offset: int  # bytes from the start of the shard to the header of the part
    detail: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.shard}, sample {self.key!r}, byte {self.offset}: {self.detail}"


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case suffix of a member, cut at the first dot of its base name; None if it belongs to no sample.

    "a/b/0007.0.PNG" gives ("a/b/0007", "0.png").
    """
    directory, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or (not slash and name.startswith("__") and name.endswith("__")):
        return None
    return directory + slash + stem, suffix.lower()


@dataclass(frozen=True)
class SampleIndex:
    """Samples of one or several shards. S samples have P parts in all; sample s owns parts starts[s]:starts[s + 1].

    The parts of a sample are ordered by slot, the text of a slot before its image.
    """

    kind: Kind
    paths: tuple[str, ...]
    shards: Int32[np.ndarray, " S"]  # number of the shard in `paths`
    keys: np.ndarray  # [S] UTF-8 bytes
    starts: Int64[np.ndarray, " S+1"]
    offsets: Int64[np.ndarray, " P"]  # bytes, start of the data
    sizes: Int64[np.ndarray, " P"]  # bytes
    is_image: Bool[np.ndarray, " P"]  # or a video
    slots: Int32[np.ndarray, " P"]
    tokens: Int32[np.ndarray, " P"]  # ids that a text part encodes to; 0 for images
    bad: tuple[BadSample, ...]  # left out
    caption: str = TEXT_SUFFIX  # where the text of a pair is: `SourceConfig.caption`

    def __len__(self) -> int:
        return len(self.keys)

    @functools.cached_property
    def num_tokens(self) -> Int64[np.ndarray, " S"]:
        """Text tokens of each sample."""
        return np.add.reduceat(self.tokens, self.starts[:-1], dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    @functools.cached_property
    def num_images(self) -> Int64[np.ndarray, " S"]:
        """Images (or videos) of each sample."""
        return np.add.reduceat(self.is_image, self.starts[:-1], dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    def key(self, sample: int) -> str:
        """The key of a sample, as text."""
        return bytes(self.keys[sample]).decode("utf-8", "surrogateescape")

    def bad_sample(self, sample: int, part: int | None, error: SampleError) -> BadSample:
        """`error` with the place of the sample (and of its part number `part`, counted over the whole index)."""
        offset = int(self.offsets[self.starts[sample] if part is None else part]) - _BLOCK
        return BadSample(error.cause, self.paths[self.shards[sample]], self.key(sample), offset, error.detail)


@dataclass(slots=True)
class _Part:
    member: Member
    slot: int
    is_image: bool
    tokens: int = 0


def _group_parts(path: str, kind: Kind, caption: str) -> tuple[dict[str, list[_Part]], collections.Counter[str]]:
    """Parts of every key in order of first appearance, and how often each unused suffix occurs."""
    groups: dict[str, list[_Part]] = {}
    unused: collections.Counter[str] = collections.Counter()
    for member in scan_tar(path):
        split = split_name(member.name)
        place = part_slot(kind, split[1], caption) if split else None
        if split is None or place is None:
            unused[split[1] if split else member.name] += 1
        else:
            groups.setdefault(split[0], []).append(_Part(member, *place))
    for parts in groups.values():
        parts.sort(key=lambda part: (part.slot, part.is_image))
    return groups, unused


def _check_parts(kind: Kind, parts: Sequence[_Part]) -> None:
    places = collections.Counter((part.slot, part.is_image) for part in parts)
    (slot, is_image), count = places.most_common(1)[0]
    if count > 1:
        raise SampleError("duplicate_part", f"{count} {'images' if is_image else 'texts'} for slot {slot}")
    if kind in PAIR_KINDS and len(parts) < 2:
        seen = "missing_video" if kind == "video_text" else "missing_image"
        cause = "missing_text" if parts[0].is_image else seen
        raise SampleError(cause, f"the sample has only {parts[0].member.name!r}")


def _count_tokens(texts: Sequence[tuple[_Part, str]], tokenizer: Tokenizer) -> None:
    for (part, _), count in zip(texts, tokenizer.count_plain([text for _, text in texts]), strict=True):
        part.tokens = count


def scan_shard(path: str, kind: Kind, tokenizer: Tokenizer | None, caption: str = TEXT_SUFFIX) -> SampleIndex:
    """Index of one shard, made by reading its headers and, given a tokenizer, its texts.

    `caption` says where the text of a pair is (`SourceConfig.caption`). Unusable samples are left out and listed in
    `bad`. Raises `DataError` when the shard itself is missing, cut or foreign, or holds no sample of this kind.
    """
    groups, unused = _group_parts(path, kind, caption)
    if not groups:
        found = ", ".join(f".{suffix} ({count})" for suffix, count in unused.most_common(4)) or "no member"
        article = "an" if kind[0] in "aeiou" else "a"
        raise DataError(
            f"{path}: holds no part of {article} {kind} sample; found {found}; see docs/data.md for the layout"
        )
    reader = ShardReader([path])
    good: list[tuple[str, list[_Part]]] = []
    bad: list[BadSample] = []
    texts: list[tuple[_Part, str]] = []
    for key, parts in groups.items():
        part = parts[0]
        try:
            _check_parts(kind, parts)
            sample_texts = []
            for part in parts:
                if tokenizer is None or part.is_image:
                    continue
                check_text_size(part.member.size)
                data = reader.read(0, part.member.offset, part.member.size)
                if kind == "grounded":
                    part.tokens = count_grounded(decode_grounded(data), tokenizer)
                else:
                    sample_texts.append((part, decode_caption(data, caption)))
        except SampleError as error:
            bad.append(BadSample(error.cause, path, key, part.member.header, error.detail))
        else:
            good.append((key, parts))
            texts += sample_texts
    reader.close()
    if tokenizer is not None:
        _count_tokens(texts, tokenizer)
    return _arrays(path, kind, caption, good, bad)


def _arrays(
    path: str, kind: Kind, caption: str, samples: Sequence[tuple[str, list[_Part]]], bad: Sequence[BadSample]
) -> SampleIndex:
    parts = [part for _, sample in samples for part in sample]
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    return SampleIndex(
        kind=kind,
        paths=(path,),
        shards=np.zeros(len(samples), np.int32),
        keys=np.array(keys, dtype=np.bytes_) if keys else np.zeros(0, "S1"),
        starts=np.cumsum([0, *(len(sample) for _, sample in samples)], dtype=np.int64),
        offsets=np.array([part.member.offset for part in parts], np.int64),
        sizes=np.array([part.member.size for part in parts], np.int64),
        is_image=np.array([part.is_image for part in parts], np.bool_),
        slots=np.array([part.slot for part in parts], np.int32),
        tokens=np.array([part.tokens for part in parts], np.int32),
        bad=tuple(bad),
        caption=caption,
    )


def join(indexes: Sequence[SampleIndex]) -> SampleIndex:
    """One index over the samples of several shards, in order."""
    first = np.cumsum([0, *(len(index.offsets) for index in indexes)])
    starts = [index.starts[:-1] + base for index, base in zip(indexes, first[:-1], strict=True)]
    return SampleIndex(
        kind=indexes[0].kind,
        paths=tuple(path for index in indexes for path in index.paths),
        shards=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index) for index in indexes]),
        starts=np.concatenate([*starts, first[-1:]]),
        keys=np.concatenate([index.keys for index in indexes]),
        offsets=np.concatenate([index.offsets for index in indexes]),
        sizes=np.concatenate([index.sizes for index in indexes]),
        is_image=np.concatenate([index.is_image for index in indexes]),
        slots=np.concatenate([index.slots for index in indexes]),
        tokens=np.concatenate([index.tokens for index in indexes]),
        bad=tuple(bad for index in indexes for bad in index.bad),
        caption=indexes[0].caption,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def index_paths(path: str, kind: Kind, caption: str = TEXT_SUFFIX) -> tuple[Path, Path]:
    """Where the index of a shard is looked for: beside the shard, and in the user's cache directory."""
    shard = Path(path).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu2_jax" / "index"
    digest = hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]
    name = f"{shard.name}.{kind}.index.npz" if caption == TEXT_SUFFIX else f"{shard.name}.{kind}.{caption}.index.npz"
    return shard.with_name(name), cache / f"{digest}-{name}"


def load_index(path: str, kind: Kind, tokenizer: Tokenizer | None, caption: str = TEXT_SUFFIX) -> SampleIndex | None:
    """The stored index of a shard, or None when there is none that fits the shard as it is now.

    It fits when the shard has the same size and modification time, and the tokens were counted by the same tokenizer;
    without a tokenizer any count will do.
    """
    for candidate in index_paths(path, kind, caption):
        try:
            with np.load(candidate, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                arrays = {name: stored[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            continue  # absent, or damaged: it is only a cache, and is built again
        if not isinstance(header, dict) or not _fits(header, path, kind, tokenizer):
            continue
        bad = tuple(BadSample(shard=path, **fields) for fields in header["bad"])
        shards = np.zeros(len(arrays["keys"]), np.int32)
        return SampleIndex(kind=kind, paths=(path,), shards=shards, bad=bad, caption=caption, **arrays)
    return None


def _identity(path: str, kind: Kind) -> dict[str, object]:
    stat = os.stat(path)
    return {"version": INDEX_VERSION, "kind": kind, "shard_bytes": stat.st_size, "shard_mtime_ns": stat.st_mtime_ns}


def _fits(header: dict[str, object], path: str, kind: Kind, tokenizer: Tokenizer | None) -> bool:
    if any(header.get(name) != value for name, value in _identity(path, kind).items()):
        return False
    return tokenizer is None or header.get("tokenizer") == tokenizer.fingerprint


def _store(index: SampleIndex, identity: dict[str, object], tokenizer: Tokenizer | None) -> None:
    bad = [{"cause": b.cause, "key": b.key, "offset": b.offset, "detail": b.detail} for b in index.bad]
    header = {**identity, "tokenizer": tokenizer.fingerprint if tokenizer else None, "bad": bad}
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    content = io.BytesIO()
    np.savez(content, header=np.array(json.dumps(header)), **arrays)
    for target in index_paths(index.paths[0], index.kind, index.caption):
        if _write_whole(target, content.getbuffer()):
            return
    logging.getLogger(__name__).warning("%s: no place to store its index; it is built at every start", index.paths[0])


def _write_whole(target: Path, content: memoryview) -> bool:
    """Writes a file so that readers see all of it or nothing; False where it cannot be written."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def open_shard(path: str, kind: Kind, tokenizer: Tokenizer | None, caption: str = TEXT_SUFFIX) -> SampleIndex:
    """Index of one shard: the stored one if it fits, else built now and stored."""
    if not os.path.exists(path):
        raise DataError(f"{path}: shard does not exist")
    stored = load_index(path, kind, tokenizer, caption=caption)
    if stored is not None:
        return stored
    identity = _identity(path, kind)  # taken before the scan: a shard that changes meanwhile is indexed again
    index = scan_shard(path, kind, tokenizer, caption=caption)
    _store(index, identity, tokenizer)
    return index


def open_index(
    paths: Sequence[str], kind: Kind, tokenizer: Tokenizer | None, threads: int = 2, caption: str = TEXT_SUFFIX
) -> SampleIndex:
    """Index over the samples of all `paths`, building what is missing; `tokenizer` None leaves texts unread.

    Raises `DataError` for the first broken shard, saying how many more there are.
    """

    def attempt(path: str) -> SampleIndex | DataError:
        try:
            return open_shard(path, kind, tokenizer, caption=caption)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(tqdm(pool.map(attempt, paths), "index", len(paths), unit="shard", leave=False, disable=None))
    errors = [result for result in found if isinstance(result, DataError)]
    if errors:
        more = f" (and {len(errors) - 1} more broken shards)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return join([result for result in found if not isinstance(result, DataError)])
