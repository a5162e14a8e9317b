"""Parameters onto devices: each device's shard is filled from the slices it needs, one layer after the other.

On the host there are at any time the shards of one layer (or one run of small layers) that live here, and a block of
the file; the stacked parameter exists on the devices alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from emu2_jax import sharding
from emu2_jax.weights.layout import Index
from emu2_jax.weights.parameters import BLOCK_BYTES, Parameter, whole
from emu2_jax.weights.state_dict import nest

_ALIGNMENT = 64


def place(parameters: Mapping[str, Parameter], mesh: Mesh, dtype: np.dtype | None = None) -> dict[str, Any]:
    """The parameter tree on the devices of `mesh`, as `emu2_jax.sharding` lays it out.

    `dtype`: of the arrays; None = as stored. Raises `ConfigError` for a parameter that the mesh does not divide.
    """
    flat = {}
    for path, parameter in parameters.items():
        spec = sharding.spec(path, parameter.shape, mesh.shape)
        flat[path] = place_parameter(parameter, NamedSharding(mesh, spec), dtype or parameter.dtype)
    return nest(flat)


def place_parameter(parameter: Parameter, target: NamedSharding, dtype: np.dtype) -> jax.Array:
    """One parameter as a sharded array."""
    if not parameter.stacked:
        return _array(parameter, whole(parameter.shape), target, dtype)
    layers, *inner = parameter.shape
    assert not target.spec or target.spec[0] is None, "layers are never spread over devices"
    local_bytes = math.prod(target.shard_shape((1, *inner))) * dtype.itemsize * len(target.addressable_devices)
    run = max(1, min(layers, BLOCK_BYTES // local_bytes))
    stack = jnp.zeros(parameter.shape, dtype, device=target)
    for start in range(0, layers, run):
        index = (slice(start, min(start + run, layers)), *whole(inner))
        # Waiting keeps at most one run on its way to the devices.
        stack = _put(stack, _array(parameter, index, target, dtype), start).block_until_ready()
    return stack


def _array(parameter: Parameter, index: Index, target: NamedSharding, dtype: np.dtype) -> jax.Array:
    """The part of a parameter at `index` as a sharded array; every slice that lives here is read once."""
    shape = tuple(part.stop - part.start for part in index)
    devices = target.addressable_devices_indices_map(shape)
    keys = {_key(part or (), shape) for part in devices.values()}
    arrays: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    parts = []
    for key in keys:
        arrays[key] = _aligned([stop - start for start, stop in key], dtype)
        here = tuple(slice(o.start + start, o.start + stop) for o, (start, stop) in zip(index, key, strict=True))
        parts.append((here, arrays[key]))
    parameter.read_into(parts)
    shards = [
        jax.device_put(arrays[_key(part or (), shape)], device, may_alias=True) for device, part in devices.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, target, shards)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts where XLA's CPU arrays start: there it can become one without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _key(part: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(size)[:2] for axis, size in zip(part, shape, strict=True))


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layers: jax.Array, start: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, layers, start, axis=0)
