"""diffusers' own networks, schedulers and sampling loop on the cases of `diffusers_goldens`."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers_goldens as goldens
import numpy as np
import references  # noqa: F401  (before diffusers looks for torchvision)
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from diffusers_goldens import Case
from goldens import Arrays, Golden

from emu2_jax.weights.diffusers_config import scheduler_json, unet_json, vae_json

__all__ = ["DDPMScheduler", "EulerDiscreteScheduler", "build", "compute_snr", "golden"]


def build(case: Case) -> torch.nn.Module:
    """The network of a case, in eval mode, with the case's weights, made from the config.json that we write for it."""
    if case.kind == "vae":
        epsilon = case.vae.norm_epsilon
        settings = vae_json(dataclasses.replace(case.vae, norm_epsilon=1e-6), 1.0)
        module: torch.nn.Module = AutoencoderKL.from_config(settings)
        _set_epsilon(module, "", epsilon)
    else:
        epsilon = case.unet.transformer_norm_epsilon
        module = UNet2DConditionModel.from_config(
            unet_json(dataclasses.replace(case.unet, transformer_norm_epsilon=1e-6))
        )
        _set_epsilon(module, "attentions", epsilon)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    drawn = goldens.weights(shapes, small=case.small)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()})
    return module.eval()


def _set_epsilon(module: torch.nn.Module, where: str, epsilon: float) -> None:
    """Another epsilon than diffusers' fixed 1e-6, for the cases that widen it."""
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.GroupNorm) and where in name:
            assert part.eps == 1e-6, name
            part.eps = epsilon


def golden(case: Case) -> Golden:
    """Run the reference of a case, forward and backward."""
    module, batch = build(case), goldens.inputs(case)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if case.kind == "sample":
        with torch.no_grad():
            outputs = {"sample": sample(module, case, tensors)}
        return Golden(params={}, inputs=batch, forward=_numpy(outputs), gradients={})
    loss, outputs = (run_vae if case.kind == "vae" else run_unet)(module, tensors)
    loss.backward()
    named = module.named_parameters() if case.gradients else ()
    gradients = {name: parameter.grad.numpy() for name, parameter in named}
    return Golden(params={}, inputs=batch, forward=_numpy(outputs), gradients=gradients)


Run = tuple[torch.Tensor, dict[str, torch.Tensor]]


def run_vae(vae: Any, batch: dict[str, torch.Tensor]) -> Run:
    posterior = vae.encode(batch["images"]).latent_dist
    drawn = posterior.mean + posterior.std * batch["noise"]
    image = vae.decode(batch["latents"]).sample
    loss = (drawn * batch["moments_cotangent"]).sum() + (image * batch["image_cotangent"]).sum()
    return loss, {"mean": posterior.mean, "log_variance": posterior.logvar, "drawn": drawn, "image": image}


def run_unet(unet: Any, batch: dict[str, torch.Tensor]) -> Run:
    predicted = predict(unet, batch["latents"], batch["timesteps"], batch["condition"], batch)
    return (predicted * batch["cotangent"]).sum(), {"predicted": predicted}


def predict(
    unet: Any, latents: torch.Tensor, timesteps: Any, condition: torch.Tensor, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    added = None
    if "time_ids" in batch:
        pooled = batch.get("pooled", condition.mean(1))
        time_ids = batch["time_ids"].repeat(len(latents) // len(batch["time_ids"]), 1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
    return unet(latents, timesteps, encoder_hidden_states=condition, added_cond_kwargs=added).sample


def sample(unet: Any, case: Case, batch: dict[str, torch.Tensor], guidance_scale: float = 3.0) -> torch.Tensor:
    """The loop of the release's decoder pipeline, [conditional, unconditional] in one batch."""
    scheduler = EulerDiscreteScheduler.from_config(scheduler_json(case.decoder))
    scheduler.set_timesteps(case.num_steps)
    latents = batch["latents"] * scheduler.init_noise_sigma
    condition = torch.cat([batch["condition"], batch["null"]])
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        wanted, null = predict(unet, scaled, timestep, condition, batch).chunk(2)
        latents = scheduler.step(null + guidance_scale * (wanted - null), timestep, latents).prev_sample
    return latents


def _numpy(outputs: dict[str, torch.Tensor]) -> Arrays:
    return {name: np.asarray(value.detach()) for name, value in outputs.items()}
