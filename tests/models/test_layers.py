"""Layers against numbers that can be checked by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu2_jax.models import layers


def test_rotate_turns_channel_i_with_channel_i_plus_half() -> None:
    """Head width 4, base 10000: channels (0, 2) turn by the position, (1, 3) by a hundredth of it."""
    x = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = layers.rotate(x, jnp.array([[2]]), base=10000.0)[0, 0, 0]
    expected = [math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)


def test_rotate_leaves_position_zero_alone_and_scores_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    np.testing.assert_array_equal(layers.rotate(jnp.asarray(q), jnp.array([[0]]), base=10000.0), q)

    def score(q_position: int, k_position: int) -> float:
        turned_q = layers.rotate(jnp.asarray(q), jnp.array([[q_position]]), base=10000.0)
        turned_k = layers.rotate(jnp.asarray(k), jnp.array([[k_position]]), base=10000.0)
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotating_by_a_product_gives_the_same_bits_and_the_same_gradient() -> None:
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), jnp.bfloat16) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 2048, (2, 5)))

    def total(x: jax.Array, by_product: bool) -> tuple[jax.Array, jax.Array]:
        turned = layers.rotate(x, positions, base=10000.0, by_product=by_product)
        return (turned * weights).sum().astype(jnp.float32), turned

    moved, product = (jax.grad(functools.partial(total, by_product=by), has_aux=True)(x) for by in (False, True))
    np.testing.assert_array_equal(moved[1], product[1])
    np.testing.assert_array_equal(moved[0], product[0])


def test_layer_norm_uses_the_biased_variance_and_adds_epsilon_inside_the_root() -> None:
    norm = layers.LayerNorm(3, epsilon=1.0)
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0])
    norm.bias[...] = jnp.array([0.0, 0.5, -1.0])
    # (0, 3, 6): mean 3, variance 6, and sqrt(6 + 1).
    expected = np.array([-3.0, 0.0, 3.0]) / math.sqrt(7.0) * [1.0, 2.0, 3.0] + [0.0, 0.5, -1.0]
    np.testing.assert_allclose(norm(jnp.array([0.0, 3.0, 6.0])), expected, rtol=1e-6)


def test_rms_norm_subtracts_no_mean() -> None:
    norm = layers.RMSNorm(2, epsilon=0.5)
    norm.scale[...] = jnp.array([1.0, 10.0])
    # (1, 2): mean square 2.5, and sqrt(2.5 + 0.5).
    np.testing.assert_allclose(norm(jnp.array([1.0, 2.0])), np.array([1.0, 20.0]) / math.sqrt(3.0), rtol=1e-6)


def test_norms_keep_the_compute_dtype_and_take_statistics_in_float32() -> None:
    """bfloat16 cannot hold 1e20 squared, nor a sum of 4096 ones exactly; the statistics must."""
    large = jnp.full(8, 1e18, jnp.bfloat16)
    normed = layers.RMSNorm(8, epsilon=1e-6)(large)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed.astype(np.float32), np.ones(8))
    ones = jnp.ones(4096, jnp.bfloat16).at[0].set(2.0)
    centred = layers.LayerNorm(4096, epsilon=1e-6)(ones)
    assert centred.dtype == jnp.bfloat16
    assert float(centred[0]) == pytest.approx(math.sqrt(4095.0), rel=1e-2)


def test_projection_is_one_matrix_without_bias() -> None:
    projection = layers.Projection(3, 2, rngs=nnx.Rngs(params=0))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(projection))) == {"kernel": (3, 2)}
    np.testing.assert_array_equal(projection(jnp.zeros((4, 3))), np.zeros((4, 2)))


def test_kernels_start_with_variance_one_over_fan_in() -> None:
    values = np.asarray(layers.kernel((64, 3, 4, 8), fan_in=64, rngs=nnx.Rngs(params=0))[...])
    assert values.std() == pytest.approx(1 / 8, rel=0.03)


def test_attend_averages_the_visible_values_when_scores_are_equal() -> None:
    q = jnp.zeros((1, 2, 1, 2))
    values = jnp.array([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]]).reshape(1, 3, 1, 2)
    mask = jnp.array([[[True, True, False], [True, True, True]]])
    mixed = layers.attend(q, jnp.ones((1, 3, 1, 2)), values, mask)[0, :, 0]
    np.testing.assert_allclose(mixed, [[2.0, 20.0], [3.0, 30.0]], rtol=1e-6)


def test_attend_scales_scores_by_the_root_of_the_head_width() -> None:
    """Head width 4: q . k = 2 is a score of 1, so the weights are e : 1."""
    q = jnp.array([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    k = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]).reshape(1, 2, 1, 4)
    v = jnp.array([[1.0] * 4, [0.0] * 4]).reshape(1, 2, 1, 4)
    np.testing.assert_allclose(layers.attend(q, k, v)[0, 0, 0], [math.e / (math.e + 1)] * 4, rtol=1e-6)


def test_query_heads_share_key_value_heads_in_runs() -> None:
    """Four query heads on two key/value heads: 0 and 1 read the first, 2 and 3 the second (not in turns)."""
    v = jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)
    mixed = layers.attend(jnp.ones((1, 1, 4, 1)), jnp.ones((1, 1, 2, 1)), v)
    np.testing.assert_array_equal(mixed[0, 0, :, 0], [1.0, 1.0, 2.0, 2.0])


def by_definition(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Softmax attention as it is written, left to JAX to differentiate."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1), v)


def test_attention_and_its_gradients_equal_the_definition_s() -> None:
    rng = np.random.default_rng(1)
    q, k, v, g = (jnp.asarray(rng.normal(size=(2, 24, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    mask = layers.packed_causal_mask(jnp.asarray(rng.integers(1, 3, (2, 1)) + (np.arange(24) > 12)))
    wanted, wanted_gradients = jax.vjp(lambda *x: by_definition(*x, mask), q, k, v)
    got, gradients = jax.vjp(lambda *x: layers.attend(*x, mask), q, k, v)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(g), wanted_gradients(g), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel_shape", "axes"), [((6, 5), 1), ((6, 2, 3), 1), ((3, 2, 5), 2)])
def test_a_product_and_its_gradients_are_einsum_s(kernel_shape: tuple[int, ...], axes: int) -> None:
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 4, *kernel_shape[:axes])), jnp.float32)
    wanted, pull_wanted = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, axes), x, kernel)
    got, pull = jax.vjp(lambda x, kernel: layers.product(x, kernel, axes), x, kernel)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for one, other in zip(pull(wanted), pull_wanted(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gives_finite_values_and_gradients() -> None:
    q = k = v = jnp.ones((1, 2, 1, 2))
    nowhere = jnp.zeros((1, 2, 2), bool)
    value, gradient = jax.value_and_grad(lambda q: layers.attend(q, k, v, nowhere).sum())(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_packed_causal_mask() -> None:
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(layers.packed_causal_mask(jnp.array([[1, 1, 2, 2, 0]]))[0], np.array(expected, bool))
