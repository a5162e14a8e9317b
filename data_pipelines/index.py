"""The index of a tar shard: where each part of each sample lies, how long its text is, how large its images are.

One pass over the headers finds the members; samples are grouped by key wherever their parts lie. With the number of
text tokens and images of every sample known, packing is planned before any image is read (`packing.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from data_pipelines.grounding import count_grounded, decode_grounded
from data_pipelines.image_header import FORMATS, HEAD_BYTES, ImageHeader, image_header
from data_pipelines.kinds import (
    MAX_TEXT_BYTES,
    PAIR_KINDS,
    TEXT_SUFFIX,
    Kind,
    SampleError,
    check_text_size,
    decode_caption,
    part_slot,
)
from data_pipelines.remote import Patience
from data_pipelines.shards import open_forward
from data_pipelines.tar import BLOCK, ForwardReader, Members, scan_members
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import Tokenizer

#: Bytes; a longer key is counted as bad, because keys take as much room each as the longest.
MAX_KEY_BYTES = 1024

#: Bytes of a JPEG that are looked at when its size is not among the first ones.
_LONG_HEAD_BYTES = 1 << 18

_MAX_SIDE = 2**31 - 1  # pixels that a damaged header may claim, and an int32 holds

#: The arrays with an entry for each part.
PART_COLUMNS = ("offsets", "sizes", "is_image", "slots", "tokens", "formats", "widths", "heights")

#: What says which sample is which; a resumed run goes on only where these are the same.
_IDENTITY = ("keys", "starts", "sizes", "is_image", "slots")


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadSample:
    """A sample (or one image of a document) that was left out: why, and where it lies."""

    cause: str
    shard: str  # path
    key: str
    offset: int  # bytes from the start of the shard to the header of the part
    detail: str
    source: str = ""  # name, once it is known

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
    digests: tuple[str, ...]  # of each shard: what its samples are, in which order
    shards: Int32[np.ndarray, " S"]  # number of the shard in `paths`
    keys: np.ndarray  # [S] UTF-8 bytes
    starts: Int64[np.ndarray, " S+1"]
    offsets: Int64[np.ndarray, " P"]  # bytes, start of the data
    sizes: Int64[np.ndarray, " P"]  # bytes
    is_image: Bool[np.ndarray, " P"]  # or a video
    slots: Int32[np.ndarray, " P"]
    tokens: Int32[np.ndarray, " P"]  # ids that a text part encodes to; 0 for images
    formats: UInt8[np.ndarray, " P"]  # of images, place in image_header.FORMATS; 0 = not known
    widths: Int32[np.ndarray, " P"]  # pixels; 0 = not known
    heights: Int32[np.ndarray, " P"]
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

    @property
    def digest(self) -> str:
        """Changes with the samples, their sizes and their order; not when shards are moved or renamed."""
        return hashlib.sha256("\0".join(self.digests).encode()).hexdigest()[:16]

    def key(self, sample: int) -> str:
        """The key of a sample, as text."""
        return bytes(self.keys[sample]).decode("utf-8", "surrogateescape")

    def bad_sample(self, sample: int, part: int | None, error: SampleError) -> BadSample:
        """`error` with the place of the sample (and of its part number `part`, counted over the whole index)."""
        offset = int(self.offsets[self.starts[sample] if part is None else part]) - BLOCK
        return BadSample(error.cause, self.paths[self.shards[sample]], self.key(sample), offset, error.detail)


class _Grouping:
    """The members of a tar by key, in order of first appearance. Members are called by their numbers."""

    def __init__(self, kind: Kind, caption: str) -> None:
        self._kind = kind
        self._caption = caption
        self._slots: dict[str, tuple[int, bool] | None] = {}  # of the suffixes met so far
        self.groups: dict[str, list[int]] = {}
        self.places: list[tuple[int, bool] | None] = []  # of each member: its slot, and whether it is an image
        self.unused: collections.Counter[str] = collections.Counter()

    def place(self, name: str) -> tuple[str, tuple[int, bool] | None]:
        """Key of a member and its place in the sample; no place for what this kind does not read."""
        first = name.rfind("/") + 1
        dot = name.find(".", first)
        if dot <= first or (not first and name.startswith("__")):  # `split_name` says it again, in full
            key, suffix = split_name(name) or ("", "")
        else:
            key, suffix = name[:dot], name[dot + 1 :]
        if suffix not in self._slots:
            self._slots[suffix] = part_slot(self._kind, suffix.lower(), self._caption)
        return key, self._slots[suffix] if key else None

    def add(self, names: Sequence[str]) -> None:
        """Groups all members."""
        start, group = "/", list[int]()  # of the names of the sample at hand; its parts
        for number, name in enumerate(names):
            suffix = name[len(start) :]
            if name.startswith(start) and suffix in self._slots:
                place = self._slots[suffix]
            else:
                key, place = self.place(name)
                if place is not None:
                    start, group = f"{key}.", self.groups.setdefault(key, [])
            self.places.append(place)
            if place is None:
                self.unused[(split_name(name) or ("", name))[1]] += 1
            else:
                group.append(number)
        for group in self.groups.values():
            if len(group) > 1:
                group.sort(key=self.places.__getitem__)  # type: ignore[arg-type]  # by slot, the text first


def _check_parts(kind: Kind, parts: Sequence[int], members: Members, places: Sequence[tuple[int, bool] | None]) -> None:
    if len({places[part] for part in parts}) < len(parts):
        one, other = next(pair for pair in itertools.pairwise(parts) if places[pair[0]] == places[pair[1]])
        slot, is_image = places[one] or (0, False)
        what, where = "images" if is_image else "texts", f"bytes {members.headers[one]} and {members.headers[other]}"
        raise SampleError("duplicate_part", f"two {what} for slot {slot}, at {where}")
    if kind in PAIR_KINDS and len(parts) < 2:
        _, is_image = places[parts[0]] or (0, False)
        seen = "missing_video" if kind == "video_text" else "missing_image"
        cause = "missing_text" if is_image else seen
        raise SampleError(cause, f"the sample has only {members.names[parts[0]]!r}")


def scan_shard(
    path: str,
    kind: Kind,
    tokenizer: Tokenizer | None,
    caption: str = TEXT_SUFFIX,
    *,
    salvage: bool = False,
    contents: bool = True,
    patience: Patience | None = None,
) -> SampleIndex:
    """Index of one shard, made by reading its headers, its texts and the first bytes of its images.

    `caption` says where the text of a pair is (`SourceConfig.caption`). Without a tokenizer texts are checked but not
    counted; without `contents` the headers alone are read. Unusable samples are left out and listed in `bad`. Raises
    `DataError` when the shard is missing, holds no sample of this kind, or is cut or damaged; with `salvage`, what is
    cut or damaged is listed in `bad` too, and the rest is used.
    """
    places = _Grouping(kind, caption)

    def wanted(name: str, size: int) -> int:
        place = places.place(name)[1]
        if place is None:
            return 0
        return min(size, HEAD_BYTES if place[1] else MAX_TEXT_BYTES)

    with open_forward(path, contents=contents, patience=patience) as file:
        members = scan_members(path, file, salvage=salvage, wanted=wanted if contents else None)
        return index_members(path, kind, tokenizer, caption, members, file if contents else None)


def index_members(
    path: str, kind: Kind, tokenizer: Tokenizer | None, caption: str, members: Members, file: ForwardReader | None
) -> SampleIndex:
    """Index of a shard whose members are known, with the data of texts and the first bytes of images.

    `file` gives the rest of an image's head where those do not reach; without it, nothing but headers is looked at.
    """
    grouping = _Grouping(kind, caption)
    grouping.add(members.names)
    if not grouping.groups and not members.damage:
        found = ", ".join(f".{suffix} ({count})" for suffix, count in grouping.unused.most_common(4)) or "no member"
        article = "an" if kind[0] in "aeiou" else "a"
        raise DataError(
            f"{path}: holds no part of {article} {kind} sample; found {found}; see docs/data.md for the layout"
        )
    heads = {} if file is None else _heads(file, members, grouping.places)
    bad = _damaged(path, members, grouping.groups)
    good: list[tuple[bytes, list[int]]] = []
    texts: dict[int, str] = {}
    counts: dict[int, int] = {}
    for key, parts in grouping.groups.items():
        part = parts[0]
        try:
            encoded = _encoded_key(key)
            _check_parts(kind, parts, members, grouping.places)
            sample_texts: dict[int, str] = {}
            for part in parts if file is not None else ():
                if not grouping.places[part][1]:  # type: ignore[index]  # every part has a place
                    check_text_size(members.sizes[part])
                    if kind == "grounded":
                        grounded = decode_grounded(members.data[part])
                        counts[part] = count_grounded(grounded, tokenizer) if tokenizer is not None else 0
                    else:
                        sample_texts[part] = decode_caption(members.data[part], caption)
        except SampleError as error:
            bad.append(BadSample(error.cause, path, key[:MAX_KEY_BYTES], members.headers[part], error.detail))
        else:
            good.append((encoded, parts))
            texts |= sample_texts
    if tokenizer is not None:
        counts |= zip(texts, tokenizer.count_plain(list(texts.values())), strict=True)
    return _arrays(path, kind, caption, good, bad, members, grouping.places, counts, heads)


def _encoded_key(key: str) -> bytes:
    encoded = key.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_KEY_BYTES:
        raise SampleError("long_key", f"the key has {len(encoded)} bytes; at most {MAX_KEY_BYTES}")
    return encoded


def _heads(file: ForwardReader, members: Members, places: Sequence[tuple[int, bool] | None]) -> dict[int, ImageHeader]:
    heads = {}
    for number, place in enumerate(places):
        if place is None or not place[1]:
            continue
        head = image_header(members.data[number])
        if FORMATS[head.format] == "JPEG" and not head.width:  # a long EXIF or colour profile comes first
            head = image_header(file.at(members.headers[number] + BLOCK, min(members.sizes[number], _LONG_HEAD_BYTES)))
        heads[number] = head
    return heads


def _damaged(path: str, members: Members, groups: dict[str, list[int]]) -> list[BadSample]:
    """What is wrong with a salvaged shard. Takes the samples out of `groups` of which a member is cut."""
    bad = []
    for damage in members.damage:
        if damage.cause != "cut_member":  # those come below, with the sample they belong to
            key = (split_name(damage.member) or ("", ""))[0]
            bad.append(BadSample(damage.cause, path, key, damage.offset, damage.detail))
    for name, header in members.cut:
        key = (split_name(name) or (name, ""))[0]
        groups.pop(key, None)
        bad.append(BadSample("cut_member", path, key[:MAX_KEY_BYTES], header, f"{name!r} is not all there"))
    return bad


def _arrays(
    path: str,
    kind: Kind,
    caption: str,
    samples: Sequence[tuple[bytes, list[int]]],
    bad: Sequence[BadSample],
    members: Members,
    places: Sequence[tuple[int, bool] | None],
    tokens: Mapping[int, int],
    heads: Mapping[int, ImageHeader],
) -> SampleIndex:
    parts = [part for _, sample in samples for part in sample]
    slots = np.array([places[part] for part in parts], np.int32).reshape(-1, 2)  # slot, is an image
    unknown = ImageHeader(0, 0, 0)
    headers = np.array([heads.get(part, unknown) for part in parts] if heads else np.zeros((len(parts), 3)), np.int64)
    headers = headers.reshape(-1, 3)
    index = SampleIndex(
        kind=kind,
        paths=(path,),
        digests=("",),
        shards=np.zeros(len(samples), np.int32),
        keys=np.array([key for key, _ in samples], dtype=np.bytes_) if samples else np.zeros(0, "S1"),
        starts=np.cumsum([0, *(len(sample) for _, sample in samples)], dtype=np.int64),
        offsets=np.array(members.headers, np.int64)[parts] + BLOCK,
        sizes=np.array(members.sizes, np.int64)[parts],
        is_image=slots[:, 1].astype(np.bool_),
        slots=slots[:, 0].copy(),
        tokens=np.array([tokens.get(part, 0) for part in parts] if tokens else np.zeros(len(parts)), np.int32),
        formats=headers[:, 0].astype(np.uint8),
        widths=headers[:, 1].clip(0, _MAX_SIDE).astype(np.int32),
        heights=headers[:, 2].clip(0, _MAX_SIDE).astype(np.int32),
        bad=tuple(bad),
        caption=caption,
    )
    digest = hashlib.sha256(f"{kind} {caption}".encode())
    for name in _IDENTITY:
        digest.update(np.ascontiguousarray(getattr(index, name)).tobytes())
    return dataclasses.replace(index, digests=(digest.hexdigest()[:16],))


def join(indexes: Sequence[SampleIndex]) -> SampleIndex:
    """One index over the samples of several shards, in order."""
    first = np.cumsum([0, *(len(index.offsets) for index in indexes)])
    starts = [index.starts[:-1] + base for index, base in zip(indexes, first[:-1], strict=True)]
    columns = {name: np.concatenate([getattr(index, name) for index in indexes]) for name in ("keys", *PART_COLUMNS)}
    return SampleIndex(
        kind=indexes[0].kind,
        paths=tuple(path for index in indexes for path in index.paths),
        digests=tuple(digest for index in indexes for digest in index.digests),
        shards=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index) for index in indexes]),
        starts=np.concatenate([*starts, first[-1:]]),
        bad=tuple(bad for index in indexes for bad in index.bad),
        caption=indexes[0].caption,
        **columns,
    )
