"""Weights under diffusers' names: in, out, and a U-Net made for another condition as Emu2's decoder."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import diffusers_goldens as goldens
import jax
import numpy as np
import pytest
from diffusers_goldens import CASES
from tiny import random_parameters
from tiny_weights import MODEL, save

from emu2_jax.config import DecoderConfig, UNetConfig, VAEConfig
from emu2_jax.diffusion.vae import init_vae
from emu2_jax.errors import WeightsError
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.diffusers_config import (
    decoder_config,
    schedule_settings,
    scheduler_json,
    unet_config,
    unet_json,
    vae_config,
    vae_json,
)
from emu2_jax.weights.diffusers_model import from_diffusers
from emu2_jax.weights.diffusers_weights import (
    CONDITION,
    POOLED,
    fit_condition,
    load_unet,
    load_vae,
    unet_table,
    vae_table,
)
from emu2_jax.weights.parameters import read, whole
from emu2_jax.weights.state_dict import flatten, to_state_dict

EMU2 = CASES["unet_sdxl"].unet  # condition 6 wide, pooled to 6; six micro-conditions 4 wide
#: The same U-Net as SDXL-base is to Emu2's: the condition wider, the pooled one narrower than it.
BASE = dataclasses.replace(EMU2, cross_attention_width=9, pooled_width=5)
VAE = CASES["vae"].vae


def state_dict_of(config: UNetConfig) -> dict[str, np.ndarray]:
    return goldens.weights(goldens.official_shapes(unet_table(config)), small=False)


@pytest.mark.parametrize("config", [VAE, VAEConfig()], ids=["tiny", "sdxl"])
def test_every_vae_parameter_has_its_row(config: VAEConfig) -> None:
    shapes = flatten(jax.eval_shape(lambda key: init_vae(config, key), jax.random.key(0)))
    rows = {row.path.removeprefix("vae/"): row.layout.our_shape for row in vae_table(config).rows}
    assert rows == {path: leaf.shape for path, leaf in shapes.items()}


def test_round_trips_keep_every_bit() -> None:
    for table, state_dict in (
        (unet_table(EMU2), state_dict_of(EMU2)),
        (vae_table(VAE), goldens.weights(goldens.official_shapes(vae_table(VAE)), small=False)),
    ):
        params = load_unet(state_dict, EMU2) if table.form == "unet" else load_vae(state_dict, VAE)
        back = to_state_dict({table.form: params}, table)
        assert set(back) == set(state_dict)
        for name, array in state_dict.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name, strict=True)


def test_a_unet_for_another_condition_becomes_emu2s() -> None:
    base = state_dict_of(BASE)
    with pytest.raises(WeightsError, match=r"of another shape: .*attn2\.to_k\.weight is 8 x 9, wanted 8 x 6"):
        load_unet(base, EMU2)
    fitted = fit_condition(base, EMU2, jax.random.key(0), source="sdxl-base")
    # Two transformers at the lower level (bottom and way up have three more) of two layers, a key and a value each.
    assert len(fitted.redrawn) == (1 + 1 + 2) * 2 * 2 + 1
    assert fitted.notes == (
        f"sdxl-base: {POOLED} reads a pooled condition 5 wide, this U-Net's is 6: these inputs are drawn anew, the 24 "
        "of the micro-conditions kept",
        "sdxl-base: its cross-attention reads a condition 9 wide, this U-Net's 6: 16 tensors (*.attn2.to_k, "
        "*.attn2.to_v) are drawn anew",
        f"sdxl-base: the other {len(base) - 17} tensors are taken as they are",
    )
    load_unet(fitted.tensors, EMU2)
    for name, array in fitted.tensors.items():
        if name == POOLED:
            np.testing.assert_array_equal(array[:, 6:], base[name][:, 5:])
            drawn = array[:, :6]
        elif name in fitted.redrawn:
            drawn = array
        else:
            np.testing.assert_array_equal(array, base[name], err_msg=name, strict=True)
            continue
        assert drawn.shape[1] == 6 and 0.1 < drawn.std() < 0.6, name  # 1 / sqrt(fan-in) is 0.41, or 0.18
    again = fit_condition(base, EMU2, jax.random.key(0)).tensors
    other = fit_condition(base, EMU2, jax.random.key(1)).tensors
    name = next(name for name in fitted.redrawn if name != POOLED)
    np.testing.assert_array_equal(fitted.tensors[name], again[name])
    assert (fitted.tensors[name] != other[name]).all()


def test_a_unet_that_fits_is_left_alone_and_another_misfit_is_refused() -> None:
    own = state_dict_of(EMU2)
    fitted = fit_condition(own, EMU2, jax.random.key(0))
    assert (fitted.notes, fitted.redrawn) == ((), ())
    assert all(fitted.tensors[name] is array for name, array in own.items())
    wide = state_dict_of(dataclasses.replace(BASE, in_channels=9))
    with pytest.raises(
        WeightsError, match=r"1 of another shape: conv_in\.weight is 4 x 9 x 3 x 3, wanted 4 x 4 x 3 x 3$"
    ):
        load_unet(fit_condition(wide, EMU2, jax.random.key(0)).tensors, EMU2)


def test_the_converter_fits_files_alike(tmp_path: Path) -> None:
    """`emu2 convert` reads in slices; what it draws and keeps is what `fit_condition` gives for arrays."""
    base, decoder = state_dict_of(BASE), DecoderConfig(unet=EMU2, vae=VAE)
    vae = goldens.weights(goldens.official_shapes(vae_table(VAE)), small=False)
    files = [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("unet", base), ("vae", vae))]
    sources = [Source.open(f"unet={files[0]}"), Source.open(str(files[1]))]
    assert sources[1].form == "vae"
    imported = import_weights(sources, ["visual_encoder", "unet", "vae"], MODEL, decoder, seed=3)
    fitted = fit_condition(base, EMU2, jax.random.key(3), source=str(files[0]))
    assert imported.notes == [f"{files[0]}: unet taken (unet)", *fitted.notes, f"{files[1]}: vae taken (vae)"]
    wanted = flatten({"unet": load_unet(fitted.tensors, EMU2), "vae": load_vae(files[1], VAE)})
    assert set(wanted) == set(imported.parameters)
    for path, array in wanted.items():
        parameter = imported.parameters[path]
        np.testing.assert_array_equal(read(parameter, whole(parameter.shape)), array, err_msg=path)


def test_the_real_widths() -> None:
    """SDXL-base to Emu2's decoder by shapes alone: 140 cross-attention products and one other differ, no more."""
    sdxl = {
        row.path: row.layout.stored_shape
        for row in unet_table(UNetConfig(cross_attention_width=2048, pooled_width=1280)).rows
    }
    ours = {row.path: row for row in unet_table(UNetConfig()).rows}
    different = [name for path, row in ours.items() if sdxl[path] != row.layout.stored_shape for name in row.names]
    assert POOLED in different
    assert len(different) == 2 * (2 * (2 + 3) + 10 * (2 + 1 + 3)) + 1 == 141
    assert all(name == POOLED or re.fullmatch(CONDITION, name) for name in different)


def test_numbers_that_are_not_finite_are_named() -> None:
    state_dict = state_dict_of(EMU2)
    state_dict["mid_block.resnets.1.conv2.weight"][0, 0, 0, 0] = np.nan
    with pytest.raises(WeightsError, match=r"^unet: mid_block\.resnets\.1\.conv2\.weight holds numbers"):
        load_unet(state_dict, EMU2)
    vae = goldens.weights(goldens.official_shapes(vae_table(VAE)), small=False)
    vae["decoder.conv_in.bias"][0] = np.inf
    with pytest.raises(WeightsError, match=r"^vae: decoder\.conv_in\.bias holds numbers that are not finite"):
        load_vae(vae, VAE)


#: The files of SDXL-base, of Emu2-Gen's decoder where they differ from it, and of Stable Diffusion 2.1.
SDXL_FILE: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
EMU2_FILE = SDXL_FILE | {"cross_attention_dim": 1792, "projection_class_embeddings_input_dim": 3328}
SD2_FILE: dict[str, Any] = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": False,
    "upcast_attention": True,
    "use_linear_projection": True,
}
VAE_FILE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": True,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SCHEDULER_FILE: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_the_files_of_the_releases() -> None:
    assert decoder_config(EMU2_FILE, VAE_FILE, SCHEDULER_FILE) == DecoderConfig()
    assert unet_config(SDXL_FILE) == UNetConfig(cross_attention_width=2048, pooled_width=1280)
    sd2 = unet_config(SD2_FILE)
    assert (sd2.transformer_layers_per_block, sd2.mid_transformer_layers, sd2.micro_conditions) == (
        (1, 1, 1, 0),
        1,
        False,
    )
    assert (sd2.num_attention_heads, sd2.cross_attention_width) == ((5, 10, 20, 20), 1024)


@pytest.mark.parametrize("config", [UNetConfig(), EMU2, BASE, CASES["unet_sd2"].unet])
def test_a_config_goes_out_and_comes_back(config: UNetConfig) -> None:
    decoder = DecoderConfig(unet=config, vae=VAE, latent_factor=2, prediction="v_prediction", zero_terminal_snr=True)
    files = (unet_json(config), vae_json(VAE, 0.13025), scheduler_json(decoder))
    back = decoder_config(*(json.loads(json.dumps(file)) for file in files))
    unread = {} if config.micro_conditions else {"time_id_width": config.time_id_width}
    assert dataclasses.replace(back, unet=dataclasses.replace(back.unet, **unread)) == decoder


@pytest.mark.parametrize(
    ("read", "file", "change", "message"),
    [
        (unet_config, SDXL_FILE, {"use_linear_projection": False}, "got False; only True can be computed here"),
        (unet_config, SDXL_FILE, {"resnet_time_scale_shift": "scale_shift"}, "only 'default' can be computed here"),
        (unet_config, SDXL_FILE, {"only_cross_attention": [True, False, False]}, "only False can be computed here"),
        (unet_config, SDXL_FILE, {"num_attention_heads": 8}, "got 8; only None can be computed here"),
        (unet_config, SDXL_FILE, {"down_block_types": ["DownBlock2D"] * 2}, "wanted 3 of DownBlock2D and Cross"),
        (unet_config, SDXL_FILE, {"up_block_types": ["UpBlock2D"] * 3}, "attention at the levels where"),
        (unet_config, SDXL_FILE, {"transformer_layers_per_block": [1, 2]}, "wanted a number, or 3 of them"),
        (unet_config, SDXL_FILE, {"addition_embed_type": "image"}, "wanted text_time or none"),
        (unet_config, SDXL_FILE, {"projection_class_embeddings_input_dim": 1536}, "more than 6 x addition_time"),
        (unet_config, SDXL_FILE, {"gated_layers": 3}, "this setting is not known here"),
        (vae_config, VAE_FILE, {"use_quant_conv": False}, "only True can be computed here"),
        (vae_config, VAE_FILE, {"shift_factor": 0.1}, "only None can be computed here"),
        (vae_config, VAE_FILE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "wanted 4 of DownEncoderBlock2D"),
        (schedule_settings, SCHEDULER_FILE, {"beta_schedule": "linear"}, "only 'scaled_linear' can be computed"),
        (schedule_settings, SCHEDULER_FILE, {"use_karras_sigmas": True}, "only False can be computed here"),
        (schedule_settings, SCHEDULER_FILE, {"timestep_spacing": "odd"}, "wanted leading, trailing or linspace"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_cannot_be_computed_is_refused_by_name(read: Any, file: Any, change: dict[str, Any], message: str) -> None:
    (name,) = change
    with pytest.raises(WeightsError) as error:
        read(file | change)
    assert f" config: {name}: " in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(EMU2_FILE))
    assert unet_config(path) == UNetConfig()
    for text in ("[1]", "{"):
        path.write_text(text)
        with pytest.raises(WeightsError, match=r"config\.json: is no config\.json"):
            unet_config(path)


def test_the_interface_adds_noise_samples_and_gives_gradients_by_name() -> None:
    case = CASES["unet_sdxl"]
    vae = goldens.weights(goldens.official_shapes(vae_table(VAE)), small=False)
    model = from_diffusers(
        unet=state_dict_of(case.unet), unet_config=unet_json(case.unet), vae=vae, vae_config=vae_json(VAE, 0.5)
    )
    batch = goldens.inputs(case)
    clean, noise, condition, time_ids = (batch[name] for name in ("latents", "cotangent", "condition", "time_ids"))
    timesteps = np.array([0, 999])
    noisy = np.asarray(model.add_noise(clean, noise, timesteps))
    share = np.array([0.99915, 0.0046600])[:, None, None, None]
    np.testing.assert_allclose(noisy, np.sqrt(share) * clean + np.sqrt(1 - share) * noise, atol=1e-5)
    predicted = np.asarray(model.forward(noisy, timesteps, condition, time_ids=time_ids))
    loss, gradients = model.loss_and_gradients(clean, noise, timesteps, condition, time_ids=time_ids)
    assert loss == pytest.approx(np.square(predicted - noise).mean(), rel=1e-5)
    assert {name: x.shape for name, x in gradients.items()} == goldens.official_shapes(case.table)
    np.testing.assert_allclose(
        gradients["conv_out.bias"], 2 * (predicted - noise).sum((0, 2, 3)) / noise.size, rtol=1e-3, atol=1e-5
    )
    assert model.config.latent_scale == 0.5
    images = np.zeros((1, 3, 8, 4), np.float32)
    latents = model.encode(images)
    assert (latents.shape, model.decode(latents).shape) == ((1, 4, 4, 2), images.shape)
    with pytest.raises(WeightsError, match=r"^vae, vae_config: got one without the other"):
        from_diffusers(unet=state_dict_of(case.unet), unet_config=unet_json(case.unet), vae=vae)


def test_random_parameters_of_a_vae_go_out_under_official_names() -> None:
    params = random_parameters(lambda key: init_vae(VAE, key))
    names = to_state_dict({"vae": params}, vae_table(VAE))
    kernel = params["encoder"]["down_blocks"]["0"]["downsamplers"]["0"]["conv"]["kernel"]
    assert names["encoder.down_blocks.0.downsamplers.0.conv.weight"][3, 1, 2, 0] == kernel[2, 0, 1, 3]
    to_q = params["decoder"]["mid_block"]["attentions"]["0"]["to_q"]["kernel"]
    assert names["decoder.mid_block.attentions.0.to_q.weight"][5, 2] == to_q[2, 5]
