"""The stand-in codec is exact, and the missing one says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emu2_jax.config import DecoderConfig
from emu2_jax.diffusion.vae import SpaceToDepth, latent_channels, open_codec
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


def test_open_codec() -> None:
    config = DecoderConfig(latent="space_to_depth", latent_factor=4, latent_scale=1.5)
    assert open_codec(config) == SpaceToDepth(factor=4, scale=1.5)
    assert latent_channels(config) == 48


def test_autoencoder_kl_can_be_planned_but_not_run() -> None:
    assert latent_channels(DecoderConfig()) == 4
    with pytest.raises(ConfigError, match=r"^decoder\.latent: got 'autoencoder_kl'.*wanted 'space_to_depth'$"):
        open_codec(DecoderConfig())
