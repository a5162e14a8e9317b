"""Layers that several networks share. Parameters are float32; products run in the dtype of their input.

Axis letters, here and in every einsum of `emu2_jax.models`:
B rows, T query positions, S key positions, D residual width, H query heads, G key/value heads, R = H / G,
K head width, F inner MLP width, V vocabulary, I images, P patches, N visual embeddings per image.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

#: `checkpoint_name` of what the backward pass of attention reads of its forward pass: mixed values, log-sums of scores.
CONTEXT = "context"

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: int = 1, result: DTypeLike | None = None
) -> Float[Array, "..."]:
    """The last `axes` axes of `x` against the first of `kernel`, summed in `result`'s dtype if that is given.

    Differentiated by hand for one reason: JAX forms the gradient of a kernel as outputs x inputs and turns it around,
    for which XLA on a CPU first copies what it multiplies. Formed as the kernel lies, it takes half the time.
    """
    inputs = tuple(range(x.ndim - axes, x.ndim))
    return jax.lax.dot_general(x, kernel, ((inputs, tuple(range(axes))), ((), ())), preferred_element_type=result)


def _product_forward(x: Array, kernel: Array, axes: int, result: DTypeLike | None) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, axes, result), (x, kernel)


def _product_backward(
    axes: int, result: DTypeLike | None, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    leading, outputs = x.ndim - axes, tuple(range(axes, kernel.ndim))
    rows, columns = tuple(range(leading)), tuple(range(leading, gradient.ndim))
    of_x = jax.lax.dot_general(gradient, kernel, ((columns, outputs), ((), ())), preferred_element_type=result)
    of_kernel = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=result)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


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
        return product(x, self.kernel[...].astype(x.dtype))


def rotate(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], *, base: float, by_product: bool = False
) -> Float[Array, "B T H K"]:
    """Rotary position embedding in LLaMA's Hugging Face layout: channel i turns with channel i + K/2.

    Source: RoFormer (arXiv 2104.09864) with the half-split pairing of `transformers` LLaMA, base 10000. `by_product`
    brings channels that turn together side by side with a product, for half precision on TPUs: exact, since each sum
    has one term that is not zero, and less work than moving halves of a register.
    """
    half = x.shape[-1] // 2
    inverse_frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * inverse_frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if by_product:
        return _turn(x, jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _turn(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T 1 K"], sin: Float[Array, "B T 1 K"]
) -> Float[Array, "B T H K"]:
    width = x.shape[-1]
    # Column j has the one channel that turns with channel j; the first half takes the second, negated.
    partner = jnp.roll(jnp.eye(width, dtype=x.dtype), width // 2, axis=1)
    partner = jnp.where(jnp.arange(width) < width // 2, -partner, partner)
    other = jnp.einsum("bthk,kj->bthj", x, partner, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def _turn_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _turn(x, cos, sin), (cos, sin)


def _turn_backward(angle: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    cos, sin = angle
    return _turn(gradient, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)


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
    mixed = _mix(q, k, v, mask) if bias is None else _mix_forward(q, k, v, mask, bias)[0]
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


Queries = Float[Array, "B T G R K"]
Keys = Float[Array, "B S G K"]
Mask = Bool[Array, "B T S"] | None


def _scores(q: Queries, k: Keys, mask: Mask, bias: Float[Array, "T S"] | None = None) -> Float[Array, "B G R T S"]:
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores if mask is None else jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


@jax.custom_vjp
def _mix(q: Queries, k: Keys, v: Keys, mask: Mask) -> Queries:
    """Values mixed by the softmax of scores; the backward pass computes a layer's T x S scores again."""
    return _mix_forward(q, k, v, mask)[0]


def _mix_forward(
    q: Queries, k: Keys, v: Keys, mask: Mask, bias: Float[Array, "T S"] | None = None
) -> tuple[Queries, tuple[Queries, Keys, Keys, Mask, Queries, Float[Array, "B G R T"]]]:
    scores = _scores(q, k, mask, bias)
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sums[..., None]).astype(v.dtype)
    mixed = checkpoint_name(jnp.einsum("bgrts,bsgk->btgrk", weights, v), CONTEXT)
    return mixed, (q, k, v, mask, mixed, checkpoint_name(log_sums, CONTEXT))


def _mix_backward(
    kept: tuple[Queries, Keys, Keys, Mask, Queries, Float[Array, "B G R T"]], gradient: Queries
) -> tuple[Queries, Keys, Keys, None]:
    """Source: FlashAttention (arXiv 2205.14135), appendix B.2."""
    q, k, v, mask, mixed, log_sums = kept
    weights = jnp.exp(_scores(q, k, mask) - log_sums[..., None])
    of_v = jnp.einsum("bgrts,btgrk->bsgk", weights.astype(v.dtype), gradient)
    of_weights = jnp.einsum("btgrk,bsgk->bgrts", gradient, v, preferred_element_type=jnp.float32)
    means = jnp.moveaxis((gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1), 1, -1)
    of_scores = (weights * (of_weights - means[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", of_scores, k), jnp.einsum("bgrts,btgrk->bsgk", of_scores, q), of_v, None


_mix.defvjp(_mix_forward, _mix_backward)


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
