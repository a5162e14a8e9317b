"""Stacks of equal layers: the only file that knows that their parameters share one leading axis.

A scanned stack compiles in time that does not grow with depth, and has 1/num_layers of the leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

Remat = Literal["none", "dots", "full"]


class Stack(nnx.Module):
    """`num_layers` copies of one layer, parameters stacked on a leading axis, run by `jax.lax.scan`."""

    def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, rngs: nnx.Rngs) -> None:
        # Without `transform_metadata` nnx.vmap would record an axis name that no sharding rule here uses.
        build = nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})
        self.layers = build(rngs.split(num_layers))

    def scan(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, *, remat: Remat = "none"
    ) -> tuple[Any, Any]:
        """`carry, y = body(layer, carry, x)` for each layer in turn; the `y` come back stacked like `xs`.

        `remat` says what the backward pass recomputes: "none" of a layer, all but products with weights ("dots"), or
        the whole layer ("full", which keeps only the carry).
        """
        graphdef, stacked = nnx.split(self.layers)

        def step(carry: Any, layer_and_x: tuple[Any, Any]) -> tuple[Any, Any]:
            layer, x = layer_and_x
            return body(nnx.merge(graphdef, layer), carry, x)

        if remat == "dots":
            step = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        elif remat == "full":
            step = jax.checkpoint(step)
        return jax.lax.scan(step, carry, (stacked, xs))
