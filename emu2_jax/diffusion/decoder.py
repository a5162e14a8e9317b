"""The image decoder: trains a U-Net to draw an image from its visual embeddings, and samples from it.

The language model takes no part: the condition is what the frozen visual encoder makes of the very image that is to be
drawn. Source: paper section 2.3; sampling as in the release's `diffusion.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from emu2_jax import compiler_options
from emu2_jax.config import DecoderConfig, ExperimentConfig, ModelConfig
from emu2_jax.diffusion import schedule
from emu2_jax.diffusion.sampler import denoise, guided
from emu2_jax.diffusion.unet import UNet, check
from emu2_jax.diffusion.vae import init_vae, latent_channels, open_codec
from emu2_jax.errors import ConfigError, NotFiniteError
from emu2_jax.metrics import count_flops
from emu2_jax.models.emu2 import encode_images, encode_normalized, init_visual_encoder
from emu2_jax.task import Batch, Losses, Params, Term

#: The noise loss is also logged by this many equal ranges of timesteps.
NUM_NOISE_LEVELS = 4

#: What predicts from noisy latents, timesteps and conditions: called as `UNet` is.
Denoiser = Callable[..., Array]
#: Makes the network that denoises from settings, all parameters and the dtype of its products.
Network = Callable[[DecoderConfig, Params, str], Denoiser]


class DecoderTask:
    """Noise prediction on frozen visual embeddings (`task.Task`). One term: `noise`.

    Batch fields: `images` uint8 (B, S, S, 3) RGB, S = `decoder.image_size`; `time_ids` int32 (B, 6), in pixels: height
    and width of the original, top and left of the crop, height and width drawn; `weight` float32 (B,), 0 = padding.
    Where the images were encoded beforehand, `embeddings` (B, N, E), bfloat16, and `latents` (B, H, W, C) are in the
    place of `images`; a VAE's `latents` are mean and log-variance, (B, H, W, 2 C) (`vae.stored_latent`).
    """

    def __init__(self, config: ExperimentConfig) -> None:
        check_decoder(config)
        self.model = config.model
        self.decoder = config.decoder
        self.coefficients: Mapping[str, float] = {"noise": 1.0}
        self.network: Network = image_network
        #: Neighbouring images of a batch that have one timestep, and keep or lose the condition together.
        self.frames = 1

    rows_are_independent = False  # the draws of a batch come from one key

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters of the visual encoder, the U-Net and, where latents are its, the VAE."""
        encoder_key, unet_key = jax.random.split(key)
        params = {
            "visual_encoder": init_visual_encoder(self.model, encoder_key),
            "unet": init_unet(self.decoder, unet_key),
        }
        if self.decoder.latent == "autoencoder_kl":
            params["vae"] = init_vae(self.decoder.vae, jax.random.fold_in(key, 2))
        return params

    def term_weights(self, batch: Batch) -> Mapping[str, Float[Array, ""]]:
        """How many images of the batch count."""
        return {"noise": jnp.asarray(batch["weight"], jnp.float32).sum()}

    def losses(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Losses:
        """Squared error of the prediction at one random timestep per image, averaged over the latent."""
        timestep_key, noise_key, dropout_key = jax.random.split(key, 3)
        clean = self.latents(params, batch, jax.random.fold_in(key, 3))
        draws = (len(clean) // self.frames,)
        timesteps = jax.random.randint(timestep_key, draws, 0, self.decoder.num_train_timesteps).repeat(self.frames)
        alpha_bar = jnp.asarray(alpha_bars(self.decoder), jnp.float32)[timesteps]
        noise = draw_noise(noise_key, clean.shape, self.decoder.noise_offset)
        predicted = self.network(self.decoder, params, self.model.compute_dtype)(
            schedule.add_noise(clean, noise, alpha_bar),
            timesteps,
            self.condition(params, batch, dropout_key),
            batch["time_ids"],
            remat=self.model.remat,
            kernel=self.model.attention,
        )
        wanted = schedule.target(clean, noise, alpha_bar, self.decoder.prediction)
        errors = jnp.square(predicted - wanted).mean((1, 2, 3))
        weight = batch["weight"].astype(jnp.float32)
        if self.decoder.min_snr_gamma is None:
            weighted = errors
        else:
            weighted = errors * schedule.min_snr_weight(alpha_bar, self.decoder.min_snr_gamma, self.decoder.prediction)
        metrics = self._by_noise_level(errors, weight, timesteps)
        if self.decoder.latent == "autoencoder_kl":
            # About 1 with the VAE that latent_scale belongs to; where the VAE fails, its name is among what is bad.
            metrics["vae_latent_square"] = Term((weight * jnp.square(clean).mean((1, 2, 3))).sum(), weight.sum())
        return Losses(terms={"noise": Term((weight * weighted).sum(), weight.sum())}, metrics=metrics)

    def latents(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Float[Array, "B H W C"]:
        """What the U-Net learns to restore, float32: one draw from what the codec makes, or made, of each image."""
        codec = open_codec(self.decoder, params)
        if "latents" in batch:
            return codec.draw(batch["latents"], key)
        return jax.lax.stop_gradient(codec.encode(batch["images"].astype(jnp.float32) / 127.5 - 1.0, key))

    def condition(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Float[Array, "B N D"]:
        """Embeddings of the batch's images, a random share of them replaced by the null; no gradient."""
        if "embeddings" in batch:
            embeddings = batch["embeddings"].astype(jnp.float32)
        else:
            embeddings = encode_images(self.model, params["visual_encoder"], batch["images"])
        if not self.decoder.condition_dropout:
            return embeddings
        null = null_embeddings(self.model, params["visual_encoder"])
        draws = (len(embeddings) // self.frames,)
        dropped = jax.random.bernoulli(key, self.decoder.condition_dropout, draws).repeat(self.frames)
        return jnp.where(dropped[:, None, None], null, embeddings)

    def _by_noise_level(
        self, errors: Float[Array, " B"], weight: Float[Array, " B"], timesteps: Int[Array, " B"]
    ) -> dict[str, Term]:
        """Unweighted squared error by range of timesteps: `noise_t0_249` is the least noisy quarter of 1000."""
        bounds = np.linspace(0, self.decoder.num_train_timesteps, NUM_NOISE_LEVELS + 1).astype(int)
        metrics = {}
        for first, end in pairwise(bounds.tolist()):
            inside = weight * ((timesteps >= first) & (timesteps < end))
            metrics[f"noise_t{first}_{end - 1}"] = Term((inside * errors).sum(), inside.sum())
        return metrics

    def model_flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Model FLOPs of one step (`task.Task.model_flops`): U-Net forward and backward, frozen encoders forward."""
        count, size = batch_shapes["weight"][0] * self.frames, self.decoder.image_size
        model = dataclasses.replace(self.model, remat="none")
        params = jax.eval_shape(self.init, jax.random.key(0))
        side = size // self.decoder.latent_factor
        unet = count_flops(
            lambda params, x, t, embeddings, time_ids: self.network(self.decoder, params, "float32")(
                x, t, embeddings, time_ids
            ),
            params,
            jax.ShapeDtypeStruct((count, side, side, latent_channels(self.decoder)), jnp.float32),
            jax.ShapeDtypeStruct((count,), jnp.int32),
            jax.ShapeDtypeStruct((count, model.num_visual_tokens, model.vision.width), jnp.float32),
            jax.ShapeDtypeStruct((count, 6), jnp.int32),
        )
        if "embeddings" in batch_shapes:
            return 3 * unet
        images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
        encoder = count_flops(partial(encode_images, model), params["visual_encoder"], images)
        latents = count_flops(self.latents, params, {"images": images}, jax.random.key(0))
        return 3 * unet + encoder + latents


def check_decoder(config: ExperimentConfig) -> None:
    """Raise ConfigError when image, latent, U-Net and encoder do not fit together."""
    decoder, unet = config.decoder, config.decoder.unet
    check(unet)
    channels = latent_channels(decoder)
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            raise ConfigError(
                f"decoder.unet.{name}: got {getattr(unet, name)}, wanted {channels}, the channels of "
                f"decoder.latent = {decoder.latent} with decoder.latent_factor = {decoder.latent_factor}"
            )
    multiple = decoder.latent_factor * 2 ** (len(unet.block_out_channels) - 1)
    if decoder.image_size % multiple:
        below = decoder.image_size // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise ConfigError(
            f"decoder.image_size: got {decoder.image_size}, wanted a multiple of {multiple} (decoder.latent_factor "
            f"times 2 for each change of scale in decoder.unet.block_out_channels); nearest: {nearest}"
        )
    if unet.cross_attention_width != config.model.vision.width:
        raise ConfigError(
            f"decoder.unet.cross_attention_width: got {unet.cross_attention_width}, wanted "
            f"{config.model.vision.width}, the width of a visual embedding (model.vision.width)"
        )


def init_unet(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    """Random parameters of the U-Net, float32, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(_build_unet(config, "float32", nnx.Rngs(params=key)), nnx.Param))


def image_network(config: DecoderConfig, params: Params, compute_dtype: str) -> Denoiser:
    """The U-Net alone: every image of a batch by itself (`Network`)."""
    return merge_unet(config, params["unet"], compute_dtype)


def merge_unet(config: DecoderConfig, unet_params: Params, compute_dtype: str) -> UNet:
    """The U-Net with these parameters, to be used inside a traced function."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _build_unet(config, compute_dtype, nnx.Rngs(params=0))))
    return nnx.merge(graphdef, unet_params)


def _build_unet(config: DecoderConfig, compute_dtype: str, rngs: nnx.Rngs) -> UNet:
    return UNet(config.unet, dtype=jnp.dtype(compute_dtype), rngs=rngs)


def alpha_bars(config: DecoderConfig) -> np.ndarray:
    """Share of signal power left at each training timestep."""
    return schedule.alpha_bars(
        config.num_train_timesteps,
        config.beta_start,
        config.beta_end,
        zero_terminal_snr=config.zero_terminal_snr,
    )


def draw_noise(key: PRNGKeyArray, shape: tuple[int, ...], offset: float) -> Float[Array, "B H W C"]:
    """Unit noise, plus `offset` times a unit draw that all positions of a channel share.

    The shared part lets the network learn to move the overall brightness. Source: "Diffusion With Offset Noise"
    (CrossLabs, 2023); paper table 7: 0.1.
    """
    noise_key, offset_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, shape)
    return noise + offset * jax.random.normal(offset_key, (shape[0], 1, 1, shape[-1]))


def null_embeddings(config: ModelConfig, visual_encoder_params: Params) -> Float[Array, "1 N D"]:
    """The condition that says nothing: embeddings of an all-zero *normalised* image (the mean colour, not black).

    Source: release `diffusion.py`, autoencoding. For generation the release instead takes what the language model
    generates for an empty prompt.
    """
    size = config.vision.image_size
    return jax.lax.stop_gradient(
        encode_normalized(config, visual_encoder_params, jnp.zeros((1, size, size, 3), jnp.float32))
    )


def whole_image_time_ids(count: int, size: int) -> Int[Array, "B 6"]:
    """Micro-conditions of `count` images drawn whole: original and target are size x size, no crop."""
    return jnp.tile(jnp.array([[size, size, 0, 0, size, size]], jnp.int32), (count, 1))


def sample(
    config: ExperimentConfig,
    params: Params,
    embeddings: Float[Array, "B N D"],
    null: Float[Array, "#B N D"],
    key: PRNGKeyArray,
    *,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
    network: Network = image_network,
) -> Float[Array, "B S S 3"]:
    """Draw one image in [0, 1], float32, for each set of visual embeddings, by `network` and the codec.

    `null` is the condition to steer away from: `null_embeddings` for autoencoding, the embeddings generated for an
    empty prompt for generation; it is not read when `guidance_scale` is 1. Scale and steps default to
    `decoder.guidance_scale` and `decoder.num_sampling_steps`. Compiled once per batch shape and number of steps.
    Raises `NotFiniteError`, which names the network, when what it gave is not finite.
    """
    scale = config.decoder.guidance_scale if guidance_scale is None else guidance_scale
    images, latents_finite, images_finite = _sample(
        config.decoder,
        config.model.compute_dtype,
        config.decoder.num_sampling_steps if num_steps is None else num_steps,
        scale != 1.0,
        network,
        {part: params[part] for part in ("unet", "temporal", "vae") if part in params},
        embeddings,
        jnp.broadcast_to(null, embeddings.shape),
        key,
        scale,
    )
    check_finite(unet=latents_finite, vae=images_finite)
    return images


def check_finite(**finite: Bool[Array, ""]) -> None:
    """Raise `NotFiniteError` that names the first network whose output is not finite."""
    for network, good in finite.items():
        if not good:
            raise NotFiniteError(f"{network}: gave numbers that are not finite, from parameters or inputs that are not")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), compiler_options=compiler_options.DRAWING)
def _sample(
    config: DecoderConfig,
    compute_dtype: str,
    num_steps: int,
    guided_by_null: bool,
    network: Network,
    params: Params,
    embeddings: Float[Array, "B N D"],
    null: Float[Array, "B N D"],
    key: PRNGKeyArray,
    guidance_scale: Float[Array, ""],
) -> tuple[Float[Array, "B S S 3"], Bool[Array, ""], Bool[Array, ""]]:
    codec = open_codec(config, params)
    unet = network(config, params, compute_dtype)
    steps = schedule.euler_steps(
        alpha_bars(config), num_steps, config.timestep_spacing, steps_offset=config.steps_offset
    )
    condition = jnp.concatenate([embeddings, null]) if guided_by_null else embeddings
    time_ids = whole_image_time_ids(len(condition), config.image_size)
    predict = guided(lambda x, t: unet(x, t, condition, time_ids), guidance_scale if guided_by_null else None)
    side = config.image_size // codec.factor
    noise = jax.random.normal(key, (len(embeddings), side, side, codec.latent_channels))
    latents = denoise(predict, noise, steps, config.prediction)
    images = codec.decode(latents)
    return jnp.clip(images / 2.0 + 0.5, 0.0, 1.0), jnp.isfinite(latents).all(), jnp.isfinite(images).all()


def autoencode(
    config: ExperimentConfig,
    params: Params,
    images: UInt8[Array, "B S S 3"],
    key: PRNGKeyArray,
    *,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
) -> Float[Array, "B S S 3"]:
    """Encode images and draw them again from their embeddings alone; images in [0, 1], float32."""
    embeddings, null = encode(config.model, params["visual_encoder"], images)
    return sample(config, params, embeddings, null, key, guidance_scale=guidance_scale, num_steps=num_steps)


@partial(jax.jit, static_argnums=0, compiler_options=compiler_options.DRAWING)
def encode(
    config: ModelConfig, visual_encoder_params: Params, images: UInt8[Array, "B S S 3"]
) -> tuple[Float[Array, "B N D"], Float[Array, "1 N D"]]:
    """Embeddings of images, and the null to steer away from."""
    return encode_images(config, visual_encoder_params, images), null_embeddings(config, visual_encoder_params)
