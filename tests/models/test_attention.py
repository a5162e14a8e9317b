"""All kernels give what plain attention gives: values and gradients, packed rows, padding, odd lengths and widths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu2_jax.models import attention, layers

#: Two documents and padding; a row that is one document; 130 positions, which splash fills up to 256.
DOCUMENTS = np.array([[1] * 50 + [2] * 70 + [0] * 10, [1] * 130], np.int32)


def inputs(rows: int, length: int, heads: int, groups: int, width: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(rows, length, count, width) for count in (heads, groups, groups)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def values_and_gradients(kernel: attention.Kernel, arrays: Any, mask: attention.Mask, counts: np.ndarray) -> Any:
    """Mixed values and the gradients of a sum over what counts, weighted so that no two positions are alike."""
    weights = np.random.default_rng(1).normal(size=arrays[0].shape) * counts[:, :, None, None]

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed = attention.attend(q, k, v, mask, kernel=kernel)
            return (mixed * weights).sum(), mixed

        (_, mixed), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return mixed * counts[:, :, None, None], gradients

    return run(*arrays)


@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 2, 128), (4, 2, 24)])
def test_splash_equals_plain_on_packed_rows(heads: int, groups: int, width: int) -> None:
    arrays, counts = inputs(2, 130, heads, groups, width), DOCUMENTS > 0
    mask = attention.Packed(jnp.asarray(DOCUMENTS))
    wanted = values_and_gradients("plain", arrays, layers.packed_causal_mask(mask.segment_ids), counts)
    found = values_and_gradients("splash", arrays, mask, counts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize("length", [128, 145])
def test_splash_equals_plain_where_everything_is_seen(length: int) -> None:
    """The visual encoder's case: no mask, a CLS position too many for whole registers."""
    arrays, counts = inputs(1, length, 2, 2, 16), np.ones((1, length))
    wanted, found = (values_and_gradients(kernel, arrays, None, counts) for kernel in ("plain", "splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, wanted)


def test_a_packed_mask_is_formed_for_plain_attention() -> None:
    arrays, mask = inputs(2, 130, 2, 2, 8), attention.Packed(jnp.asarray(DOCUMENTS))
    formed = attention.prepare(mask, "auto", jnp.dtype("float32"))
    np.testing.assert_array_equal(formed, layers.packed_causal_mask(mask.segment_ids))
    np.testing.assert_array_equal(attention.attend(*arrays, mask), layers.attend(*arrays, formed))
    assert attention.prepare(mask, "splash", jnp.dtype("float32")) is mask


def test_auto_is_plain_on_a_cpu_and_splash_on_a_mesh_of_tpus() -> None:
    assert attention.choose("auto", jnp.dtype("bfloat16")) == "plain"
    tpus = jax.sharding.AbstractMesh(
        (4,), ("fsdp",), abstract_device=jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    )
    with jax.sharding.use_abstract_mesh(tpus):
        assert attention.choose("auto", jnp.dtype("bfloat16")) == "splash"
        assert attention.choose("plain", jnp.dtype("bfloat16")) == "plain"


def test_the_squares_of_the_visual_encoder_divide_its_filled_length() -> None:
    """1025 positions become 1152 = 3 x 384, and rows of 2048 are cut into 512."""
    assert attention._block_sizes(1152).block_q == 384
    assert attention._block_sizes(2048).block_kv == 512
