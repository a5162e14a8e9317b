"""Parameters read in parts: any slice equals the slice of the whole, whatever the block."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_weights import BFLOAT16, CLIP_FORMS, CLIP_MODEL, MODEL, model_of, save, save_form

from emu2_jax.errors import WeightsError
from emu2_jax.models.eva_vit import resize_position_embedding
from emu2_jax.weights import parameters as parameters_lib
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.layout import Index
from emu2_jax.weights.names import FORMS, Form, table
from emu2_jax.weights.parameters import ComputedParameter, grid, read, whole
from emu2_jax.weights.state_dict import flatten, to_state_dict

PARTS = ("visual_encoder", "project_up", "language_model", "project_down")


def halves(shape: tuple[int, ...]) -> list[Index]:
    """All combinations of two uneven halves of every axis that has two elements."""
    axes = [[slice(0, n // 3 or 1), slice(n // 3 or 1, n)] if n > 1 else [slice(0, n)] for n in shape]
    return list(itertools.product(*axes))


def sharded(path: str, shape: tuple[int, ...]) -> list[Index]:
    """Parts that a mesh could ask for: an axis of several letters (the patch kernel's first) stays whole."""
    if path.endswith("patch_kernel"):
        return [(slice(0, shape[0]), part) for (part,) in halves(shape[1:])]
    return halves(shape)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("form", ["emu2_hf", *CLIP_FORMS])
def test_every_slice_is_the_slice_of_the_whole(
    tmp_path: Path,
    params: dict[str, Any],
    clip_params: dict[str, Any],
    form: Form,
    block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parameters_lib, "BLOCK_BYTES", block_bytes)
    own = clip_params if form in CLIP_FORMS else params
    source = Source.open(str(save_form(tmp_path / "x.safetensors", own, form)))
    imported = import_weights([source], PARTS, model_of(form)).parameters
    assert imported.keys() == flatten(own).keys()
    for path, wanted in flatten(own).items():
        parts = [(index, np.empty(wanted[index].shape, np.float32)) for index in sharded(path, wanted.shape)]
        imported[path].read_into(parts)
        for index, array in parts:
            np.testing.assert_array_equal(array, wanted[index], err_msg=path)


def test_the_grid_covers_everything_once() -> None:
    count = np.zeros((5, 4, 3), int)
    for index in grid((5, 4, 3), (2, 4, 2)):
        count[index] += 1
    assert (count == 1).all()


def test_casts_round_to_nearest(tmp_path: Path, params: dict[str, Any]) -> None:
    source = Source.open(str(save_form(tmp_path / "x.safetensors", params, "llama_hf")))
    head = import_weights([source], ["language_model"], MODEL).parameters["language_model/head"]
    got = read(head, whole(head.shape), BFLOAT16)
    np.testing.assert_array_equal(got, params["language_model"]["head"].astype(BFLOAT16), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_new_rows_of_the_vocabulary_are_the_mean_of_the_old(tmp_path: Path, params: dict[str, Any], dtype: Any) -> None:
    old = 41
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    state_dict = to_state_dict(cast, table("llama_hf", MODEL))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state_dict[name] = state_dict[name][:old]
    source = Source.open(str(save(tmp_path / "llama.safetensors", state_dict)))
    imported = import_weights([source], ["language_model"], MODEL)
    assert sum("has 41 rows; 7 are added at their mean" in note for note in imported.notes) == 2
    for path, axis in (("token_embedding", 0), ("head", 1)):
        mine = cast["language_model"][path]
        kept, lost = np.split(mine, [old], axis=axis)
        mean = kept.astype(np.float64).mean(axis, keepdims=True).astype(dtype)
        wanted = np.concatenate([kept, np.broadcast_to(mean, lost.shape)], axis=axis)
        parameter = imported.parameters[f"language_model/{path}"]
        np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), wanted, strict=True)
        for index in halves(parameter.shape):
            np.testing.assert_array_equal(read(parameter, index), wanted[index], strict=True)


def test_a_vocabulary_cannot_shrink(tmp_path: Path, params: dict[str, Any]) -> None:
    state_dict = to_state_dict(params, table("llama_hf", MODEL))
    state_dict["lm_head.weight"] = np.zeros((49, 32), np.float32)
    source = Source.open(str(save(tmp_path / "llama.safetensors", state_dict)))
    with pytest.raises(WeightsError, match=r"lm_head.weight is 49 x 32, wanted at most 48 x 32"):
        import_weights([source], ["language_model"], MODEL)


def test_positions_are_interpolated(tmp_path: Path, params: dict[str, Any]) -> None:
    state_dict = to_state_dict(params, table("eva_open_clip", MODEL))
    small = np.random.default_rng(0).normal(size=(1, 1 + 2 * 2, 16)).astype(np.float32)
    state_dict["visual.trunk.pos_embed"] = small
    state_dict["text.token_embedding.weight"] = np.zeros((3, 3), np.float32)
    state_dict["visual.trunk.head.weight"] = np.zeros((3, 16), np.float32)
    source = Source.open(str(save(tmp_path / "eva.safetensors", state_dict)))
    assert source.form == "eva_open_clip"
    imported = import_weights([source], PARTS, MODEL)
    assert "interpolated from 2 x 2 to 4 x 4 patches" in imported.notes[-1]
    assert sum("1 tensors skipped" in note for note in imported.notes) == 2
    parameter = imported.parameters["visual_encoder/position_embedding"]
    wanted = resize_position_embedding(jax.numpy.asarray(small[0]), 17)
    np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), wanted)
    np.testing.assert_array_equal(wanted[0], small[0, 0])


def test_positions_are_interpolated_as_eva_clip_does() -> None:
    """The values are PyTorch's: `F.interpolate(x, size=(4, 4), mode="bicubic", align_corners=False)` of 1 4 / 9 16."""
    small = jax.numpy.array([[0.0], [1.0], [4.0], [9.0], [16.0]])
    wanted = [
        [-0.1157, 0.7404, 2.1503, 3.0063],
        [2.4005, 3.6975, 5.8337, 7.1307],
        [6.5448, 8.5681, 11.9006, 13.9240],
        [9.0610, 11.5253, 15.5841, 18.0484],
    ]
    got = resize_position_embedding(small, 17)
    np.testing.assert_allclose(got[1:, 0].reshape(4, 4), wanted, atol=1e-4)
    np.testing.assert_allclose(resize_position_embedding(small, 5), small, atol=1e-6)


def test_positions_that_are_no_square(tmp_path: Path, params: dict[str, Any]) -> None:
    state_dict = to_state_dict(params, table("eva_timm", MODEL))
    state_dict["pos_embed"] = np.zeros((1, 7, 16), np.float32)
    source = Source.open(str(save(tmp_path / "eva.safetensors", state_dict)))
    with pytest.raises(WeightsError, match=r"pos_embed is 1 x 7 x 16, which is no position embedding of a square"):
        import_weights([source], PARTS, MODEL)


def test_sources_combine_and_do_not_overlap(tmp_path: Path, params: dict[str, Any]) -> None:
    llama = Source.open(str(save_form(tmp_path / "llama.safetensors", params, "llama_hf")))
    eva = Source.open(f"eva_timm={save_form(tmp_path / 'eva.safetensors', params, 'eva_timm')}")
    whole_model = Source.open(str(save_form(tmp_path / "emu2.safetensors", params, "emu2")))
    both = import_weights([llama, eva], PARTS, MODEL).parameters
    assert {path.split("/")[0] for path in both} == {"language_model", "visual_encoder"}
    with pytest.raises(WeightsError, match=r"emu2\.safetensors: holds visual_encoder, which .*eva\.safetensors"):
        import_weights([eva, whole_model], PARTS, MODEL)
    other = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, num_layers=7, vocab_size=9))
    decoder = import_weights([whole_model], ["visual_encoder", "unet"], other)  # its language model does not matter
    assert decoder.notes[1].endswith("21 tensors skipped: language_model, not a part of this model")
    assert {path.split("/")[0] for path in decoder.parameters} == {"visual_encoder"}
    with pytest.raises(WeightsError, match=r"form 'llama_hf' holds language_model; wanted any of visual_encoder, unet"):
        import_weights([llama], ["visual_encoder", "unet"], MODEL)


def test_forms_are_recognised_by_names_alone(
    tmp_path: Path, params: dict[str, Any], clip_params: dict[str, Any]
) -> None:
    for form in FORMS:
        if form not in ("unet", "vae"):
            own = clip_params if form in CLIP_FORMS else params
            assert Source.open(str(save_form(tmp_path / "x.safetensors", own, form))).form == form
    with pytest.raises(WeightsError, match=r"its names \(a, b\) are of none of the forms emu2, emu2_hf"):
        Source.open(str(save(tmp_path / "x.safetensors", {"a": np.zeros(1), "b": np.zeros(1)})))
    with pytest.raises(WeightsError, match="'emu3' is none of the forms"):
        Source.open("emu3=/somewhere")


TEXT_TOWERS: dict[Form, list[str]] = {
    "clip_hf": [
        "logit_scale",
        "text_projection.weight",
        "text_model.embeddings.token_embedding.weight",
        *(f"text_model.encoder.layers.{i}.{x}" for i in range(12) for x in ("mlp.fc1.weight", "layer_norm1.bias")),
    ],
    "clip_open_clip": [
        "logit_scale",
        "text_projection",
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.bias",
        "context_length",
        *(f"transformer.resblocks.{i}.{x}" for i in range(12) for x in ("mlp.c_fc.weight", "attn.in_proj_bias")),
    ],
}
HEADS = {
    "clip_hf": ["vision_model.embeddings.position_ids", "visual_projection.weight"],
    "clip_open_clip": ["visual.proj"],
}


@pytest.mark.parametrize("form", ["clip_hf", "clip_open_clip"])
def test_all_of_clip_comes_in_by_its_visual_encoder(tmp_path: Path, clip_params: dict[str, Any], form: Form) -> None:
    """The text tower and the head are known; so is the final norm, when the model has none."""
    vision = dataclasses.replace(CLIP_MODEL.vision, final_norm=False)
    extra = {name: np.zeros((3,), np.float32) for name in (*TEXT_TOWERS[form], *HEADS[form])}
    state_dict = to_state_dict(clip_params, table(form, CLIP_MODEL))
    source = Source.open(str(save(tmp_path / "clip.safetensors", {**extra, **state_dict})))
    assert source.form == form
    imported = import_weights([source], PARTS, dataclasses.replace(CLIP_MODEL, vision=vision))
    assert not any("final_norm" in path for path in imported.parameters)
    assert sum(int(note.split(": ")[1].split()[0]) for note in imported.notes[1:]) == len(extra) + 2
    for path, parameter in imported.parameters.items():
        np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), flatten(clip_params)[path])


@pytest.mark.parametrize("form", CLIP_FORMS)
def test_positions_of_clip_are_resized_too(tmp_path: Path, clip_params: dict[str, Any], form: Form) -> None:
    small = clip_params["visual_encoder"]["position_embedding"][:5]
    resized = {"visual_encoder": {**clip_params["visual_encoder"], "position_embedding": small}}
    vision = dataclasses.replace(CLIP_MODEL.vision, image_size=4)
    state_dict = to_state_dict(resized, table(form, dataclasses.replace(CLIP_MODEL, vision=vision)))
    source = Source.open(str(save(tmp_path / "clip.safetensors", state_dict)))
    parameter = import_weights([source], PARTS, CLIP_MODEL).parameters["visual_encoder/position_embedding"]
    wanted = resize_position_embedding(jax.numpy.asarray(small), 17)
    np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), wanted)


def test_computed_parameters_are_forgotten() -> None:
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(6.0).reshape(2, 3)

    parameter = ComputedParameter((2, 3), np.dtype(np.float64), compute)
    for _ in range(2):
        np.testing.assert_array_equal(read(parameter, (slice(0, 2), slice(1, 2))), [[1.0], [4.0]])
    parameter.release()
    read(parameter, whole((2, 3)))
    assert len(calls) == 2
