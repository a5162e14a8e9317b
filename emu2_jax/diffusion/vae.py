"""Between pixels and latents: the interface, and the stand-in that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Array, Float

from emu2_jax.config import DecoderConfig
from emu2_jax.errors import ConfigError

#: Channels of the latents of Stable Diffusion's VAE. Source: release `vae/config.json`.
AUTOENCODER_KL_CHANNELS = 4


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

    def encode(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W C"]:
        """Latents of images in [-1, 1]; H = W = S / factor."""
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

    def encode(self, images: Float[Array, "B S S 3"]) -> Float[Array, "B H W C"]:
        """Latents of images in [-1, 1]. A 2 x 2 image [[a, b], [c, d]] with factor 2 gives one position: a b c d."""
        count, size = images.shape[:2]
        side = size // self.factor
        x = images.reshape(count, side, self.factor, side, self.factor, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(count, side, side, self.latent_channels) * self.scale

    def decode(self, latents: Float[Array, "B H W C"]) -> Float[Array, "B S S 3"]:
        """The inverse of `encode`."""
        count, side = latents.shape[:2]
        x = latents.reshape(count, side, side, self.factor, self.factor, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(count, side * self.factor, side * self.factor, 3) / self.scale


def open_codec(config: DecoderConfig) -> LatentCodec:
    """The codec that `decoder.latent` names. Raises ConfigError for one that cannot run here."""
    if config.latent == "space_to_depth":
        return SpaceToDepth(config.latent_factor, config.latent_scale)
    raise ConfigError(
        f"decoder.latent: got {config.latent!r}, whose network is not part of this version: the recipe can be planned "
        "(--dry_run) but not run; wanted 'space_to_depth'"
    )


def latent_channels(config: DecoderConfig) -> int:
    """Channels of a latent position, also for a codec that cannot run here."""
    return AUTOENCODER_KL_CHANNELS if config.latent == "autoencoder_kl" else 3 * config.latent_factor**2
