"""The next-element objective on packed rows: which position predicts what, and the two loss terms.

Everything here returns weighted sums in float32 (`task.Term`); the division by the *global* weight happens once, in
the trainer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emu2_jax.config import ObjectiveConfig
from emu2_jax.models import layers
from emu2_jax.task import Batch, Term


class Targets(NamedTuple):
    """What each position of a packed row predicts: the element at the next position of the same document.

    For "<s> [IMG] v v [/IMG] cat </s>" followed by one padding position, all loss weights 1:

        element        <s>    [IMG]  v  v       [/IMG]  cat   </s>  -
        tokens         [IMG]  .      .  [/IMG]  cat     </s>  .     .
        text_weights   1      0      0  1       1       1     0     0
        visual_weights 0      1      1  0       0       0     0     0

    With `supervise_image_start=False` the first 1 is 0; with `supervise_image_end=False` the second one.
    """

    tokens: Int[Array, "B T"]  # the next token; read only where text_weights > 0
    text_weights: Float[Array, "B T"]
    visual_index: Int[Array, "B T"]  # the next visual embedding; read only where visual_weights > 0
    visual_weights: Float[Array, "B T"]
    image_end_weights: Float[Array, "B T"]  # 1 at the last position of an image, whose next element is [/IMG]


def next_elements(batch: Batch, objective: ObjectiveConfig, *, image_start_id: int, image_end_id: int) -> Targets:
    """Targets and loss weights of every position, from the row's fields alone (no model)."""
    segment_ids = batch["segment_ids"]
    same_document = (_next(segment_ids) == segment_ids) & (segment_ids > 0)
    # The last position's successor wraps around to the first: never a target.
    same_document = same_document.at[:, -1].set(False)
    weights = jnp.where(same_document, _next(batch["loss_weights"]), 0.0)
    tokens, is_visual = _next(batch["tokens"]), _next(batch["is_visual"])
    text_weights = jnp.where(is_visual, 0.0, weights)
    is_start = ~is_visual & (tokens == image_start_id)
    is_end = ~is_visual & (tokens == image_end_id)
    image_end_weights = jnp.where(is_end & batch["is_visual"], weights, 0.0)
    if not objective.supervise_image_start:
        text_weights = jnp.where(is_start, 0.0, text_weights)
    if not objective.supervise_image_end:
        text_weights = jnp.where(is_end, 0.0, text_weights)
    return Targets(
        tokens=tokens,
        text_weights=text_weights,
        visual_index=_next(batch["visual_index"]),
        visual_weights=jnp.where(is_visual, weights, 0.0),
        image_end_weights=image_end_weights,
    )


def _next(x: Array) -> Array:
    return jnp.roll(x, -1, axis=1)


class CrossEntropy(NamedTuple):
    """Sums over the supervised text positions."""

    loss: Term  # nats
    correct: Term  # the likeliest token is the right one


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    block_positions: int | None,
) -> CrossEntropy:
    """Cross-entropy over the vocabulary, `block_positions` positions of each row at a time.

    Logits of one block exist at once (float32, B x block x V) and are recomputed in the backward pass: at the 37B
    model's size the logits of whole rows would take more memory than the rest of the activations. Those of a single
    block are kept. A token is the likeliest when none is likelier.
    """
    rows, length, _ = hidden.shape
    block = min(block_positions or length, length)
    padding = -length % block
    num_blocks = (length + padding) // block

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, num_blocks, block, *x.shape[2:]), 1, 0)

    def add_block(sums: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        hidden, tokens, weights = xs
        logits = layers.product(hidden, head.astype(hidden.dtype), 1, jnp.float32)
        target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - target
        correct = logits.max(-1) == target
        return (sums[0] + (nll * weights).sum(), sums[1] + (correct * weights).sum()), None

    zero = jnp.zeros((), jnp.float32)
    if num_blocks == 1:
        (loss, correct), _ = add_block((zero, zero), (hidden, tokens, weights))
    else:
        xs = blocks(hidden), blocks(tokens), blocks(weights)
        (loss, correct), _ = jax.lax.scan(jax.checkpoint(add_block), (zero, zero), xs)
    weight = weights.sum()
    return CrossEntropy(loss=Term(loss, weight), correct=Term(correct, weight))


class Regression(NamedTuple):
    """Sums over the supervised visual positions."""

    squared_error: Term  # mean over the channels of an embedding
    cosine: Term  # cosine similarity of predicted and target embedding
    norm_ratio: Term  # predicted norm / target norm; below 1 when the regression blurs


def regression(
    predicted: Float[Array, "B T E"], target: Float[Array, "B T E"], weights: Float[Array, "B T"]
) -> Regression:
    """Mean squared error of visual embeddings (stated by the authors), with two diagnostics, all in float32.

    `target` carries no gradient. Positions of weight 0 contribute nothing, whatever they hold.
    """
    predicted = predicted.astype(jnp.float32)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    weight = weights.sum()

    def total(x: Array) -> Term:
        return Term((x * weights).sum(), weight)

    # The epsilon keeps the gradient of a norm finite at zero, which padding and empty slots reach.
    predicted_norm = jnp.sqrt(jnp.square(predicted).sum(-1) + 1e-12)
    target_norm = jnp.sqrt(jnp.square(target).sum(-1) + 1e-12)
    return Regression(
        squared_error=total(jnp.square(predicted - target).mean(-1)),
        cosine=total((predicted * target).sum(-1) / (predicted_norm * target_norm)),
        norm_ratio=total(predicted_norm / target_norm),
    )
