"""The U-Net of SDXL and Stable Diffusion 2: residual blocks on a pyramid of scales, and transformers that read the
condition.

Layout NHWC. Parameters are float32; products run in `dtype`; norms, softmax and sinusoids are float32. Module names
follow diffusers (`down_blocks/1/resnets/0/conv1`), so that a weight's name says where it comes from; the layers of one
transformer are stacked (`models.stack`). The last product of every residual branch and of the network starts at zero:
an untrained network is linear up to its last norm, and predicts nothing.

Axis letters: B images, H W latent rows and columns, C channels, P = H W positions, N visual embeddings, D their width,
E width of the time embedding.

Source: diffusers 0.24 `UNet2DConditionModel` as configured by the release's `unet/config.json`, and by the U-Net files
of SDXL-base and Stable Diffusion 2.1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive, primitives
from jaxtyping import Array, Float, Int

from emu2_jax.config import UNetConfig
from emu2_jax.diffusion.schedule import sinusoids
from emu2_jax.errors import ConfigError
from emu2_jax.models import attention, layers
from emu2_jax.models.stack import Remat, Stack

#: Micro-conditions of an image: original height and width, top and left of its crop, target height and width.
NUM_TIME_IDS = 6
#: The time embedding is this many times as wide as the first level. Source: diffusers `time_embed_dim`.
TIME_WIDTH_RATIO = 4
#: Inner width of a transformer's MLP, relative to its channels. Source: diffusers `FeedForward`.
MLP_RATIO = 4
#: Self-attention of shorter sequences is products around a softmax whatever the kernel: the scores are small, and heads
#: of 64 fill half of a register.
MIN_KERNEL_POSITIONS = 1024
LAYER_NORM_EPSILON = 1e-5  # Source: PyTorch's default, which diffusers keeps


def check(config: UNetConfig) -> None:
    """Raise ConfigError when levels, heads and groups do not fit together."""
    channels = config.block_out_channels
    for name in ("transformer_layers_per_block", "num_attention_heads"):
        if len(getattr(config, name)) != len(channels):
            raise ConfigError(
                f"decoder.unet.{name}: got {len(getattr(config, name))} values, wanted one for each of the "
                f"{len(channels)} levels of decoder.unet.block_out_channels"
            )
    for width, heads in zip(channels, config.num_attention_heads, strict=True):
        if width % config.norm_groups:
            raise ConfigError(
                f"decoder.unet.block_out_channels: {width} channels do not divide into "
                f"decoder.unet.norm_groups = {config.norm_groups} groups"
            )
        if width % heads:
            raise ConfigError(f"decoder.unet.num_attention_heads: {width} channels do not divide into {heads} heads")


class MLP(nnx.Module):
    """Two products with SiLU between them: how the timestep and the micro-conditions enter."""

    def __init__(self, in_width: int, out_width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.linear_1 = nnx.Linear(in_width, out_width, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(out_width, out_width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B E"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions around the time embedding, plus the input."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        time_width = TIME_WIDTH_RATIO * config.block_out_channels[0]
        self.norm1 = group_norm(config, inputs, config.norm_epsilon, dtype, rngs)
        self.conv1 = convolution(inputs, outputs, dtype, rngs)
        self.time_emb_proj = nnx.Linear(time_width, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(config, outputs, config.norm_epsilon, dtype, rngs)
        self.conv2 = convolution(outputs, outputs, dtype, rngs, zero=True)
        self.conv_shortcut = nnx.Conv(inputs, outputs, (1, 1), dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B E"]) -> Float[Array, "B H W C2"]:
        inner = self.conv1(nnx.silu(self.norm1(x)))
        inner = inner + self.time_emb_proj(nnx.silu(time))[:, None, None, :]
        inner = self.conv2(nnx.silu(self.norm2(inner)))
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention from `x` to `context`; only the output product has a bias."""

    def __init__(self, width: int, context_width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.to_q = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = nnx.Linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = nnx.Linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B P C"],
        context: Float[Array, "B N D"],
        bias: Float[Array, "P N"] | None = None,
        *,
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B P C"]:
        """`kernel` is for self-attention without a bias; short sequences are left to plain products."""
        q, k, v = (self._split(values) for values in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if kernel != "plain" and x.shape[1] >= MIN_KERNEL_POSITIONS:
            return self.to_out(attention.attend(q, k, v, kernel=kernel).reshape(x.shape))
        return self.to_out(layers.attend(q, k, v, bias=bias).reshape(x.shape))

    def _split(self, values: Float[Array, "B P C"]) -> Float[Array, "B P H K"]:
        return values.reshape(*values.shape[:2], self.heads, -1)


class GatedMLP(nnx.Module):
    """GEGLU: half of the first product, times exact GELU of the other half, then the second product."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, 2 * MLP_RATIO * width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(MLP_RATIO * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B P C"]) -> Float[Array, "B P C"]:
        values, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(values * nnx.gelu(gate, approximate=False))


class TransformerLayer(nnx.Module):
    """Self-attention over positions, cross-attention to the condition, MLP; each pre-norm, each added."""

    def __init__(self, config: UNetConfig, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm1 = layers.LayerNorm(width, epsilon=LAYER_NORM_EPSILON)
        self.attn1 = Attention(width, width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(width, epsilon=LAYER_NORM_EPSILON)
        self.attn2 = Attention(width, config.cross_attention_width, heads, dtype=dtype, rngs=rngs)
        self.norm3 = layers.LayerNorm(width, epsilon=LAYER_NORM_EPSILON)
        self.ff = GatedMLP(width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B P C"],
        condition: Float[Array, "B N D"],
        bias: Float[Array, "P N"] | None = None,
        *,
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B P C"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, kernel=kernel)
        x = x + self.attn2(self.norm2(x), condition, bias)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """The positions of one scale as a sequence through a stack of layers, plus the input."""

    def __init__(self, config: UNetConfig, level: int, num_layers: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        width, heads = config.block_out_channels[level], config.num_attention_heads[level]
        self.condition_radius = config.condition_radius
        self.norm = group_norm(config, width, config.transformer_norm_epsilon, dtype, rngs)
        self.proj_in = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.transformer_blocks = Stack(
            lambda rngs: TransformerLayer(config, width, heads, dtype=dtype, rngs=rngs),
            num_layers,
            rngs=rngs,
        )
        self.proj_out = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        condition: Float[Array, "B N D"],
        *,
        remat: Remat = "none",
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B H W C"]:
        inner = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        bias = None
        if self.condition_radius is not None:
            bias = locality_bias(x.shape[1], x.shape[2], condition.shape[1], self.condition_radius)
        inner, _ = self.transformer_blocks.scan(
            lambda layer, carry, _: (layer(carry, condition, bias, kernel=kernel), None), inner, remat=remat
        )
        return x + self.proj_out(inner).reshape(x.shape)


def locality_bias(rows: int, columns: int, num_tokens: int, radius: float) -> Float[Array, "P N"]:
    """Attention scores' penalty for distance on the image, between latent positions and a square grid of embeddings.

    -distance^2 / (2 radius^2), distance in cells of the embeddings' grid: at radius 0.5 a neighbouring embedding starts
    with a weight of exp(-2) of a position's own. Parameter-free; where to look is learned on top of it. SDXL has
    nothing like it, and needs a pretrained network: one that trains for minutes attends everywhere alike, and draws
    the right colours in the wrong places.
    """
    side = round(num_tokens**0.5)

    def offsets(count: int) -> Float[Array, "count side"]:
        own = (jnp.arange(count) + 0.5) * side / count
        return own[:, None] - (jnp.arange(side) + 0.5)[None, :]

    squared = jnp.square(offsets(rows))[:, None, :, None] + jnp.square(offsets(columns))[None, :, None, :]
    return -squared.reshape(rows * columns, side * side) / (2 * radius**2)


class Downsample(nnx.Module):
    """Halve height and width by a strided convolution, padded by 1 on every side (not XLA's "SAME")."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.conv = convolution(channels, channels, dtype, rngs, stride=2)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.conv = convolution(channels, channels, dtype, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Block(nnx.Module):
    """One scale on the way down, at the bottom or up: residual blocks, each but the last of the bottom followed by a
    transformer where the scale has any, then the change of scale."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths: list[tuple[int, int]],
        *,
        num_transformers: int,
        num_layers: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_resnets = len(widths)
        self.num_transformers = num_transformers if num_layers else 0
        self.resnets = nnx.Dict(
            {str(i): ResidualBlock(config, *pair, dtype=dtype, rngs=rngs) for i, pair in enumerate(widths)}
        )
        self.attentions = nnx.Dict(
            {
                str(i): Transformer(config, level, num_layers, dtype=dtype, rngs=rngs)
                for i in range(self.num_transformers)
            }
        )

    def layer(
        self,
        i: int,
        x: Float[Array, "B H W C"],
        time: Float[Array, "B E"],
        condition: Float[Array, "B N D"],
        remat: Remat = "none",
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B H W C2"]:
        """Residual block `i` and the transformer that follows it."""
        x = rematerialized(self.resnets[str(i)], remat)(x, time)
        return self.attentions[str(i)](x, condition, remat=remat, kernel=kernel) if i < self.num_transformers else x


class UNet(nnx.Module):
    """Predicts the noise in a latent from its timestep, the condition and the micro-conditions."""

    def __init__(self, config: UNetConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        check(config)
        channels = config.block_out_channels
        time_width = TIME_WIDTH_RATIO * channels[0]
        last = len(channels) - 1
        self.config = config
        self.dtype = dtype
        self.time_embedding = MLP(channels[0], time_width, dtype=dtype, rngs=rngs)
        if config.micro_conditions:
            self.add_embedding = MLP(added_width(config), time_width, dtype=dtype, rngs=rngs)
        self.conv_in = convolution(config.in_channels, channels[0], dtype, rngs)

        def block(
            level: int, widths: list[tuple[int, int]], num_transformers: int, num_layers: int | None = None
        ) -> Block:
            depth = config.transformer_layers_per_block[level] if num_layers is None else num_layers
            return Block(
                config, level, widths, num_transformers=num_transformers, num_layers=depth, dtype=dtype, rngs=rngs
            )

        down, up = down_widths(config), up_widths(config)
        self.down_blocks = nnx.Dict({str(i): block(i, down[i], len(down[i])) for i in range(last + 1)})
        self.downsamplers = nnx.Dict({str(i): Downsample(channels[i], dtype=dtype, rngs=rngs) for i in range(last)})
        self.mid_block = block(last, [(channels[last], channels[last])] * 2, 1, mid_layers(config))
        self.up_blocks = nnx.Dict({str(i): block(last - i, up[i], len(up[i])) for i in range(last + 1)})
        self.upsamplers = nnx.Dict({str(i): Upsample(channels[last - i], dtype=dtype, rngs=rngs) for i in range(last)})
        self.conv_norm_out = group_norm(config, channels[0], config.norm_epsilon, dtype, rngs)
        self.conv_out = convolution(channels[0], config.out_channels, dtype, rngs, zero=True)

    def __call__(
        self,
        latents: Float[Array, "B H W C"],
        timesteps: Int[Array, " B"] | Float[Array, " B"],
        condition: Float[Array, "B N D"],
        time_ids: Int[Array, "B 6"] | None = None,
        pooled: Float[Array, "B Q"] | None = None,
        *,
        remat: Remat = "none",
        kernel: attention.Kernel = "plain",
    ) -> Float[Array, "B H W C"]:
        """The network's prediction, float32. `pooled` defaults to the mean of the N embeddings.

        Without micro-conditions `time_ids` and `pooled` are not read. `kernel` computes the self-attention of large
        maps.
        """
        time = self.embed_time(timesteps, condition, time_ids, pooled)
        condition = condition.astype(self.dtype)
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        last = len(self.down_blocks) - 1
        for level in range(last + 1):
            block = self.down_blocks[str(level)]
            for i in range(block.num_resnets):
                x = block.layer(i, x, time, condition, remat, kernel)
                skips.append(x)
            if level < last:
                x = self.downsamplers[str(level)](x)
                skips.append(x)
        for i in range(self.mid_block.num_resnets):
            x = self.mid_block.layer(i, x, time, condition, remat, kernel)
        for level in range(last + 1):
            block = self.up_blocks[str(level)]
            for i in range(block.num_resnets):
                x = block.layer(i, jnp.concatenate([x, skips.pop()], axis=-1), time, condition, remat, kernel)
            if level < last:
                x = self.upsamplers[str(level)](x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def embed_time(
        self,
        timesteps: Int[Array, " B"] | Float[Array, " B"],
        condition: Float[Array, "B N D"],
        time_ids: Int[Array, "B 6"] | None,
        pooled: Float[Array, "B Q"] | None,
    ) -> Float[Array, "B E"]:
        """One vector per image for timestep, pooled condition and micro-conditions."""
        time = self.time_embedding(sinusoids(timesteps, self.config.block_out_channels[0]))
        if not self.config.micro_conditions:
            return time
        if time_ids is None:
            raise ConfigError("time_ids: got none, but decoder.unet.micro_conditions is True: six numbers per image")
        micro = sinusoids(time_ids, self.config.time_id_width).reshape(time_ids.shape[0], -1)
        added = jnp.concatenate([condition.mean(1) if pooled is None else pooled, micro], axis=-1)
        return time + self.add_embedding(added)


def added_width(config: UNetConfig) -> int:
    """Inputs of `add_embedding`: the pooled condition, then the micro-conditions."""
    pooled = config.cross_attention_width if config.pooled_width is None else config.pooled_width
    return pooled + NUM_TIME_IDS * config.time_id_width


def mid_layers(config: UNetConfig) -> int:
    """Layers of the transformer at the bottom."""
    own = config.mid_transformer_layers
    return config.transformer_layers_per_block[-1] if own is None else own


def down_widths(config: UNetConfig) -> list[list[tuple[int, int]]]:
    """Input and output channels of each residual block on the way down, by level.

    Channels (8, 16) and 2 layers per block give [[(8, 8), (8, 8)], [(8, 16), (16, 16)]].
    """
    channels = config.block_out_channels
    inputs = (channels[0], *channels[:-1])
    return [
        [(before if i == 0 else after, after) for i in range(config.layers_per_block)]
        for before, after in zip(inputs, channels, strict=True)
    ]


def up_widths(config: UNetConfig) -> list[list[tuple[int, int]]]:
    """Input and output channels of each residual block on the way up, from the bottom; inputs include the skip.

    Channels (8, 16) and 1 layer per block: the way down leaves the skips 8 (conv_in), 8, 8 (downsampled), 16, so the
    way up reads [[(16 + 16, 16), (16 + 8, 16)], [(16 + 8, 8), (8 + 8, 8)]].
    """
    channels = config.block_out_channels
    skips = [channels[0]]
    for level, width in enumerate(channels):
        skips += [width] * (config.layers_per_block + (level < len(channels) - 1))
    widths, before = [], channels[-1]
    for after in reversed(channels):
        block = []
        for _ in range(config.layers_per_block + 1):
            block.append((before + skips.pop(), after))
            before = after
        widths.append(block)
    return widths


def group_norm(config: UNetConfig, channels: int, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation with two-pass statistics in float32."""
    return nnx.GroupNorm(channels, config.norm_groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def convolution(
    inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, stride: int = 1, zero: bool = False
) -> nnx.Conv:
    """A 3x3 convolution padded by 1 on every side; kernel (3, 3, in, out)."""
    kernel_init = nnx.initializers.zeros if zero else layers.kernel_init
    return nnx.Conv(inputs, outputs, (3, 3), stride, padding=1, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


def rematerialized(block: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """`block`, recomputed in the backward pass except for what `remat` keeps."""
    if remat == "none":
        return block
    policy = _products_saveable if remat == "dots" else None
    return jax.checkpoint(lambda *inputs: block(*inputs), policy=policy)


def _products_saveable(primitive: Primitive, *_: object, **__: object) -> bool:
    return primitive in (primitives.dot_general_p, primitives.conv_general_dilated_p)
