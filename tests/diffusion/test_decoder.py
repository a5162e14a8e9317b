"""The decoder's loss, null condition and sampler on a tiny model with the real visual encoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_parameters

from emu2_jax.config import DecoderConfig, ExperimentConfig, ModelConfig, UNetConfig, VAEConfig, VisionConfig
from emu2_jax.diffusion import decoder
from emu2_jax.diffusion.decoder import DecoderTask, autoencode, draw_noise, null_embeddings, sample
from emu2_jax.diffusion.vae import merge_vae, open_codec
from emu2_jax.errors import ConfigError, NotFiniteError
from emu2_jax.models.emu2 import encode_images
from emu2_jax.task import Losses

UNET = UNetConfig(
    in_channels=12,
    out_channels=12,
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_layers_per_block=(0, 1),
    num_attention_heads=(1, 2),
    cross_attention_width=6,
    time_id_width=4,
    norm_groups=4,
)
CONFIG = ExperimentConfig(
    name="tiny_decoder",
    model=ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=2, width=6, num_layers=1, num_heads=2, mlp_width=10),
        num_visual_tokens=4,
        compute_dtype="float32",
        remat="none",
    ),
    decoder=DecoderConfig(
        unet=UNET, latent="space_to_depth", latent_factor=2, latent_scale=1.0, image_size=16, num_sampling_steps=3
    ),
)


def with_decoder(**changes: Any) -> ExperimentConfig:
    return dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, **changes))


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def batch(count: int = 4) -> dict[str, Any]:
    weight = np.array([1.0, 0.0, 2.0, 1.0, 1.0, 1.0], np.float32)[:count]
    return {
        "images": images(count),
        "time_ids": np.tile(np.int32([16, 16, 0, 0, 16, 16]), (count, 1)),
        "weight": weight,
    }


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.tree.map(jnp.asarray, random_parameters(DecoderTask(CONFIG).init))


@functools.cache
def compiled_losses(config: ExperimentConfig) -> Any:
    return jax.jit(DecoderTask(config).losses)


def losses(params: Any, batch: Any, seed: int = 0, config: ExperimentConfig = CONFIG) -> Losses:
    return compiled_losses(config)(params, batch, jax.random.key(seed))


def test_an_untrained_network_has_the_loss_of_predicting_nothing() -> None:
    # It predicts 0, so an image's error is the mean square of its noise: about 1, plus 0.1^2 from the offset.
    params = jax.jit(DecoderTask(CONFIG).init)(jax.random.key(0))
    terms = [losses(params, batch(), seed).terms["noise"] for seed in range(20)]
    assert sum(t.sum for t in terms) / sum(t.weight for t in terms) == pytest.approx(1.01, abs=0.02)


def test_terms_are_weighted_and_metrics_add_up_to_the_term(params: Any) -> None:
    result = losses(params, batch())
    assert result.terms["noise"].weight == DecoderTask(CONFIG).term_weights(batch())["noise"] == 4.0
    assert sorted(result.metrics) == ["noise_t0_249", "noise_t250_499", "noise_t500_749", "noise_t750_999"]
    np.testing.assert_allclose(sum(m.sum for m in result.metrics.values()), result.terms["noise"].sum, rtol=1e-6)
    assert sum(m.weight for m in result.metrics.values()) == 4.0


def test_images_of_weight_zero_do_not_count(params: Any) -> None:
    changed = batch()
    changed["images"][1] = 255 - changed["images"][1]
    assert losses(params, batch()).terms["noise"].sum == losses(params, changed).terms["noise"].sum
    nothing = losses(params, batch() | {"weight": np.zeros(4, np.float32)}).terms["noise"]
    assert (nothing.sum, nothing.weight) == (0.0, 0.0)


def test_every_draw_comes_from_the_key(params: Any) -> None:
    first, again, other = (losses(params, batch(), seed).terms["noise"].sum for seed in (0, 0, 1))
    assert first == again != other


def test_min_snr_weighs_the_term_but_not_the_metrics(params: Any) -> None:
    plain, weighted = losses(params, batch()), losses(params, batch(), config=with_decoder(min_snr_gamma=0.01))
    assert weighted.terms["noise"].sum < plain.terms["noise"].sum
    for name, metric in plain.metrics.items():
        np.testing.assert_allclose(weighted.metrics[name].sum, metric.sum, rtol=1e-3)


def test_only_the_unet_gets_a_gradient(params: Any) -> None:
    def loss(params: Any) -> jax.Array:
        return (
            DecoderTask(CONFIG).losses(params, jax.tree.map(jnp.asarray, batch()), jax.random.key(0)).terms["noise"].sum
        )

    gradient = jax.jit(jax.grad(loss))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["visual_encoder"]))
    # Cross-attention and pooled condition included: each leaf of the U-Net takes part.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["unet"]):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_condition_dropout_puts_the_null_in_place_of_an_image(params: Any, dropout: float, share: float) -> None:
    task = DecoderTask(with_decoder(condition_dropout=dropout))
    many = batch() | {"images": jnp.concatenate([images()] * 100)}
    condition = jax.jit(task.condition)(params, many, jax.random.key(0))
    own = encode_images(CONFIG.model, params["visual_encoder"], many["images"])
    null = null_embeddings(CONFIG.model, params["visual_encoder"])
    is_null = np.isclose(condition, null, atol=1e-5).all((1, 2))
    is_own = np.isclose(condition, own, atol=1e-5).all((1, 2))
    assert (is_null ^ is_own).all()
    assert is_null.mean() == pytest.approx(share, abs=0.06)


def test_null_is_the_mean_colour_and_not_black(params: Any) -> None:
    null = null_embeddings(CONFIG.model, params["visual_encoder"])
    mean_colour = jnp.broadcast_to(jnp.uint8([123, 117, 104]), (1, 8, 8, 3))  # CLIP's mean in 8 bits, rounded
    black = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    np.testing.assert_allclose(null, encode_images(CONFIG.model, params["visual_encoder"], mean_colour), atol=0.02)
    assert np.abs(null - encode_images(CONFIG.model, params["visual_encoder"], black)).max() > 0.1


def test_noise_offset_is_shared_by_all_positions_of_a_channel() -> None:
    plain = draw_noise(jax.random.key(0), (2, 4, 4, 3), 0.0)
    shift = draw_noise(jax.random.key(0), (2, 4, 4, 3), 0.1) - plain
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)
    assert len(np.unique(np.asarray(shift[:, 0, 0]).round(6))) == 6


class PerfectUNet:
    """Stands in for the network: knows the image, and draws it only on the condition; else mid-grey."""

    def __init__(self, config: DecoderConfig, image: jax.Array, condition: jax.Array) -> None:
        self.alpha_bar = jnp.asarray(decoder.alpha_bars(config), jnp.float32)
        self.clean = open_codec(config, {}).encode(image)
        self.condition = condition

    def __call__(
        self, latents: jax.Array, timesteps: jax.Array, condition: jax.Array, time_ids: jax.Array
    ) -> jax.Array:
        asked = (condition == self.condition).all((1, 2))
        clean = self.clean * asked[:, None, None, None]
        share = self.alpha_bar[timesteps][:, None, None, None]
        return (latents - jnp.sqrt(share) * clean) / jnp.sqrt(1 - share)


@pytest.mark.parametrize(("guidance_scale", "contrast"), [(1.0, 1.0), (3.0, 3.0), (0.5, 0.5)])
def test_sampling_with_a_perfect_network(
    monkeypatch: pytest.MonkeyPatch, guidance_scale: float, contrast: float
) -> None:
    # With x_0 = image on the condition and 0 (mid-grey) on the null, guidance g draws g times the image.
    config = with_decoder(latent_scale=0.5)
    image = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-0.25, maxval=0.25)
    condition = jnp.ones((1, 4, 6))
    monkeypatch.setattr(decoder, "merge_unet", lambda *_: PerfectUNet(config.decoder, image, condition))
    jax.clear_caches()
    drawn = sample(
        config, {"unet": {}}, condition, 0 * condition, jax.random.key(1), guidance_scale=guidance_scale, num_steps=7
    )
    jax.clear_caches()
    np.testing.assert_allclose(drawn, 0.5 + contrast * image / 2, atol=1e-4)


def test_autoencode_draws_within_range_and_repeatably(params: Any) -> None:
    drawn = autoencode(CONFIG, params, jnp.asarray(images(2)), jax.random.key(0))
    assert (drawn.shape, drawn.dtype) == ((2, 16, 16, 3), jnp.float32)
    assert 0 <= drawn.min() < drawn.max() <= 1
    np.testing.assert_array_equal(drawn, autoencode(CONFIG, params, jnp.asarray(images(2)), jax.random.key(0)))


def test_sampling_compiles_once(params: Any) -> None:
    embeddings = encode_images(CONFIG.model, params["visual_encoder"], jnp.asarray(images(2)))
    before = decoder._sample._cache_size()
    for seed, scale in enumerate((2.0, 2.5, 3.0)):
        sample(CONFIG, params, embeddings, embeddings[:1], jax.random.key(seed), guidance_scale=scale, num_steps=2)
    assert decoder._sample._cache_size() == before + 1


VAE = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_groups=2)
WITH_VAE = with_decoder(
    unet=dataclasses.replace(UNET, in_channels=4, out_channels=4), vae=VAE, latent="autoencoder_kl", latent_scale=0.5
)


@pytest.fixture(scope="module")
def params_with_vae() -> Any:
    return jax.tree.map(jnp.asarray, random_parameters(DecoderTask(WITH_VAE).init))


def test_the_37b_decoder_has_sdxls_vae() -> None:
    shapes = jax.eval_shape(DecoderTask(ExperimentConfig(name="decoder")).init, jax.random.key(0))
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) for part in ("unet", "vae")}
    assert counts == {"unet": 2_525_520_644, "vae": 83_653_863}


@jax.jit
def gradient_with_vae(params: Any) -> tuple[Any, Losses]:
    def loss(params: Any) -> tuple[jax.Array, Losses]:
        out = DecoderTask(WITH_VAE).losses(params, jax.tree.map(jnp.asarray, batch()), jax.random.key(0))
        return out.terms["noise"].sum, out

    return jax.grad(loss, has_aux=True)(params)


def test_a_vae_gives_the_latents_and_gets_no_gradient(params_with_vae: Any) -> None:
    task, key = DecoderTask(WITH_VAE), jax.random.key(0)
    latents = jax.jit(task.latents)(params_with_vae, {"images": images(2)}, key)
    posterior = merge_vae(VAE, params_with_vae["vae"]).encode(images(2) / 127.5 - 1.0)
    assert latents.shape == (2, 8, 8, 4)
    np.testing.assert_allclose(latents, 0.5 * posterior.sample(key), rtol=1e-4, atol=1e-5)
    assert np.abs(latents - 0.5 * posterior.mean).max() > 1e-3  # a draw, not the mean

    gradient, out = gradient_with_vae(params_with_vae)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["vae"]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["unet"]))
    assert out.metrics["vae_latent_square"].weight == 4.0


def test_nan_in_the_vae_is_named(params_with_vae: Any) -> None:
    broken = {**params_with_vae, "vae": jax.tree.map(lambda x: x.at[0].set(jnp.nan), params_with_vae["vae"])}
    assert np.isnan(gradient_with_vae(broken)[1].metrics["vae_latent_square"].sum)
    condition = jnp.ones((1, 4, 6))
    with pytest.raises(NotFiniteError, match=r"^vae: "):
        sample(WITH_VAE, broken, condition, 0 * condition, jax.random.key(0), num_steps=1)
    broken = {**params_with_vae, "unet": jax.tree.map(lambda x: x * jnp.nan, params_with_vae["unet"])}
    with pytest.raises(NotFiniteError, match=r"^unet: "):
        sample(WITH_VAE, broken, condition, 0 * condition, jax.random.key(0), num_steps=1)


def test_drawing_decodes_the_latents(params_with_vae: Any) -> None:
    condition = jnp.ones((1, 4, 6))
    drawn = sample(WITH_VAE, params_with_vae, condition, 0 * condition, jax.random.key(0), num_steps=1)
    assert (drawn.shape, drawn.dtype) == ((1, 16, 16, 3), jnp.float32)
    assert 0 <= drawn.min() < drawn.max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_factor": 4}, "decoder.unet.in_channels: got 12, wanted 48"),
        ({"image_size": 18}, r"decoder.image_size: got 18, wanted a multiple of 4.*nearest: 16 or 20$"),
        (
            {"unet": dataclasses.replace(UNET, cross_attention_width=8)},
            r"decoder.unet.cross_attention_width: got 8, wanted 6.*model\.vision\.width",
        ),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderTask(with_decoder(**changes))
