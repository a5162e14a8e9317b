"""The noise of diffusion: how much there is at each timestep, and the Euler solver that takes it away.

Timestep t in [0, T) has signal share a = alpha_bar[t]. Training mixes x_t = sqrt(a) x_0 + sqrt(1 - a) noise; the solver
works on x_t / sqrt(a) = x_0 + sigma noise, with sigma = sqrt((1 - a) / a).

Source: DDPM (arXiv 2006.11239); EDM (arXiv 2206.00364) for the solver; min-SNR (arXiv 2303.09556);
v-prediction (arXiv 2202.00512). Timesteps, sigmas and step are those of `EulerDiscreteScheduler` in diffusers 0.24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emu2_jax.errors import ConfigError

Prediction = Literal["epsilon", "v_prediction", "sample"]

#: Added to the timesteps of "leading" spacing. Source: release `scheduler/scheduler_config.json`, `steps_offset`.
STEPS_OFFSET = 1

#: Signal power at the end of a schedule with zero terminal SNR; not 0, so that sigma stays finite (diffusers: 2^-24).
SMALLEST_SHARE = 2.0**-24


def alpha_bars(
    num_timesteps: int, beta_start: float, beta_end: float, *, zero_terminal_snr: bool = False
) -> np.ndarray:
    """Share of signal power left at each timestep, (T,) float64; betas are linear in their square root.

    SDXL's schedule ends with 0.5 % of signal power: enough for a network to read the overall colours off the noise,
    where sampling then starts from noise that holds none. With `zero_terminal_snr` the signal's amplitude is shifted
    and stretched so that it ends at (almost) nothing and starts where it did.
    Source: latent diffusion (arXiv 2112.10752), the schedule named "scaled_linear"; arXiv 2305.08891, algorithm 1.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    shares = np.cumprod(1.0 - betas)
    if not zero_terminal_snr:
        return shares
    amplitude = np.sqrt(shares)
    first, last = amplitude[0], amplitude[-1]
    rescaled = ((amplitude - last) * first / (first - last)) ** 2
    rescaled[-1] = SMALLEST_SHARE
    return rescaled


def signal_to_noise(alpha_bar: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Ratio of signal power to noise power in x_t, for signal and noise of unit variance."""
    return alpha_bar / (1.0 - alpha_bar)


def add_noise(
    clean: Float[Array, "B H W C"], noise: Float[Array, "B H W C"], alpha_bar: Float[Array, " B"]
) -> Float[Array, "B H W C"]:
    """x_t, of unit variance when `clean` and `noise` have it."""
    share = alpha_bar[:, None, None, None]
    return jnp.sqrt(share) * clean + jnp.sqrt(1.0 - share) * noise


def target(
    clean: Float[Array, "B H W C"],
    noise: Float[Array, "B H W C"],
    alpha_bar: Float[Array, " B"],
    prediction: Prediction,
) -> Float[Array, "B H W C"]:
    """What the network gives for x_t: noise, velocity sqrt(a) noise - sqrt(1 - a) clean, or the clean latent."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return clean
    share = alpha_bar[:, None, None, None]
    return jnp.sqrt(share) * noise - jnp.sqrt(1.0 - share) * clean


def min_snr_weight(alpha_bar: Float[Array, " B"], gamma: float, prediction: Prediction) -> Float[Array, " B"]:
    """Loss weight that caps a timestep's weight, seen as an error of x_0, at `gamma`.

    With snr = 10, gamma = 5: 5 / 10 for epsilon, 5 / 11 for v_prediction, 5 for sample.
    """
    snr = signal_to_noise(alpha_bar)
    if prediction == "sample":
        return jnp.minimum(snr, gamma)
    return jnp.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1.0)


Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class EulerSteps:
    """Where the solver stops on its way from noise to image."""

    timesteps: np.ndarray  #: (K,) int32, descending; what the network is told. float32 with "linspace"
    sigmas: np.ndarray  #: (K + 1,) float32, descending to 0
    init_noise_sigma: float  #: standard deviation of what sampling starts from


def euler_steps(
    alpha_bar: np.ndarray, num_steps: int, spacing: Spacing = "leading", *, steps_offset: int = STEPS_OFFSET
) -> EulerSteps:
    """Timesteps and their sigmas, T / K apart.

    T = 10, K = 3: "leading" gives the timesteps 7, 4, 1, short of the end; "trailing" 9, 6, 2, from the end;
    "linspace" 9, 4.5, 0, from end to end. What sampling starts from has the variance of x_t / sqrt(a) for x_0 of unit
    variance with "leading", that of its noise alone with the others, as in diffusers. Raises ConfigError when there are
    more steps than timesteps.
    """
    num_timesteps = len(alpha_bar)
    if not 1 <= num_steps <= num_timesteps - steps_offset:
        raise ConfigError(
            f"decoder.num_sampling_steps: got {num_steps}, wanted 1 to {num_timesteps - steps_offset} "
            f"(decoder.num_train_timesteps is {num_timesteps})"
        )
    timesteps: np.ndarray
    if spacing == "leading":
        timesteps = (np.arange(num_steps) * (num_timesteps // num_steps))[::-1] + steps_offset
    elif spacing == "trailing":
        timesteps = np.round(num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)).astype(int) - 1
    else:
        timesteps = np.linspace(0, num_timesteps - 1, num_steps, dtype=np.float32)[::-1]
    sigmas = np.interp(timesteps, np.arange(num_timesteps), np.sqrt((1.0 - alpha_bar) / alpha_bar))
    start = np.sqrt(sigmas[0] ** 2 + 1.0) if spacing == "leading" else sigmas[0]
    dtype = np.float32 if spacing == "linspace" else np.int32
    return EulerSteps(timesteps.astype(dtype), np.append(sigmas, 0.0).astype(np.float32), float(start))


def scale_model_input(x: Float[Array, "B H W C"], sigma: Float[Array, ""]) -> Float[Array, "B H W C"]:
    """x_0 + sigma noise, back to the unit variance that the network was trained on."""
    return x / jnp.sqrt(sigma**2 + 1.0)


def euler_step(
    x: Float[Array, "B H W C"],
    predicted: Float[Array, "B H W C"],
    sigma: Float[Array, ""],
    next_sigma: Float[Array, ""],
    prediction: Prediction,
) -> Float[Array, "B H W C"]:
    """One step along dx/dsigma = (x - x_0) / sigma; `x` is unscaled, `predicted` is the network's answer."""
    if prediction == "epsilon":
        clean = x - sigma * predicted
    elif prediction == "sample":
        clean = predicted
    else:
        clean = x / (sigma**2 + 1.0) - predicted * sigma / jnp.sqrt(sigma**2 + 1.0)
    return x + (next_sigma - sigma) * (x - clean) / sigma


def sinusoids(values: Int[Array, "*axes"] | Float[Array, "*axes"], width: int) -> Float[Array, "*axes W"]:
    """Sinusoidal embedding of timesteps and of micro-conditions: `width` / 2 cosines, then as many sines. float32.

    Source: diffusers `Timesteps` with `flip_sin_to_cos=True`, `downscale_freq_shift=0`, as in the release's U-Net.
    """
    half = width // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = values[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
