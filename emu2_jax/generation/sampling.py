"""How the next token is chosen: the likeliest, one drawn at random, or by a search over several beams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from emu2_jax.errors import ConfigError


@dataclass(frozen=True)
class Greedy:
    """The likeliest token."""


GREEDY = Greedy()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A token at random, of those that `top_k` and then `top_p` leave; as `transformers` has these settings."""

    temperature: float = 1.0  #: scores are divided by it; above 0
    top_k: int | None = None  #: only the k likeliest; None = all
    top_p: float = 1.0  #: only the likeliest that together reach this probability
    seed: int = 0  #: prompt i of a call draws from fold_in(key(seed), i), whatever batch it is in

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature:g}, wanted more than 0; Greedy() is the limit at 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}, wanted at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p:g}, wanted more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Beam search, for answers of text alone.

    The score of an answer of n tokens is its log-probability, `</s>` included, over (n + 1) ** length_penalty: above 0
    long answers win, below 0 short ones. The two sets of `rules` differ in answers that `max_tokens` cuts: what length
    they have (n + 1 in the release, which counts its own `<s>`; n in transformers 5), and which of them count; and in
    when the search is known to be over. Answers that end by themselves have the same scores.
    """

    num_beams: int = 5  #: release: 5
    length_penalty: float = 1.0  #: release: -1 for short answers
    early_stopping: bool | Literal["never"] = False  #: stop at num_beams ended answers; when none can get better; never
    rules: Literal["release", "transformers"] = "release"  #: of transformers 4.31, which the release ran, or of 5

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ConfigError(f"num_beams: got {self.num_beams}, wanted at least 1")


#: The release's choices for short answers (its `generate` with length_penalty -1).
RELEASE_BEAMS = Beams(num_beams=5, length_penalty=-1.0, rules="release")

Decoding = Greedy | Sampling | Beams


class Draw(NamedTuple):
    """The numbers of `Sampling`, as arrays: changing them compiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # the vocabulary's size for all
    top_p: Float[Array, ""]


def likeliest(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Greedy."""
    return scores.argmax(-1).astype(jnp.int32)


def drawn(scores: Float[Array, "B V"], keys: Key[Array, " B"], draw: Draw) -> Int[Array, " B"]:
    """One token of each row at random."""
    scores = kept(scores, draw)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)


def kept(scores: Float[Array, "B V"], draw: Draw) -> Float[Array, "B V"]:
    """Scores over the temperature, -inf for what `top_k` and `top_p` leave out; the likeliest token always stays.

    With top_p = 0.7, probabilities 0.5, 0.3, 0.2 keep the first two: the first alone does not reach 0.7.
    """
    scores = scores / draw.temperature
    order = jnp.argsort(-scores, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1)
    # As transformers does: what ties with the last of the k stays too.
    ranked = jnp.where(ranked >= ranked[:, draw.top_k - 1][:, None], ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < draw.top_p).at[:, 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(jnp.where(keep, ranked, -jnp.inf), rank, axis=-1)
