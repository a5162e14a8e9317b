"""Parameters to and from an Orbax checkpoint piece by piece: a model need not fit in memory to be converted.

What is written is an ordinary checkpoint of a work directory (step 0, the item `state` with `params` alone), stored a
layer per chunk, so that one layer can be read again without its neighbours.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from emu2_jax.checkpoint import CHUNK_BYTES, CONVERTED_STEP, FOLDER, latest_state, layer_chunks
from emu2_jax.errors import CheckpointError, WeightsError
from emu2_jax.weights.layout import Index
from emu2_jax.weights.parameters import ComputedParameter, Parameter, Parts, grid, read
from emu2_jax.weights.state_dict import flatten, nest

#: A target's disk must have this share more room than the arrays take.
DISK_MARGIN = 0.02


class _Stream:
    """A leaf of the tree that Orbax saves: a parameter and the dtype to store it in."""

    def __init__(self, parameter: Parameter, dtype: np.dtype, done: Callable[[int], None]) -> None:
        self.parameter, self.dtype, self.done = parameter, dtype, done
        self.shape = parameter.shape
        self.size = math.prod(self.shape)
        self.nbytes = self.size * dtype.itemsize

    def pieces(self, chunk: Sequence[int]) -> Iterator[tuple[Index, np.ndarray]]:
        """The parameter chunk by chunk: what is written in parts of a chunk would be read back and written again."""
        for index in grid(self.shape, chunk):
            array = read(self.parameter, index, self.dtype)
            yield index, array
            self.done(array.nbytes)
        if isinstance(self.parameter, ComputedParameter):
            self.parameter.release()


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `_Stream` as Orbax writes a NumPy array, but never holds more of it than a piece."""

    async def _open_and_write(self, value: _Stream, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        array = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
        # Waiting inside the coroutine is meant: the parameters are written one after the other.
        chunk = [size or 1 for size in array.chunk_layout.write_chunk.shape or ()]
        for index, piece in value.pieces(chunk):
            array[index].write(piece).result()


def write_parameters(
    folder: Path,
    parameters: Mapping[str, Parameter],
    dtypes: Mapping[str, np.dtype],
    config_text: str,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Make `folder`/checkpoints with one checkpoint that holds the parameters (path -> parameter) and the config.

    Raises `WeightsError` before anything is written when the disk has not enough room.
    """
    streams = {path: _Stream(parameter, dtypes[path], progress) for path, parameter in parameters.items()}
    check_room(folder, sum(stream.nbytes for stream in streams.values()))
    state = {"params": nest(streams)}
    save_args = jax.tree.map(_save_args, state, is_leaf=lambda leaf: isinstance(leaf, _Stream))
    registry = ocp.type_handlers.create_type_handler_registry((_Stream, _StreamHandler(deepcopy_host_arrays=False)))
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "config": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, step_format_fixed_length=8)
    with ocp.CheckpointManager((folder / FOLDER).absolute(), options=options, item_handlers=handlers) as manager:
        manager.save(
            CONVERTED_STEP,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state, save_args=save_args),
                config=ocp.args.JsonSave({"text": config_text}),
            ),
        )


def _save_args(stream: _Stream) -> ocp.SaveArgs:
    if stream.parameter.stacked:
        return layer_chunks(stream.nbytes // stream.shape[0])
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


class SavedParameter:
    """A parameter of a checkpoint on disk."""

    def __init__(self, array: ts.TensorStore, stacked: bool) -> None:
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype)
        self.chunk = tuple(array.chunk_layout.read_chunk.shape or ())
        self.stacked = stacked
        self._array = array

    def read_into(self, parts: Parts) -> None:
        """Fill parts; each is read for itself."""
        for index, array in parts:
            array[...] = self._array[index].read().result()


def open_parameters(workdir: Path) -> dict[str, Parameter]:
    """The parameters (path -> parameter) of the newest checkpoint of a work directory; nothing is read yet."""
    folder, saved, kept_under = latest_state(workdir)
    context = ts.Context({"cache_pool": {"total_bytes_limit": CHUNK_BYTES}})
    parameters: dict[str, Parameter] = {}
    for path, leaf in flatten(saved).items():
        name = ".".join([kept_under[path.split("/")[0]], *path.split("/")])
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"},
        }
        try:
            array = ts.open(ts.Spec(spec), read=True, context=context).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{workdir}: {path} cannot be read: {str(error).splitlines()[0][:200]}") from error
        if tuple(array.shape) != tuple(leaf.shape):
            raise CheckpointError(f"{workdir}: {path} is {array.shape} on disk, {leaf.shape} in the metadata")
        parameters[path] = SavedParameter(array, stacked="layers" in path.split("/"))
    return parameters


def check_room(folder: Path, nbytes: int) -> None:
    """Raise `WeightsError` unless the disk under `folder` (or its nearest ancestor) has room for `nbytes`."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    needed = round(nbytes * (1 + DISK_MARGIN))
    if needed > free:
        raise WeightsError(f"{folder}: needs {needed / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free")


@contextlib.contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `target` when all is in it; on an error nothing is left behind.

    Raises `WeightsError` when there is something under that name already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target}: exists already and is not empty; give another name")
    temporary = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise WeightsError(f"{target}: cannot be made: {error.strerror}") from error
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
