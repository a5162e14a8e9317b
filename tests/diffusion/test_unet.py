"""The U-Net: SDXL's own parameter count, shapes at every scale, and what each input reaches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_parameters

from emu2_jax.config import UNetConfig
from emu2_jax.diffusion import unet
from emu2_jax.diffusion.unet import (
    Block,
    Transformer,
    TransformerLayer,
    UNet,
    check,
    down_widths,
    group_norm,
    locality_bias,
    up_widths,
)
from emu2_jax.errors import ConfigError
from emu2_jax.models import attention

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
FLOAT32 = jnp.dtype("float32")
SD2 = UNetConfig(
    block_out_channels=(320, 640, 1280, 1280),
    transformer_layers_per_block=(1, 1, 1, 0),
    mid_transformer_layers=1,
    num_attention_heads=(5, 10, 20, 20),
    cross_attention_width=1024,
    micro_conditions=False,
)


def build(config: UNetConfig, key: jax.Array, dtype: str = "float32") -> UNet:
    return UNet(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=key))


def init(key: jax.Array, config: UNetConfig = TINY) -> Any:
    return nnx.to_pure_dict(nnx.state(build(config, key), nnx.Param))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    latents = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
    condition = jax.random.normal(jax.random.key(1), (2, 5, 6))
    time_ids = jnp.tile(jnp.array([[64, 64, 0, 0, 64, 64]]), (2, 1))
    return latents, jnp.array([0, 100]), condition, time_ids


@jax.jit
def forward(parameters: Any, *inputs: jax.Array) -> jax.Array:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(TINY, jax.random.key(0))))
    return nnx.merge(graphdef, parameters)(*inputs)


@pytest.fixture(scope="module")
def parameters() -> Any:
    return random_parameters(init)


def test_parameter_count_of_sdxl() -> None:
    config = UNetConfig(cross_attention_width=2048, pooled_width=1280)
    shapes = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_567_463_684


def test_parameter_count_of_stable_diffusion_2_1() -> None:
    shapes = jax.eval_shape(lambda key: init(key, SD2), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 865_910_724
    assert "add_embedding" not in shapes
    assert shapes["down_blocks"]["3"].keys() == shapes["up_blocks"]["0"].keys() == {"resnets"}
    assert shapes["mid_block"].keys() == {"resnets", "attentions"}


def test_emu2_forward_shapes() -> None:
    def forward(key: jax.Array) -> jax.Array:
        condition, time_ids = jnp.zeros((1, 64, 1792)), jnp.zeros((1, 6), int)
        unet = build(UNetConfig(), key, "bfloat16")
        assert unet.add_embedding.linear_1.kernel.shape == (3328, 1280)
        return unet(jnp.zeros((1, 128, 128, 4)), jnp.zeros(1, int), condition, time_ids, remat="full")

    predicted = jax.eval_shape(forward, jax.random.key(0))
    assert (predicted.shape, predicted.dtype) == ((1, 128, 128, 4), jnp.float32)


def test_parameters_are_plain_float32_dicts_with_string_keys(parameters: Any) -> None:
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
    predicted = forward(jax.jit(init)(jax.random.key(0)), *inputs())
    assert (predicted.shape, predicted.dtype) == ((2, 4, 8, 3), jnp.float32)
    np.testing.assert_array_equal(predicted, 0.0)


@pytest.mark.parametrize("changed", range(4), ids=["latents", "timesteps", "condition", "time_ids"])
def test_every_input_reaches_its_own_image_only(parameters: Any, changed: int) -> None:
    before = inputs()
    after = list(before)
    after[changed] = before[changed].at[1].add(1)
    difference = np.abs(np.asarray(forward(parameters, *before) - forward(parameters, *after))).max((1, 2, 3))
    assert difference[0] < 1e-5
    assert difference[1] > 1e-3


def test_a_pooled_condition_may_be_given_and_time_ids_must(parameters: Any) -> None:
    latents, timesteps, condition, time_ids = inputs()
    mean = forward(parameters, latents, timesteps, condition, time_ids, condition.mean(1))
    np.testing.assert_allclose(mean, forward(parameters, *inputs()), atol=1e-6)
    other = forward(parameters, latents, timesteps, condition, time_ids, condition.mean(1) + 1)
    assert np.abs(other - mean).max() > 1e-3
    with pytest.raises(ConfigError, match=r"^time_ids: got none"):
        forward(parameters, latents, timesteps, condition)


def test_condition_is_a_set(parameters: Any) -> None:
    # As in SDXL, nothing tells the U-Net an embedding's place in the sequence: the encoder has to have written it in.
    latents, timesteps, condition, time_ids = inputs()
    np.testing.assert_allclose(
        forward(parameters, latents, timesteps, condition, time_ids),
        forward(parameters, latents, timesteps, condition[:, ::-1], time_ids),
        atol=1e-3,
    )


def test_recomputation_does_not_change_the_gradient() -> None:
    block = Block(TINY, 1, [(8, 16)], num_transformers=1, num_layers=2, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(block)
    parameters = random_parameters(lambda _: nnx.to_pure_dict(state))
    x, time = jax.random.normal(jax.random.key(0), (1, 4, 4, 8)), jnp.ones((1, 32))

    def gradient(remat: Any) -> Any:
        def loss(parameters: Any) -> jax.Array:
            return nnx.merge(graphdef, parameters).layer(0, x, time, jnp.ones((1, 5, 6)), remat).mean()

        return jax.jit(jax.grad(loss))(parameters)

    wanted = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient(remat), wanted)


def test_self_attention_of_a_large_map_is_the_same_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash, interpreted; cross-attention stays plain, and so does a map that is not large."""
    monkeypatch.setattr(unet, "MIN_KERNEL_POSITIONS", 130)
    layer = TransformerLayer(TINY, 16, 2, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
    condition = jax.random.normal(jax.random.key(1), (1, 5, 6))

    def run(positions: int, kernel: attention.Kernel) -> Any:
        x = jax.random.normal(jax.random.key(0), (1, positions, 16))
        return jax.make_jaxpr(lambda x: layer(x, condition, kernel=kernel))(x), layer(x, condition, kernel=kernel)

    jaxpr, found = run(130, "splash")
    assert str(jaxpr).count("pallas_call") == 1
    np.testing.assert_allclose(found, run(130, "plain")[1], rtol=1e-4, atol=3e-5)
    assert "pallas_call" not in str(run(129, "splash")[0])


def test_group_norm_of_a_worked_example() -> None:
    # Two groups of one channel over two positions: (1, 3) and (10, 10) with variances 1 and 0.
    norm = group_norm(dataclasses.replace(TINY, norm_groups=2), 2, 1e-5, FLOAT32, nnx.Rngs(params=0))
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
    with pytest.raises(ConfigError) as error:
        check(dataclasses.replace(TINY, **change))
    assert message in str(error.value)


def test_locality_falls_off_with_distance_on_the_image() -> None:
    """A 2 x 4 grid of latents over a 2 x 2 grid of embeddings: rows coincide, two columns share an embedding's."""
    bias = np.asarray(locality_bias(2, 4, num_tokens=4, radius=0.5))
    own, other = 0.25**2, 1.25**2  # squared distances of the first column to the two columns of embeddings, in cells
    np.testing.assert_allclose(bias[0], [-2 * own, -2 * other, -2 * (own + 1), -2 * (other + 1)], rtol=1e-6)
    np.testing.assert_array_equal(bias.argmax(1), [0, 0, 1, 1, 2, 2, 3, 3])


def test_a_local_transformer_reads_the_embedding_of_its_own_place() -> None:
    """Changing one embedding of a 2 x 2 grid changes its own quarter of a 4 x 4 latent; without locality, all alike."""
    condition = jax.random.normal(jax.random.key(1), (1, 4, TINY.cross_attention_width))
    changed = condition.at[0, 0].add(1.0)
    changes = {}
    for radius in (None, 0.25):
        config = dataclasses.replace(TINY, transformer_layers_per_block=(0, 1), condition_radius=radius)
        transformer = Transformer(config, 1, 1, dtype=FLOAT32, rngs=nnx.Rngs(params=0))
        transformer.proj_out.kernel[...] = jnp.eye(16)  # it starts at zero
        x = jnp.zeros((1, 4, 4, 16))
        difference = jnp.abs(transformer(x, changed) - transformer(x, condition)).sum((0, 3))
        changes[radius] = np.asarray(difference)
    np.testing.assert_allclose(changes[None], np.full((4, 4), changes[None][0, 0]), rtol=1e-3)
    assert changes[0.25][:2, :2].min() > 20 * changes[0.25][2:, 2:].max()
