"""Stacks of equal layers: the only file that knows that their parameters share one leading axis.

A scanned stack compiles in time that does not grow with depth, and has 1/num_layers of the leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from emu2_jax import shards
from emu2_jax.config import Remat

#: What a layer computes that its backward pass reads, by `checkpoint_name`: inputs and results of products, and what
#: attention leaves (`context`). A residual stream's sum after attention stands for the product before it; "down" is the
#: MLP's result, which only a norm behind it reads.
CONTEXT = ("query", "key", "value", "context", "attention", "down")
PRODUCTS = (*CONTEXT, "gate", "up")


def _policy(remat: Remat) -> Callable[..., Any] | None:
    """What is kept from a layer's forward pass; everything else is computed again."""
    policies = jax.checkpoint_policies
    match remat:
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "dots_with_context":
            return policies.save_only_these_names(*PRODUCTS)
        case "context":
            return policies.save_only_these_names(*CONTEXT)
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=["context", "attention"],
                names_which_can_be_offloaded=["query", "key", "value", "gate", "up", "down"],
                offload_src="device",
                offload_dst="pinned_host",
            )
    return None


class Stack(nnx.Module):
    """`num_layers` copies of one layer, parameters stacked on a leading axis, run by `jax.lax.scan`."""

    def __init__(
        self, make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, rngs: nnx.Rngs, path: str = ""
    ) -> None:
        """`path` is that of the stack among the parameters, for stacks whose layers are gathered one by one."""
        self._path = path
        # Without `transform_metadata` nnx.vmap would record an axis name that no sharding rule here uses.
        build = nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})
        self.layers = build(rngs.split(num_layers))

    def scan(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None, *, remat: Remat = "none"
    ) -> tuple[Any, Any]:
        """`carry, y = body(layer, carry, x)` for each layer in turn; the `y` come back stacked like `xs`.

        `remat` says what the backward pass computes again (docs/performance.md has what each costs and saves): "none"
        of a layer; all but products with weights ("dots"), and but attention ("dots_with_context"); the MLP's inner
        part too ("context"); the whole layer ("full", which keeps only the carry). "offload" keeps what
        "dots_with_context" keeps, most of it in the host's memory.
        """
        graphdef, stacked = nnx.split(self.layers)

        def step(carry: Any, layer_and_x: tuple[Any, Any]) -> tuple[Any, Any]:
            layer, x = layer_and_x
            if self._path:
                layer = shards.whole(layer, f"{self._path}/layers/")
            return body(nnx.merge(graphdef, layer), carry, x)

        if remat != "none":
            # Nothing outside a loop's body can be merged with what it computes again; the barrier against that would
            # make a copy of everything that was kept.
            step = jax.checkpoint(step, policy=_policy(remat), prevent_cse=False)
        return jax.lax.scan(step, carry, (stacked, xs))
