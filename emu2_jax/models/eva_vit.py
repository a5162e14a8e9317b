"""The visual encoder: EVA-02-CLIP-E-plus, a post-norm ViT.

What differs from the textbook ViT, and trains without an error when it is wrong: the norm sits *after* each sublayer,
inside the residual branch; there is no final norm; q and v have biases, k has none; GELU is exact. `VisionConfig` also
describes its relatives: EVA-CLIP's pre-norm ViTs and those of CLIP.
Source: paper section 2.1; release `eva_vit.py` and its model config.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt8

from emu2_jax.config import VisionConfig
from emu2_jax.models import attention, layers
from emu2_jax.models.stack import Remat, Stack

#: Mean and standard deviation of RGB in [0, 1]. Source: CLIP's preprocessing, used unchanged by the release.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: Of the initial position embedding. **open**: pretrained encoders bring theirs. Patches enter with a standard
#: deviation of about 1, and the decoder sees the embeddings as a set: at the usual 0.02 it cannot tell where each is.
POSITION_INIT_STD = 0.5

#: Of the norms' scales. **open**: a post-norm sublayer adds a vector of exactly this size per channel, so that at 1 the
#: residual stream of an untrained encoder grows with depth and buries the patch that it started from. Source: the
#: reasoning of Swin v2 (arXiv 2111.09883), which starts at 0. Pre-norm blocks start at 1.
POST_NORM_INIT_SCALE = 0.1


def normalize(images: UInt8[Array, "I S S 3"]) -> Float[Array, "I S S 3"]:
    """8-bit RGB to the encoder's input: [0, 1], then CLIP's mean and standard deviation. float32."""
    return (images.astype(jnp.float32) / 255.0 - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


class Attention(nnx.Module):
    """Self-attention with one fused qkv product, learned q and v biases, none for k (in EVA)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width, heads = config.width, config.num_heads
        head_width = width // heads
        self.qkv = layers.kernel((width, 3, heads, head_width), fan_in=width, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((heads, head_width)))
        self.v_bias = nnx.Param(jnp.zeros((heads, head_width)))
        self.has_k_bias = config.k_bias
        if config.k_bias:
            self.k_bias = nnx.Param(jnp.zeros((heads, head_width)))
        self.out = layers.kernel((heads, head_width, width), fan_in=width, rngs=rngs)
        self.out_bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "I P D"], kernel: attention.Kernel = "plain") -> Float[Array, "I P D"]:
        dtype = x.dtype
        q, k, v = jnp.moveaxis(layers.product(x, self.qkv[...].astype(dtype)), 2, 0)
        q += self.q_bias[...].astype(dtype)
        v += self.v_bias[...].astype(dtype)
        if self.has_k_bias:
            k += self.k_bias[...].astype(dtype)
        mixed = attention.attend(q, k, v, kernel=kernel)
        out = layers.product(mixed, self.out[...].astype(dtype), 2) + self.out_bias[...].astype(dtype)
        return checkpoint_name(out, "attention")


def gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Exact (erf) GELU, not its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """OpenAI CLIP's activation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class MLP(nnx.Module):
    """Two products with GELU between them."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.width, config.mlp_width
        self.up = layers.kernel((width, inner), fan_in=width, rngs=rngs)
        self.up_bias = nnx.Param(jnp.zeros(inner))
        self.down = layers.kernel((inner, width), fan_in=inner, rngs=rngs)
        self.down_bias = nnx.Param(jnp.zeros(width))
        self.activation = {"gelu": gelu, "quick_gelu": quick_gelu}[config.activation]

    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        dtype = x.dtype
        inner = layers.product(x, self.up[...].astype(dtype)) + self.up_bias[...].astype(dtype)
        inner = self.activation(checkpoint_name(inner, "up"))
        out = layers.product(inner, self.down[...].astype(dtype)) + self.down_bias[...].astype(dtype)
        return checkpoint_name(out, "down")


class Block(nnx.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)); pre-norm blocks have the norms inside."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = self._norm(config)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_norm = self._norm(config)
        self.is_pre_norm = config.block_norm == "pre"

    @staticmethod
    def _norm(config: VisionConfig) -> layers.LayerNorm:
        scale = POST_NORM_INIT_SCALE if config.block_norm == "post" else 1.0
        return layers.LayerNorm(config.width, epsilon=config.layer_norm_epsilon, initial_scale=scale)

    def __call__(self, x: Float[Array, "I P D"], kernel: attention.Kernel = "plain") -> Float[Array, "I P D"]:
        if self.is_pre_norm:
            x = x + self.attention(self.attention_norm(x), kernel)
            return x + self.mlp(self.mlp_norm(x))
        x = x + self.attention_norm(self.attention(x, kernel))
        return x + self.mlp_norm(self.mlp(x))


class VisualEncoder(nnx.Module):
    """Square images to one embedding per patch, after a leading CLS embedding."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        patch_inputs = config.patch_size**2 * 3
        self.patch_kernel = layers.kernel((patch_inputs, config.width), fan_in=patch_inputs, rngs=rngs)
        if config.patch_bias:
            self.patch_bias = nnx.Param(jnp.zeros(config.width))
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.width,)))
        position_shape = (1 + config.grid_size**2, config.width)
        self.position_embedding = nnx.Param(POSITION_INIT_STD * jax.random.normal(rngs.params(), position_shape))
        if config.input_norm:
            self.input_norm = layers.LayerNorm(config.width, epsilon=config.layer_norm_epsilon)
        self.blocks = Stack(
            lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs=rngs, path="visual_encoder/blocks"
        )
        if config.final_norm:
            self.final_norm = layers.LayerNorm(config.width, epsilon=config.layer_norm_epsilon)

    def __call__(
        self, images: Float[Array, "I S S 3"], *, remat: Remat = "none", kernel: attention.Kernel = "plain"
    ) -> Float[Array, "I P D"]:
        """Embeddings of normalised images, P = 1 + grid_size^2, CLS first, in the dtype of `images`."""
        dtype = images.dtype
        patches = patchify(images, self.config.patch_size)
        x = patches @ self.patch_kernel[...].astype(dtype)
        if self.config.patch_bias:
            x += self.patch_bias[...].astype(dtype)
        cls = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding[...].astype(dtype)
        if self.config.input_norm:
            x = self.input_norm(x)
        x, _ = self.blocks.scan(lambda block, x, _: (block(x, kernel), None), x, remat=remat)
        return self.final_norm(x) if self.config.final_norm else x


def patchify(images: Float[Array, "I S S 3"], patch_size: int) -> Float[Array, "I P C"]:
    """Cut images into patches in reading order; C runs over (row, column, colour) inside a patch."""
    count, size = images.shape[:2]
    grid = size // patch_size
    x = images.reshape(count, grid, patch_size, grid, patch_size, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, grid * grid, patch_size * patch_size * 3)


def pool(embeddings: Float[Array, "I P D"], num_visual_tokens: int) -> Float[Array, "I N D"]:
    """Drop CLS and average the patch grid to sqrt(N) x sqrt(N); stride and window are grid // sqrt(N).

    Source: release `emu.py` (`encode_image`).
    """
    patches = embeddings[:, 1:]
    count, num_patches, width = patches.shape
    grid = round(num_patches**0.5)
    side = round(num_visual_tokens**0.5)
    window = grid // side
    x = patches.reshape(count, side, window, side, window, width).astype(jnp.float32)
    return x.mean((2, 4)).reshape(count, num_visual_tokens, width).astype(embeddings.dtype)


def resize_position_embedding(
    position_embedding: Float[Array, "P D"], num_positions: int
) -> Float[Array, "num_positions D"]:
    """Position embedding for another image size: the patch grid is interpolated (bicubic), CLS is kept.

    Stage 1b continues stage 1a at 448 px this way (16 x 16 -> 32 x 32 patches). **open** in the paper; the kernel is
    that of EVA-CLIP's own code (PyTorch's bicubic, half-pixel centres, without antialiasing), which is not
    `jax.image.resize`'s: Keys' cubic at -0.75 instead of -0.5, and edges that repeat instead of weights that are
    normalised anew.
    """
    cls, patches = position_embedding[:1], position_embedding[1:]
    old, new = round(patches.shape[0] ** 0.5), round((num_positions - 1) ** 0.5)
    weights = _bicubic_weights(old, new)
    grid = patches.reshape(old, old, -1).astype(jnp.float32)
    resized = jnp.einsum("ai,bj,ijd->abd", weights, weights, grid, precision="highest")
    return jnp.concatenate([cls, resized.reshape(new * new, -1).astype(cls.dtype)])


def _bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """How much each of `old` samples counts for each of `new` ones along one axis."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        x = np.abs(centre - (first + offset))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + offset, 0, old - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)
