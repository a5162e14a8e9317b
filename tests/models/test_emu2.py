"""Emu2's pretraining task: what a packed row computes, where gradients go, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import BOS, EOS, IMAGE_END, PICTURE

from emu2_jax import metrics, train
from emu2_jax.config import ObjectiveConfig, OptimizerConfig
from emu2_jax.models import emu2
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.sequence import batch_shapes
from emu2_jax.task import Losses

Arrays = dict[str, np.ndarray]

#: Ten positions each: a picture and its caption, a text with a picture inside.
CAPTIONED: tiny.Document = [BOS, PICTURE, 5, 6, EOS]
ILLUSTRATED: tiny.Document = [BOS, 7, PICTURE, 8, EOS]
FIRST, SECOND, PADDING = slice(0, 10), slice(10, 20), slice(20, 24)


@dataclasses.dataclass(frozen=True)
class Forward:
    """One evaluation of the task: losses, hidden states and visual embeddings."""

    losses: Losses
    hidden: np.ndarray
    embeddings: np.ndarray

    def sum(self, term: str) -> float:
        return float(self.losses.terms[term].sum)


def forward_of(task: PretrainTask) -> Callable[..., Forward]:
    @jax.jit
    def run(params: Any, batch: Any, key: jax.Array) -> tuple[Any, ...]:
        embeddings = task.visual_embeddings(params, batch)
        return task.losses(params, batch, key), task.hidden(params, batch, embeddings, key), embeddings

    def forward(params: Any, batch: Arrays, key: int = 0) -> Forward:
        losses, hidden, embeddings = run(params, as_jax(batch), jax.random.key(key))
        return Forward(losses, np.asarray(hidden), np.asarray(embeddings))

    return forward


def gradients_of(task: PretrainTask) -> Callable[[Any, Arrays], dict[str, Any]]:
    """Gradient of each term's sum, by term."""

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        return jax.jacrev(lambda p: {k: t.sum for k, t in task.losses(p, batch, jax.random.key(0)).terms.items()})(
            params
        )

    return lambda params, batch: run(params, as_jax(batch))


def as_jax(batch: Arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in batch.items()}


def largest(tree: Any) -> float:
    """Largest absolute value; nan if any is."""
    return float(max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree)))


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.random_parameters(tiny.task().init)


@pytest.fixture(scope="module")
def forward() -> Callable[..., Forward]:
    return forward_of(tiny.task())


@pytest.fixture(scope="module")
def gradients() -> Callable[[Any, Arrays], dict[str, Any]]:
    return gradients_of(tiny.task())


@pytest.fixture(scope="module")
def packed() -> Arrays:
    return tiny.pack([[CAPTIONED, ILLUSTRATED], []])


@pytest.fixture(scope="module")
def separate() -> Arrays:
    """The documents (and pictures) of `packed`, one to a row."""
    return tiny.pack([[CAPTIONED], [ILLUSTRATED]])


def test_the_parts_and_their_projections(params: Any) -> None:
    assert sorted(params) == ["language_model", "project_down", "project_up", "visual_encoder"]
    assert params["project_up"]["kernel"].shape == (16, 32)
    assert params["project_down"]["kernel"].shape == (32, 16)


def test_interleave_puts_each_embedding_in_its_place() -> None:
    tokens = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    visual = jnp.array([[[10.0], [20.0], [30.0]]])
    is_visual = jnp.array([[False, True, False, True]])
    out = emu2.interleave(tokens, visual, is_visual, jnp.array([[0, 2, 0, 1]]))
    np.testing.assert_array_equal(out[0, :, 0], [1.0, 30.0, 3.0, 20.0])


def test_the_language_model_reads_token_embeddings_and_projected_visual_embeddings(
    params: Any, forward: Callable[..., Forward], separate: Arrays
) -> None:
    """Row 0 by hand: <s> [IMG] v v v v [/IMG] 5 6 </s>, and nothing else."""
    out = forward(params, separate)
    table = params["language_model"]["token_embedding"]
    visual = out.embeddings[0, :4] @ params["project_up"]["kernel"]
    x = np.concatenate([table[[BOS, tiny.IMAGE_START]], visual, table[[IMAGE_END, 5, 6, EOS]]])[None]
    model = emu2.merge(tiny.CONFIG.model, params).language_model
    causal = jnp.tril(jnp.ones((1, 10, 10), bool))
    hidden = jax.jit(model.__call__)(jnp.asarray(x), jnp.arange(10)[None], causal)
    np.testing.assert_allclose(out.hidden[0, :10], hidden[0], rtol=1e-4, atol=1e-5)


def losses_element_by_element(batch: Arrays, out: Forward, params: Any) -> dict[str, tuple[float, float]]:
    """(sum, weight) of both terms, element after element, in float64."""
    head = params["language_model"]["head"].astype(np.float64)
    down = params["project_down"]["kernel"].astype(np.float64)
    text, regression = [], []
    for row in range(batch["tokens"].shape[0]):
        for t in range(batch["tokens"].shape[1] - 1):
            document = batch["segment_ids"][row, t]
            if document == 0 or batch["segment_ids"][row, t + 1] != document:
                continue
            hidden = out.hidden[row, t].astype(np.float64)
            if batch["is_visual"][row, t + 1]:
                target = out.embeddings[row, batch["visual_index"][row, t + 1]]
                regression.append(((hidden @ down - target) ** 2).mean())
            else:
                logits = hidden @ head
                text.append(np.log(np.exp(logits).sum()) - logits[batch["tokens"][row, t + 1]])
    return {"text": (sum(text), len(text)), "regression": (sum(regression), len(regression))}


def test_losses_are_those_of_a_loop_over_the_elements(
    params: Any, forward: Callable[..., Forward], packed: Arrays
) -> None:
    out = forward(params, packed)
    expected = losses_element_by_element(packed, out, params)
    assert set(out.losses.terms) == set(expected)
    for name, (total, weight) in expected.items():
        assert float(out.losses.terms[name].sum) == pytest.approx(total, rel=1e-5)
        assert float(out.losses.terms[name].weight) == weight
    assert (expected["text"][1], expected["regression"][1]) == (10, 8)


def test_term_weights_are_known_without_the_model(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    weights = tiny.task().term_weights(as_jax(packed))
    assert {name: float(weight) for name, weight in weights.items()} == {"text": 10.0, "regression": 8.0}
    terms = forward(params, packed).losses.terms
    assert {name: float(term.weight) for name, term in terms.items()} == {"text": 10.0, "regression": 8.0}


def test_two_documents_in_one_row_give_the_sums_of_two_rows(
    params: Any, forward: Callable[..., Forward], packed: Arrays, separate: Arrays
) -> None:
    together, apart = forward(params, packed), forward(params, separate)
    for name in ("text", "regression"):
        assert together.sum(name) == pytest.approx(apart.sum(name), rel=1e-5)
    np.testing.assert_allclose(together.hidden[0, FIRST], apart.hidden[0, FIRST], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together.hidden[0, SECOND], apart.hidden[1, FIRST], rtol=1e-4, atol=1e-5)


def changed(batch: Arrays, field: str, at: tuple[Any, ...], value: Any) -> Arrays:
    array = batch[field].copy()
    array[at] = value
    return batch | {field: array}


def test_a_document_does_not_see_the_other_one(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    """Not one bit of the second document's states depends on the first one's text or picture, nor the reverse."""
    before = forward(params, packed).hidden[0]
    other_text = forward(params, changed(packed, "tokens", (0, 8), 9)).hidden[0]
    other_picture = forward(params, changed(packed, "images", (0, 0), 128)).hidden[0]
    other_second_picture = forward(params, changed(packed, "images", (0, 1), 128)).hidden[0]
    for after in (other_text, other_picture):
        np.testing.assert_array_equal(after[SECOND], before[SECOND])
        assert np.abs(after[FIRST] - before[FIRST]).max() > 1e-3
    np.testing.assert_array_equal(other_second_picture[FIRST], before[FIRST])
    assert np.abs(other_second_picture[SECOND] - before[SECOND]).max() > 1e-3


def test_no_position_sees_a_later_one(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    before = forward(params, packed).hidden[0]
    after = forward(params, changed(packed, "tokens", (0, 8), 9)).hidden[0]
    np.testing.assert_array_equal(after[:8], before[:8])
    assert np.abs(after[8] - before[8]).max() > 1e-3


def test_positions_count(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    """A shift of a whole document changes nothing (rotary is relative); a gap inside it does."""
    before = forward(params, packed).hidden[0]
    shifted = packed["positions"].copy()
    shifted[0, SECOND] += 10
    np.testing.assert_allclose(forward(params, packed | {"positions": shifted}).hidden[0], before, atol=1e-4)
    shifted[0, 15:20] += 7
    torn = forward(params, packed | {"positions": shifted}).hidden[0]
    assert np.abs(torn[SECOND] - before[SECOND]).max() > 1e-2


def test_padding_and_empty_slots_are_read_by_nothing(params: Any, forward: Callable[..., Forward]) -> None:
    batch = tiny.pack([[CAPTIONED], [[BOS, 5, EOS]]])
    filled = changed(changed(batch, "images", (slice(None), 1), 200), "tokens", (slice(None), slice(10, None)), 9)
    before, after = forward(params, batch), forward(params, filled)
    for name in ("text", "regression"):
        assert before.sum(name) == after.sum(name)
    np.testing.assert_array_equal(before.hidden[0, FIRST], after.hidden[0, FIRST])


def test_each_term_reaches_its_own_head_and_both_reach_the_rest(
    params: Any, gradients: Callable[[Any, Arrays], dict[str, Any]], packed: Arrays
) -> None:
    by_term = gradients(params, packed)
    assert np.isfinite(largest(by_term))
    assert largest(by_term["text"]["project_down"]) == 0.0
    assert largest(by_term["regression"]["language_model"]["head"]) == 0.0
    assert largest(by_term["text"]["language_model"]["head"]) > 0.0
    assert largest(by_term["regression"]["project_down"]) > 0.0
    for term in ("text", "regression"):
        for part in ("visual_encoder", "project_up"):
            assert largest(by_term[term][part]) > 0.0
        assert largest(by_term[term]["language_model"]["blocks"]) > 0.0


def test_an_embedding_that_is_only_a_target_gives_the_encoder_no_gradient(
    params: Any, gradients: Callable[[Any, Arrays], dict[str, Any]], packed: Arrays
) -> None:
    """Only the first embedding of the first picture is supervised; what predicts it has seen no picture."""
    weights = np.zeros_like(packed["loss_weights"])
    weights[0, 2] = 1.0
    regression = gradients(params, packed | {"loss_weights": weights})["regression"]
    assert largest(regression["visual_encoder"]) == 0.0
    assert largest(regression["project_up"]) == 0.0
    assert largest(regression["project_down"]) > 0.0


def test_a_frozen_encoder_gets_no_gradient_and_the_loss_stays(
    params: Any, forward: Callable[..., Forward], packed: Arrays
) -> None:
    frozen = tiny.task(optimizer=OptimizerConfig(frozen=("visual_encoder",)))
    others = jax.tree.map(jnp.asarray, params)
    encoder = others.pop("visual_encoder")

    def total(encoder: Any) -> tuple[jax.Array, Losses]:
        losses = frozen.losses({**others, "visual_encoder": encoder}, as_jax(packed), jax.random.key(0))
        return jnp.asarray(sum(term.sum for term in losses.terms.values())), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(encoder)
    assert largest(gradient) == 0.0
    assert float(losses.terms["text"].sum) == pytest.approx(forward(params, packed).sum("text"), rel=1e-6)


@pytest.mark.parametrize("image_slots", [0, 2])
def test_a_batch_without_images(
    image_slots: int,
    params: Any,
    forward: Callable[..., Forward],
    gradients: Callable[[Any, Arrays], dict[str, Any]],
) -> None:
    """Text rows in a batch with empty image slots, and with none: equal, finite, no gradient to the visual parts."""
    shape = dataclasses.replace(tiny.ROW_SHAPE, image_slots=image_slots)
    batch = tiny.pack([[[BOS, 5, 6, EOS], [BOS, 7, EOS]], [[BOS, 8, EOS]]], shape)
    out = forward(params, batch)
    assert out.sum("text") == pytest.approx(losses_element_by_element(batch, out, params)["text"][0], rel=1e-5)
    assert float(out.losses.terms["text"].weight) == 7.0
    assert (out.sum("regression"), float(out.losses.terms["regression"].weight)) == (0.0, 0.0)
    by_term = gradients(params, batch)
    assert np.isfinite(largest(by_term["text"]))
    assert largest(by_term["text"]["language_model"]) > 0.0
    assert largest(by_term["regression"]) == 0.0
    for part in ("visual_encoder", "project_up", "project_down"):
        assert largest(by_term["text"][part]) == 0.0


def test_a_batch_without_labels_has_zero_loss_and_gradient_and_a_step_changes_nothing(
    params: Any, gradients: Callable[[Any, Arrays], dict[str, Any]], packed: Arrays
) -> None:
    unlabelled = packed | {"loss_weights": np.zeros_like(packed["loss_weights"])}
    assert largest(gradients(params, unlabelled)) == 0.0

    optimizer = optax.sgd(1.0)
    step = jax.jit(train.make_step(tiny.task(), tiny.CONFIG, optimizer))
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
    state["rng"] = jax.random.key_data(jax.random.key(0))
    after, log = step(state, as_jax(unlabelled))
    assert float(log["grad_norm"]) == 0.0
    assert all(float(term.sum) == 0.0 and float(term.weight) == 0.0 for term in log["terms"].values())
    jax.tree.map(np.testing.assert_array_equal, after["params"], params)


def test_captioning_has_no_regression_term(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    task = tiny.task(dataclasses.replace(tiny.CONFIG.objective, regression_loss_weight=0.0))
    out = forward_of(task)(params, packed)
    assert task.coefficients == {"text": 1.0}
    assert set(out.losses.terms) == set(task.term_weights(as_jax(packed))) == {"text"}
    assert set(out.losses.metrics) == {"text_accuracy"}
    assert out.sum("text") == pytest.approx(forward(params, packed).sum("text"), rel=1e-6)


def test_the_image_end_can_be_regressed(params: Any, forward: Callable[..., Forward], packed: Arrays) -> None:
    """At each picture's last embedding: the fed-back prediction against the token embedding of [/IMG]."""
    objective = dataclasses.replace(
        tiny.CONFIG.objective,
        regress_image_end=True,
        supervise_image_end=False,
        regression_loss_weight=3.0,
        text_loss_weight=2.0,
    )
    task = tiny.task(objective)
    assert task.coefficients == {"text": 2.0, "regression": 3.0, "image_end": 3.0}
    out, plain = forward_of(task)(params, packed), forward(params, packed)
    target = params["language_model"]["token_embedding"][IMAGE_END]
    last = [5, 16]  # <s> [IMG] v v v *v* [/IMG] 5 6 </s> | <s> 7 [IMG] v v v *v* [/IMG] 8 </s>
    fed_back = plain.hidden[0, last] @ params["project_down"]["kernel"] @ params["project_up"]["kernel"]
    assert out.sum("image_end") == pytest.approx(((fed_back - target) ** 2).mean(-1).sum(), rel=1e-4)
    assert float(out.losses.terms["image_end"].weight) == 2.0
    assert out.sum("regression") == pytest.approx(plain.sum("regression"), rel=1e-6)
    assert float(out.losses.terms["text"].weight) == 10.0 - 2.0
    weights = task.term_weights(as_jax(packed))
    assert {name: float(weight) for name, weight in weights.items()} == {"text": 8, "regression": 8, "image_end": 2}


def test_the_cosine_term_adds_one_minus_the_cosine(
    params: Any, forward: Callable[..., Forward], packed: Arrays
) -> None:
    task = tiny.task(dataclasses.replace(tiny.CONFIG.objective, regression_cosine_weight=0.5))
    out, plain = forward_of(task)(params, packed), forward(params, packed)
    predicted = np.concatenate([plain.hidden[0, 1:5], plain.hidden[0, 12:16]]) @ params["project_down"]["kernel"]
    target = plain.embeddings[0]
    cosine = (predicted * target).sum(-1) / np.linalg.norm(predicted, axis=-1) / np.linalg.norm(target, axis=-1)
    assert out.sum("regression") == pytest.approx(plain.sum("regression") + 0.5 * (1.0 - cosine).sum(), rel=1e-5)
    assert float(plain.losses.metrics["regression_cosine"].sum) == pytest.approx(cosine.sum(), rel=1e-4)


def test_input_noise_follows_the_key_and_leaves_the_target_clean(params: Any, packed: Arrays) -> None:
    forward = forward_of(tiny.task(dataclasses.replace(tiny.CONFIG.objective, visual_input_noise=0.5)))
    first, again, other = forward(params, packed, 0), forward(params, packed, 0), forward(params, packed, 1)
    np.testing.assert_array_equal(first.hidden, again.hidden)
    assert np.abs(first.hidden[0, 2] - other.hidden[0, 2]).max() > 1e-3
    np.testing.assert_array_equal(first.hidden[0, :2], other.hidden[0, :2])  # <s> [IMG] have seen no picture
    np.testing.assert_array_equal(first.embeddings, other.embeddings)
    # `embeddings` are the encoder's own: the loop regresses the noisy hidden states to them.
    expected = losses_element_by_element(packed, first, params)["regression"][0]
    assert first.sum("regression") == pytest.approx(expected, rel=1e-5)


def test_without_input_noise_the_key_changes_nothing(
    params: Any, forward: Callable[..., Forward], packed: Arrays
) -> None:
    np.testing.assert_array_equal(forward(params, packed, 0).hidden, forward(params, packed, 1).hidden)


def test_encoded_images_carry_no_gradient(params: Any) -> None:
    images = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    encoder = jax.tree.map(jnp.asarray, params["visual_encoder"])
    gradient = jax.jit(jax.grad(lambda p: emu2.encode_images(tiny.CONFIG.model, p, images).sum()))(encoder)
    assert largest(gradient) == 0.0


@pytest.mark.parametrize("image_slots", [0, 1, 3])
@pytest.mark.parametrize("regression_loss_weight", [0.0, 1.0])
@pytest.mark.parametrize("frozen", [(), ("visual_encoder",)])
def test_model_flops_are_those_of_the_traced_program(
    image_slots: int, regression_loss_weight: float, frozen: tuple[Any, ...]
) -> None:
    """Each part's forward pass is counted in its jaxpr; training costs three of them; causal attention counts half."""
    objective = ObjectiveConfig(regression_loss_weight=regression_loss_weight, vocab_block_positions=8)
    task = tiny.task(objective, OptimizerConfig(frozen=frozen))
    shape = dataclasses.replace(tiny.ROW_SHAPE, image_slots=image_slots)
    arrays = batch_shapes(2, shape)
    batch = {name: jax.ShapeDtypeStruct(dims, dtype) for name, (dims, dtype) in arrays.items()}
    params = jax.eval_shape(task.init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))

    encoder = metrics.count_flops(task.visual_embeddings, params, batch)
    everything = metrics.count_flops(task.losses, params, batch, key)
    language = tiny.CONFIG.model.language
    full_attention = 2 * 2 * language.num_layers * 2 * shape.length**2 * language.width  # scores and mixing, 2 rows
    unused_projection = 0 if image_slots else 2 * 2 * 16 * 32  # `project_up` of the one row that nothing reads
    decoder = everything - encoder - full_attention // 2 - unused_projection
    expected = (1 if frozen else 3) * encoder + 3 * decoder
    assert task.model_flops({name: dims for name, (dims, _) in arrays.items()}) == expected


def test_a_traced_training_step_costs_three_forward_passes() -> None:
    """Up to what needs no gradient (the patches) and scores that are computed again; "three" is not taken on trust."""
    task = tiny.task(ObjectiveConfig(vocab_block_positions=None))
    batch = {name: jax.ShapeDtypeStruct(dims, dtype) for name, (dims, dtype) in batch_shapes(2, tiny.ROW_SHAPE).items()}
    params, key = jax.eval_shape(task.init, jax.random.key(0)), jax.eval_shape(lambda: jax.random.key(0))

    def total(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.asarray(sum(term.sum for term in task.losses(params, batch, key).terms.values()))

    forward = metrics.count_flops(total, params, batch, key)
    backward_and_forward = metrics.count_flops(jax.grad(total), params, batch, key)
    patches = 2 * (2 * 2 * 16) * (2 * 2 * 3) * 16
    scores = 2 * (2 * 24 * 24) * 32 * tiny.CONFIG.model.language.num_layers
    visual_scores = 2 * (2 * 2 * 17 * 17) * 16 * tiny.CONFIG.model.vision.num_layers
    assert backward_and_forward == 3 * forward - patches + scores + visual_scores


def test_bfloat16_with_recomputation_stays_close_and_sums_in_float32(
    params: Any, forward: Callable[..., Forward], packed: Arrays
) -> None:
    """As the 37B recipes compute: bfloat16 products, a frozen bfloat16 encoder, every layer recomputed."""
    model = dataclasses.replace(tiny.CONFIG.model, compute_dtype="bfloat16", remat="full")
    optimizer = OptimizerConfig(frozen=("visual_encoder",))
    config = dataclasses.replace(tiny.CONFIG, model=model, optimizer=optimizer)
    task = PretrainTask(config, image_start_id=tiny.IMAGE_START, image_end_id=IMAGE_END)
    trained = jax.tree.map(jnp.asarray, params)
    encoder = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained.pop("visual_encoder"))

    def total(trained: Any) -> tuple[jax.Array, Losses]:
        losses = task.losses({**trained, "visual_encoder": encoder}, as_jax(packed), jax.random.key(0))
        return jnp.asarray(sum(term.sum for term in losses.terms.values())), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(trained)
    exact = forward(params, packed)
    for name, term in losses.terms.items():
        assert term.sum.dtype == term.weight.dtype == jnp.float32
        assert float(term.sum) == pytest.approx(exact.sum(name), rel=0.05)
    assert np.isfinite(largest(gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
