"""The model under official names: what the packed trainer computes, and true gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny_weights import MODEL

from emu2_jax import weights
from emu2_jax.errors import WeightsError
from emu2_jax.models import eva_vit
from emu2_jax.weights.names import official_shapes, table
from emu2_jax.weights.native import NativeModel
from emu2_jax.weights.state_dict import to_state_dict

IDS = {"image_start_id": tiny.IMAGE_START, "image_end_id": tiny.IMAGE_END, "image_id": tiny.IMAGE}


@pytest.fixture(scope="module")
def state_dict(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return to_state_dict(params, table("emu2", MODEL))


@pytest.fixture(scope="module")
def model(state_dict: dict[str, np.ndarray]) -> NativeModel:
    return weights.from_native(state_dict, MODEL, **IDS)


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Two rows of one document each, of one and two images; the first row is padded at its end."""
    return tiny.pack([[[1, tiny.PICTURE, 5, 6, 2]], [[1, 7, tiny.PICTURE, 8, tiny.PICTURE, 9, 2]]])


def pixels_of(batch: dict[str, Any]) -> np.ndarray:
    """The images in the order of the tokens, normalised, colours first."""
    images = batch["images"][batch["image_mask"]]
    return np.asarray(eva_vit.normalize(jax.numpy.asarray(images))).transpose(0, 3, 1, 2)


def test_it_is_the_trainer_s_model(model: NativeModel, batch: dict[str, Any], params: dict[str, Any]) -> None:
    task = tiny.task()
    arguments = (batch["tokens"], pixels_of(batch), batch["segment_ids"])
    real = batch["segment_ids"] > 0
    params, batch = jax.tree.map(jax.numpy.asarray, (params, batch))
    embeddings = jax.jit(task.visual_embeddings)(params, batch)
    hidden = jax.jit(task.hidden)(params, batch, embeddings)
    np.testing.assert_allclose(model.hidden_states(*arguments)[real], hidden[real], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        model.logits(*arguments)[real], hidden[real] @ params["language_model"]["head"], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        model.predicted_embeddings(*arguments)[real],
        hidden[real] @ params["project_down"]["kernel"],
        rtol=1e-4,
        atol=1e-4,
    )
    encoded = model.encode_image(pixels_of(batch))
    np.testing.assert_allclose(encoded[0], embeddings[0, :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoded[2], embeddings[1, 4:], rtol=1e-5, atol=1e-5)
    terms = jax.jit(task.losses)(params, batch, jax.random.key(0)).terms
    wanted = {name: float(term.sum / term.weight) for name, term in terms.items()}
    assert model.losses(*arguments) == pytest.approx(wanted, rel=1e-5)


def test_padding_may_stand_on_the_left(model: NativeModel, batch: dict[str, Any]) -> None:
    """As the release pads: positions count from the first element that is not padding."""
    length = int((batch["segment_ids"][0] > 0).sum())
    padding = batch["tokens"].shape[1] - length
    tokens = np.roll(batch["tokens"][:1], padding, axis=1)
    mask = np.roll(batch["segment_ids"][:1], padding, axis=1)
    pixels = pixels_of(batch)[:1]
    right = model.hidden_states(batch["tokens"][:1], pixels, batch["segment_ids"][:1])[0, :length]
    left = model.hidden_states(tokens, pixels, mask)[0, padding:]
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def test_gradients_are_slopes_under_the_names_given(
    state_dict: dict[str, np.ndarray], batch: dict[str, Any], model: NativeModel
) -> None:
    """Along one random direction, against a central difference in the state dict itself."""
    given = dict(state_dict)
    given["vl_adapter.projection.weight"] = given.pop("decoder.lm.project_up.weight")
    arguments = (batch["tokens"], pixels_of(batch), batch["segment_ids"])
    coefficients = {"text": 0.5, "regression": 2.0}
    mine = weights.from_native(given, MODEL, **IDS)
    losses, gradients = mine.losses_and_gradients(*arguments, **coefficients)
    assert losses == pytest.approx(model.losses(*arguments), rel=1e-5)
    assert {name: g.shape for name, g in gradients.items()} == {name: array.shape for name, array in given.items()}

    # The target of the regression carries no gradient: a difference would see it move with the encoder, so the
    # encoder's own slope is taken on the text loss alone.
    rng = np.random.default_rng(0)
    for names, weights_of_terms in (
        ([name for name in given if not name.startswith("visual.")], coefficients),
        (list(given), {"text": 1.0, "regression": 0.0}),
    ):
        direction = {name: rng.normal(size=given[name].shape).astype(np.float32) * 1e-3 for name in names}
        _, gradients = mine.losses_and_gradients(*arguments, **weights_of_terms)

        def total(sign: float, direction: Any = direction, terms: Any = weights_of_terms) -> float:
            moved = {name: array + sign * direction.get(name, np.float32(0)) for name, array in given.items()}
            values = weights.from_native(moved, MODEL, **IDS).losses(*arguments)
            return sum(terms[name] * value for name, value in values.items())

        slope = (total(1.0) - total(-1.0)) / 2
        predicted = sum(float((gradients[name] * direction[name]).sum()) for name in names)
        assert predicted == pytest.approx(slope, rel=0.02, abs=1e-5)


def test_one_loss_at_a_time(model: NativeModel, batch: dict[str, Any]) -> None:
    arguments = (batch["tokens"], pixels_of(batch), batch["segment_ids"])
    _, regression = model.losses_and_gradients(*arguments, text=0.0)
    assert not regression["decoder.lm.lm_head.weight"].any()
    assert regression["decoder.lm.project_down.weight"].any() and regression["visual.cls_token"].any()
    _, text = model.losses_and_gradients(*arguments, regression=0.0)
    assert not text["decoder.lm.project_down.weight"].any() and text["decoder.lm.lm_head.weight"].any()


def test_text_alone(model: NativeModel) -> None:
    losses = model.losses(np.array([[1, 5, 6, 2]]))
    assert losses["text"] > 0 and losses["regression"] == 0
    half = model.losses(np.array([[1, 5, 6, 2]]), loss_weights=np.array([[1, 1, 0, 0]]))
    assert half["text"] != losses["text"]


def test_what_does_not_fit(model: NativeModel, state_dict: dict[str, np.ndarray]) -> None:
    with pytest.raises(WeightsError, match=r"tokens: 2 of them are <image> \(37\); wanted 4, 4 for each of 1 images"):
        model.hidden_states(np.array([[1, 35, 37, 37, 36]]), np.zeros((1, 3, 8, 8)))
    deeper = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, num_layers=3))
    layers = r"it has 2 layers decoder\.lm\.model\.layers\.N, the config 3"
    with pytest.raises(WeightsError, match=rf"state dict: .*{layers}; 9 missing: decoder\.lm\.model\.layers\.2\."):
        weights.from_native(state_dict, deeper, **IDS)


def test_the_hugging_face_form_too(params: dict[str, Any], model: NativeModel, batch: dict[str, Any]) -> None:
    other = weights.from_native(to_state_dict(params, table("emu2_hf", MODEL)), MODEL, form="emu2_hf", **IDS)
    arguments = (batch["tokens"], pixels_of(batch), batch["segment_ids"])
    (losses, gradients), (native_losses, native) = (m.losses_and_gradients(*arguments) for m in (other, model))
    assert losses == native_losses
    assert gradients.keys() == official_shapes("emu2_hf", MODEL).keys()
    np.testing.assert_array_equal(gradients["project_up.weight"], native["decoder.lm.project_up.weight"])
