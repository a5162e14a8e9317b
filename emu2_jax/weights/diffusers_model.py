"""A latent diffusion model from diffusers' state dicts, to hold against the original: same inputs, same names.

    from emu2_jax.weights.diffusers_model import from_diffusers

    model = from_diffusers(
        unet=unet_state_dict, unet_config="unet/config.json",
        vae=vae_state_dict, vae_config="vae/config.json", scheduler_config="scheduler/scheduler_config.json",
    )
    model.forward(latents, timesteps, condition, time_ids=time_ids)      # what the U-Net predicts
    model.encode(images)                                                # scaled latents of images in [-1, 1]
    model.decode(latents)                                               # images
    model.add_noise(clean, noise, timesteps)
    model.sample(noise, condition, null, time_ids=time_ids)             # the whole loop, from a given initial latent

Layout is diffusers' too: colours (channels) first. docs/decoder.md has a longer example.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emu2_jax import compiler_options
from emu2_jax.config import DecoderConfig
from emu2_jax.diffusion import schedule
from emu2_jax.diffusion.decoder import alpha_bars, check_finite, merge_unet
from emu2_jax.diffusion.sampler import denoise, guided
from emu2_jax.diffusion.vae import ScaledAutoencoder, merge_vae
from emu2_jax.errors import WeightsError
from emu2_jax.task import Params
from emu2_jax.weights.diffusers_config import Settings, decoder_config
from emu2_jax.weights.diffusers_weights import StateDict, load_unet, load_vae, unet_table
from emu2_jax.weights.state_dict import to_state_dict

Values = Any  #: NumPy, JAX or PyTorch (CPU) array


@dataclass(frozen=True)
class DiffusersModel:
    """U-Net, VAE and schedule. Everything is float32 and compiled once per shape."""

    config: DecoderConfig
    params: Params  #: {"unet": ...} and, where there is one, {"vae": ...}

    def forward(
        self, latents: Values, timesteps: Values, condition: Values, *, time_ids: Values = None, pooled: Values = None
    ) -> Float[Array, "B C H W"]:
        """The U-Net's prediction.

        `latents` (B, C, H, W), noisy and scaled; `timesteps` (B,) or one number; `condition` (B, N, D); `time_ids`
        (B, 6) and `pooled` (B, Q), by default the mean of the condition, where the U-Net has micro-conditions.
        """
        x = _last(latents)
        t = jnp.broadcast_to(jnp.asarray(timesteps), x.shape[:1])
        return _first(_forward(self.config, self.params["unet"], x, t, *_arrays(condition, time_ids, pooled)))

    def encode(self, images: Values, *, noise: Values = None) -> Float[Array, "B L H W"]:
        """Scaled latents of images (B, 3, S, S) in [-1, 1]: the posterior's mean, or the draw that `noise` gives."""
        latents = _encode(self.config, self._vae(), _last(images), None if noise is None else _last(noise))
        check_finite(vae=jnp.isfinite(latents).all())
        return _first(latents)

    def decode(self, latents: Values) -> Float[Array, "B 3 S S"]:
        """Images of scaled latents, not clipped to [-1, 1]."""
        images = _decode(self.config, self._vae(), _last(latents))
        check_finite(vae=jnp.isfinite(images).all())
        return _first(images)

    def add_noise(self, clean: Values, noise: Values, timesteps: Values) -> Float[Array, "B C H W"]:
        """What training shows the U-Net at these timesteps (B,)."""
        clean, noise = _arrays(clean, noise)
        return schedule.add_noise(clean, noise, self._alpha_bar(timesteps))

    def target(self, clean: Values, noise: Values, timesteps: Values) -> Float[Array, "B C H W"]:
        """What training asks of the U-Net there: noise, velocity or the clean latent, by `config.prediction`."""
        clean, noise = _arrays(clean, noise)
        return schedule.target(clean, noise, self._alpha_bar(timesteps), self.config.prediction)

    def loss_and_gradients(
        self,
        clean: Values,
        noise: Values,
        timesteps: Values,
        condition: Values,
        *,
        time_ids: Values = None,
        pooled: Values = None,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean squared error of the prediction, and its gradients under the names of the U-Net's state dict."""
        noisy, wanted = self.add_noise(clean, noise, timesteps), self.target(clean, noise, timesteps)
        loss, gradients = _loss_and_gradients(
            self.config,
            self.params["unet"],
            _last(noisy),
            _last(wanted),
            jnp.asarray(timesteps),
            *_arrays(condition, time_ids, pooled),
        )
        return float(loss), to_state_dict({"unet": gradients}, unet_table(self.config.unet))

    def sample(
        self,
        noise: Values,
        condition: Values,
        null: Values = None,
        *,
        time_ids: Values = None,
        pooled: Values = None,
        null_pooled: Values = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
    ) -> Float[Array, "B C H W"]:
        """The scaled latents that Euler steps make of `noise` (B, C, H, W), the initial latent of unit variance.

        It is multiplied by `init_noise_sigma` here, as diffusers' pipelines do with their `latents`. `null` is the
        condition to steer away from, `condition`'s shape or of one image; without it, or with a guidance scale of 1,
        there is no guidance. Scale and steps default to `config`'s. Raises `NotFiniteError` for a U-Net that fails.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        steps = self.config.num_sampling_steps if num_steps is None else num_steps
        null = None if scale == 1.0 else null
        latents = _sample(
            self.config, steps, self.params["unet"], _last(noise),
            *_arrays(condition, null, time_ids, pooled, null_pooled, scale),
        )  # fmt: skip
        check_finite(unet=jnp.isfinite(latents).all())
        return _first(latents)

    def euler_steps(self, num_steps: int) -> schedule.EulerSteps:
        """Timesteps, sigmas and `init_noise_sigma` of sampling."""
        return _steps(self.config, num_steps)

    def _alpha_bar(self, timesteps: Values) -> Float[Array, " B"]:
        return jnp.asarray(alpha_bars(self.config), jnp.float32)[jnp.asarray(timesteps)]

    def _vae(self) -> Params:
        if "vae" not in self.params:
            raise WeightsError("vae: was not given; hand `from_diffusers` its state dict and config.json")
        return self.params["vae"]


def from_diffusers(
    *,
    unet: StateDict | str | Path,
    unet_config: Settings | str | Path,
    vae: StateDict | str | Path | None = None,
    vae_config: Settings | str | Path | None = None,
    scheduler_config: Settings | str | Path | None = None,
) -> DiffusersModel:
    """A model from state dicts in diffusers' names and what their config.json files hold.

    For each, a path will do: of a safetensors file or a folder that holds one, and of the config.json.

    Without a scheduler's file the schedule is Emu2's and SDXL's. Raises `WeightsError` for a tensor that is missing,
    not known, of another shape or not finite, and for a setting that cannot be computed here.
    """
    if (vae is None) != (vae_config is None):
        raise WeightsError("vae, vae_config: got one without the other; wanted both, or neither")
    config = decoder_config(unet_config, vae_config, scheduler_config)
    params: dict[str, Any] = {"unet": load_unet(unet, config.unet)}
    if vae is not None:
        params["vae"] = load_vae(vae, config.vae)
    return DiffusersModel(config, params)


@partial(jax.jit, static_argnums=0, compiler_options=compiler_options.DRAWING)
def _forward(config: DecoderConfig, params: Params, x: Array, t: Array, condition: Array, *rest: Array | None) -> Array:
    return merge_unet(config, params, "float32")(x, t, condition, *rest)


@partial(jax.jit, static_argnums=0, compiler_options=compiler_options.DRAWING)
def _encode(config: DecoderConfig, params: Params, images: Array, noise: Array | None) -> Array:
    posterior = merge_vae(config.vae, params).encode(images)
    return (posterior.mean if noise is None else posterior.sample_with(noise)) * config.latent_scale


@partial(jax.jit, static_argnums=0, compiler_options=compiler_options.DRAWING)
def _decode(config: DecoderConfig, params: Params, latents: Array) -> Array:
    return ScaledAutoencoder(merge_vae(config.vae, params), config.vae, config.latent_scale).decode(latents)


@partial(jax.jit, static_argnums=0)
def _loss_and_gradients(
    config: DecoderConfig, params: Params, noisy: Array, wanted: Array, t: Array, condition: Array, *rest: Array | None
) -> tuple[Array, Params]:
    def loss(params: Params) -> Array:
        return jnp.square(merge_unet(config, params, "float32")(noisy, t, condition, *rest) - wanted).mean()

    return jax.value_and_grad(loss)(params)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=compiler_options.DRAWING)
def _sample(
    config: DecoderConfig,
    num_steps: int,
    params: Params,
    noise: Array,
    condition: Array,
    null: Array | None,
    time_ids: Array | None,
    pooled: Array | None,
    null_pooled: Array | None,
    guidance_scale: Array,
) -> Array:
    unet = merge_unet(config, params, "float32")
    if null is not None:
        nulls = jnp.broadcast_to(null, condition.shape)
        if pooled is not None:
            pooled = jnp.concatenate([pooled, nulls.mean(1) if null_pooled is None else null_pooled])
        condition = jnp.concatenate([condition, nulls])
        time_ids = None if time_ids is None else jnp.concatenate([time_ids, time_ids])
    predict = guided(lambda x, t: unet(x, t, condition, time_ids, pooled), None if null is None else guidance_scale)
    return denoise(predict, noise, _steps(config, num_steps), config.prediction)


def _steps(config: DecoderConfig, num_steps: int) -> schedule.EulerSteps:
    return schedule.euler_steps(
        alpha_bars(config), num_steps, config.timestep_spacing, steps_offset=config.steps_offset
    )


def _arrays(*values: Values) -> list[Any]:
    return [None if value is None else jnp.asarray(np.asarray(value)) for value in values]


def _last(values: Values) -> Array:
    """Channels first to channels last, float32."""
    return jnp.asarray(np.asarray(values), jnp.float32).transpose(0, 2, 3, 1)


def _first(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2)
