"""The name tables: every parameter has its row, shapes agree with the networks', round trips keep every bit."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny_weights import CLIP_FORMS, CLIP_MODEL, model_of

from emu2_jax.config import DecoderConfig, LanguageConfig, ModelConfig, UNetConfig, VisionConfig
from emu2_jax.diffusion.decoder import init_unet
from emu2_jax.errors import WeightsError
from emu2_jax.models import emu2
from emu2_jax.weights.names import FORMS, Form, official_shapes, table
from emu2_jax.weights.state_dict import flatten, resolve, to_params, to_state_dict

MODEL = tiny.CONFIG.model
UNET = UNetConfig(
    block_out_channels=(8, 16),
    transformer_layers_per_block=(0, 2),
    num_attention_heads=(1, 2),
    cross_attention_width=16,
    time_id_width=4,
    norm_groups=4,
)
DECODER = DecoderConfig(unet=UNET)


def shapes_of_emu2(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda key: emu2.init(model, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def shapes_of_unet(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda key: init_unet(decoder, key), jax.random.key(0))
    return {f"unet/{path}": leaf.shape for path, leaf in flatten(shapes).items()}


@functools.cache
def params_of(form: Form) -> dict[str, Any]:
    """Random parameters of the parts that a form holds, at the tiny size."""
    if form == "unet":
        return {"unet": tiny.random_parameters(lambda key: init_unet(DECODER, key))}
    model = model_of(form)
    params = tiny.random_parameters(lambda key: emu2.init(model, key))
    return {part: params[part] for part in table(form, model).parts}


@pytest.mark.parametrize("form", ["emu2", "emu2_hf"])
@pytest.mark.parametrize("model", [MODEL, ModelConfig()], ids=["tiny", "37b"])
def test_every_parameter_has_its_row(form: Form, model: ModelConfig) -> None:
    rows = table(form, model).rows
    assert {row.path: row.layout.our_shape for row in rows} == shapes_of_emu2(model)


@pytest.mark.parametrize("decoder", [DECODER, DecoderConfig()], ids=["tiny", "sdxl"])
def test_every_unet_parameter_has_its_row(decoder: DecoderConfig) -> None:
    rows = table("unet", ModelConfig(), decoder).rows
    assert {row.path: row.layout.our_shape for row in rows} == shapes_of_unet(decoder)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "vae"])
def test_round_trip_keeps_every_bit(form: Form, dtype: Any) -> None:
    model = model_of(form)
    rows = table(form, model, DECODER)
    params = jax.tree.map(lambda x: x.astype(dtype), params_of(form))
    state_dict = to_state_dict(params, rows)
    assert {name: array.shape for name, array in state_dict.items()} == official_shapes(form, model, DECODER)
    back = flatten(to_params(state_dict, rows))
    for path, array in flatten(params).items():
        assert back[path].dtype == dtype
        np.testing.assert_array_equal(back[path], array, err_msg=path, strict=True)


@pytest.mark.parametrize("form", FORMS)
def test_rows_cover_every_element_once(form: Form) -> None:
    """Of the parameters and of the stored tensors, also where several rows share one."""
    rows = table(form, model_of(form), DECODER)
    for path, pieces in rows.parameters.items():
        count = np.zeros(pieces[0].layout.layer_shape, int)
        for row in pieces:
            assert row.layout.layer_shape == count.shape
            count[row.layout.our_part] += 1
        assert (count == 1).all(), path
    for pieces in rows.tensors:
        count = np.zeros(pieces[0].layout.lengths, int)
        for row in pieces:
            assert row.layout.lengths == count.shape and row.aliases == pieces[0].aliases
            count[row.layout.stored_index(row.layout.our_part)] += 1
        assert (count == 1).all(), pieces[0].name


@pytest.mark.parametrize("form", CLIP_FORMS)
def test_every_parameter_of_clip_has_its_rows(form: Form) -> None:
    shapes = {path: x for path, x in shapes_of_emu2(CLIP_MODEL).items() if path.startswith("visual_encoder/")}
    assert {row.path: row.layout.our_shape for row in table(form, CLIP_MODEL).rows} == shapes


def test_where_elements_of_clip_go() -> None:
    """q, k and v apart in one naming, all and their biases together in the others."""
    attention = params_of("clip_hf")["visual_encoder"]["blocks"]["layers"]["attention"]
    apart = to_state_dict(params_of("clip_hf"), table("clip_hf", CLIP_MODEL))
    fused = to_state_dict(params_of("clip_hf"), table("clip_open_clip", CLIP_MODEL))
    timm = to_state_dict(params_of("clip_hf"), table("vit_timm", CLIP_MODEL))
    head_width, width = 8, 16
    for c, letter in enumerate("qkv"):
        own = 1 * head_width + 3  # head 1, channel 3
        name = f"vision_model.encoder.layers.1.self_attn.{letter}_proj"
        assert apart[f"{name}.weight"].shape == (width, width)
        np.testing.assert_array_equal(apart[f"{name}.weight"][own], attention["qkv"][1, :, c, 1, 3], strict=True)
        assert apart[f"{name}.bias"][own] == attention[f"{letter}_bias"][1, 1, 3]
        for name in ("visual.transformer.resblocks.1.attn.in_proj_", "blocks.1.attn.qkv."):
            tensors = fused if name.startswith("visual") else timm
            np.testing.assert_array_equal(tensors[f"{name}weight"][c * width + own], attention["qkv"][1, :, c, 1, 3])
            assert tensors[f"{name}bias"][c * width + own] == attention[f"{letter}_bias"][1, 1, 3]
            assert tensors[f"{name}bias"].shape == (3 * width,)


def test_a_part_of_a_parameter_or_of_a_tensor_may_be_missing_or_misshapen() -> None:
    """Each tensor is named once, however many parameters it is, and alone, whatever else fills its parameter."""
    shapes = official_shapes("clip_hf", CLIP_MODEL)
    del shapes["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    shapes["vision_model.encoder.layers.0.self_attn.v_proj.weight"] = (16, 15)
    with pytest.raises(WeightsError) as error:
        resolve(table("clip_hf", CLIP_MODEL), shapes, source="x")
    assert str(error.value) == (
        "x: does not hold the tensors of form 'clip_hf': 1 missing: "
        "vision_model.encoder.layers.1.self_attn.q_proj.weight; 1 of another shape: "
        "vision_model.encoder.layers.0.self_attn.v_proj.weight is 16 x 15, wanted 16 x 16"
    )
    shapes = official_shapes("vit_timm", CLIP_MODEL)
    del shapes["blocks.1.attn.qkv.bias"]
    shapes["blocks.0.attn.qkv.bias"] = (16,)
    with pytest.raises(WeightsError) as error:
        resolve(table("vit_timm", CLIP_MODEL), shapes, source="x")
    assert str(error.value) == (
        "x: does not hold the tensors of form 'vit_timm': 1 missing: blocks.1.attn.qkv.bias; "
        "1 of another shape: blocks.0.attn.qkv.bias is 16, wanted 48"
    )


def test_newer_files_of_clip_in_transformers_have_no_prefix() -> None:
    shapes = {name.removeprefix("vision_model."): x for name, x in official_shapes("clip_hf", CLIP_MODEL).items()}
    found = resolve(table("clip_hf", CLIP_MODEL), shapes, source="x").names
    assert {name for _, names in found for name in names} == shapes.keys()
    for layer in range(2, 5):
        shapes[f"encoder.layers.{layer}.layer_norm1.bias"] = (16,)
    with pytest.raises(WeightsError, match=r"it has 5 layers encoder\.layers\.N, the config 2"):
        resolve(table("clip_hf", CLIP_MODEL), shapes, source="x")


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"^model\.vision\.block_norm: is post, which no encoder of the CLIP family"):
        table("clip_hf", MODEL)
    with pytest.raises(
        WeightsError, match=r"^model\.vision\.k_bias: is False, which no encoder of the timm ViT family"
    ):
        table("vit_timm", MODEL)


def test_where_elements_go() -> None:
    """Written out by index, from how each side uses the array, for every layout that is more than a transpose."""
    state_dict = to_state_dict(params_of("emu2"), table("emu2", MODEL))
    ours = flatten(params_of("emu2"))
    heads, head_width, width = 2, 8, 16
    q, k, v = 0, 1, 2
    qkv = state_dict["visual.blocks.1.attn.qkv.weight"]  # torch: x @ W.T, then split into q, k, v, then into heads
    for which in (q, k, v):
        row = which * width + 1 * head_width + 3
        np.testing.assert_array_equal(
            qkv[row], ours["visual_encoder/blocks/layers/attention/qkv"][1, :, which, 1, 3], strict=True
        )
    bias = state_dict["visual.blocks.0.attn.v_bias"]
    assert bias[1 * head_width + 5] == ours["visual_encoder/blocks/layers/attention/v_bias"][0, 1, 5]
    out = state_dict["visual.blocks.0.attn.proj.weight"]
    assert out[4, 1 * head_width + 2] == ours["visual_encoder/blocks/layers/attention/out"][0, 1, 2, 4]
    patch = state_dict["visual.patch_embed.proj.weight"]  # torch: (out, colour, row, column)
    row, column, colour, side = 1, 0, 2, 2
    flat = (row * side + column) * 3 + colour
    assert patch[7, colour, row, column] == ours["visual_encoder/patch_kernel"][flat, 7]
    key = state_dict["decoder.lm.model.layers.1.self_attn.k_proj.weight"]  # 2 key/value heads of 8
    assert key.shape == (heads * head_width, 32)
    assert key[1 * 8 + 6, 30] == ours["language_model/blocks/layers/attention/k"][1, 30, 1, 6]
    unet = to_state_dict(params_of("unet"), table("unet", MODEL, DECODER))
    kernel = flatten(params_of("unet"))["unet/conv_in/kernel"]
    assert unet["conv_in.weight"][5, 3, 2, 1] == kernel[2, 1, 3, 5]


def test_the_two_forms_of_emu2_differ_in_prefix_and_projections() -> None:
    native, hugging_face = official_shapes("emu2", MODEL), official_shapes("emu2_hf", MODEL)
    assert {"decoder.lm.project_up.weight", "decoder.lm.project_down.weight", "visual.cls_token"} < native.keys()
    assert {"project_up.weight", "project_down.weight", "model.visual.cls_token"} < hugging_face.keys()
    assert hugging_face["project_up.weight"] == (32, 16)
    assert hugging_face["model.decoder.lm.lm_head.weight"] == (48, 32)
    assert len(native) == len(hugging_face)


def test_names_of_the_training_code_are_known() -> None:
    shapes = official_shapes("emu2", MODEL)
    shapes["vl_adapter.projection.weight"] = shapes.pop("decoder.lm.project_up.weight")
    shapes["decoder.lm.stu_regress_head.weight"] = shapes.pop("decoder.lm.project_down.weight")
    shapes["decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    resolution = resolve(table("emu2", MODEL), shapes, source="x.safetensors")
    assert ("vl_adapter.projection.weight",) in [names for _, names in resolution.names]
    assert list(resolution.skipped) == ["decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq"]


@pytest.mark.parametrize(
    ("form", "prefix"), [("eva_timm", ""), ("eva_clip", "visual."), ("eva_open_clip", "visual.trunk.")]
)
def test_what_emu2_does_not_take_of_eva_clip_is_known(form: Form, prefix: str) -> None:
    rows = table(form, MODEL)
    assert rows.skip_reason(f"{prefix}head.weight") and rows.skip_reason(f"{prefix}norm.bias")
    assert not rows.skip_reason(f"{prefix}blocks.0.attn.k_bias")
    assert bool(rows.skip_reason("text.transformer.resblocks.3.attn.in_proj_weight")) == bool(prefix)


def test_every_tensor_is_accounted_for() -> None:
    shapes = official_shapes("emu2", MODEL)
    del shapes["visual.cls_token"]
    shapes["visual.extra"] = (3,)
    shapes["decoder.lm.lm_head.weight"] = (47, 32)
    with pytest.raises(WeightsError) as error:
        resolve(table("emu2", MODEL), shapes, source="emu2.safetensors")
    assert str(error.value) == (
        "emu2.safetensors: does not hold the tensors of form 'emu2': 1 missing: visual.cls_token; 1 unexpected: "
        "visual.extra; 1 of another shape: decoder.lm.lm_head.weight is 47 x 32, wanted 48 x 32"
    )


def test_long_lists_are_cut() -> None:
    with pytest.raises(WeightsError, match=r"30 missing: .* and 24 more$"):
        resolve(table("emu2", MODEL).only(["visual_encoder"]), {}, source="x")


def test_llama_is_as_large_as_the_release_says() -> None:
    """`total_size` in the release's `llama_config/pytorch_model.bin.index.json`: float16, with rotary frequencies."""
    llama = ModelConfig(language=LanguageConfig(vocab_size=32000))
    count = sum(math.prod(shape) for shape in official_shapes("llama_hf", llama).values())
    frequencies = 60 * 64  # of each layer: half a head's width
    assert 2 * (count + frequencies) == 65_057_894_912


def test_the_official_sizes() -> None:
    """Sums over official shapes: SDXL's published counts, and the parts of Emu2 by hand."""
    vae = sum(math.prod(shape) for shape in official_shapes("vae", ModelConfig()).values())
    assert vae == 83_653_863  # as published for AutoencoderKL
    sdxl = DecoderConfig(unet=dataclasses.replace(UNetConfig(), cross_attention_width=2048))
    names = official_shapes("unet", ModelConfig(), sdxl)
    # SDXL conditions on 1280 pooled text channels where Emu2 has the width of its embeddings.
    pooled = (2048 - 1280) * 1280
    assert sum(math.prod(shape) for shape in names.values()) - pooled == 2_567_463_684
    assert len(official_shapes("emu2", ModelConfig())) == 4 + 64 * 13 + 3 + 60 * 9 + 2
    assert len(official_shapes("emu2", ModelConfig(vision=VisionConfig(num_layers=3)))) == 4 + 3 * 13 + 3 + 60 * 9 + 2
