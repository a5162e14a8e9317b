"""The part of a step in which every device works on its own rows, with its own shards of the parameters.

Rows never meet inside a model, so nothing is left for the compiler to guess: parameters are gathered when a layer needs
them, in the dtype of its products; the gradient of a gather is a reduce-scatter; what remains is summed once, at the
end. Only the `tensor` axis stays with the compiler. Outside of `by_rows` every function here does nothing, so that
models run as they are on one device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from emu2_jax import sharding
from emu2_jax.sharding import ROWS

#: Rows of a tile in half precision.
ROWS_OF_TILE = 16


class Region(NamedTuple):
    """How parameters and gradients travel while rows are worked on."""

    compute_dtype: str  # of gathered parameters
    gradient_dtype: str  # in which gradients are reduced


_region: ContextVar[Region | None] = ContextVar("region", default=None)


@contextlib.contextmanager
def _entered(region: Region) -> Iterator[None]:
    token = _region.set(region)
    try:
        yield
    finally:
        _region.reset(token)


def whole(tree: Any, prefix: str = "") -> Any:
    """The whole parameters of `tree`, whose paths start with `prefix`; those of stacks are left to `Stack.scan`."""
    region = _region.get()
    if region is None:
        return tree

    def gathered(key_path: tuple[Any, ...], x: Array) -> Array:
        path = prefix + sharding.path_of(key_path)
        if "/layers/" in path and not prefix:
            return x
        axes = sharding.rule(path)[1]
        return _gather(x, axes.index("fsdp"), region) if "fsdp" in axes else x

    return jax.tree_util.tree_map_with_path(gathered, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, dimension: int, region: Region) -> Array:
    """All shards of a parameter, one after the other along `dimension`."""
    return jax.lax.all_gather(x.astype(region.compute_dtype), "fsdp", axis=dimension, tiled=True)


def _gather_forward(x: Array, dimension: int, region: Region) -> tuple[Array, Array]:
    return _gather(x, dimension, region), jnp.zeros((), x.dtype)


def _gather_backward(dimension: int, region: Region, like: Array, gradient: Array) -> tuple[Array]:
    first = jnp.moveaxis(gradient.astype(region.gradient_dtype), dimension, 0)
    size = jax.lax.axis_size("fsdp")
    rows, missing = first.shape[0] // size, -(first.shape[0] // size) % ROWS_OF_TILE
    if missing or first.ndim > 3:
        # Where a shard is no whole number of tiles, a TPU adds up everything everywhere and then throws most of it
        # away, at twice the bytes: rows of zeros fill the last one, in a matrix whose rows are the shards.
        shards = jnp.pad(first.reshape(size, rows, -1), ((0, 0), (0, missing), (0, 0)))
        matrix = shards.reshape(-1, shards.shape[-1])
        shard = jax.lax.psum_scatter(matrix, "fsdp", scatter_dimension=0, tiled=True)[:rows]
    else:
        # As it lies: as a matrix, heads and channels would have to change places first.
        shard = jax.lax.psum_scatter(first, "fsdp", scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(shard.reshape(rows, *first.shape[1:]), 0, dimension).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _as_gathered(trained: Any, region: Region) -> Any:
    """Sharded parameters in the dtype that they are gathered in, so that their gradients are kept in it, too.

    They were rounded to it when they were reduced: float32 would hold nothing more, in twice the memory.
    """
    if region.gradient_dtype != region.compute_dtype:
        return trained

    def cast(key_path: tuple[Any, ...], x: Array) -> Array:
        return x.astype(region.compute_dtype) if "fsdp" in sharding.rule(sharding.path_of(key_path))[1] else x

    return jax.tree_util.tree_map_with_path(cast, trained)


def row_keys(key: PRNGKeyArray, rows: int) -> PRNGKeyArray:
    """A key for each of these `rows`, by its number in the whole batch: what is drawn is the same on any mesh."""
    first = 0 if _region.get() is None else jax.lax.axis_index(ROWS) * rows
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(rows))


Gradients = Callable[..., tuple[Any, Any]]


def by_rows(gradients: Gradients, mesh: Mesh, region: Region) -> Gradients:
    """`gradients(trained, frozen, batch, key, weights) -> (gradients, sums)`, run on each device's rows and summed.

    `weights` are those of the whole batch. On a mesh with one device for all rows there is nothing to spread.
    """
    if all(mesh.shape[axis] == 1 for axis in ROWS):
        return gradients

    def spread(trained: Mapping[str, Any], frozen: Mapping[str, Any], batch: Any, key: Array, weights: Any) -> Any:
        own = _row_specs(trained, mesh)

        def local(trained: Any, frozen: Any, batch: Any, key: Array, weights: Any) -> Any:
            with _entered(region):
                grads, sums = gradients(_as_gathered(trained, region), frozen, batch, key, weights)
            return jax.tree.map(_sum_over_other_axes, grads, own), jax.lax.psum(sums, ROWS)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(own, _row_specs(frozen, mesh), P(ROWS), P(), P()),
            out_specs=(own, P()),
            # An axis of size 1 is taken along: a program that is manual everywhere is the simpler one to compile.
            axis_names={axis for axis in mesh.axis_names if axis in ROWS or mesh.shape[axis] == 1},
            check_vma=False,  # the sums below are written out; kernels have no rule for it
        )(trained, frozen, batch, key, weights)

    return spread


def _row_specs(params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Where the shards of each parameter lie, as far as the axes of `ROWS` go."""

    def row_spec(key_path: tuple[Any, ...], leaf: Any) -> P:
        spec = sharding.spec(sharding.path_of(key_path), leaf.shape, mesh.shape)
        return P(*(axis if axis in ROWS else None for axis in spec))

    return jax.tree_util.tree_map_with_path(row_spec, params)


def _sum_over_other_axes(gradient: Array, spec: P) -> Array:
    """What a gather's gradient has not summed yet: over the axes that the parameter is not sharded on."""
    return jax.lax.psum(gradient, tuple(axis for axis in ROWS if axis not in spec))
