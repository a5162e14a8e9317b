"""A scanned stack is its layers, one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu2_jax.models.stack import Remat, Stack

WIDTH, NUM_LAYERS = 3, 4


class Layer(nnx.Module):
    """Two leaves of different rank."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.bias = nnx.Param(jnp.zeros(WIDTH))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.weight[...] + self.bias[...])


@pytest.fixture(scope="module")
def stack() -> Stack:
    return Stack(Layer, NUM_LAYERS, rngs=nnx.Rngs(params=0))


def weights_of(stack: Stack) -> np.ndarray:
    return np.asarray(nnx.to_pure_dict(nnx.state(stack))["layers"]["weight"])


def test_parameters_have_one_leading_axis_and_layers_differ(stack: Stack) -> None:
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(stack)))
    assert shapes == {"layers": {"weight": (NUM_LAYERS, WIDTH, WIDTH), "bias": (NUM_LAYERS, WIDTH)}}
    weights = weights_of(stack)
    assert not any(np.array_equal(weights[0], other) for other in weights[1:])


def test_scan_runs_the_layers_in_order_and_stacks_what_they_return(stack: Stack) -> None:
    x = np.array([0.5, -1.0, 2.0], np.float32)
    last, inputs = stack.scan(lambda layer, x, extra: (layer(x) + extra, x), jnp.asarray(x), jnp.arange(4.0))
    expected = x
    for number, weight in enumerate(weights_of(stack)):
        np.testing.assert_allclose(inputs[number], expected, rtol=1e-5)
        expected = np.tanh(expected @ weight) + number
    np.testing.assert_allclose(last, expected, rtol=1e-5)


@pytest.mark.parametrize(("remat", "tanh_calls"), [("none", 1), ("dots", 2), ("full", 2)])
def test_remat_changes_what_is_recomputed_and_not_the_gradient(stack: Stack, remat: Remat, tanh_calls: int) -> None:
    graphdef, params = nnx.split(stack)

    def loss(params: Any, remat: Remat) -> jax.Array:
        last, _ = nnx.merge(graphdef, params).scan(lambda layer, x, _: (layer(x), None), jnp.ones(WIDTH), remat=remat)
        return jnp.square(last).sum()

    gradient = jax.tree.leaves(jax.grad(loss)(params, remat))
    plain = jax.tree.leaves(jax.grad(loss)(params, "none"))
    for ours, theirs in zip(gradient, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # One layer's forward pass appears in the program once, and again where the backward pass recomputes it.
    program = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, remat))
    assert program.count("= tanh ") == tanh_calls
