"""Weight files without their weight: names, shapes and dtypes at once, elements only when they are asked for.

Read are safetensors files (one, or several with an index) from local disk or any path that fsspec knows, and PyTorch's
zip files (.bin, .pt, .pth) from local disk, mapped into memory and unpickled with `weights_only`, so that no code in
them runs; those need the optional extra `emu2_jax[torch]`.
"""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import fsspec
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from emu2_jax.errors import WeightsError

#: Dtypes of weights, by their names in safetensors files. Integers and 8-bit floats are of quantised models.
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX_SUFFIX = ".index.json"
SAFETENSORS, TORCH = (".safetensors",), (".bin", ".pt", ".pth")

#: `model.safetensors.index.json`, or with a variant's name before the last dot, as `transformers` writes it.
_INDEX = re.compile(r".+(\.safetensors|\.bin|\.pt|\.pth)\.index(?:\.\w+)?\.json")
#: A header longer than this is no header (the format's own limit).
_MAX_HEADER = 100_000_000
#: Names that PyTorch training code wraps a state dict in. Source: release `emu/emu.py` ("module"), `timm`, Lightning.
_WRAPPERS = ("module", "state_dict", "model")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what is known without reading it, and how to read a range of its elements."""

    name: str
    file: str
    dtype: np.dtype | None  #: None for a dtype that no weight has, named in `dtype_name`
    dtype_name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Shaped[np.ndarray, " n"]] = field(repr=False)
    """Elements [start, stop) in the order of their bytes."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * (self.dtype.itemsize if self.dtype else 1)

    def array(self) -> Shaped[np.ndarray, "..."]:
        """The whole tensor in memory."""
        return self.read(0, self.size).reshape(self.shape)


Tensors = Mapping[str, StoredTensor]


def open_weights(path: str) -> Tensors:
    """The tensors of a file, of an index and the files it names, or of a directory that holds one of these.

    Raises `WeightsError` that names the file (and the tensor) for what cannot be read, is truncated, holds code or
    has a dtype that no weight has.
    """
    folder = _Folder.of(path)
    files = folder.resolve()
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        opened = _open_torch(folder, name) if name.endswith(TORCH) else _open_safetensors(folder, name)
        for tensor in opened:
            if tensor.name in tensors:
                raise WeightsError(f"{tensor.file}: holds {tensor.name}, which {tensors[tensor.name].file} holds too")
            tensors[tensor.name] = tensor
    lacking = [name for name in folder.promised if name not in tensors]
    if lacking:
        raise WeightsError(
            f"{folder.promised_by}: promises {lacking[0]} in {folder.promised[lacking[0]]}, which does not hold it"
            + (f" (and {len(lacking) - 1} more like it)" if len(lacking) > 1 else "")
        )
    return tensors


def check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    """Raise `WeightsError` for a tensor whose dtype no weight has; quantised files are not read."""
    for tensor in tensors:
        if tensor.dtype is None:
            raise WeightsError(
                f"{tensor.file}: {tensor.name} has dtype {tensor.dtype_name}; wanted one of {', '.join(DTYPES)} "
                "(quantised weights are not read)"
            )


class _File(Protocol):
    """A file of known size that gives ranges of its bytes."""

    size: int

    def read(self, start: int, stop: int) -> bytes | bytearray: ...


class _LocalFile:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> bytearray:
        # Not a memory map: its pages would count as this process's memory as long as the system likes.
        buffer = bytearray(stop - start)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise WeightsError(f"got {done} of {len(buffer)} bytes at byte {start}: the file was cut while in use")
            done += count
        return buffer


class _RemoteFile:
    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.size = int(system.size(path))

    def read(self, start: int, stop: int) -> bytes:
        data: bytes = self._system.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise WeightsError(f"got {len(data)} of {stop - start} bytes at byte {start}")
        return data


@dataclass
class _Folder:
    """Where files lie: a directory of some file system, and what of it was asked for."""

    system: Any
    root: str
    wanted: str | None  #: one file of the directory; None = the directory
    shown: str  #: the directory as the user wrote it
    local: bool
    promised: dict[str, str] = field(default_factory=dict)  #: tensor -> file, from an index
    promised_by: str = ""

    @classmethod
    def of(cls, path: str) -> _Folder:
        try:
            system, real = fsspec.core.url_to_fs(path)
            is_folder = system.isdir(real)
            if not is_folder and not system.exists(real):
                raise WeightsError(f"{path}: no such file or directory")
        except (OSError, ValueError, ImportError) as error:
            raise WeightsError(f"{path}: cannot be opened: {error}") from error
        local = "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)
        if is_folder:
            return cls(system, real.rstrip("/"), None, path.rstrip("/"), local)
        root, _, name = real.rpartition("/")
        return cls(system, root, name, path.rpartition("/")[0] or ".", local)

    def resolve(self) -> list[str]:
        """Names of the weight files that were asked for."""
        name = self.wanted or self._choose()
        if not _INDEX.fullmatch(name):
            if not name.endswith(SAFETENSORS + TORCH):
                raise WeightsError(
                    f"{self.show(name)}: is no weight file; wanted a directory or a name that ends in "
                    f"{', '.join(SAFETENSORS + TORCH)} or {INDEX_SUFFIX}"
                )
            return [name]
        self.promised, self.promised_by = self.read_index(name), self.show(name)
        files = sorted(set(self.promised.values()))
        absent = [file for file in files if not self.system.exists(self.path(file))]
        if absent:
            raise WeightsError(
                f"{self.show(name)}: names {len(files)} files, of which {len(absent)} are not there: {absent[0]}"
                + (" ..." if len(absent) > 1 else "")
            )
        return files

    def _choose(self) -> str:
        """The one index, or the one file, of a directory; safetensors before PyTorch's."""
        names = sorted(os.path.basename(str(entry)) for entry in self.system.ls(self.root, detail=False))
        for suffixes in (SAFETENSORS, TORCH):
            indices = [name for name in names if (match := _INDEX.fullmatch(name)) and match[1] in suffixes]
            for found in (indices, [name for name in names if name.endswith(suffixes)]):
                if len(found) > 1:
                    raise WeightsError(f"{self.shown}: holds several: {', '.join(found[:6])}; name the one to read")
                if found:
                    return found[0]
        raise WeightsError(f"{self.shown}: holds no weight files ({', '.join(SAFETENSORS + TORCH)})")

    def read_index(self, name: str) -> dict[str, str]:
        try:
            weight_map = json.loads(self.system.cat_file(self.path(name)))["weight_map"]
            return {str(tensor): str(file) for tensor, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{self.show(name)}: is not an index of weights (no weight_map): {error}") from error

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if self.root else name

    def show(self, name: str) -> str:
        return f"{self.shown}/{name}"

    def open(self, name: str) -> _File:
        try:
            return _LocalFile(self.path(name)) if self.local else _RemoteFile(self.system, self.path(name))
        except OSError as error:
            raise WeightsError(f"{self.show(name)}: cannot be opened: {error.strerror or error}") from error


def missing_files(path: str) -> list[str] | None:
    """Names of the tensors of an index whose weight files are not beside it; None for anything else."""
    if not _INDEX.fullmatch(path):
        return None
    folder = _Folder.of(path)
    assert folder.wanted is not None
    weight_map = folder.read_index(folder.wanted)
    there = all(folder.system.exists(folder.path(file)) for file in set(weight_map.values()))
    return None if there else list(weight_map)


def _open_safetensors(folder: _Folder, name: str) -> list[StoredTensor]:
    shown = folder.show(name)
    file = folder.open(name)
    if file.size < 8:
        raise WeightsError(f"{shown}: has {file.size} bytes, too few for a safetensors file; it is truncated")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > _MAX_HEADER:
        raise WeightsError(f"{shown}: is not a safetensors file (a header of {length:,} bytes)")
    if 8 + length > file.size:
        raise WeightsError(f"{shown}: is truncated: {file.size:,} bytes, of which the header alone would be {length:,}")
    try:
        header = json.loads(bytes(file.read(8, 8 + length)))
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        return [_safetensor(shown, file, 8 + length, key, entry) for key, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{shown}: is not a safetensors file (its header cannot be read: {error})") from error


def _safetensor(shown: str, file: _File, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    dtype_name, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (data + int(offset) for offset in entry["data_offsets"])
    dtype = DTYPES.get(dtype_name)
    if end > file.size:
        raise WeightsError(
            f"{shown}: is truncated: {name} ends at byte {end:,}, the file at {file.size:,}; get the file again"
        )
    if begin < data or (dtype and end - begin != math.prod(shape) * dtype.itemsize):
        raise WeightsError(f"{shown}: {name} has {end - begin:,} bytes, which {dtype_name} {list(shape)} has not")

    def read(start: int, stop: int) -> Shaped[np.ndarray, " n"]:
        assert dtype is not None
        try:
            data = file.read(begin + start * dtype.itemsize, begin + stop * dtype.itemsize)
        except (OSError, WeightsError) as error:
            raise WeightsError(f"{shown}: {name} cannot be read: {error}") from error
        return np.frombuffer(data, dtype)

    return StoredTensor(name, shown, dtype, dtype_name, shape, read)


def _open_torch(folder: _Folder, name: str) -> list[StoredTensor]:
    shown = folder.show(name)
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{shown}: is a PyTorch file; reading it needs PyTorch: pip install 'emu2_jax[torch]' "
            "(or take the safetensors files of the same release)"
        ) from error
    if not folder.local:
        raise WeightsError(f"{shown}: PyTorch files are read from local disk alone; copy it here first")
    import pickle

    try:
        loaded = torch.load(folder.path(name), map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise WeightsError(
            f"{shown}: refused: it holds more than tensors, and code in it is never run ({reason})"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise WeightsError(
            f"{shown}: cannot be read (truncated, or not a zip file of torch >= 1.6): {error}"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise WeightsError(f"{shown}: holds a {type(loaded).__name__}, wanted a state dict")
    return [_torch_tensor(shown, str(key), value, torch) for key, value in loaded.items()]


def _torch_tensor(shown: str, name: str, tensor: Any, torch: Any) -> StoredTensor:
    if not isinstance(tensor, torch.Tensor):
        raise WeightsError(f"{shown}: {name} is a {type(tensor).__name__}, wanted a tensor")
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype_name = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    dtype = DTYPES.get(dtype_name)

    def read(start: int, stop: int) -> Shaped[np.ndarray, " n"]:
        assert dtype is not None
        flat = tensor.detach().reshape(-1)[start:stop]
        if dtype == ml_dtypes.bfloat16:  # NumPy knows no bfloat16 of torch's
            return flat.view(torch.int16).numpy().view(dtype)
        return flat.numpy()

    return StoredTensor(name, shown, dtype, dtype_name, tuple(tensor.shape), read)
