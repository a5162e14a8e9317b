"""Between pixels and latents: the interface, the VAE behind it, and the stand-in that needs no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from emu2_jax.config import DecoderConfig, VAEConfig
from emu2_jax.diffusion.autoencoder import AutoencoderKL, Posterior
from emu2_jax.errors import ConfigError
from emu2_jax.task import Params


class LatentCodec(Protocol):
    """Turns images into latents of about unit variance, and back."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent position."""
        ...

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        ...

    def encode(self, images: Float[Array, "B S S 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """Latents of images in [-1, 1]; H = W = S / factor. A draw where there is a key and a choice, else the mean."""
        ...

    def summary(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W M"]:
        """What `draw` needs of images in [-1, 1]: all that is random comes after it, so it can be stored."""
        ...

    def draw(self, summary: Float[Array, "B H W M"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """What `encode` gives of the images that `summary` was made of."""
        ...

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B S S 3"]:
        """Images, not clipped to [-1, 1]."""
        ...


@dataclass(frozen=True)
class SpaceToDepth:
    """Every factor x factor square of pixels becomes one latent position: exact, invertible, nothing to learn."""

    factor: int  #: pixels per latent position along one side
    scale: float  #: latents are multiplied by this

    @property
    def latent_channels(self) -> int:
        """3 factor^2, in the order (row, column, colour) inside a square."""
        return 3 * self.factor**2

    def encode(self, images: Float[Array, "B S S 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """Latents of images in [-1, 1]; `key` is not used.

        A 2 x 2 image [[a, b], [c, d]] with factor 2 gives one position: a b c d.
        """
        count, size = images.shape[:2]
        side = size // self.factor
        x = images.reshape(count, side, self.factor, side, self.factor, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(count, side, side, self.latent_channels) * self.scale

    def summary(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W C"]:
        """The latents themselves: there is no choice."""
        return self.encode(images)

    def draw(self, summary: Float[Array, "B H W C"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """The same, float32; `key` is not used."""
        return summary.astype(jnp.float32)

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B S S 3"]:
        """The inverse of `encode`."""
        count, side = latents.shape[:2]
        x = latents.reshape(count, side, side, self.factor, self.factor, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(count, side * self.factor, side * self.factor, 3) / self.scale


@dataclass(frozen=True)
class Cosines:
    """Every factor x factor square of pixels as the amplitudes of its cosines, each brought to about the same size.

    In pictures the amplitude falls with frequency, about as 1 / (1 + f): in pixels a square's mean colour is most of
    the variance, and a network learns its edges last. Multiplied by 1 + f they count alike. Exact, invertible, nothing
    to learn; f is the length of the frequency's two numbers of half-waves.
    """

    factor: int  #: pixels per latent position along one side
    scale: float  #: latents are multiplied by this

    @property
    def latent_channels(self) -> int:
        """3 factor^2, in the order (half-waves down, half-waves across, colour)."""
        return 3 * self.factor**2

    def encode(self, images: Float[Array, "B S S 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """Latents of images in [-1, 1]; `key` is not used."""
        count, size = images.shape[:2]
        side = size // self.factor
        x = images.reshape(count, side, self.factor, side, self.factor, 3)
        x = jnp.einsum("bhywxc,uy,vx->bhwuvc", x, *self._waves)
        return (x * self._weights).reshape(count, side, side, self.latent_channels)

    def summary(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W C"]:
        """The latents themselves: there is no choice."""
        return self.encode(images)

    def draw(self, summary: Float[Array, "B H W C"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """The same, float32; `key` is not used."""
        return summary.astype(jnp.float32)

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B S S 3"]:
        """The inverse of `encode`."""
        count, side = latents.shape[:2]
        x = latents.reshape(count, side, side, self.factor, self.factor, 3) / self._weights
        x = jnp.einsum("bhwuvc,uy,vx->bhywxc", x, *self._waves)
        return x.reshape(count, side * self.factor, side * self.factor, 3)

    @property
    def _waves(self) -> tuple[Float[np.ndarray, "u y"], Float[np.ndarray, "v x"]]:
        """The orthonormal cosine transform (DCT-II), down and across."""
        waves = scipy.fft.dct(np.eye(self.factor), axis=0, norm="ortho").astype(np.float32)
        return waves, waves

    @property
    def _weights(self) -> Float[np.ndarray, "u v 1"]:
        half_waves = np.arange(self.factor)
        frequency = np.hypot(half_waves[:, None], half_waves[None, :])[:, :, None]
        return (self.scale * (1.0 + frequency)).astype(np.float32)


@dataclass(frozen=True)
class ScaledAutoencoder:
    """A VAE whose latents are brought to about unit variance."""

    network: AutoencoderKL
    config: VAEConfig
    scale: float  #: latents are multiplied by this
    chunks: int = 1  #: of a batch; only one of them is inside the network at a time

    @property
    def latent_channels(self) -> int:
        """Channels of a latent position."""
        return self.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images: Float[Array, "B S S 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W C"]:
        """Scaled latents of images in [-1, 1]: a draw from the posterior, or its mean without a key."""
        return self._latents(self._posterior(images), key)

    def summary(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W 2*L"]:
        """Mean and log-variance of the posterior, not scaled."""
        posterior = self._posterior(images)
        return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1)

    def draw(self, summary: Float[Array, "B H W 2*L"], key: PRNGKeyArray | None = None) -> Float[Array, "B H W L"]:
        """The draw that `encode` makes with this key, or the mean."""
        return self._latents(Posterior(*jnp.split(summary.astype(jnp.float32), 2, axis=-1)), key)

    def _posterior(self, images: Float[Array, "B S S 3"]) -> Posterior:
        if len(images) % self.chunks:
            raise ConfigError(
                f"decoder.vae_chunks: {self.chunks} chunks do not divide {len(images)} images; take a divisor"
            )

        def moments(images: Float[Array, "b S S 3"]) -> tuple[Array, Array]:
            posterior = self.network.encode(images)
            return posterior.mean, posterior.log_variance

        # A draw is one over all images, so that it does not depend on the chunks.
        return Posterior(*_in_chunks(moments, images, self.chunks))

    def _latents(self, posterior: Posterior, key: PRNGKeyArray | None) -> Float[Array, "B H W L"]:
        return (posterior.mean if key is None else posterior.sample(key)) * self.scale

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B S S 3"]:
        """Images, not clipped to [-1, 1]."""
        chunks = self.chunks if len(latents) % self.chunks == 0 else len(latents)
        return _in_chunks(self.network.decode, latents / self.scale, chunks)


def _in_chunks(function: Callable[[Array], Any], x: Float[Array, "B *axes"], chunks: int) -> Any:
    """`function` of a batch, a chunk at a time; image r is in chunk r % chunks, so that devices keep their own rows."""
    if chunks == 1:
        return function(x)
    pieces = jnp.moveaxis(x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]), 1, 0)
    done = jax.lax.map(function, pieces)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(x.shape[0], *y.shape[2:]), done)


def open_codec(config: DecoderConfig, params: Params) -> LatentCodec:
    """The codec that `decoder.latent` names; a VAE has its parameters in `params["vae"]`."""
    if config.latent == "space_to_depth":
        return SpaceToDepth(config.latent_factor, config.latent_scale)
    if config.latent == "cosines":
        return Cosines(config.latent_factor, config.latent_scale)
    return ScaledAutoencoder(merge_vae(config.vae, params["vae"]), config.vae, config.latent_scale, config.vae_chunks)


def latent_channels(config: DecoderConfig) -> int:
    """Channels of a latent position."""
    return config.vae.latent_channels if config.latent == "autoencoder_kl" else 3 * config.latent_factor**2


def stored_latent(config: DecoderConfig) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the summary of one image in a store."""
    side, channels = config.image_size // config.latent_factor, latent_channels(config)
    if config.latent == "autoencoder_kl":
        # As small as bfloat16 and eight times as exact; what a sound VAE gives is far from its largest, 65,504.
        return jax.ShapeDtypeStruct((side, side, 2 * channels), jnp.float16)
    return jax.ShapeDtypeStruct((side, side, channels), jnp.bfloat16)


def init_vae(config: VAEConfig, key: PRNGKeyArray) -> Params:
    """Random parameters of a VAE, float32, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(AutoencoderKL(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def merge_vae(config: VAEConfig, vae_params: Params) -> AutoencoderKL:
    """The VAE with these parameters, to be used inside a traced function."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(params=0))))
    return nnx.merge(graphdef, vae_params)
