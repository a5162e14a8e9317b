"""Layers that several networks share. Parameters are float32; products run in the dtype of their input.

Axis letters, here and in every einsum of `emu2_jax.models`:
B rows, T query positions, S key positions, D residual width, H query heads, G key/value heads, R = H / G,
K head width, F inner MLP width, V vocabulary, I images, P patches, N visual embeddings per image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

#: Initial weights have variance 1 / fan-in. **open**: the paper starts from pretrained parts.
kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def kernel(shape: tuple[int, ...], *, fan_in: int, rngs: nnx.Rngs) -> nnx.Param:
    """A weight of `shape` whose products sum over `fan_in` inputs."""
    values = kernel_init(rngs.params(), (fan_in, _size(shape) // fan_in), jnp.float32)
    return nnx.Param(values.reshape(shape))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in float32."""

    def __init__(self, width: int, *, epsilon: float, initial_scale: float = 1.0) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.full(width, initial_scale))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inverse_std * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, statistics in float32 (LLaMA)."""

    def __init__(self, width: int, *, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        # LLaMA rounds the normalised value to the compute dtype before the scale; kept, so that bfloat16 agrees.
        return (x32 * inverse_rms).astype(x.dtype) * self.scale[...].astype(x.dtype)


class Projection(nnx.Module):
    """A linear map without bias: the connector's `project_up` and `project_down`."""

    def __init__(self, in_width: int, out_width: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = kernel((in_width, out_width), fan_in=in_width, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes E"]:
        return jnp.einsum("...d,de->...e", x, self.kernel[...].astype(x.dtype))


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, base: float) -> Float[Array, "B T H K"]:
    """Rotary position embedding in LLaMA's Hugging Face layout: channel i turns with channel i + K/2.

    Source: RoFormer (arXiv 2104.09864) with the half-split pairing of `transformers` LLaMA, base 10000.
    """
    half = x.shape[-1] // 2
    inverse_frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse_frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"] | None = None,
    bias: Float[Array, "T S"] | None = None,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention, softmax in float32; query head h reads key/value head h // (H / G).

    `mask` is True where position t may see position s; None means everywhere. `bias` is added to the scores. A query
    that may see nothing (padding) gives a finite, meaningless value that no loss reads.
    """
    groups = k.shape[2]
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgrts,bsgk->btgrk", weights, v)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def packed_causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed row: only earlier positions (and itself) of the same document.

    segment_ids 1 1 2 2 0 gives (rows are t, columns s)

        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 0 0 1    padding sees padding only; nothing reads it
    """
    length = segment_ids.shape[1]
    same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return same_document & causal
