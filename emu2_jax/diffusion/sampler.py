"""The loop from noise to latent: one compiled scan over the steps of the Euler solver, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emu2_jax.diffusion import schedule

Timestep = Int[Array, ""] | Float[Array, ""]
#: What the network gives for latents of unit variance at one timestep.
Predict = Callable[[Float[Array, "B H W C"], Timestep], Float[Array, "B H W C"]]


def denoise(
    predict: Predict,
    noise: Float[Array, "B H W C"],
    steps: schedule.EulerSteps,
    prediction: schedule.Prediction,
) -> Float[Array, "B H W C"]:
    """The latent that unit `noise` becomes; it is brought to `steps.init_noise_sigma` here."""

    def step(
        x: Float[Array, "B H W C"], at: tuple[Timestep, Float[Array, ""], Float[Array, ""]]
    ) -> tuple[Float[Array, "B H W C"], None]:
        timestep, sigma, next_sigma = at
        predicted = predict(schedule.scale_model_input(x, sigma), timestep)
        return schedule.euler_step(x, predicted, sigma, next_sigma, prediction), None

    sigmas = jnp.asarray(steps.sigmas)
    stops = (jnp.asarray(steps.timesteps), sigmas[:-1], sigmas[1:])
    return jax.lax.scan(step, steps.init_noise_sigma * noise, stops)[0]


def guided(
    predict: Callable[[Float[Array, "B2 H W C"], Array], Float[Array, "B2 H W C"]],
    guidance_scale: Float[Array, ""] | float | None,
) -> Predict:
    """Predict for a batch whose condition is [wanted; null]: null + scale (wanted - null).

    None = no guidance: the condition is the wanted one alone.
    """

    def call(scaled: Float[Array, "B H W C"], timestep: Timestep) -> Float[Array, "B H W C"]:
        inputs = scaled if guidance_scale is None else jnp.concatenate([scaled, scaled])
        predicted = predict(inputs, jnp.full(len(inputs), timestep))
        if guidance_scale is None:
            return predicted
        wanted, null = jnp.split(predicted, 2)
        return null + guidance_scale * (wanted - null)

    return call
