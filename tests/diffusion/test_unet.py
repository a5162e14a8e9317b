"""The U-Net: SDXL's own parameter count, shapes at every scale, and what each input reaches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emu2_jax.config import UNetConfig
from emu2_jax.diffusion.unet import UNet, check, down_widths, group_norm, up_widths
from emu2_jax.errors import ConfigError

TINY = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_layers_per_block=(0, 2),
    num_attention_heads=(1, 2),
    cross_attention_width=6,
    time_id_width=4,
    norm_groups=4,
)


def build(config: UNetConfig = TINY, dtype: str = "float32") -> UNet:
    return UNet(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0))


def parameter_shapes(config: UNetConfig) -> Any:
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(config)), nnx.Param))


def count(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def inputs(batch: int = 2) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    latents = jax.random.normal(jax.random.key(0), (batch, 4, 8, 3))
    condition = jax.random.normal(jax.random.key(1), (batch, 5, 6))
    time_ids = jnp.tile(jnp.array([[64, 64, 0, 0, 64, 64]]), (batch, 1))
    return latents, jnp.arange(batch) * 100, condition, time_ids


@pytest.fixture(scope="module")
def lively() -> UNet:
    """A tiny U-Net whose last convolution is not zero."""
    unet = build()
    unet.conv_out.kernel.set_value(jax.random.normal(jax.random.key(2), unet.conv_out.kernel.shape))
    return unet


def test_parameter_count_of_sdxl() -> None:
    # SDXL base 1.0 has 2,567,463,684 U-Net parameters. It reads text 2048 wide but pools it 1280 wide; here both are
    # one width, so the count at 2048 has (2048 - 1280) more inputs of the first product of `add_embedding`.
    shapes = parameter_shapes(dataclasses.replace(UNetConfig(), cross_attention_width=2048))
    assert count(shapes) - (2048 - 1280) * 1280 == 2_567_463_684


def test_parameter_count_of_emu2() -> None:
    shapes = parameter_shapes(UNetConfig())
    assert shapes["add_embedding"]["linear_1"]["kernel"].shape == (3328, 1280)
    assert count(shapes) == 2_525_520_644


def test_sdxl_forward_shapes() -> None:
    def forward() -> jax.Array:
        unet = build(UNetConfig(), "bfloat16")
        return unet(
            jnp.zeros((1, 128, 128, 4)),
            jnp.zeros(1, int),
            jnp.zeros((1, 64, 1792)),
            jnp.zeros((1, 6), int),
            remat="full",
        )

    predicted = jax.eval_shape(forward)
    assert (predicted.shape, predicted.dtype) == ((1, 128, 128, 4), jnp.float32)


def test_parameters_are_plain_float32_dicts_with_string_keys() -> None:
    parameters = nnx.to_pure_dict(nnx.state(build(), nnx.Param))
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        assert all(isinstance(entry.key, str) for entry in path)
        assert leaf.dtype == jnp.float32
    layers = parameters["down_blocks"]["1"]["attentions"]["0"]["transformer_blocks"]["layers"]
    assert layers["attn2"]["to_k"]["kernel"].shape == (2, 6, 16)  # two layers; condition 6 wide; 16 channels
    assert "bias" not in layers["attn2"]["to_k"]
    assert parameters["down_blocks"]["0"].keys() == {"resnets"}  # no transformer at the first scale


def test_widths_of_residual_blocks() -> None:
    assert down_widths(dataclasses.replace(TINY, layers_per_block=2)) == [[(8, 8), (8, 8)], [(8, 16), (16, 16)]]
    assert up_widths(TINY) == [[(32, 16), (24, 16)], [(24, 8), (16, 8)]]
    # SDXL, as in the names and shapes of its weights.
    assert up_widths(UNetConfig()) == [
        [(2560, 1280), (2560, 1280), (1920, 1280)],
        [(1920, 640), (1280, 640), (960, 640)],
        [(960, 320), (640, 320), (640, 320)],
    ]


def test_starts_at_zero_and_keeps_the_shape() -> None:
    predicted = build(dtype="bfloat16")(*inputs())
    assert (predicted.shape, predicted.dtype) == ((2, 4, 8, 3), jnp.float32)
    np.testing.assert_array_equal(predicted, 0.0)


@pytest.mark.parametrize("changed", range(4), ids=["latents", "timesteps", "condition", "time_ids"])
def test_every_input_reaches_its_own_image_only(lively: UNet, changed: int) -> None:
    before = inputs()
    after = list(before)
    after[changed] = before[changed].at[1].add(1)
    difference = np.abs(np.asarray(lively(*before) - lively(*after))).max((1, 2, 3))
    assert difference[0] < 1e-5
    assert difference[1] > 1e-3


def test_condition_is_a_set(lively: UNet) -> None:
    # As in SDXL, nothing tells the U-Net an embedding's place in the sequence: the encoder has to have written it in.
    latents, timesteps, condition, time_ids = inputs()
    np.testing.assert_allclose(
        lively(latents, timesteps, condition, time_ids),
        lively(latents, timesteps, condition[:, ::-1], time_ids),
        atol=1e-4,
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_does_not_change_the_gradient(lively: UNet, remat: Any) -> None:
    graphdef, state = nnx.split(lively)

    def loss(state: Any, remat: Any) -> jax.Array:
        return jnp.square(nnx.merge(graphdef, state)(*inputs(1), remat=remat)).mean()

    wanted = jax.jit(jax.grad(loss), static_argnums=1)(state, "none")
    got = jax.jit(jax.grad(loss), static_argnums=1)(state, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def test_group_norm_of_a_worked_example() -> None:
    # Two groups of one channel over two positions: (1, 3) and (10, 10) with variances 1 and 0.
    config = dataclasses.replace(TINY, norm_groups=2)
    norm = group_norm(config, 2, 1e-5, jnp.dtype("float32"), nnx.Rngs(params=0))
    x = jnp.array([[[[1.0, 10.0], [3.0, 10.0]]]])
    np.testing.assert_allclose(norm(x).ravel(), [-1.0, 0.0, 1.0, 0.0], atol=1e-5)


def test_group_norm_has_float32_statistics_in_bfloat16() -> None:
    # A mean of 256 with deviations of 2: squares in bfloat16 would lose the variance altogether.
    norm = group_norm(dataclasses.replace(TINY, norm_groups=1), 2, 1e-5, jnp.dtype("bfloat16"), nnx.Rngs(params=0))
    x = jnp.array([[[[254.0, 258.0], [254.0, 258.0]]]], jnp.bfloat16)
    np.testing.assert_allclose(norm(x).astype(jnp.float32).ravel(), [-1.0, 1.0, -1.0, 1.0], atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": (1,)}, "decoder.unet.num_attention_heads: got 1 values, wanted one for each of the 2"),
        ({"transformer_layers_per_block": (0, 1, 1)}, "decoder.unet.transformer_layers_per_block: got 3 values"),
        ({"norm_groups": 3}, "8 channels do not divide into decoder.unet.norm_groups = 3 groups"),
        ({"num_attention_heads": (3, 2)}, "decoder.unet.num_attention_heads: 8 channels do not divide into 3 heads"),
    ],
)
def test_levels_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(TINY, **change))
