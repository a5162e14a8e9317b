"""Attention behind one interface: which kernel computes it, and masks that are said without being formed.

`attend` gives the same values whichever kernel computes them: `plain` products around a softmax (any device), `splash`
(TPU; elsewhere interpreted, for tests) or `cudnn` (GPU). `auto` is the one of the device that is compiled for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emu2_jax.models import layers
from emu2_jax.sharding import ROWS

Kernel = Literal["auto", "plain", "splash", "cudnn"]

#: Width of a TPU register: splash wants heads and lengths that are multiples of it.
LANES = 128

#: Positions of the squares that splash works in. Squares above the diagonal are left out, so that smaller ones waste
#: less of a causal row (512 of 2048: 20 % of the products), and larger ones start fewer kernels.
SPLASH_BLOCK = 512


class Packed(NamedTuple):
    """The mask of a packed row, as `layers.packed_causal_mask` forms it: earlier positions of the same document."""

    segment_ids: Int[Array, "B T"]


Mask = Bool[Array, "B T S"] | Packed | None


def platform() -> str:
    """What is compiled for: that of the mesh, if the program has one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(kernel: Kernel, dtype: jnp.dtype) -> Kernel:
    """The kernel that `auto` stands for; cuDNN's is for half precision only."""
    if kernel != "auto":
        return kernel
    if platform() == "tpu":
        return "splash"
    return "cudnn" if platform() in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16) else "plain"


def prepare(mask: Mask, kernel: Kernel, dtype: jnp.dtype) -> Mask:
    """The mask as the kernel reads it: formed once, before the loop over layers, for all kernels but splash."""
    if isinstance(mask, Packed) and choose(kernel, dtype) != "splash":
        return layers.packed_causal_mask(mask.segment_ids)
    return mask


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Mask = None,
    *,
    kernel: Kernel = "plain",
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention, softmax in float32; query head h reads key/value head h // (H / G).

    A mask that is given in full is for `plain` and `cudnn`: it is what decoding with a cache needs. The operands get
    their `checkpoint_name` here, in the layout that the kernel reads: what is kept for the backward pass is kept so.
    """
    kernel = choose(kernel, q.dtype)
    if kernel == "splash" and (mask is None or isinstance(mask, Packed)):
        return _splash(q, k, v, mask)
    q, k, v = _named(q, k, v)
    formed = prepare(mask, "plain", q.dtype)
    assert not isinstance(formed, Packed)
    if kernel == "cudnn":
        per_head = None if formed is None else formed[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=per_head, implementation="cudnn")
    return layers.attend(q, k, v) if formed is None else layers.attend(q, k, v, formed)


def _named(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")


def _splash(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], mask: Packed | None
) -> Float[Array, "B T H K"]:
    """Positions and head width are filled up to whole registers; what was filled in is a document of its own."""
    rows, length, _, width = q.shape
    padding, more_width = -length % LANES, -width % LANES

    def as_splash_reads(x: Float[Array, "B T N K"]) -> Float[Array, "B N S L"]:
        filled = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, more_width)))
        return filled.transpose(0, 2, 1, 3)

    q, k, v = _named(*(as_splash_reads(x) for x in (q * width**-0.5, k, v)))
    if mask is None and not padding:
        document = None
    else:
        document = jnp.ones((rows, length), jnp.int32) if mask is None else mask.segment_ids
        document = jnp.pad(document, ((0, 0), (0, padding)), constant_values=-1)

    def of_heads(q: Array, k: Array, v: Array, document: Array | None) -> Array:
        causal, interpret = mask is not None, platform() != "tpu"
        run = _splash_kernel(length + padding, q.shape[1], causal=causal, interpret=interpret)

        def of_row(q: Array, k: Array, v: Array, document: Array | None) -> Any:
            return run(q, k, v, None if document is None else splash.SegmentIds(q=document, kv=document))

        mixed: Array = jax.vmap(of_row)(q, k, v, document)
        return mixed

    mixed = _on_each_device(of_heads, q, k, v, document)
    return mixed.transpose(0, 2, 1, 3)[:, :length, :, :width].astype(q.dtype)


def _on_each_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B H S L"],
    k: Float[Array, "B G S L"],
    v: Float[Array, "B G S L"],
    document: Int[Array, "B S"] | None,
) -> Float[Array, "B H S L"]:
    """`kernel` of each device's rows and heads where the compiler spreads them: it cannot cut a kernel itself.

    In a program whose rows are spread by hand (`emu2_jax.shards`) only heads are left to spread, and on one device
    nothing. What does not divide, such as the one image that stands for all nulls, is computed everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if math.prod(mesh.shape[axis] for axis in left) == 1:
        return kernel(q, k, v, document)

    def spread(axes: tuple[str, ...], *sizes: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in axes if axis in left)
        devices = math.prod(mesh.shape[axis] for axis in axes)
        return axes if axes and all(size % devices == 0 for size in sizes) else None

    rows, heads = spread(ROWS, q.shape[0]), spread(("tensor",), q.shape[1], k.shape[1])
    spec = P(rows, heads)
    # Replicated along the other axes. A kernel has no rule for what varies where.
    on_devices = jax.shard_map(
        kernel, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, axis_names=left, check_vma=False
    )
    return on_devices(q, k, v, document)


def _splash_kernel(length: int, heads: int, *, causal: bool, interpret: bool) -> splash.SplashAttentionKernel:
    one = splash_mask.CausalMask((length, length)) if causal else splash_mask.FullMask((length, length))
    return splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([one] * heads),
        block_sizes=_block_sizes(length),
        residual_checkpoint_name=layers.CONTEXT,
        interpret=interpret,
    )


@functools.cache
def _block_sizes(length: int) -> splash.BlockSizes:
    block = max(size for size in range(LANES, SPLASH_BLOCK + 1, LANES) if length % size == 0)
    # dq and dkv in kernels of their own: the fused one computes 5 products for 7, and then sums a copy of dq per column
    # of squares, which costs more than it saves at rows of 2048.
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
