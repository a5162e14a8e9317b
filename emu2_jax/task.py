"""What the trainer needs to know of a thing to train: its parameters, its loss terms, their weights.

Pretraining (`emu2_jax.models.emu2.PretrainTask`) and the visual decoder (`emu2_jax.diffusion.decoder.DecoderTask`) are
two tasks of the one trainer in `emu2_jax.train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

Params = Mapping[str, Any]  # nested dicts of arrays; the top-level keys are the parts
Batch = Mapping[str, Any]  # arrays whose first axis is the batch


class Term(NamedTuple):
    """A weighted sum, to be divided once, globally: value = sum / weight."""

    sum: Float[Array, ""]  # float32
    weight: Float[Array, ""]  # float32, how many things were summed; may be 0


class Losses(NamedTuple):
    """What one (micro-)batch yields."""

    terms: Mapping[str, Term]  # the loss terms, by name; differentiated
    metrics: Mapping[str, Term]  # logged, not differentiated


class Task(Protocol):
    """A model with its objective, as pure functions of parameters and batch."""

    #: Coefficient of each loss term in the total loss: total = sum over terms of coefficient * sum / weight.
    coefficients: Mapping[str, float]

    #: Whether no row of a batch is read for another one, so that each device can work on its own. `losses` then draws
    #: with a key for each row, `emu2_jax.shards.row_keys`.
    rows_are_independent: bool

    def init(self, key: PRNGKeyArray) -> Params:
        """Initial parameters, float32, as nested dicts. Pure: usable under `jax.eval_shape` and `jax.jit`."""
        ...

    def term_weights(self, batch: Batch) -> Mapping[str, Float[Array, ""]]:
        """The weight of each loss term in `batch`, without running the model.

        The trainer divides each micro-batch's sums by the weight of the *whole* batch, so that accumulating gradients
        over micro-batches equals one big batch exactly.
        """
        ...

    def losses(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Losses:
        """Loss terms and metrics of a (micro-)batch; `key` feeds every random draw."""
        ...

    def model_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Floating-point operations that one step on a batch of these shapes has to do, without recomputation.

        Three times the forward pass, for the backward pass takes twice as much; a frozen encoder, which nothing is
        differentiated through, counts once. Causal attention counts half.
        """
        ...
