"""The video decoder: a new one draws each frame as the image decoder does; then frames of a clip know each other."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoder import CONFIG as IMAGE_CONFIG
from tiny import leaf_paths, random_parameters

from emu2_jax import optimizer as optimizer_lib
from emu2_jax.config import ExperimentConfig, OptimizerConfig, VideoConfig
from emu2_jax.diffusion import decoder as decoder_lib
from emu2_jax.diffusion.decoder import DecoderTask, image_network
from emu2_jax.diffusion.unet import UNet
from emu2_jax.diffusion.video import (
    TemporalConvolution,
    VideoDecoderTask,
    clip_network,
    init_temporal,
    sample_clips,
    spatial_convolutions,
    transformers,
)
from emu2_jax.train import build_program, make_step

FRAMES, CLIPS = 4, 2


def with_video(base: ExperimentConfig = IMAGE_CONFIG, **changes: Any) -> ExperimentConfig:
    video = VideoConfig(num_frames=FRAMES, **changes)
    return dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, video=video))


CONFIG = with_video(attention="joint")
#: Of one scale: compiles in half the time, and has every kind of layer but the changes of scale.
SMALL = dataclasses.replace(
    CONFIG,
    decoder=dataclasses.replace(
        CONFIG.decoder,
        unet=dataclasses.replace(
            CONFIG.decoder.unet, block_out_channels=(8,), transformer_layers_per_block=(1,), num_attention_heads=(2,)
        ),
    ),
)


def new_decoder(config: ExperimentConfig = CONFIG) -> Any:
    """Any image decoder's weights, none of them 0, and new layers of time."""
    trained = jax.tree.map(jnp.asarray, random_parameters(DecoderTask(config).init))
    return {**trained, "temporal": jax.jit(functools.partial(init_temporal, config.decoder))(jax.random.key(0))}


def trained_decoder(config: ExperimentConfig = CONFIG) -> Any:
    return jax.tree.map(jnp.asarray, random_parameters(VideoDecoderTask(config).init))


def inputs() -> list[jax.Array]:
    random, count = np.random.default_rng(1), CLIPS * FRAMES
    latents, condition = random.normal(size=(count, 8, 8, 12)), random.normal(size=(count, 4, 6))
    timesteps = np.arange(CLIPS).repeat(FRAMES) * 400 + 100
    arrays = (latents.astype(np.float32), timesteps, condition.astype(np.float32), np.full((count, 6), 16, np.int32))
    return [jnp.asarray(array) for array in arrays]


#: For what is not compared to the bit: compiles in half the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function: Any, *arguments: Any, **options: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def predict(
    network: Any, params: Any, dtype: str = "float32", config: ExperimentConfig = CONFIG, **options: Any
) -> Any:
    def run(params: Any, arrays: list[jax.Array]) -> jax.Array:
        return network(config.decoder, params, dtype)(*arrays)

    return np.asarray(compiled(run, params, inputs(), **options)(params, inputs()))


@functools.cache
def as_images() -> np.ndarray:
    """What the image decoder predicts, frame by frame."""
    return predict(image_network, new_decoder())


@pytest.mark.parametrize("attention", ["axial", "joint"])
def test_at_first_every_frame_is_the_image_decoders_to_the_bit(attention: Any) -> None:
    config = with_video(attention=attention)
    assert np.array_equal(predict(clip_network(FRAMES), new_decoder(config), config=config), as_images())
    assert np.abs(as_images()).max() > 0.1  # the weights are not those of a network that draws nothing


def test_in_half_precision_too_where_roundings_are_not_left_out() -> None:
    """XLA may keep more than bfloat16's bits between fused operations, and fuses two networks differently."""
    exact = {"xla_allow_excess_precision": False, **QUICK}
    found = [
        predict(network, new_decoder(SMALL), "bfloat16", config=SMALL, **exact)
        for network in (clip_network(FRAMES), image_network)
    ]
    assert np.array_equal(*found)


def test_drawn_clips_are_at_first_what_the_image_decoder_draws() -> None:
    params, key = new_decoder(SMALL), jax.random.key(3)
    embeddings = inputs()[2].reshape(CLIPS, FRAMES, 4, 6)
    null = 0 * embeddings[0, :1]
    clips = sample_clips(SMALL, params, embeddings, null, key)
    assert clips.shape == (CLIPS, FRAMES, 16, 16, 3)
    images = decoder_lib.sample(SMALL, params, inputs()[2], null, key)
    assert np.array_equal(clips.reshape(images.shape), images)

    before = decoder_lib._sample._cache_size()
    sample_clips(SMALL, params, embeddings + 1, null, jax.random.key(4), guidance_scale=2.0)
    assert decoder_lib._sample._cache_size() == before  # one compiled sampler


def test_every_spatial_convolution_and_every_self_attention_has_its_layer_of_time() -> None:
    image = nnx.eval_shape(lambda: UNet(CONFIG.decoder.unet, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(params=0)))
    shapes = jax.eval_shape(VideoDecoderTask(CONFIG).init, jax.random.key(0))
    convolutions = {"/".join(path) for path in spatial_convolutions(image)}
    attentions = {"/".join(path) for path in transformers(image)}
    assert {"conv_in", "conv_out", "downsamplers/0/conv", "upsamplers/0/conv"} < convolutions
    assert sum(path.endswith(("conv1", "conv2")) for path in convolutions) == 2 * (1 + 1 + 2 + 2 + 2)
    assert sum(path.startswith("up_blocks/0/attentions") for path in attentions) == 2

    names = {path.replace("']['", "/").strip("[']") for path in leaf_paths(shapes["temporal"])}
    wanted = {f"{path}/{leaf}" for path in convolutions for leaf in ("kernel", "bias")}
    of_attention = ("to_q/kernel", "to_k/kernel", "to_v/kernel", "to_out/kernel", "to_out/bias")
    assert names == wanted | {f"{path}/layers/attention/{leaf}" for path in attentions for leaf in of_attention}
    assert leaf_paths(shapes["unet"]) == leaf_paths(jax.eval_shape(DecoderTask(CONFIG).init, jax.random.key(0))["unet"])


def test_a_convolution_over_time_reads_the_frames_beside_a_frame_and_nothing_beyond_the_clip() -> None:
    layer = TemporalConvolution(2, kernel_frames=3)
    before, after = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [10.0, 0.0]])  # [in, out]
    layer.kernel[...] = jnp.asarray(np.stack([before, np.zeros((2, 2)), after]))
    layer.bias[...] = jnp.array([0.5, 0.0])
    x = np.arange(6 * 2 * 1 * 2, dtype=np.float32).reshape(6, 2, 1, 2)  # two clips of three frames, of 2 x 1 positions
    got = np.asarray(layer(jnp.asarray(x), 3))
    for clip in (0, 3):
        for t in range(3):
            past = x[clip + t - 1, ..., 0] if t > 0 else 0
            future = x[clip + t + 1, ..., 1] if t < 2 else 0
            np.testing.assert_allclose(got[clip + t, ..., 0], x[clip + t, ..., 0] + 0.5 + 10 * future)
            np.testing.assert_allclose(got[clip + t, ..., 1], x[clip + t, ..., 1] + past)


@pytest.mark.parametrize("attention", ["axial", "joint"])
def test_frames_of_a_clip_know_each_other_and_their_order_and_no_other_clip(attention: Any) -> None:
    params = trained_decoder(with_video(SMALL, attention=attention))
    config = with_video(SMALL, attention=attention).decoder
    arrays = inputs()
    network = compiled(lambda arrays: clip_network(FRAMES)(config, params, "float32")(*arrays), arrays, **QUICK)
    whole = np.asarray(network(arrays))
    other = [arrays[0].at[FRAMES - 1].add(1.0), *arrays[1:]]  # the last frame of the first clip
    changed = np.abs(np.asarray(network(other)) - whole).max((1, 2, 3))
    assert (changed[:FRAMES] > 1e-3).all()
    assert (changed[FRAMES:] == 0).all()
    swapped = np.array([1, 0, 2, 3, 4, 5, 6, 7])
    assert np.abs(np.asarray(network([x[swapped] for x in arrays])) - whole[swapped]).max() > 1e-2


def batch(seed: int = 0) -> dict[str, Any]:
    images = np.random.default_rng(seed).integers(0, 256, (CLIPS, FRAMES, 16, 16, 3), np.uint8)
    time_ids = np.tile(np.int32([16, 16, 0, 0, 16, 16]), (CLIPS, 1))
    return {"images": images, "time_ids": time_ids, "weight": np.array([1.0, 0.5], np.float32)}


def test_the_loss_is_the_image_decoders_with_one_timestep_and_one_fate_of_the_condition_per_clip() -> None:
    task, params, key = VideoDecoderTask(SMALL), new_decoder(SMALL), jax.random.key(5)
    found = compiled(task.losses, params, batch(), key, **QUICK)(params, batch(), key)
    assert found.terms["noise"].weight == task.term_weights(batch())["noise"] == FRAMES * 1.5
    together = DecoderTask(SMALL)
    together.frames = FRAMES
    images, ids = batch()["images"].reshape(-1, 16, 16, 3), np.tile(batch()["time_ids"], (FRAMES, 1))
    flat = {"images": images, "time_ids": ids, "weight": batch()["weight"].repeat(FRAMES)}
    image = compiled(together.losses, params, flat, key, **QUICK)(params, flat, key)
    np.testing.assert_allclose(found.terms["noise"].sum, image.terms["noise"].sum, rtol=1e-6)
    # A clip is in one quarter of the timesteps, whole.
    assert {float(term.weight) for term in found.metrics.values()} <= {0.0, 2.0, 4.0, 6.0}

    half = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, condition_dropout=0.5))
    frames = {"images": jnp.asarray(flat["images"]).repeat(4, axis=0)}
    condition = jax.jit(VideoDecoderTask(half).condition)(params, frames, key).reshape(-1, FRAMES, 24)
    null = decoder_lib.null_embeddings(SMALL.model, params["visual_encoder"]).reshape(24)
    dropped = np.asarray((condition == null).all(-1))
    assert (dropped == dropped[:, :1]).all()
    assert 0 < dropped[:, 0].mean() < 1


@pytest.mark.parametrize(("frozen", "remat"), [(("visual_encoder",), "none"), (("visual_encoder", "unet"), "full")])
def test_layers_of_time_learn_alone_or_with_the_rest(frozen: Any, remat: Any) -> None:
    model = dataclasses.replace(SMALL.model, remat=remat, frozen_dtype="float32")
    optimizer = OptimizerConfig(learning_rate=1e-2, temporal_learning_rate=2e-2, frozen=frozen, epsilon=1e-6)
    config = dataclasses.replace(SMALL, model=model, optimizer=optimizer)
    task, params = VideoDecoderTask(config), new_decoder(SMALL)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), build_program(task, config).abstract_state)
    state["params"] = params
    step = make_step(task, config, optimizer_lib.build(optimizer, 1))
    new, log = compiled(step, state, batch(), **QUICK)(state, batch())
    assert np.isfinite(float(log["grad_norm"]))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), new["params"], params)
    assert max(jax.tree.leaves(moved["visual_encoder"])) == 0
    assert (max(jax.tree.leaves(moved["unet"])) > 0) == ("unet" not in frozen)
    leaves = jax.tree_util.tree_leaves_with_path(moved["temporal"])
    assert min(value for path, value in leaves if "conv" in str(path)) > 0
    attention = moved["temporal"]["mid_block"]["attentions"]["0"]["layers"]["attention"]
    assert attention["to_out"]["kernel"] > 0
    assert attention["to_q"]["kernel"] == 0  # what it reads matters as soon as its output is not zero


def test_operations_of_a_step_are_counted_with_the_layers_of_time() -> None:
    shapes = {name: array.shape for name, array in batch().items()}
    flat = {"images": (8, 16, 16, 3), "time_ids": (8, 6), "weight": (8,)}
    video, image = VideoDecoderTask(SMALL).model_flops(shapes), DecoderTask(SMALL).model_flops(flat)
    positions, width, latent_channels = 64 * CLIPS * FRAMES, 8, 12
    convolutions = 2 * 3 * positions * ((1 + 2 * 5) * width**2 + latent_channels**2)  # 5 residual blocks and both ends
    products, scores = 4 * 2 * positions * width**2, 2 * 2 * CLIPS * (64 * FRAMES) ** 2 * width
    assert video - image == 3 * (convolutions + 4 * (products + scores))  # 4 transformers
