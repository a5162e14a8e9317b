"""Beam search over texts, compiled: the prompt is read once; all beams start from its keys and values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from emu2_jax.config import ModelConfig
from emu2_jax.generation import network
from emu2_jax.generation.loop import Ids, Limits
from emu2_jax.generation.network import Cache
from emu2_jax.generation.sampling import Beams
from emu2_jax.task import Params

#: The score of what does not exist: worse than any text, and finite, so that differences stay numbers.
NEVER = -1e9


class BeamState(NamedTuple):
    """K running texts of each of B prompts, best first, and the K best that have ended."""

    cache: Cache  # of B x K rows
    length: Int[Array, " BK"]  # elements in the cache
    made: Int[Array, ""]  # tokens of the running texts
    ids: Int[Array, "B K R"]
    log_probs: Float[Array, "B K"]  # sums over the running texts
    ended_ids: Int[Array, "B K R"]  # without `</s>`
    ended_lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]  # of the ended texts, best first; NEVER where there is none
    done: Bool[Array, " B"]


def begin(
    ids: Ids,
    beams: Beams,
    params: Params,
    hidden: Float[Array, "B D"],
    cache: Cache,
    length: Int[Array, " B"],
    limits: Limits,
) -> BeamState:
    """The state after the first token."""
    rows, num = len(hidden), beams.num_beams
    cache = jax.tree.map(lambda x: jnp.repeat(x, num, axis=0), cache)
    # Equal beams would find equal texts: at first only one of them counts.
    log_probs = jnp.full((rows, num), NEVER).at[:, 0].set(0.0)
    no_ids = jnp.full((rows, num, cache.capacity), ids.pad, jnp.int32)
    state = BeamState(
        cache=cache,
        length=jnp.repeat(length, num),
        made=jnp.zeros((), jnp.int32),
        ids=no_ids,
        log_probs=log_probs,
        ended_ids=no_ids,
        ended_lengths=jnp.zeros((rows, num), jnp.int32),
        scores=jnp.full((rows, num), NEVER),
        done=jnp.zeros(rows, bool),
    )
    return _add(ids, beams, params, jnp.repeat(hidden, num, axis=0), state, limits)


def run(
    config: ModelConfig,
    ids: Ids,
    beams: Beams,
    params: Params,
    state: BeamState,
    limits: Limits,
    max_steps: Int[Array, ""],
    where: NamedSharding | None,
) -> BeamState:
    """Add tokens until every search is over, `max_steps` at most."""

    def unfinished(carry: tuple[Array, BeamState]) -> Array:
        steps, state = carry
        return (steps < max_steps) & (state.made < limits.max_tokens) & ~state.done.all()

    def step(carry: tuple[Array, BeamState]) -> tuple[Array, BeamState]:
        steps, state = carry
        newest = network.embed(params, state.ids[:, :, state.made - 1].reshape(-1))
        hidden, cache = network.extend(config.language, params, newest[:, None], state.length, state.cache, where)
        state = state._replace(cache=cache, length=state.length + 1)
        return steps + 1, _add(ids, beams, params, hidden[:, 0], state, limits)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]


def _add(
    ids: Ids, beams: Beams, params: Params, hidden: Float[Array, "BK D"], state: BeamState, limits: Limits
) -> BeamState:
    """One more token for every beam: of the 2 K best continuations, K go on and those that end are kept."""
    rows, num = state.log_probs.shape
    log_probs = jax.nn.log_softmax(network.logits(params, hidden), axis=-1)
    too_short = state.made < limits.min_tokens
    log_probs = log_probs.at[:, ids.end].set(jnp.where(too_short, -jnp.inf, log_probs[:, ids.end]))
    vocabulary = log_probs.shape[-1]
    sums = (log_probs.reshape(rows, num, -1) + state.log_probs[:, :, None]).reshape(rows, -1)
    sums, at = jax.lax.top_k(sums, 2 * num)  # twice as many: K may end
    beam, token = at // vocabulary, (at % vocabulary).astype(jnp.int32)
    texts = jnp.take_along_axis(state.ids, beam[:, :, None], axis=1)
    ends = token == ids.end
    last = state.made + 1 >= limits.max_tokens
    cut = jnp.zeros((), bool) if beams.rules == "release" else last  # transformers 5: the last token ends a text
    stops = ends | cut

    # Texts that end: only if they are among the K best continuations, and not once the search is over.
    length = state.made + 1  # the tokens and `</s>`; in the release, `<s>` and the tokens
    scores = sums / length.astype(jnp.float32) ** beams.length_penalty
    counts = stops & (jnp.arange(2 * num) < num) & ~state.done[:, None]
    with_token = texts.at[:, :, state.made].set(jnp.where(ends, ids.pad, token))
    lengths = jnp.broadcast_to(state.made, beam.shape) + ~ends
    ended = _best(
        state.scores,
        state.ended_ids,
        state.ended_lengths,
        jnp.where(counts, scores, NEVER),
        with_token,
        lengths,
    )

    # Texts that go on, in their order. Those that stop come last: with K of 2 K continuations they are never taken.
    going_sums, order = jax.lax.top_k(jnp.where(ends, NEVER, sums), num)
    running_ids = jnp.take_along_axis(with_token, order[:, :, None], axis=1)
    source = jnp.take_along_axis(beam, order, axis=1) + num * jnp.arange(rows)[:, None]
    cache = jax.tree.map(lambda x: x[source.reshape(-1)], state.cache)

    if beams.rules == "release":
        # What `max_tokens` cuts is as long as the release counts it, `<s>` included.
        cut_scores = going_sums / (length + 1).astype(jnp.float32) ** beams.length_penalty
        over = state.done | _hopeless(beams, ended[0], sums[:, 0], length + 1, limits.max_tokens + 1)
        cut_counts = last & ~over[:, None] & jnp.ones((rows, num), bool)
        cut_lengths = jnp.broadcast_to(length, (rows, num))
        ended = _best(*ended, jnp.where(cut_counts, cut_scores, NEVER), running_ids, cut_lengths)
    else:
        over = state.done | _hopeless(beams, ended[0], going_sums[:, 0], length, limits.max_tokens)
    return BeamState(
        cache=cache,
        length=state.length,
        made=state.made + 1,
        ids=running_ids,
        log_probs=going_sums,
        ended_ids=ended[1],
        ended_lengths=ended[2],
        scores=ended[0],
        done=over,
    )


def _best(
    scores: Float[Array, "B K"],
    texts: Int[Array, "B K R"],
    lengths: Int[Array, "B K"],
    new_scores: Float[Array, "B M"],
    new_texts: Int[Array, "B M R"],
    new_lengths: Int[Array, "B M"],
) -> tuple[Float[Array, "B K"], Int[Array, "B K R"], Int[Array, "B K"]]:
    """The K best of the ended texts there were and the new ones; of equals, those there were."""
    best, at = jax.lax.top_k(jnp.concatenate([scores, new_scores], axis=1), scores.shape[1])
    texts = jnp.take_along_axis(jnp.concatenate([texts, new_texts], axis=1), at[:, :, None], axis=1)
    return best, texts, jnp.take_along_axis(jnp.concatenate([lengths, new_lengths], axis=1), at, axis=1)


def _hopeless(
    beams: Beams,
    scores: Float[Array, "B K"],
    best_sum: Float[Array, " B"],
    length: Int[Array, ""],
    max_length: Int[Array, ""],
) -> Bool[Array, " B"]:
    """Whether K texts have ended and, unless that is enough, none that runs could still be better than the worst."""
    full = scores[:, -1] > NEVER / 2
    if beams.early_stopping is True:
        return full
    longest = max_length if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    attainable = best_sum / longest.astype(jnp.float32) ** beams.length_penalty
    return full & (scores[:, -1] >= attainable)
