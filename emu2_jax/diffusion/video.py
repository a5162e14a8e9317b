"""The video decoder: the image decoder's U-Net with layers of time in it, which draws the frames of a clip together.

After every spatial convolution stands a convolution over frames; beside every self-attention over the positions of a
frame stands one over the frames of the clip. Both are added and start at zero: a new video decoder draws every frame
exactly as the image decoder would. The layers of time are a part of their own, `temporal`, and the U-Net's part stays
what it was, in shape and names: `train.init_from` takes it from an image decoder's run, and either part can be frozen.

Frames lie in the U-Net's batch: B T stands for B clips of T frames, clip after clip.

Source: paper section 2.3, which names these layers and no more; what is open is in `config.VideoConfig`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from emu2_jax.config import DecoderConfig, ExperimentConfig, UNetConfig, VideoConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.diffusion.decoder import DecoderTask, Network, merge_unet
from emu2_jax.diffusion.schedule import sinusoids
from emu2_jax.diffusion.unet import Attention, Transformer, UNet
from emu2_jax.models import attention
from emu2_jax.models.stack import Stack
from emu2_jax.task import Batch, Losses, Params

#: Kernel of the U-Net's convolutions that look around; those of 1 x 1 do not and are not followed by one over time.
SPATIAL_KERNEL = (3, 3)

Path = tuple[str, ...]


class TemporalConvolution(nnx.Module):
    """x plus a convolution of it over the frames of each clip, zero before the first frame and after the last."""

    def __init__(self, channels: int, kernel_frames: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((kernel_frames, channels, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "BT H W C"], num_frames: int) -> Float[Array, "BT H W C"]:
        clips = x.reshape(-1, num_frames, x.shape[1] * x.shape[2], x.shape[3])
        reach = self.kernel.shape[0] // 2
        added = jax.lax.conv_general_dilated(
            clips,
            self.kernel[...].astype(x.dtype)[:, None],
            window_strides=(1, 1),
            padding=((reach, reach), (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + (added + self.bias[...].astype(x.dtype)).reshape(x.shape)


class TemporalAttention(nnx.Module):
    """Attention over the frames of a clip: of a position to itself ("axial") or to all positions ("joint").

    Frames are told apart by sinusoids of their number, added to the input.
    """

    def __init__(self, width: int, heads: int, reach: str, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.reach = reach
        self.attention = Attention(width, width, heads, dtype=dtype, rngs=rngs)
        self.attention.to_out = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "BT P C"], num_frames: int) -> Float[Array, "BT P C"]:
        positions, width = x.shape[1:]
        numbers = sinusoids(jnp.arange(num_frames), width).astype(x.dtype)
        clips = x.reshape(-1, num_frames, positions, width) + numbers[:, None]
        if self.reach == "joint":
            whole = clips.reshape(-1, num_frames * positions, width)
            return self.attention(whole, whole).reshape(x.shape)
        lines = clips.swapaxes(1, 2).reshape(-1, num_frames, width)
        return self.attention(lines, lines).reshape(-1, positions, num_frames, width).swapaxes(1, 2).reshape(x.shape)


class ConvolutionThenTime(nnx.Module):
    """A convolution of the U-Net and the one over time that follows it."""

    def __init__(self, space: nnx.Conv, time: TemporalConvolution, num_frames: int) -> None:
        self.space, self.time, self.num_frames = space, time, num_frames

    def __call__(self, x: Float[Array, "BT H W C"]) -> Float[Array, "BT H2 W2 C2"]:
        return self.time(self.space(x), self.num_frames)


class SpaceTimeAttention(nnx.Module):
    """A self-attention of the U-Net and the one over time, of the same input, added."""

    def __init__(self, space: Attention, time: TemporalAttention, num_frames: int) -> None:
        self.space, self.time, self.num_frames = space, time, num_frames

    def __call__(
        self, x: Float[Array, "BT P C"], context: Float[Array, "BT P C"], *, kernel: attention.Kernel = "plain"
    ) -> Float[Array, "BT P C"]:
        return self.space(x, context, kernel=kernel) + self.time(x, self.num_frames)


def spatial_convolutions(unet: UNet) -> dict[Path, nnx.Conv]:
    """Those that look around in a frame, by their place in the network."""
    found = {_path(path): module for path, module in nnx.iter_modules(unet) if isinstance(module, nnx.Conv)}
    return {path: module for path, module in sorted(found.items()) if module.kernel_size == SPATIAL_KERNEL}


def transformers(unet: UNet) -> dict[Path, Transformer]:
    """The stacks of attention layers, by their place in the network."""
    found = {_path(path): module for path, module in nnx.iter_modules(unet) if isinstance(module, Transformer)}
    return dict(sorted(found.items()))


def _path(path: tuple[Any, ...]) -> Path:
    return tuple(str(name) for name in path)


class TemporalLayers(nnx.Module):
    """All layers of time of a U-Net, each under the name of the layer that it follows or stands beside."""

    def __init__(self, unet: UNetConfig, video: VideoConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        image = nnx.eval_shape(lambda: UNet(unet, dtype=dtype, rngs=nnx.Rngs(params=0)))
        tree: dict[str, Any] = {}
        for path, convolution in spatial_convolutions(image).items():
            _put(tree, path, TemporalConvolution(convolution.out_features, video.kernel_frames))
        for path, transformer in transformers(image).items():
            _put(tree, path, _attention_stack(transformer, video, dtype=dtype, rngs=rngs))
        for name, entry in tree.items():
            setattr(self, name, _modules(entry))


def _attention_stack(transformer: Transformer, video: VideoConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Stack:
    layers: Any = transformer.transformer_blocks.layers
    spatial: Attention = layers.attn1
    num_layers, _, width = spatial.to_out.kernel.shape
    return Stack(
        lambda rngs: TemporalAttention(width, spatial.heads, video.attention, dtype=dtype, rngs=rngs),
        num_layers,
        rngs=rngs,
    )


def _put(tree: dict[str, Any], path: Path, module: nnx.Module) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = module


def _modules(entry: Any) -> nnx.Module:
    return nnx.Dict({name: _modules(inner) for name, inner in entry.items()}) if isinstance(entry, dict) else entry


def _at(module: Any, path: Path) -> Any:
    for name in path:
        module = module[name] if isinstance(module, nnx.Dict) else getattr(module, name)
    return module


def insert(unet: UNet, temporal: TemporalLayers, num_frames: int) -> UNet:
    """Put the layers of time into the U-Net, which is changed: its batches are clips of `num_frames` from now on."""
    for path, convolution in spatial_convolutions(unet).items():
        joined = ConvolutionThenTime(convolution, _at(temporal, path), num_frames)
        setattr(_at(unet, path[:-1]), path[-1], joined)
    for path, transformer in transformers(unet).items():
        layers: Any = transformer.transformer_blocks.layers
        layers.attn1 = SpaceTimeAttention(layers.attn1, _at(temporal, path).layers, num_frames)
    return unet


@functools.cache
def clip_network(num_frames: int) -> Network:
    """The U-Net with the layers of time in it, for clips of `num_frames`. Cached, so that equal ones compile once."""

    def network(config: DecoderConfig, params: Params, compute_dtype: str) -> UNet:
        build = functools.partial(TemporalLayers, config.unet, config.video, dtype=jnp.dtype(compute_dtype))
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=0))))
        temporal = nnx.merge(graphdef, params["temporal"])
        return insert(merge_unet(config, params["unet"], compute_dtype), temporal, num_frames)

    return network


def init_temporal(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    """Parameters of the layers of time, float32, as nested dicts: with any U-Net they change nothing."""
    layers = TemporalLayers(config.unet, config.video, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(layers, nnx.Param))


class VideoDecoderTask(DecoderTask):
    """Noise prediction on clips, each frame conditioned on its own embeddings (`task.Task`). One term: `noise`.

    Batch fields: `images` uint8 (B, T, S, S, 3), T = `decoder.video.num_frames`; `time_ids` int32 (B, 6) and `weight`
    float32 (B,) of the clip, as `DecoderTask` has them of an image. The frames of a clip have one timestep and keep or
    lose their condition together; each has noise of its own.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self.frames = config.decoder.video.num_frames
        self.network = clip_network(self.frames)

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters of an image decoder's parts, and layers of time that change nothing yet."""
        return {**super().init(key), "temporal": init_temporal(self.decoder, jax.random.fold_in(key, 3))}

    def term_weights(self, batch: Batch) -> Mapping[str, Float[Array, ""]]:
        """How many frames of the batch count."""
        return {name: weight * self.frames for name, weight in super().term_weights(batch).items()}

    def losses(self, params: Params, batch: Batch, key: PRNGKeyArray) -> Losses:
        """Squared error of the prediction at one random timestep per clip, averaged over latent and frames."""
        images = batch["images"]
        frames = {
            "images": images.reshape(-1, *images.shape[2:]),
            **{name: batch[name].repeat(self.frames, axis=0) for name in ("time_ids", "weight")},
        }
        return super().losses(params, frames, key)


def sample_clips(
    config: ExperimentConfig,
    params: Params,
    embeddings: Float[Array, "B T N D"],
    null: Float[Array, "1 N D"],
    key: PRNGKeyArray,
    *,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
) -> Float[Array, "B T S S 3"]:
    """Draw the frames of clips together, each from its own embeddings; the rest as `decoder.sample`."""
    clips, frames = embeddings.shape[:2]
    images = decoder_lib.sample(
        config,
        params,
        embeddings.reshape(clips * frames, *embeddings.shape[2:]),
        null,
        key,
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        network=clip_network(frames),
    )
    return images.reshape(clips, frames, *images.shape[1:])


def autoencode_clips(
    config: ExperimentConfig,
    params: Params,
    clips: UInt8[Array, "B T S S 3"],
    key: PRNGKeyArray,
    *,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
) -> Float[Array, "B T S S 3"]:
    """Encode the frames of clips and draw them again from their embeddings alone; in [0, 1], float32."""
    embeddings, null = decoder_lib.encode(config.model, params["visual_encoder"], clips.reshape(-1, *clips.shape[2:]))
    embeddings = embeddings.reshape(*clips.shape[:2], *embeddings.shape[1:])
    return sample_clips(config, params, embeddings, null, key, guidance_scale=guidance_scale, num_steps=num_steps)
