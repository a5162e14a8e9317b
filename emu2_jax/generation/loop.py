"""The compiled part of generation: read prompts, then add one element after the other, token or visual embedding.

Every row is in a state of its own: one draws the k-th embedding of an image while another writes text. An element is
chosen from the hidden state before it, and enters the language model as its token embedding or, a regressed embedding,
through `project_up`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from emu2_jax.config import ModelConfig
from emu2_jax.generation import network, sampling
from emu2_jax.generation.network import Cache
from emu2_jax.task import Params

#: Stands for an embedding among the ids of an answer. Not `<image>`, which a model could choose as a token.
EMBEDDING = -1


class Chunk(NamedTuple):
    """The next stretch of each row's prompt, padded on the right (fields as in `emu2_jax.sequence`)."""

    tokens: Int[Array, "B T"]
    is_visual: Bool[Array, "B T"]
    embeddings: Float[Array, "B T E"] | None  # at the visual positions; None: the stretch has none
    lengths: Int[Array, " B"]  # elements that are not padding, at least 1


class Limits(NamedTuple):
    """What an answer may be. Scalars, so that changing them compiles nothing."""

    max_tokens: Int[Array, ""]  # text tokens, `</s>` included; an image's [IMG] counts when the model chose it
    min_tokens: Int[Array, ""]  # before this many, `</s>` is not chosen
    max_images: Int[Array, ""]  # images in all. 0: [IMG] is a token like others, as in the release


class Ids(NamedTuple):
    """The token ids that generation knows of."""

    end: int  # </s>
    pad: int
    image_start: int
    image_end: int


class State(NamedTuple):
    """Where the rows of a batch stand between two elements. R is the longest answer, X the visual embeddings it has."""

    cache: Cache
    length: Int[Array, " B"]  # elements in the cache
    newest: Float[Array, "B D"]  # the element that is not in the cache yet, as the language model reads it
    ids: Int[Array, "B R"]  # elements made; EMBEDDING for an embedding
    embeddings: Float[Array, "B X E"]  # embeddings made, float32
    made: Int[Array, " B"]  # elements made
    text: Int[Array, " B"]  # of them chosen as tokens
    drawn: Int[Array, " B"]  # of them embeddings
    left: Int[Array, " B"]  # embeddings that the open image still lacks
    end_due: Bool[Array, " B"]  # the image is complete, [/IMG] follows
    forced: Int[Array, " B"]  # images still to be drawn whether the model would or not
    images: Int[Array, " B"]  # images begun
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    start: Int[Array, " B"],
    chunk: Chunk,
    where: NamedSharding | None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Read a stretch of each prompt into the cache; the hidden state at the last element of each."""
    x = network.embed(params, chunk.tokens)
    if chunk.embeddings is not None:
        x = jnp.where(chunk.is_visual[..., None], network.project_up(params, chunk.embeddings), x)
    hidden, cache = network.extend(config.language, params, x, start, cache, where)
    return jnp.take_along_axis(hidden, chunk.lengths[:, None, None] - 1, axis=1)[:, 0], cache


def log_probability(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B D"],
    cache: Cache,
    start: Int[Array, " B"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    where: NamedSharding | None,
) -> Float[Array, " B"]:
    """Log-probability of the next `lengths` tokens of each row, whose state before them is `hidden`."""
    after, _ = network.extend(config.language, params, network.embed(params, tokens), start, cache, where)
    before = jnp.concatenate([hidden[:, None], after[:, :-1]], axis=1)
    scores = jax.nn.log_softmax(network.logits(params, before))
    each = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], each, 0).sum(axis=1)


def begin(
    config: ModelConfig,
    ids: Ids,
    params: Params,
    hidden: Float[Array, "B D"],
    cache: Cache,
    length: Int[Array, " B"],
    forced: Int[Array, " B"],
    keys: Key[Array, " B"],
    limits: Limits,
    draw: sampling.Draw | None,
    max_embeddings: int,
) -> State:
    """The state after the first element. Rows with `forced` images have prompts that end in `[IMG]`."""
    rows = len(hidden)
    zeros = jnp.zeros(rows, jnp.int32)
    state = State(
        cache=cache,
        length=length,
        newest=hidden,
        ids=jnp.full((rows, cache.capacity), ids.pad, jnp.int32),
        embeddings=jnp.zeros((rows, max_embeddings, config.vision.width), jnp.float32),
        made=zeros,
        text=zeros,
        drawn=zeros,
        left=jnp.where(forced > 0, config.num_visual_tokens, 0),
        end_due=jnp.zeros(rows, bool),
        forced=jnp.maximum(forced - 1, 0),
        images=(forced > 0).astype(jnp.int32),
        done=(forced == 0) & (limits.max_tokens == 0),
        keys=keys,
    )
    return _add(config, ids, params, hidden, state, limits, draw)


def run(
    config: ModelConfig,
    ids: Ids,
    params: Params,
    state: State,
    limits: Limits,
    draw: sampling.Draw | None,
    max_steps: Int[Array, ""],
    where: NamedSharding | None,
) -> State:
    """Add elements until every row is done, `max_steps` at most. `draw` None is greedy."""

    def unfinished(carry: tuple[Array, State]) -> Array:
        steps, state = carry
        return (steps < max_steps) & ~state.done.all()

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        steps, state = carry
        hidden, cache = network.extend(config.language, params, state.newest[:, None], state.length, state.cache, where)
        state = state._replace(cache=cache, length=state.length + ~state.done)
        return steps + 1, _add(config, ids, params, hidden[:, 0], state, limits, draw)

    state = state._replace(cache=state.cache.one_row())
    _, state = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))
    return state._replace(cache=state.cache.rows())


def _add(
    config: ModelConfig,
    ids: Ids,
    params: Params,
    hidden: Float[Array, "B D"],
    state: State,
    limits: Limits,
    draw: sampling.Draw | None,
) -> State:
    """Choose the next element of each row from the hidden state before it."""
    num = config.num_visual_tokens
    visual = state.left > 0
    starts_forced = ~visual & ~state.end_due & (state.forced > 0)
    free = ~visual & ~state.end_due & ~starts_forced
    # Most of an image's steps need no scores, and the output head is a large share of a small model.
    chosen = jax.lax.cond(
        (free & ~state.done).any(),
        lambda: _choose(ids, params, hidden, state, limits, draw),
        lambda: jnp.full(len(hidden), ids.pad, jnp.int32),
    )
    token = jnp.where(
        visual, EMBEDDING, jnp.where(state.end_due, ids.image_end, jnp.where(starts_forced, ids.image_start, chosen))
    )
    opens = starts_forced | (free & (chosen == ids.image_start) & (state.images < limits.max_images))
    embedding = network.project_down(params, hidden)
    newest = jnp.where(visual[:, None], network.project_up(params, embedding), network.embed(params, token))

    going = ~state.done
    row = jnp.arange(len(hidden))
    # A row that is done writes beyond the end, which drops it.
    ids_made = state.ids.at[row, jnp.where(going, state.made, state.ids.shape[1])].set(token, mode="drop")
    at = jnp.where(going & visual, state.drawn, state.embeddings.shape[1])
    embeddings = state.embeddings.at[row, at].set(embedding.astype(jnp.float32), mode="drop")

    left = jnp.where(visual, state.left - 1, jnp.where(opens, num, 0))
    end_due = visual & (left == 0)
    forced = state.forced - starts_forced
    text = state.text + (free & going)
    # An image that nothing follows needs no [/IMG].
    over = (left == 0) & (forced == 0) & (text >= limits.max_tokens)
    ended = free & (chosen == ids.end)
    return State(
        cache=state.cache,
        length=state.length,
        newest=newest,
        ids=ids_made,
        embeddings=embeddings,
        made=state.made + going,
        text=text,
        drawn=state.drawn + (visual & going),
        left=jnp.where(going, left, state.left),
        end_due=jnp.where(going, end_due, state.end_due),
        forced=jnp.where(going, forced, state.forced),
        images=state.images + (opens & going),
        done=state.done | ended | over,
        keys=state.keys,
    )


def _choose(
    ids: Ids,
    params: Params,
    hidden: Float[Array, "B D"],
    state: State,
    limits: Limits,
    draw: sampling.Draw | None,
) -> Int[Array, " B"]:
    scores = network.logits(params, hidden)
    scores = scores.at[:, ids.end].set(jnp.where(state.text < limits.min_tokens, -jnp.inf, scores[:, ids.end]))
    spent = (limits.max_images > 0) & (state.images >= limits.max_images)
    scores = scores.at[:, ids.image_start].set(jnp.where(spent, -jnp.inf, scores[:, ids.image_start]))
    if draw is None:
        return sampling.likeliest(scores)
    return sampling.drawn(scores, jax.vmap(jax.random.fold_in)(state.keys, state.made), draw)
