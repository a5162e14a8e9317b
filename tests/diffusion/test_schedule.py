"""The noise schedule against values worked out by hand and those of diffusers' EulerDiscreteScheduler."""

import jax.numpy as jnp
import numpy as np
import pytest

from emu2_jax.diffusion import schedule
from emu2_jax.errors import ConfigError

SDXL = schedule.alpha_bars(1000, 0.00085, 0.012)


def test_alpha_bars_of_two_steps() -> None:
    # sqrt(beta) runs from 0.1 to 0.5: betas 0.01 and 0.25.
    np.testing.assert_allclose(schedule.alpha_bars(2, 0.01, 0.25), [0.99, 0.99 * 0.75], rtol=1e-12)


def test_alpha_bars_of_sdxl() -> None:
    np.testing.assert_allclose(SDXL[[0, 999]], [0.99915, 0.00466009], rtol=1e-5)


def test_euler_steps_of_sdxl() -> None:
    steps = schedule.euler_steps(SDXL, 50)
    assert steps.timesteps.tolist() == list(range(981, 0, -20))
    assert steps.init_noise_sigma == pytest.approx(13.158, abs=5e-4)
    np.testing.assert_allclose(steps.sigmas[:2], [13.1204, 11.6760], atol=1e-4)
    np.testing.assert_allclose(steps.sigmas[-2:], [0.0413144, 0.0], atol=1e-6)


def test_leading_spacing_drops_the_remainder() -> None:
    assert schedule.euler_steps(schedule.alpha_bars(10, 0.01, 0.1), 3).timesteps.tolist() == [7, 4, 1]


@pytest.mark.parametrize("num_steps", [0, 1000])
def test_impossible_number_of_steps(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"decoder.num_sampling_steps: got {num_steps}, wanted 1 to 999"):
        schedule.euler_steps(SDXL, num_steps)


def test_add_noise_and_targets() -> None:
    clean, noise = jnp.full((2, 1, 1, 1), 2.0), jnp.full((2, 1, 1, 1), 3.0)
    alpha_bar = jnp.array([0.64, 1.0])
    noisy = schedule.add_noise(clean, noise, alpha_bar)
    np.testing.assert_allclose(noisy.ravel(), [0.8 * 2 + 0.6 * 3, 2.0], rtol=1e-6)
    assert schedule.target(clean, noise, alpha_bar, "epsilon") is noise
    assert schedule.target(clean, noise, alpha_bar, "sample") is clean
    velocity = schedule.target(clean, noise, alpha_bar, "v_prediction")
    np.testing.assert_allclose(velocity.ravel(), [0.8 * 3 - 0.6 * 2, 3.0], rtol=1e-6)


def test_min_snr_weight() -> None:
    alpha_bar = jnp.array([10 / 11, 0.5])  # snr 10 and 1
    np.testing.assert_allclose(schedule.min_snr_weight(alpha_bar, 5.0, "epsilon"), [0.5, 1.0], rtol=1e-5)
    np.testing.assert_allclose(schedule.min_snr_weight(alpha_bar, 5.0, "v_prediction"), [5 / 11, 0.5], rtol=1e-5)
    np.testing.assert_allclose(schedule.min_snr_weight(alpha_bar, 5.0, "sample"), [5.0, 1.0], rtol=1e-5)


def test_zero_terminal_snr_keeps_the_first_share_and_ends_at_nothing() -> None:
    shares = schedule.alpha_bars(1000, 0.00085, 0.012, zero_terminal_snr=True)
    assert shares[0] == pytest.approx(SDXL[0], rel=1e-12)
    assert shares[-1] == 2.0**-24
    assert (np.diff(shares) < 0).all()
    # Two steps by hand: amplitudes 1 and 0.5 become 1 x (1 - 0.5) / (1 - 0.5) and nothing.
    two = schedule.alpha_bars(2, 0.0, 0.75, zero_terminal_snr=True)
    np.testing.assert_allclose(two, [1.0, 2.0**-24], rtol=1e-12)


def test_trailing_spacing_starts_at_the_last_timestep() -> None:
    assert schedule.euler_steps(SDXL[:10], 3, "trailing").timesteps.tolist() == [9, 6, 2]
    assert schedule.euler_steps(SDXL, 1, "trailing").timesteps.tolist() == [999]
    assert schedule.euler_steps(SDXL, 4, "trailing").timesteps.tolist() == [999, 749, 499, 249]


def test_linspace_spacing_goes_from_end_to_end() -> None:
    steps = schedule.euler_steps(SDXL[:10], 3, "linspace")
    assert steps.timesteps.tolist() == [9.0, 4.5, 0.0]
    sigma = np.sqrt((1 - SDXL[:10]) / SDXL[:10])
    np.testing.assert_allclose(steps.sigmas, [sigma[9], (sigma[4] + sigma[5]) / 2, sigma[0], 0.0], rtol=1e-6)


def test_sampling_starts_from_the_variance_that_diffusers_has() -> None:
    """Leading: of x_0 + sigma noise; the others: of sigma noise alone."""
    sigma = np.sqrt((1 - SDXL[999]) / SDXL[999])
    for spacing in ("trailing", "linspace"):
        assert schedule.euler_steps(SDXL, 7, spacing).init_noise_sigma == pytest.approx(sigma, rel=1e-9)
    leading = schedule.euler_steps(SDXL, 7)
    assert leading.init_noise_sigma == pytest.approx(np.sqrt(leading.sigmas[0] ** 2 + 1), rel=1e-6)
    assert schedule.euler_steps(SDXL, 7, steps_offset=0).timesteps[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_with_a_perfect_network_arrives_at_the_image(prediction: schedule.Prediction) -> None:
    clean = jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)
    noise = jnp.cos(jnp.arange(12.0)).reshape(1, 2, 2, 3)
    steps = schedule.euler_steps(SDXL, 4)
    x = clean + steps.sigmas[0] * noise
    for i, timestep in enumerate(steps.timesteps):
        sigma, next_sigma = jnp.asarray(steps.sigmas[i]), jnp.asarray(steps.sigmas[i + 1])
        alpha_bar = jnp.asarray(SDXL[timestep], jnp.float32)[None]
        # The input of the network is exactly the x_t of training ...
        np.testing.assert_allclose(
            schedule.scale_model_input(x, sigma), schedule.add_noise(clean, noise, alpha_bar), atol=1e-5
        )
        predicted = schedule.target(clean, noise, alpha_bar, prediction)
        x = schedule.euler_step(x, predicted, sigma, next_sigma, prediction)
        # ... and the path is straight: the same noise, less of it.
        np.testing.assert_allclose(x, clean + next_sigma * noise, atol=1e-4)


def test_sinusoids_are_cosines_then_sines() -> None:
    # Width 4: frequencies 1 and 10000 ** -0.5 = 0.01.
    embedded = schedule.sinusoids(jnp.array([[0, 2]]), 4)
    wanted = [[[1, 1, 0, 0], [np.cos(2), np.cos(0.02), np.sin(2), np.sin(0.02)]]]
    np.testing.assert_allclose(embedded, wanted, atol=1e-6)
