"""A fingerprint of parameters that does not depend on how they lie on devices."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from emu2_jax.sharding import path_of
from emu2_jax.task import Params

#: Odd numbers that tell places apart. Sums modulo 2^32 come out the same in whatever order devices add them.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that differ whenever a name, a shape, a dtype or any bit of any value differs."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    for (path, leaf), checksum in zip(leaves, sums, strict=True):
        digest.update(f"{path_of(path)} {leaf.shape} {leaf.dtype} {checksum.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def _checksum(x: Any) -> UInt32[Array, " 2"]:
    """Of an array that may be spread over the devices of several hosts; each of them gets the result."""
    where = getattr(x, "sharding", None)
    everywhere = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    return jax.jit(_sums, out_shardings=everywhere)(x)


def _sums(x: Any) -> UInt32[Array, " 2"]:
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    # A product with the place alone would let two values change against each other; mixing the bits first prevents it.
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in range(x.ndim - 1, -1, -1):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % (1 << 32))
        stride *= x.shape[axis]
    mixed = [_mix(bits ^ _mix(place * jnp.uint32(multiplier) + jnp.uint32(1))) for multiplier in _MULTIPLIERS]
    return jnp.stack([values.sum(dtype=jnp.uint32) for values in mixed])


def _mix(x: Any) -> Any:
    """Spreads every bit over the word. Source: MurmurHash3's finaliser (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
