"""The U-Nets, the VAE and the sampling loop against numbers that diffusers gave, and proof that these can fail.

`make test-parity` runs diffusers again, `make goldens` writes the files anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_goldens import CASES, Case
from flax import nnx
from goldens import Golden

from emu2_jax.diffusion import autoencoder, sampler, schedule, unet
from emu2_jax.models import layers

SDXL, SD2, VAE, SAMPLE = CASES["unet_sdxl"], CASES["unet_sd2"], CASES["vae"], CASES["sample_50"]


@functools.cache
def golden(case: Case) -> Golden:
    return goldens.load(case)


@pytest.mark.parametrize("name", CASES)
def test_the_package_gives_what_diffusers_gives(name: str) -> None:
    assert goldens.failures(CASES[name], golden(CASES[name])) == []


def test_no_number_of_the_goldens_is_trivial() -> None:
    for case in (SDXL, SD2, VAE):
        assert set(golden(case).gradients) == set(goldens.official_shapes(case.table))
        for name, gradient in golden(case).gradients.items():
            # A bias on the keys of the VAE's attention moves all scores alike: its gradient is 0.
            assert "to_k.bias" in name or np.linalg.norm(gradient) > 1e-3, name
    assert all(0.1 < np.abs(array).mean() < 100 for case in CASES.values() for array in golden(case).forward.values())


#: What another epsilon, or one at the wrong norm, would be. The first five are the release's against each other.
WRONG_SETTINGS: dict[str, tuple[Case, dict[str, Any]]] = {
    "residual norms with 1e-6": (SDXL, {"norm_epsilon": 1e-6}),
    "transformer norm with 1e-5": (SDXL, {"transformer_norm_epsilon": 1e-5}),
    "transformer norm with 1e-5, SD 2": (SD2, {"transformer_norm_epsilon": 1e-5}),
    "vae norms with 1e-5": (VAE, {"norm_epsilon": 1e-5}),
    "vae norms with 1e-7": (VAE, {"norm_epsilon": 1e-7}),
    "wide epsilons exchanged": (
        CASES["unet_wide_epsilons"],
        {"norm_epsilon": 0.5, "transformer_norm_epsilon": 0.1},
    ),
    "one wide epsilon for all": (CASES["unet_wide_epsilons"], {"transformer_norm_epsilon": 0.1}),
    "vae's wide epsilon halved": (CASES["vae_wide_epsilon"], {"norm_epsilon": 0.05}),
    "heads of the width that the file names": (SDXL, {"num_attention_heads": (4, 2)}),
}


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Without compilation: operations are compiled once for all mistakes, not whole networks for each."""
    with jax.disable_jit():
        yield


def red(case: Case, reference: Case) -> bool:
    return bool(goldens.forward_failures(case, golden(reference)))


@pytest.mark.parametrize("mistake", WRONG_SETTINGS)
@pytest.mark.usefixtures("eagerly")
def test_another_setting_turns_the_golden_red(mistake: str) -> None:
    case, settings = WRONG_SETTINGS[mistake]
    part = {case.kind: dataclasses.replace(getattr(case, case.kind), **settings)}
    assert red(dataclasses.replace(case, **part), case)


Patch = pytest.MonkeyPatch
Mistake = Callable[[Patch], None]


def tanh_gelu(patch: Patch) -> None:
    gelu = nnx.gelu
    patch.setattr(nnx, "gelu", lambda x, approximate: gelu(x, approximate=True))


def the_other_half_gated(patch: Patch) -> None:
    split = jnp.split
    patch.setattr(unet.jnp, "split", lambda *arguments, **more: split(*arguments, **more)[::-1])


def sines_first(patch: Patch) -> None:
    sinusoids = schedule.sinusoids
    patch.setattr(unet, "sinusoids", lambda values, width: jnp.roll(sinusoids(values, width), width // 2, axis=-1))


def time_ids_before_the_pooled_condition(patch: Patch) -> None:
    concatenate = jnp.concatenate

    def call(arrays: Any, axis: int = 0) -> jax.Array:
        return concatenate(arrays[::-1] if arrays[0].ndim == 2 else arrays, axis)

    patch.setattr(unet.jnp, "concatenate", call)


def skips_first(patch: Patch) -> None:
    concatenate = jnp.concatenate

    def call(arrays: Any, axis: int = 0) -> jax.Array:
        return concatenate(arrays[::-1] if arrays[0].ndim == 4 else arrays, axis)

    patch.setattr(unet.jnp, "concatenate", call)


def time_without_activation(patch: Patch) -> None:
    silu = nnx.silu
    patch.setattr(nnx, "silu", lambda x: x if x.ndim == 2 and x.shape[0] == 2 else silu(x))


def unscaled_attention(patch: Patch) -> None:
    attend = layers.attend
    patch.setattr(layers, "attend", lambda q, k, v, **more: attend(q * q.shape[-1] ** 0.5, k, v, **more))


def two_heads_in_the_vae(patch: Patch) -> None:
    attend = layers.attend

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        halves = [x.reshape(*x.shape[:2], 2, -1) for x in (q, k, v)]
        return attend(*halves).reshape(q.shape)

    patch.setattr(layers, "attend", call)


def padding_on_every_side(patch: Patch) -> None:
    call = autoencoder.Downsample.__call__

    def padded(self: Any, x: jax.Array) -> jax.Array:
        return call(self, jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0))))[:, : x.shape[1] // 2, : x.shape[2] // 2]

    patch.setattr(autoencoder.Downsample, "__call__", padded)


def smooth_upsampling(patch: Patch) -> None:
    def call(self: Any, x: jax.Array) -> jax.Array:
        count, height, width, channels = x.shape
        return self.conv(jax.image.resize(x, (count, 2 * height, 2 * width, channels), "linear"))

    patch.setattr(unet.Upsample, "__call__", call)


def spread_without_the_half(patch: Patch) -> None:
    patch.setattr(
        autoencoder.Posterior, "sample_with", lambda self, noise: self.mean + jnp.exp(self.log_variance) * noise
    )


def log_variance_first(patch: Patch) -> None:
    split = jnp.split
    patch.setattr(autoencoder.jnp, "split", lambda *arguments, **more: split(*arguments, **more)[::-1])


def no_quantising_convolution(patch: Patch) -> None:
    def decode(self: Any, latents: jax.Array) -> jax.Array:
        return self.decoder(latents)

    patch.setattr(autoencoder.AutoencoderKL, "decode", decode)


MISTAKES: tuple[tuple[Case, Mistake], ...] = (
    (CASES["unet_wide_epsilons"], tanh_gelu),
    (SDXL, the_other_half_gated),
    (SDXL, sines_first),
    (SDXL, time_ids_before_the_pooled_condition),
    (SDXL, skips_first),
    (SDXL, time_without_activation),
    (SDXL, unscaled_attention),
    (SDXL, smooth_upsampling),
    (VAE, unscaled_attention),
    (VAE, two_heads_in_the_vae),
    (VAE, padding_on_every_side),
    (VAE, smooth_upsampling),
    (VAE, spread_without_the_half),
    (VAE, log_variance_first),
    (VAE, no_quantising_convolution),
)


@pytest.mark.parametrize(("case", "mistake"), MISTAKES, ids=[f"{c.name}-{m.__name__}" for c, m in MISTAKES])
@pytest.mark.usefixtures("eagerly")
def test_a_deliberate_mistake_turns_the_golden_red(case: Case, mistake: Mistake, monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    assert red(case, case)


def unscaled_input(patch: Patch) -> None:
    patch.setattr(schedule, "scale_model_input", lambda x, sigma: x)


def start_from_the_first_sigma(patch: Patch) -> None:
    steps = schedule.euler_steps

    def call(*arguments: Any, **more: Any) -> schedule.EulerSteps:
        made = steps(*arguments, **more)
        return dataclasses.replace(made, init_noise_sigma=float(made.sigmas[0]))

    patch.setattr(schedule, "euler_steps", call)


def no_offset_of_the_steps(patch: Patch) -> None:
    steps = schedule.euler_steps
    patch.setattr(schedule, "euler_steps", lambda *arguments, steps_offset: steps(*arguments, steps_offset=0))


def the_null_first(patch: Patch) -> None:
    split = jnp.split
    patch.setattr(sampler.jnp, "split", lambda *arguments, **more: split(*arguments, **more)[::-1])


@pytest.mark.parametrize(
    "mistake", [unscaled_input, start_from_the_first_sigma, no_offset_of_the_steps, the_null_first]
)
def test_a_deliberate_mistake_in_the_loop_turns_the_golden_red(mistake: Mistake, monkeypatch: Patch) -> None:
    jax.clear_caches()
    mistake(monkeypatch)
    failed = red(SAMPLE, SAMPLE)
    jax.clear_caches()
    assert failed
