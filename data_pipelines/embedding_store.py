"""Visual embeddings worked out beforehand, in tar shards keyed like the shards that the pictures are in.

`00042.tar` of the store holds, for every picture of the shard `00042.tar`, what the frozen encoder makes of it. It is
an ordinary tar in which every record takes equally many bytes, so a record is found by arithmetic:

    __store__.json    what the store is: encoder, settings, members of a record, size of the shard it was made from
    __keys__.u64      for each record a hash of its key, in the order of the records
    0007.emb          embeddings, bfloat16 [N, E], as raw bytes
    0007.lat          of a crop for the visual decoder: its latent, bfloat16 [H, W, C]; of a VAE mean and log-variance
                      of the latent, before scaling, float16 [H, W, 2 C]
    0007.ids          of such a crop: the six sizes that condition the U-Net, int32

Crops are drawn anew in each epoch: `epoch-0000/00042.tar` holds those of the first, and so on. Any number of epochs
makes a store; a run that goes on past the last begins again with the first.

A picture that cannot be used has `0007.emb.bad`, which says why, in place of its embeddings. Images of an interleaved
sample are `0007.3.emb`. A key that is too long for the tar's name field stands by its hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from data_pipelines.index import SampleIndex
from data_pipelines.kinds import SampleError
from data_pipelines.shards import ShardReader
from emu2_jax.errors import DataError

FORMAT = 1  # changes whenever older stores can no longer be read

HEADER_NAME, KEYS_NAME = "__store__.json", "__keys__.u64"
EMBEDDINGS, LATENT, TIME_IDS = "emb", "lat", "ids"
BAD_SUFFIX = ".bad"

_BLOCK = 512  # bytes; everything in a tar starts on a multiple of it
_HEADER_BYTES = 4096  # of the JSON, padded with spaces
_MAX_NAME_BYTES = 80  # of a key: with its suffixes it has to fit the 100 bytes of a tar header

Settings = Mapping[str, str | int | float | bool]


class Member(NamedTuple):
    """One array of a record."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype; numpy itself knows no bfloat16."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape)) * self.numpy_dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes that it takes in a tar, with its header."""
        return _BLOCK + _padded(self.num_bytes)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class StoreHeader:
    """What a store shard says of itself."""

    encoder: str  # fingerprint of the visual encoder's parameters
    settings: Settings  # everything else that decides what the encoder was given and gave
    members: tuple[Member, ...]  # of a record
    num_records: int
    shard_bytes: int  # size of the shard that was encoded
    vae: str | None = None  # fingerprint of the parameters of the VAE that latents are of

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next."""
        return sum(member.span for member in self.members)

    @property
    def first_record(self) -> int:
        """Byte where the first record begins."""
        return _BLOCK + _HEADER_BYTES + _BLOCK + _padded(8 * self.num_records)

    def to_json(self) -> bytes:
        """The header as stored, of fixed length."""
        fields = {"format": FORMAT, **self.__dict__, "settings": dict(self.settings)}
        text = json.dumps(fields).encode()
        if len(text) > _HEADER_BYTES:
            raise ValueError(f"a store's header of {len(text)} bytes; at most {_HEADER_BYTES}")
        return text.ljust(_HEADER_BYTES)

    @classmethod
    def from_json(cls, data: bytes, path: str) -> StoreHeader:
        """The inverse of `to_json`. Raises `DataError` naming the shard."""
        try:
            fields = json.loads(data)
            if fields.pop("format") != FORMAT:
                raise DataError(f"{path}: a store of another format; run `emu2 encode` again into a new directory")
            fields["members"] = tuple(Member(name, dtype, tuple(shape)) for name, dtype, shape in fields["members"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is no shard of an embedding store (`emu2 encode` writes them)") from error


def stem(index: SampleIndex, sample: int, part: int) -> str:
    """The key that the record of an image has: the sample's, and in an interleaved sample the image's number."""
    key = index.key(sample)
    return f"{key}.{int(index.slots[part])}" if index.kind == "interleaved" else key


def _name(stem: str) -> str:
    encoded = stem.encode("utf-8", "surrogateescape")
    return stem if len(encoded) <= _MAX_NAME_BYTES else hashlib.sha256(encoded).hexdigest()


def _hashed(stem: str) -> int:
    return int.from_bytes(hashlib.blake2b(stem.encode("utf-8", "surrogateescape"), digest_size=8).digest())


# --- writing ----------------------------------------------------------------------------------------------------------


def store_path(directory: Path, shard: str) -> Path:
    """Where the store has what belongs to a shard."""
    return directory / Path(shard).name


def epoch_directory(directory: Path, epoch: int) -> Path:
    """Where the store has the crops of an epoch."""
    return directory / f"epoch-{epoch:04d}"


def num_epochs(directory: Path, config_path: str) -> int:
    """How many epochs of crops are in a store. Raises `DataError` when it has none, or one between them is missing."""
    found = len(list(directory.glob("epoch-*")))
    missing = [epoch for epoch in range(max(1, found)) if not epoch_directory(directory, epoch).is_dir()]
    if missing:
        raise DataError(
            f"{config_path}: {epoch_directory(directory, missing[0])} is not there; the decoder reads crops, which "
            "`emu2 encode --crops` writes"
        )
    return found


def shard_size(shard: str) -> int:
    """Bytes of a shard that lies in the file system; 0 for one behind a URL, which is known by its keys alone."""
    return 0 if "://" in shard else os.path.getsize(shard)


def check_names(shards: Sequence[str]) -> None:
    """Raises `DataError` when two shards would have the same name in a store."""
    seen: dict[str, str] = {}
    for shard in shards:
        other = seen.setdefault(Path(shard).name, shard)
        if other != shard:
            raise DataError(f"{shard} and {other} have the same name; encode them into different directories")


def write_store_shard(
    path: Path,
    header: StoreHeader,
    stems: Sequence[str],
    records: Iterable[Mapping[str, np.ndarray] | SampleError],
) -> None:
    """Writes one shard of a store, whole or not at all; `records` in the order of `stems`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, HEADER_NAME, header.to_json())
            _add(tar, KEYS_NAME, np.array([_hashed(stem) for stem in stems], "<u8").tobytes())
            for name, record in zip(stems, records, strict=True):
                _add_record(tar, _name(name), header.members, record)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _add_record(
    tar: tarfile.TarFile, name: str, members: Sequence[Member], record: Mapping[str, np.ndarray] | SampleError
) -> None:
    for i, member in enumerate(members):
        if isinstance(record, SampleError):
            # The place is kept, so that the records after it stay where they are looked for.
            why = {"cause": record.cause, "detail": record.detail[: max(0, member.num_bytes // 2 - 80)]}
            data = json.dumps(why).encode() if i == 0 else b""
            _add(tar, f"{name}.{member.suffix}{BAD_SUFFIX}", data[: member.num_bytes].ljust(member.num_bytes))
        else:
            array = np.ascontiguousarray(record[member.suffix], member.numpy_dtype)
            if array.shape != member.shape:
                raise ValueError(f"{name}.{member.suffix}: got shape {array.shape}, wanted {member.shape}")
            _add(tar, f"{name}.{member.suffix}", array.tobytes())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


# --- reading ----------------------------------------------------------------------------------------------------------


class EmbeddingStore:
    """What `emu2 encode` wrote for the shards of an index. Threads may share it."""

    def __init__(self, directory: str, index: SampleIndex, settings: Settings, config_path: str) -> None:
        """Looks at the head of every shard of the store.

        Raises `DataError` when a shard is missing or belongs to another version of its original, and when the store
        was made with other settings than `settings`; `config_path` is the setting that names the store.
        """
        check_names(index.paths)
        self._index = index
        self._paths = [str(store_path(Path(directory), shard)) for shard in index.paths]
        self._reader = ShardReader(self._paths)
        self._lock = threading.Lock()
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        with ThreadPoolExecutor(8) as pool:
            self._headers = list(pool.map(self._open, range(len(self._paths))))
        for path, header in zip(self._paths, self._headers, strict=True):
            _check_settings(path, header.settings, settings, config_path)
            if (header.encoder, header.vae) != (self.encoder, self.vae):
                what = "encoder" if header.encoder != self.encoder else "VAE"
                raise DataError(f"{path}: was made by another {what} than {self._paths[0]}; encode one of them again")

    @property
    def encoder(self) -> str:
        """Fingerprint of the encoder that made the store."""
        return self._headers[0].encoder

    @property
    def vae(self) -> str | None:
        """Fingerprint of the VAE that made the latents, if one did."""
        return self._headers[0].vae

    @property
    def directory(self) -> str:
        """Where the store is."""
        return os.path.dirname(self._paths[0])

    @property
    def members(self) -> tuple[Member, ...]:
        """The arrays of a record."""
        return self._headers[0].members

    def _open(self, shard: int) -> StoreHeader:
        path, original = self._paths[shard], self._index.paths[shard]
        if not os.path.exists(path):
            raise DataError(f"{path}: {original} is not encoded; run `emu2 encode` again, it does what is missing")
        if os.path.getsize(path) < _BLOCK + _HEADER_BYTES:
            raise DataError(f"{path}: is no shard of an embedding store (`emu2 encode` writes them)")
        header = StoreHeader.from_json(self._reader.read(shard, _BLOCK, _HEADER_BYTES), path)
        if header.shard_bytes != shard_size(original):
            raise DataError(
                f"{path}: was made from a shard of {header.shard_bytes} bytes, but {original} has "
                f"{shard_size(original)}; remove the former and run `emu2 encode` again"
            )
        wanted = header.first_record + header.num_records * header.record_bytes
        if os.path.getsize(path) < wanted:
            raise DataError(f"{path}: cut: has {os.path.getsize(path)} bytes, wanted {wanted}; encode it again")
        return header

    def _table(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the shard's keys in rising order, and the record of each."""
        with self._lock:
            if shard not in self._tables:
                count = self._headers[shard].num_records
                data = self._reader.read(shard, _BLOCK + _HEADER_BYTES + _BLOCK, 8 * count)
                hashes = np.frombuffer(data, "<u8")
                order = np.argsort(hashes, kind="stable").astype(np.int32)
                self._tables[shard] = hashes[order], order
            return self._tables[shard]

    def read(self, sample: int, part: int) -> dict[str, np.ndarray]:
        """The arrays of an image of the index, by suffix. Raises `SampleError` when there are none."""
        shard, name = int(self._index.shards[sample]), stem(self._index, sample, part)
        hashes, order = self._table(shard)
        hashed = np.uint64(_hashed(name))
        place = int(np.searchsorted(hashes, hashed))
        if place == len(hashes) or hashes[place] != hashed:
            raise SampleError("not_encoded", f"{self._paths[shard]} has no record {name!r}")
        header = self._headers[shard]
        offset = header.first_record + int(order[place]) * header.record_bytes
        return self._parse(name, header, self._reader.read(shard, offset, header.record_bytes), self._paths[shard])

    def _parse(self, name: str, header: StoreHeader, data: bytes, path: str) -> dict[str, np.ndarray]:
        first = header.members[0]
        stored = data[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
        if stored == f"{_name(name)}.{first.suffix}{BAD_SUFFIX}":
            why = json.loads(data[_BLOCK : _BLOCK + first.num_bytes])
            raise SampleError(why["cause"], why["detail"])
        if stored != f"{_name(name)}.{first.suffix}":
            raise SampleError("not_encoded", f"{path} has {stored!r} where {name!r} was looked for")
        arrays: dict[str, np.ndarray] = {}
        start = 0
        for member in header.members:
            content = data[start + _BLOCK : start + _BLOCK + member.num_bytes]
            arrays[member.suffix] = np.frombuffer(content, member.numpy_dtype).reshape(member.shape)
            start += member.span
        return arrays


def _check_settings(path: str, stored: Settings, wanted: Settings, config_path: str) -> None:
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    different += [name for name in stored if name not in wanted]
    if different:
        name = different[0]
        raise DataError(
            f"{config_path}: {path} was made with {name} = {stored.get(name)}, this run has {wanted.get(name)}; "
            "run `emu2 encode` for this run's settings into a new directory"
        )


def image_settings(
    *, visual_tokens: int, width: int, image_size: int, decoding: str, exif: bool, dtypes: str
) -> dict[str, str | int | float | bool]:
    """What decides the embeddings of whole pictures, besides the encoder's parameters."""
    return {
        "visual_tokens": visual_tokens,
        "width": width,
        "image_size": image_size,
        "image_decoding": decoding,
        "apply_exif_orientation": exif,
        "dtypes": dtypes,
    }


def members_of(visual_tokens: int, width: int, latent: tuple[Sequence[int], str] | None = None) -> tuple[Member, ...]:
    """The arrays of a record: embeddings and, of a crop for the visual decoder, sizes and `latent`: shape, dtype."""
    members = (Member(EMBEDDINGS, "bfloat16", (visual_tokens, width)),)
    if latent is None:
        return members
    shape, dtype = latent
    return (*members, Member(LATENT, dtype, tuple(shape)), Member(TIME_IDS, "int32", (6,)))
