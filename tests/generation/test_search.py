"""Greedy and beam search give the ids that `transformers` 4.31, which the release ran, gives (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_cases

from emu2_jax.errors import ConfigError
from emu2_jax.generation import sampling
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.sampling import Beams, Draw, Sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "searches_release.json"


def test_the_releases_searches() -> None:
    theirs = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert theirs["transformers"].startswith("4.31")
    found = search_cases.ours("release")
    for search, ours, wanted in zip(search_cases.SEARCHES, found, theirs["answers"], strict=True):
        assert ours == wanted, search
    # The settings matter, and answers end by themselves and by max_tokens.
    assert len({json.dumps(answers) for answers in found}) > 6
    lengths = {len(answer) for answers in found for answer in answers}
    assert min(lengths) == 0 and max(lengths) == search_cases.MAX_TOKENS


def draw(temperature: float = 1.0, top_k: int = 4, top_p: float = 1.0) -> Draw:
    return Draw(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


PROBABILITIES = np.array([[0.2, 0.5, 0.3, 0.0001], [0.1, 0.1, 0.7, 0.1]])


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        (draw(), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (draw(top_k=2), [[0, 1, 1, 0], [1, 1, 1, 1]]),  # what ties with the second stays
        (draw(top_k=1), [[0, 1, 0, 0], [0, 0, 1, 0]]),
        (draw(top_p=0.7), [[0, 1, 1, 0], [0, 0, 1, 0]]),
        (draw(top_p=0.01), [[0, 1, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_what_top_k_and_top_p_leave(settings: Draw, stay: list[list[int]]) -> None:
    scores = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32) / PROBABILITIES.sum(-1, keepdims=True).astype("float32"))
    kept = np.asarray(sampling.kept(scores, settings))
    np.testing.assert_array_equal(np.isfinite(kept), np.array(stay, bool))
    np.testing.assert_allclose(kept[np.isfinite(kept)], np.asarray(scores)[np.isfinite(kept)], rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    scores = jnp.broadcast_to(jnp.log(jnp.array([0.2, 0.5, 0.3, 1e-9])), (4000, 4)).astype(jnp.float32)
    share = np.bincount(np.asarray(sampling.drawn(scores, keys, draw())), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.2, 0.5, 0.3, 0], atol=0.03)
    hot = np.bincount(np.asarray(sampling.drawn(scores, keys, draw(temperature=0.5))), minlength=4) / 4000
    np.testing.assert_allclose(hot, np.array([0.04, 0.25, 0.09, 0]) / 0.38, atol=0.03)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "no image is forced"),
        ({"forced_images": 2, "max_images": 1}, "at least forced_images"),
        ({"decoding": Beams(), "max_images": 1}, "beam search writes text alone"),
    ],
)
def test_answers_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wanted(**settings)  # type: ignore[arg-type]
