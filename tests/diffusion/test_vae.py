"""The stand-in codec is exact; the VAE scales, clips and pads as it must."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_parameters

from emu2_jax.config import DecoderConfig, VAEConfig
from emu2_jax.diffusion.autoencoder import Downsample, Posterior
from emu2_jax.diffusion.vae import Cosines, SpaceToDepth, init_vae, latent_channels, merge_vae, open_codec
from emu2_jax.errors import ConfigError


def test_space_to_depth_of_a_worked_image() -> None:
    image = jnp.arange(2 * 4 * 3.0).reshape(1, 2, 4, 3)[:, :, :2]  # pixels a b / c d
    latents = SpaceToDepth(factor=2, scale=0.5).encode(image)
    assert latents.shape == (1, 1, 1, 12)
    np.testing.assert_array_equal(latents.ravel() * 2, [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17])


def test_decode_is_the_inverse_of_encode() -> None:
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1.0)
    codec = SpaceToDepth(factor=4, scale=2.0)
    latents = codec.encode(images)
    assert latents.shape == (2, 2, 2, 48) == (2, 2, 2, codec.latent_channels)
    np.testing.assert_array_equal(codec.decode(latents), images)


def test_cosines_of_worked_squares() -> None:
    """A flat square has its mean colour alone, times its side; the transform keeps the sum of squares at weight 1."""
    codec = Cosines(factor=4, scale=0.5)
    flat = codec.encode(jnp.full((1, 4, 4, 3), 0.3)).reshape(4, 4, 3)
    np.testing.assert_allclose(flat[0, 0], 0.5 * 4 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(flat.ravel()[3:], 0.0, atol=1e-6)
    across = np.sqrt(2 / 4) * np.cos(np.pi * (np.arange(4) + 0.5) / 4) / np.sqrt(4)  # one half-wave, of norm 1
    image = jnp.broadcast_to(jnp.asarray(across, jnp.float32)[None, None, :, None], (1, 4, 4, 3))
    latents = codec.encode(image).reshape(4, 4, 3)
    np.testing.assert_allclose(latents[0, 1], 0.5 * (1 + 1), rtol=1e-5)
    np.testing.assert_allclose(latents[1:], 0.0, atol=1e-6)


def test_cosines_decode_is_the_inverse_of_encode() -> None:
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)
    config = DecoderConfig(latent="cosines", latent_factor=8, latent_scale=0.7)
    codec = open_codec(config, {})
    latents = codec.encode(images)
    assert latents.shape == (2, 2, 2, 192) == (2, 2, 2, latent_channels(config))
    np.testing.assert_allclose(codec.decode(latents), images, atol=1e-6)


def test_open_codec() -> None:
    config = DecoderConfig(latent="space_to_depth", latent_factor=4, latent_scale=1.5)
    assert open_codec(config, {}) == SpaceToDepth(factor=4, scale=1.5)
    assert latent_channels(config) == 48


def test_an_autoencoder_scales_its_latents_and_knows_its_factor() -> None:
    vae = VAEConfig(block_out_channels=(4, 8, 8), layers_per_block=1, norm_groups=2, latent_channels=3)
    config = DecoderConfig(vae=vae, latent_factor=4, latent_scale=0.5)
    params = {"vae": jax.tree.map(jnp.asarray, random_parameters(lambda key: init_vae(vae, key)))}
    codec = open_codec(config, params)
    assert (codec.factor, codec.latent_channels, latent_channels(config), latent_channels(DecoderConfig())) == (
        4,
        3,
        3,
        4,
    )
    images = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)
    network = merge_vae(vae, params["vae"])
    latents = codec.encode(images)
    np.testing.assert_allclose(latents, 0.5 * network.encode(images).mean, rtol=1e-6)
    np.testing.assert_allclose(codec.decode(latents), network.decode(latents / 0.5), rtol=1e-6)


@functools.cache
def chunked(chunks: int) -> tuple[DecoderConfig, Any]:
    vae = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_groups=2, latent_channels=3)
    config = DecoderConfig(vae=vae, latent_factor=2, latent_scale=0.5, vae_chunks=chunks)
    return config, {"vae": jax.tree.map(jnp.asarray, random_parameters(lambda key: init_vae(vae, key)))}


def test_chunks_change_neither_latents_nor_their_draw_nor_images() -> None:
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1.0)
    whole, halves = (open_codec(*chunked(chunks)) for chunks in (1, 2))
    key = jax.random.key(1)
    latents = whole.encode(images, key)
    np.testing.assert_allclose(halves.encode(images, key), latents, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(halves.decode(latents), whole.decode(latents), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(halves.decode(latents[:3]), whole.decode(latents[:3]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"decoder\.vae_chunks: 2 chunks do not divide 3 images"):
        halves.encode(images[:3], key)


def test_chunks_bound_the_memory_of_encoding() -> None:
    """In a quarter of the images at a time the compiler needs well under half of the temporary memory."""

    def temporaries(chunks: int) -> int:
        config, params = chunked(chunks)
        images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
        compiled = jax.jit(lambda p, x: open_codec(config, p).encode(x)).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.5 * temporaries(1)


def test_the_log_variance_is_held_in_its_range_and_gives_the_spread() -> None:
    posterior = Posterior(jnp.array([1.0]), jnp.array([np.log(4.0)]))
    np.testing.assert_allclose(posterior.sample_with(jnp.array([3.0])), 1 + 2 * 3, rtol=1e-6)
    vae = VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_groups=2, latent_channels=1)
    params = init_vae(vae, jax.random.key(0))
    params["quant_conv"]["bias"] = jnp.array([0.0, 1e4])
    assert (merge_vae(vae, params).encode(jnp.zeros((1, 2, 2, 3))).log_variance == 20.0).all()


def test_the_encoder_halves_without_looking_up_or_left() -> None:
    """A row a b c d: the two outputs read a b c and c d 0; with a kernel that copies its first place, a and c."""
    down = Downsample(1, rngs=nnx.Rngs(params=0))
    down.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(down(image).ravel(), [0, 2, 8, 10])
