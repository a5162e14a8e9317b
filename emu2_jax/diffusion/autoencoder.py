"""The VAE of Stable Diffusion and SDXL: images to the distribution of their latents, latents to images.

Layout NHWC, everything in float32: SDXL's overflows in half precision. Module names follow diffusers
(`decoder/up_blocks/0/resnets/1/conv1`), so that a weight's name says where it comes from.

Axis letters: B images, Y X rows and columns of pixels, H W rows and columns of a level, C channels, L latent channels.

Source: diffusers `AutoencoderKL` as configured by the release's `vae/config.json`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from emu2_jax.config import VAEConfig
from emu2_jax.diffusion.unet import Upsample
from emu2_jax.models import layers

#: The log-variance of the latents is held inside this range. Source: diffusers `DiagonalGaussianDistribution`.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
FLOAT32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Posterior:
    """The distribution of an image's latent, independent at every position and channel; not scaled."""

    mean: Float[Array, "B H W L"]
    log_variance: Float[Array, "B H W L"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B H W L"]:
        """A draw."""
        return self.sample_with(jax.random.normal(key, self.mean.shape))

    def sample_with(self, noise: Float[Array, "B H W L"]) -> Float[Array, "B H W L"]:
        """The draw that this unit noise gives."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, plus the input."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(config, inputs, rngs)
        self.conv1 = _conv(inputs, outputs, rngs)
        self.norm2 = _norm(config, outputs, rngs)
        self.conv2 = _conv(outputs, outputs, rngs)
        self.conv_shortcut = _conv(inputs, outputs, rngs, side=1) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C2"]:
        inner = self.conv1(nnx.silu(self.norm1(x)))
        inner = self.conv2(nnx.silu(self.norm2(inner)))
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Attention over all positions with a single head as wide as the channels, plus the input."""

    def __init__(self, config: VAEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.group_norm = _norm(config, width, rngs)
        self.to_q = nnx.Linear(width, width, rngs=rngs)
        self.to_k = nnx.Linear(width, width, rngs=rngs)
        self.to_v = nnx.Linear(width, width, rngs=rngs)
        self.to_out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        normed = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        mixed = layers.attend(self.to_q(normed), self.to_k(normed), self.to_v(normed))
        return x + self.to_out(mixed).reshape(x.shape)


class Middle(nnx.Module):
    """The lowest level: a residual block, attention, a residual block."""

    def __init__(self, config: VAEConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.Dict({str(i): ResidualBlock(config, width, width, rngs=rngs) for i in range(2)})
        self.attentions = nnx.Dict({"0": Attention(config, width, rngs=rngs)})

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.resnets["1"](self.attentions["0"](self.resnets["0"](x)))


class Downsample(nnx.Module):
    """Halve height and width by a convolution that is padded below and on the right alone.

    Of 4 pixels a b c d in a row, the two outputs read a b c and c d 0.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(channels, channels, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=FLOAT32, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        return self.conv(x)


class Level(nnx.Module):
    """The residual blocks of one scale, and the way to the next where there is one."""

    def __init__(
        self, config: VAEConfig, inputs: int, outputs: int, count: int, then: str | None, *, rngs: nnx.Rngs
    ) -> None:
        self.resnets = nnx.Dict(
            {str(i): ResidualBlock(config, outputs if i else inputs, outputs, rngs=rngs) for i in range(count)}
        )
        if then == "downsamplers":
            self.downsamplers = nnx.Dict({"0": Downsample(outputs, rngs=rngs)})
        elif then == "upsamplers":
            self.upsamplers = nnx.Dict({"0": Upsample(outputs, dtype=FLOAT32, rngs=rngs)})
        self.then = then

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        for i in range(len(self.resnets)):
            x = self.resnets[str(i)](x)
        return getattr(self, self.then)["0"](x) if self.then else x


class Encoder(nnx.Module):
    """Pixels to the moments of the latent, before `quant_conv`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels
        last, top = len(channels) - 1, channels[-1]
        self.conv_in = _conv(3, channels[0], rngs)
        inputs = (channels[0], *channels[:-1])
        self.down_blocks = nnx.Dict(
            {
                str(i): Level(config, *pair, config.layers_per_block, "downsamplers" if i < last else None, rngs=rngs)
                for i, pair in enumerate(zip(inputs, channels, strict=True))
            }
        )
        self.mid_block = Middle(config, top, rngs=rngs)
        self.conv_norm_out = _norm(config, top, rngs)
        self.conv_out = _conv(top, 2 * config.latent_channels, rngs)

    def __call__(self, images: Float[Array, "B Y X 3"]) -> Float[Array, "B H W L2"]:
        x = self.conv_in(images)
        for i in range(len(self.down_blocks)):
            x = self.down_blocks[str(i)](x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents, after `post_quant_conv`, to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels[::-1]
        last = len(channels) - 1
        self.conv_in = _conv(config.latent_channels, channels[0], rngs)
        self.mid_block = Middle(config, channels[0], rngs=rngs)
        inputs = (channels[0], *channels[:-1])
        self.up_blocks = nnx.Dict(
            {
                str(i): Level(config, *pair, config.layers_per_block + 1, "upsamplers" if i < last else None, rngs=rngs)
                for i, pair in enumerate(zip(inputs, channels, strict=True))
            }
        )
        self.conv_norm_out = _norm(config, channels[-1], rngs)
        self.conv_out = _conv(channels[-1], 3, rngs)

    def __call__(self, x: Float[Array, "B H W L"]) -> Float[Array, "B Y X 3"]:
        x = self.mid_block(self.conv_in(x))
        for i in range(len(self.up_blocks)):
            x = self.up_blocks[str(i)](x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder and decoder. Latents here are not scaled; `vae.ScaledAutoencoder` brings them to unit variance."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = _conv(2 * channels, 2 * channels, rngs, side=1)
        self.post_quant_conv = _conv(channels, channels, rngs, side=1)

    def encode(self, images: Float[Array, "B Y X 3"]) -> Posterior:
        """The latents of images in [-1, 1]."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images.astype(FLOAT32))), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents: Float[Array, "B H W L"]) -> Float[Array, "B Y X 3"]:
        """Images, not clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents.astype(FLOAT32)))


def _norm(config: VAEConfig, channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        channels,
        config.norm_groups,
        epsilon=config.norm_epsilon,
        dtype=FLOAT32,
        use_fast_variance=False,
        rngs=rngs,
    )


def _conv(inputs: int, outputs: int, rngs: nnx.Rngs, *, side: int = 3) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (side, side), padding=side // 2, dtype=FLOAT32, kernel_init=layers.kernel_init, rngs=rngs
    )
