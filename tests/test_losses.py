"""Which position predicts what, worked by hand; and the two loss terms against direct formulas."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import BOS, EOS, IMAGE_END, IMAGE_START, PICTURE

from emu2_jax import losses
from emu2_jax.config import ObjectiveConfig
from emu2_jax.sequence import RowShape

CAT, DOG = 5, 6
SHAPE = RowShape(length=8, image_slots=1, visual_tokens=2, image_size=8)


def next_elements(batch: dict[str, np.ndarray], **objective: Any) -> losses.Targets:
    arrays = {name: jnp.asarray(array) for name, array in batch.items() if name not in ("images", "image_mask")}
    return losses.next_elements(
        arrays, ObjectiveConfig(**objective), image_start_id=IMAGE_START, image_end_id=IMAGE_END
    )


@pytest.fixture
def picture_of_a_cat() -> dict[str, np.ndarray]:
    """<s> [IMG] v v [/IMG] cat </s> and one position of padding."""
    return tiny.pack([[[BOS, PICTURE, CAT, EOS]]], SHAPE)


def test_every_position_predicts_the_next_element(picture_of_a_cat: dict[str, np.ndarray]) -> None:
    targets = next_elements(picture_of_a_cat)
    np.testing.assert_array_equal(targets.text_weights, [[1, 0, 0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(targets.visual_weights, [[0, 1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(targets.image_end_weights, [[0, 0, 0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(targets.tokens[targets.text_weights > 0], [IMAGE_START, IMAGE_END, CAT, EOS])
    np.testing.assert_array_equal(targets.visual_index[targets.visual_weights > 0], [0, 1])


@pytest.mark.parametrize(
    ("objective", "text_weights"),
    [
        ({"supervise_image_start": False}, [0, 0, 0, 1, 1, 1, 0, 0]),
        ({"supervise_image_end": False}, [1, 0, 0, 0, 1, 1, 0, 0]),
        ({"supervise_image_start": False, "supervise_image_end": False}, [0, 0, 0, 0, 1, 1, 0, 0]),
    ],
)
def test_predicting_the_image_markers_can_go_unsupervised(
    picture_of_a_cat: dict[str, np.ndarray], objective: dict[str, bool], text_weights: list[int]
) -> None:
    targets = next_elements(picture_of_a_cat, **objective)
    np.testing.assert_array_equal(targets.text_weights, [text_weights])
    np.testing.assert_array_equal(targets.visual_weights, [[0, 1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(targets.image_end_weights, [[0, 0, 0, 1, 0, 0, 0, 0]])


def test_no_document_predicts_the_next_one_and_nothing_wraps_around() -> None:
    """Two documents that fill the row, the second of them <s> dog: its last position must not predict the first."""
    shape = dataclasses.replace(SHAPE, length=5)
    targets = next_elements(tiny.pack([[[BOS, CAT, EOS], [BOS, DOG]]], shape))
    np.testing.assert_array_equal(targets.text_weights, [[1, 1, 0, 1, 0]])
    assert targets.text_weights.sum() == 3

    one_document = next_elements(tiny.pack([[[BOS, CAT, DOG, CAT, EOS]]], shape))
    np.testing.assert_array_equal(one_document.text_weights, [[1, 1, 1, 1, 0]])


def test_a_picture_at_the_start_of_a_document_has_no_predictor_for_its_marker() -> None:
    """Without <s>, nothing predicts [IMG], also when the document before it ends with an image."""
    shape = dataclasses.replace(SHAPE, image_slots=2, length=9)
    targets = next_elements(tiny.pack([[[PICTURE], [PICTURE, CAT]]], shape))
    np.testing.assert_array_equal(targets.text_weights, [[0, 0, 1, 0, 0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(targets.visual_weights, [[1, 1, 0, 0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(targets.visual_index[0, [0, 1, 4, 5]], [0, 1, 2, 3])


def test_a_loss_weight_belongs_to_the_element_that_is_predicted(picture_of_a_cat: dict[str, np.ndarray]) -> None:
    """Element:         <s>  [IMG] v     v    [/IMG] cat   </s>  -"""
    weights = [9.0, 0.5, 0.25, 2.0, 3.0, 0.125, 0.0, 7.0]
    targets = next_elements(picture_of_a_cat | {"loss_weights": np.array([weights], np.float32)})
    np.testing.assert_array_equal(targets.text_weights, [[0.5, 0, 0, 3.0, 0.125, 0, 0, 0]])
    np.testing.assert_array_equal(targets.visual_weights, [[0, 0.25, 2.0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(targets.image_end_weights, [[0, 0, 0, 3.0, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def text() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(2, 7, 3)).astype(np.float32),
        "head": rng.normal(size=(3, 5)).astype(np.float32),
        "tokens": rng.integers(0, 5, (2, 7)).astype(np.int32),
        "weights": np.array([[1, 0, 2, 1, 0, 0.5, 1], [0, 0, 1, 0, 1, 1, 3]], np.float32),
    }


def direct_cross_entropy(text: dict[str, np.ndarray]) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Sum, number right, gradients to hidden states and head, in float64 from the textbook formulas."""
    hidden, head = text["hidden"].astype(np.float64), text["head"].astype(np.float64)
    logits = hidden @ head
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(probabilities, text["tokens"][..., None], -1)[..., 0]
    error = (probabilities - np.eye(5)[text["tokens"]]) * text["weights"][..., None]
    correct = logits.argmax(-1) == text["tokens"]
    gradients = error @ head.T, np.einsum("btd,btv->dv", hidden, error)
    return -(np.log(right) * text["weights"]).sum(), (correct * text["weights"]).sum(), *gradients


@pytest.mark.parametrize("block", [None, 1, 2, 3, 7, 100])
def test_cross_entropy_in_blocks_equals_the_direct_one(text: dict[str, np.ndarray], block: int | None) -> None:
    def loss(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, losses.CrossEntropy]:
        out = losses.cross_entropy(
            hidden, head, jnp.asarray(text["tokens"]), jnp.asarray(text["weights"]), block_positions=block
        )
        return out.loss.sum, out

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, out = gradient(jnp.asarray(text["hidden"]), jnp.asarray(text["head"]))
    total, correct, hidden_gradient, head_gradient = direct_cross_entropy(text)
    assert float(out.loss.sum) == pytest.approx(total, rel=1e-5)
    assert float(out.loss.weight) == 11.5
    assert (float(out.correct.sum), float(out.correct.weight)) == (pytest.approx(correct), 11.5)
    assert 0 < correct < 11.5
    np.testing.assert_allclose(gradients[0], hidden_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[1], head_gradient, rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_equal_scores_is_the_log_of_the_vocabulary_also_in_bfloat16() -> None:
    hidden = jnp.zeros((1, 2, 4), jnp.bfloat16)
    out = losses.cross_entropy(
        hidden, jnp.ones((4, 1000)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)), block_positions=1
    )
    assert out.loss.sum.dtype == jnp.float32
    assert float(out.loss.sum) == pytest.approx(2 * math.log(1000), rel=1e-6)


def test_regression_in_numbers() -> None:
    """Position 0: (3, 4) against (0, 5); position 1, weight 2: (1, 0) against (2, 0); position 2 carries none."""
    predicted = jnp.array([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    target = jnp.array([[[0.0, 5.0], [2.0, 0.0], [-9.0, 1.0]]])
    sums = losses.regression(predicted, target, jnp.array([[1.0, 2.0, 0.0]]))
    assert all(float(term.weight) == 3.0 for term in sums)
    assert float(sums.squared_error.sum) == pytest.approx((9 + 1) / 2 + 2 * (1 / 2))
    assert float(sums.cosine.sum) == pytest.approx(20 / 25 + 2 * 1.0)
    assert float(sums.norm_ratio.sum) == pytest.approx(5 / 5 + 2 * (1 / 2))


def test_the_regression_target_carries_no_gradient() -> None:
    predicted, target = jnp.array([[[3.0, 4.0]]]), jnp.array([[[0.0, 5.0]]])

    def loss(predicted: jax.Array, target: jax.Array) -> jax.Array:
        sums = losses.regression(predicted, target, jnp.ones((1, 1)))
        return sums.squared_error.sum + sums.cosine.sum + sums.norm_ratio.sum

    to_predicted, to_target = jax.grad(loss, argnums=(0, 1))(predicted, target)
    np.testing.assert_array_equal(to_target, np.zeros((1, 1, 2)))
    assert np.abs(to_predicted).min() > 0

    squared_error = jax.grad(lambda p: losses.regression(p, target, jnp.ones((1, 1))).squared_error.sum)(predicted)
    np.testing.assert_allclose(squared_error, [[[3.0, -1.0]]])  # 2 (predicted - target) / channels


def test_weight_zero_gives_zero_and_a_zero_gradient_even_at_zero_vectors() -> None:
    nothing, none = jnp.zeros((1, 3, 2)), jnp.zeros((1, 3))

    def regression(predicted: jax.Array) -> jax.Array:
        sums = losses.regression(predicted, nothing, none)
        return sums.squared_error.sum + sums.cosine.sum + sums.norm_ratio.sum

    def text(hidden: jax.Array) -> jax.Array:
        tokens = jnp.zeros((1, 3), jnp.int32)
        return losses.cross_entropy(hidden, jnp.ones((2, 5)), tokens, none, block_positions=2).loss.sum

    for loss in (regression, text):
        value, gradient = jax.value_and_grad(loss)(nothing)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, np.zeros((1, 3, 2)))


def test_the_gradient_of_the_cosine_is_finite_where_a_vector_is_zero() -> None:
    gradient = jax.grad(lambda p: losses.regression(p, jnp.ones((1, 1, 2)), jnp.ones((1, 1))).cosine.sum)(
        jnp.zeros((1, 1, 2))
    )
    assert np.isfinite(gradient).all()
