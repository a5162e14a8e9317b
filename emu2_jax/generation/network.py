"""The language model with its keys and values kept: new positions in, their hidden states out, nothing computed twice.

An element of a sequence lies in the cache slot of its own position, 0 for `<s>`. So what a position may see is the
slots up to its own, whatever lies beyond: rows of different lengths need no mask of their own, a row is cut by
forgetting its length, and what a prompt has in common with another is the front of its cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from emu2_jax import sharding
from emu2_jax.config import LanguageConfig, ModelConfig
from emu2_jax.models import layers, llama
from emu2_jax.task import Params


class Cache(NamedTuple):
    """Keys (after rotation) and values, one array per layer. S slots.

    Each is laid out as its product with one query reads it; otherwise all of it is transposed at every step. In a loop
    over a single row the arrays have no axis for it (`one_row`): with one, XLA for CPUs reshapes what a step has
    written before it reads it, and to do so updates a copy of the whole cache.
    """

    keys: tuple[Float[Array, "*B G S K"], ...]
    values: tuple[Float[Array, "*B G K S"], ...]

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.keys[0].shape[-2]

    def one_row(self) -> Cache:
        """Without the axis of its one row; as it is when there are several."""
        return jax.tree.map(lambda x: x[0], self) if len(self.keys[0]) == 1 else self

    def rows(self) -> Cache:
        """With the axis that `one_row` took."""
        return jax.tree.map(lambda x: x[None], self) if self.keys[0].ndim == 3 else self


def empty_cache(config: LanguageConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros."""
    heads, width, num_layers = config.num_kv_heads, config.head_width, config.num_layers
    return Cache(
        tuple(jnp.zeros((rows, heads, capacity, width), dtype) for _ in range(num_layers)),
        tuple(jnp.zeros((rows, heads, width, capacity), dtype) for _ in range(num_layers)),
    )


def grow_cache(cache: Cache, rows: int, capacity: int) -> Cache:
    """The first row of a cache, with room for more, in each of `rows`."""

    def grown(x: Array, axis: int) -> Array:
        more = [(0, capacity - cache.capacity if i == axis else 0) for i in range(4)]
        one = jnp.pad(x[:1], more)
        return jnp.broadcast_to(one, (rows, *one.shape[1:]))

    return Cache(tuple(grown(keys, 2) for keys in cache.keys), tuple(grown(values, 3) for values in cache.values))


def cache_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Rows over `data` and `fsdp`, key/value heads over `tensor`, as the weights of k and v lie."""
    return None if mesh is None else NamedSharding(mesh, P(sharding.ROWS, "tensor"))


def prepare(config: ModelConfig, params: Params, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, Any]:
    """The parameters as decoding reads them: the language model's in `dtype`, and one tree for each of its layers.

    Layers come out of their stack because a step that takes them from a stacked array first copies every weight it
    reads, and reading weights is what the time of a step goes to. On a `mesh` every weight lies as in training.
    """
    parts = {part: params[part] for part in ("visual_encoder", "project_up", "language_model", "project_down")}
    if mesh is None:
        parts = jax.tree.map(jnp.asarray, parts)
    else:
        parts = jax.device_put(parts, sharding.parameter_shardings(parts, mesh))
    num_layers = config.language.num_layers

    def split(stacked: Array) -> tuple[Array, ...]:
        lies = stacked.sharding
        where = NamedSharding(lies.mesh, P(*lies.spec[1:])) if isinstance(lies, NamedSharding) else None
        take = jax.jit(lambda x: tuple(x[i].astype(dtype) for i in range(num_layers)), out_shardings=where)
        return take(stacked)

    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda x: x if x.dtype == dtype else jax.jit(lambda y: y.astype(dtype))(x), tree)

    language = dict(parts["language_model"])
    stack = language.pop("blocks")["layers"]
    taken = jax.tree.map(split, stack)
    blocks = jax.tree.transpose(jax.tree.structure(stack), jax.tree.structure((0,) * num_layers), taken)
    return {
        "visual_encoder": parts["visual_encoder"],
        "project_up": cast(parts["project_up"]),
        "project_down": cast(parts["project_down"]),
        "language_model": {**cast(language), "blocks": blocks},
    }


def embed(params: Params, tokens: Int[Array, "*axes"]) -> Float[Array, "*axes D"]:
    """What the language model reads for token ids."""
    return params["language_model"]["token_embedding"][tokens]


def project_up(params: Params, embeddings: Float[Array, "*axes E"]) -> Float[Array, "*axes D"]:
    """What the language model reads for visual embeddings."""
    kernel = params["project_up"]["kernel"]
    return jnp.einsum("...e,ed->...d", embeddings.astype(kernel.dtype), kernel)


def project_down(params: Params, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes E"]:
    """The visual embedding that follows a hidden state."""
    return jnp.einsum("...d,de->...e", hidden, params["project_down"]["kernel"])


def logits(params: Params, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes V"]:
    """Scores over the vocabulary, float32."""
    head = llama.output_head(params["language_model"])
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def extend(
    config: LanguageConfig,
    params: Params,
    x: Float[Array, "B T D"],
    start: Int[Array, " B"],
    cache: Cache,
    where: NamedSharding | None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states, after the final norm, of T new positions of each row, of which the first is `start`.

    The cache must have `start` + T slots. A row that has fewer than T new elements writes the rest for nothing: no
    position looks at a slot beyond its own, and the row's next elements take these slots.
    """
    block_def, norm_def = _graphdefs(config)
    positions = start[:, None] + jnp.arange(x.shape[1])
    seen = jnp.arange(cache.capacity) <= positions[:, :, None]
    keys, values = [], []
    for layer, (old_keys, old_values) in zip(
        params["language_model"]["blocks"], zip(cache.keys, cache.values, strict=True), strict=True
    ):
        block: llama.Block = nnx.merge(block_def, layer)
        q, k, v = block.attention.project(block.attention_norm(x), positions)
        keys.append(_write(old_keys, jnp.transpose(k, (0, 2, 1, 3)), start, 1, where))
        values.append(_write(old_values, jnp.transpose(v, (0, 2, 3, 1)), start, 2, where))
        x = x + block.attention.combine(_attend(q, keys[-1], values[-1], seen))
        x = x + block.mlp(block.mlp_norm(x))
    norm: layers.RMSNorm = nnx.merge(norm_def, params["language_model"]["final_norm"])
    return norm(x), Cache(tuple(keys), tuple(values))


def _write(
    cache: Float[Array, "*B G X Y"], new: Float[Array, "B G U V"], start: Int[Array, " B"], axis: int, where: Any
) -> Float[Array, "*B G X Y"]:
    """`new` in the slots from `start` on, a place of its own in each row; `axis`, without the rows', is the slots'."""
    new = new.astype(cache.dtype)
    one = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if cache.ndim == 3:
        written = one(cache, new[0], start[0])
        where = where if where is None else NamedSharding(where.mesh, P(*where.spec[1:]))
    else:
        written = jax.vmap(lambda cache, new, start: one(cache, new, start))(cache, new, start)
    return written if where is None else jax.lax.with_sharding_constraint(written, where)


def _attend(
    q: Float[Array, "B T H K"],
    keys: Float[Array, "*B G S K"],
    values: Float[Array, "*B G K S"],
    seen: Bool[Array, "B T S"],  # which slots each position sees
) -> Float[Array, "B T H K"]:
    """`layers.attend`, over a cache."""
    if keys.ndim == 3:
        return _attend_row(q[0], keys, values, seen[0])[None]
    return jax.vmap(_attend_row)(q, keys, values, seen)


def _attend_row(
    q: Float[Array, "T H K"], keys: Float[Array, "G S K"], values: Float[Array, "G K S"], seen: Bool[Array, "T S"]
) -> Float[Array, "T H K"]:
    length, heads, width = q.shape
    q = q.reshape(length, keys.shape[0], -1, width)
    scores = jnp.einsum("tgrk,gsk->grts", q, keys, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    # The softmax's division comes last: over K channels of a head in place of S slots.
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.einsum("grts,gks->grtk", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)
    return jnp.moveaxis(mixed, 2, 0).reshape(length, heads, width)


@functools.cache
def _graphdefs(config: LanguageConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Of a block and of the final norm."""

    def parts() -> tuple[llama.Block, layers.RMSNorm]:
        block = llama.Block(config, rngs=nnx.Rngs(params=0))
        return block, layers.RMSNorm(config.width, epsilon=config.rms_norm_epsilon)

    block, norm = nnx.eval_shape(parts)
    return nnx.graphdef(block), nnx.graphdef(norm)
