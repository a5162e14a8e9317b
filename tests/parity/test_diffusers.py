"""U-Nets, VAE, schedules and the sampling loop against diffusers', in float32."""

from __future__ import annotations

import dataclasses

import diffusers_goldens as goldens
import goldens as comparison
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_goldens import CASES, SAMPLE_ATOL, Case
from diffusers_references import DDPMScheduler, EulerDiscreteScheduler, build, compute_snr, golden

from emu2_jax.config import DecoderConfig, UNetConfig, VAEConfig
from emu2_jax.diffusion import schedule
from emu2_jax.diffusion.decoder import alpha_bars
from emu2_jax.weights.diffusers_config import decoder_config, scheduler_json, unet_json, vae_json
from emu2_jax.weights.diffusers_model import from_diffusers

#: Group counts, head widths and depths of the real networks, which the small cases of the goldens have not. At least
#: two channels to a group: alone in its group, a channel's bias before the norm does nothing, its gradient is rounding.
LARGER: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "sdxl_base",
            "unet",
            unet=UNetConfig(
                block_out_channels=(64, 64, 128),
                transformer_layers_per_block=(0, 2, 10),
                num_attention_heads=(1, 1, 2),
                cross_attention_width=96,
                pooled_width=40,
                time_id_width=32,
            ),
            small=False,
            size=(16, 8),
        ),
        Case(
            "stable_diffusion_2_1",
            "unet",
            unet=UNetConfig(
                block_out_channels=(64, 64, 128, 128),
                transformer_layers_per_block=(1, 1, 1, 0),
                mid_transformer_layers=1,
                num_attention_heads=(1, 1, 2, 2),
                cross_attention_width=48,
                micro_conditions=False,
            ),
            small=False,
            size=(16, 16),
        ),
        Case("sdxl_vae", "vae", vae=VAEConfig(block_out_channels=(64, 64, 128, 128)), small=False, size=(8, 4)),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_the_package_agrees_with_diffusers(name: str) -> None:
    assert goldens.failures(CASES[name], golden(CASES[name])) == []


@pytest.mark.parametrize("name", LARGER)
def test_it_does_at_the_real_head_widths_and_depths(name: str) -> None:
    assert goldens.failures(LARGER[name], golden(LARGER[name])) == []


@pytest.mark.parametrize("name", CASES)
def test_the_golden_file_is_what_diffusers_gives(name: str) -> None:
    """Up to rounding, which differs from one processor to the next."""
    case = CASES[name]
    stored, now = goldens.load(case), golden(case)
    assert set(stored.inputs) == set(now.inputs)
    for path, array in stored.inputs.items():
        np.testing.assert_array_equal(array, now.inputs[path], err_msg=path)
    if case.kind == "sample":
        np.testing.assert_allclose(stored.forward["sample"], now.forward["sample"], atol=SAMPLE_ATOL)
        return
    assert max(comparison.forward_differences(stored.forward, now.forward).values()) < 1
    if case.gradients:
        relative = comparison.gradient_differences(stored.gradients, now.gradients)
        assert max(relative.values()) < comparison.GRADIENT_RTOL


@pytest.mark.parametrize("num_steps", [7, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_timesteps_sigmas_and_initial_sigma(num_steps: int, spacing: schedule.Spacing, zero_terminal_snr: bool) -> None:
    config = DecoderConfig(timestep_spacing=spacing, zero_terminal_snr=zero_terminal_snr)
    reference = EulerDiscreteScheduler.from_config(scheduler_json(config))
    reference.set_timesteps(num_steps)
    steps = schedule.euler_steps(alpha_bars(config), num_steps, spacing)
    np.testing.assert_allclose(steps.timesteps, reference.timesteps, rtol=1e-7)
    # Above 1 (13 and, without a rest of signal, 4096) to 1e-5 of the value, for diffusers works in float32.
    np.testing.assert_allclose(steps.sigmas, reference.sigmas, rtol=1e-5, atol=1e-5)
    assert steps.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("num_steps", [7, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_euler_step_on_the_same_predictions(num_steps: int, prediction: schedule.Prediction) -> None:
    config = DecoderConfig(prediction=prediction)
    reference = EulerDiscreteScheduler.from_config(scheduler_json(config))
    reference.set_timesteps(num_steps)
    steps = schedule.euler_steps(alpha_bars(config), num_steps)
    random = np.random.RandomState(0)
    start = random.normal(size=(1, 4, 4, 4)).astype(np.float32) * np.float32(steps.init_noise_sigma)
    x, there = jnp.asarray(start), torch.from_numpy(start)
    for i, timestep in enumerate(reference.timesteps):
        predicted = random.normal(size=x.shape).astype(np.float32)
        sigma, next_sigma = jnp.asarray(steps.sigmas[i]), jnp.asarray(steps.sigmas[i + 1])
        scaled = schedule.scale_model_input(x, sigma)
        np.testing.assert_allclose(scaled, reference.scale_model_input(there, timestep), rtol=1e-5, atol=1e-5)
        x = schedule.euler_step(x, jnp.asarray(predicted), sigma, next_sigma, prediction)
        there = reference.step(torch.from_numpy(predicted), timestep, there).prev_sample
        np.testing.assert_allclose(x, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_what_training_adds_asks_and_weighs(zero_terminal_snr: bool) -> None:
    config = DecoderConfig(zero_terminal_snr=zero_terminal_snr)
    reference = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    timesteps = np.array([0, 1, 250, 500, 900, 998])
    clean, noise = np.random.RandomState(0).normal(size=(2, 6, 2, 2, 4)).astype(np.float32)
    there = [torch.from_numpy(x) for x in (clean, noise)] + [torch.from_numpy(timesteps)]
    alpha_bar = jnp.asarray(alpha_bars(config)[timesteps], jnp.float32)
    clean, noise = jnp.asarray(clean), jnp.asarray(noise)
    np.testing.assert_allclose(schedule.add_noise(clean, noise, alpha_bar), reference.add_noise(*there), atol=1e-5)
    np.testing.assert_allclose(
        schedule.target(clean, noise, alpha_bar, "v_prediction"), reference.get_velocity(*there), atol=1e-5
    )
    snr = compute_snr(reference, there[2]).numpy()
    np.testing.assert_allclose(schedule.signal_to_noise(alpha_bar), snr, rtol=2e-4)
    # The weights as diffusers' training scripts have them.
    for prediction, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        got = schedule.min_snr_weight(alpha_bar, 5.0, prediction)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, np.minimum(snr, 5.0) / divisor, rtol=2e-4)


def test_the_interface_takes_state_dicts_and_settings_as_they_are() -> None:
    """U-Net and VAE of diffusers, with their whole configs, v-prediction: forward, encode, decode, noise, the loop."""
    case = dataclasses.replace(CASES["sample_50"], num_steps=7)
    decoder = dataclasses.replace(case.decoder, vae=CASES["vae"].vae, latent_scale=0.7, prediction="v_prediction")
    unet, vae = build(case), build(CASES["vae"])
    vae.register_to_config(scaling_factor=0.7)
    scheduler = EulerDiscreteScheduler.from_config(scheduler_json(decoder))
    model = from_diffusers(
        unet=unet.state_dict(),
        unet_config=dict(unet.config),
        vae=vae.state_dict(),
        vae_config=dict(vae.config),
        scheduler_config=dict(scheduler.config),
    )
    batch = {name: torch.from_numpy(array) for name, array in goldens.inputs(case).items()}
    images = torch.from_numpy(goldens.inputs(CASES["vae"])["images"])
    scheduler.set_timesteps(7)
    with torch.no_grad():
        added = {"text_embeds": batch["condition"].mean(1), "time_ids": batch["time_ids"]}
        predicted = unet(batch["latents"], 10, batch["condition"], added_cond_kwargs=added).sample
        latents = vae.encode(images).latent_dist.mean * 0.7
        image = vae.decode(latents / 0.7).sample
        x = batch["latents"] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            velocity = unet(scaled, t, batch["condition"], added_cond_kwargs=added).sample
            x = scheduler.step(velocity, t, x).prev_sample
    close = {"rtol": 1e-4, "atol": 3e-5}
    time_ids = batch["time_ids"]
    got = model.forward(batch["latents"], 10, batch["condition"], time_ids=time_ids)
    np.testing.assert_allclose(got, predicted, **close)
    np.testing.assert_allclose(model.encode(images), latents, **close)
    np.testing.assert_allclose(model.decode(latents), image, **close)
    got = model.sample(batch["latents"], batch["condition"], time_ids=time_ids, num_steps=7)
    np.testing.assert_allclose(got, x, atol=SAMPLE_ATOL)


@pytest.mark.parametrize("case", [*CASES.values(), *LARGER.values()], ids=lambda case: case.name)
def test_settings_come_back_through_diffusers(case: Case) -> None:
    """Ours to config.json, through diffusers, and back."""
    if "wide" in case.name:
        with pytest.raises(Exception, match="epsilon: got"):
            unet_json(case.unet) if case.kind == "unet" else vae_json(case.vae, 1.0)
        return
    module = build(case)
    if case.kind == "vae":
        unet = unet_json(CASES["unet_sdxl"].unet)
        assert decoder_config(unet, dict(module.config)).vae == case.vae
    else:
        unread = {} if case.unet.micro_conditions else {"time_id_width": case.unet.time_id_width}
        read = decoder_config(dict(module.config)).unet
        assert dataclasses.replace(read, **unread) == case.unet
