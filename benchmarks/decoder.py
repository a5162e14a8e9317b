"""The visual decoder: what a trained one redraws, what stored embeddings save, and a sampling step beside PyTorch's.

    python -m benchmarks.decoder --run runs/openmoji_64/decoder --cases reconstruct-seen reconstruct-unseen
    python -m benchmarks.decoder --run runs/openmoji_64/decoder --cases guidance steps guidance-steps
    python -m benchmarks.decoder --cases embeddings-over-pixels image-flops
    .venv-parity/bin/python -m benchmarks.decoder --cases unet-step

The first cases read the run that they are given and train nothing: `reconstruct-seen` and `reconstruct-unseen` redraw
the held-out pictures that its config names (seen emoji in new scenes, and emoji never trained on); `guidance` and
`steps` do so for other settings of the sampler, `guidance-steps` for pairs of both.

`embeddings-over-pixels` takes the same steps from pixels and from embeddings and latents that it stores first, in
turns, on the pictures of `openmoji_64_decoder`. What that saves is the frozen networks' share of a step. Without
`--run` their sizes are such that it is about what it is at full size, in `emu2_37b_decoder_512`: a random encoder of 6
times and a random VAE of 0.6 times the U-Net's operations. With `--run` they are the run's own. `image-flops` counts
the operations from shapes, for these networks and for the recipes (minutes at full size).

`unet-step` needs torch and diffusers, which `make test-parity` installs there. The network is `openmoji_tiny_decoder`'s
without its local cross-attention, which diffusers has not; weights are random. A step is what happens once per
timestep: scale the latents, run the network on the condition and on the null, guide, take an Euler step. The two take
turns, each step timed after one that is not, as in a loop. PyTorch is timed on all cores and on one, which is quicker
on a busy machine, and the better of both counts. JSON lines; milliseconds are medians over rounds, `torch_over_ours` is
their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.shards import expand_shards
from emu2_jax import compiler_options
from emu2_jax.checkpoint import Checkpointer
from emu2_jax.config import DecoderConfig, ExperimentConfig, VAEConfig
from emu2_jax.diffusion import schedule
from emu2_jax.diffusion.decoder import alpha_bars, init_unet, merge_unet
from emu2_jax.diffusion.sampler import guided
from emu2_jax.errors import UserError
from emu2_jax.evaluation.autoencoding import likeness, redraw
from emu2_jax.metrics import count_flops
from emu2_jax.models.emu2 import encode_images, init_visual_encoder
from emu2_jax.train import BatchPlacer, build_program
from emu2_jax.weights.diffusers_config import scheduler_json, unet_json
from emu2_jax.weights.diffusers_weights import unet_table
from emu2_jax.weights.state_dict import to_state_dict
from experiments import recipes
from experiments.autoencode import read_images, splits
from experiments.encode import Part, encode_crops
from experiments.inputs import make_task, open_input
from experiments.runs import load_config, load_params

#: Setting of the sampler, and the values that it is tried at, by case.
ABLATIONS: Mapping[str, tuple[str, Sequence[float]]] = {
    "guidance": ("guidance_scale", (1.0, 1.5, 2.0, 3.0)),
    "steps": ("num_sampling_steps", (1, 2, 5, 10, 25, 50)),
}
CASES = (
    "reconstruct-seen",
    "reconstruct-unseen",
    *ABLATIONS,
    "guidance-steps",
    "embeddings-over-pixels",
    "image-flops",
    "unet-step",
)
GUIDANCE_STEPS = tuple(itertools.product((1.0, 1.5, 3.0, 5.0), (2, 7, 25, 50)))

GUIDANCE_SCALE = 3.0
NUM_STEPS = 50
STEP = 10  #: which of them is taken


def tiny_decoder() -> DecoderConfig:
    """The settings of the tiny decoder with SDXL's schedule, so that both sides can run it."""
    decoder = recipes.get("openmoji_tiny_decoder").decoder
    unet = dataclasses.replace(decoder.unet, condition_radius=None)
    return dataclasses.replace(DecoderConfig(), unet=unet)


def random_params(shapes: Any) -> Any:
    """Parameters away from their initial zeros, so that the network's output is not trivial."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        fan_in = np.prod(leaf.shape[:-1][-3:]) if len(leaf.shape) > 1 else 100.0
        return jnp.asarray(random.normal(float(path[-1].key == "scale"), fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def our_step(config: DecoderConfig, params: Any, inputs: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """The compiled step on fixed inputs."""
    steps = schedule.euler_steps(alpha_bars(config), NUM_STEPS)

    @partial(jax.jit, compiler_options=compiler_options.DRAWING)
    def step(params: Any, x: Any, condition: Any, time_ids: Any, timestep: Any, sigma: Any, next_sigma: Any) -> Any:
        unet = merge_unet(config, params, "float32")
        predict = guided(lambda x, t: unet(x, t, condition, time_ids), GUIDANCE_SCALE)
        predicted = predict(schedule.scale_model_input(x, sigma), timestep)
        return schedule.euler_step(x, predicted, sigma, next_sigma, config.prediction)

    stops = (steps.timesteps[STEP], steps.sigmas[STEP], steps.sigmas[STEP + 1])
    x = inputs["latents"].transpose(0, 2, 3, 1)
    arguments = [jnp.asarray(array) for array in (x, inputs["condition"], inputs["time_ids"], *stops)]
    return lambda: np.asarray(step(params, *arguments)).transpose(0, 3, 1, 2)


def torch_step(config: DecoderConfig, params: Any, inputs: dict[str, np.ndarray]) -> Callable[[int], np.ndarray]:
    """The same by diffusers, on a number of threads. Raises `UserError` that says how to get it."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # not needed, and often of another build
    try:
        import torch
        from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    except ImportError as error:
        raise UserError(
            f"benchmarks.decoder: needs torch and diffusers ({error}); `make test-parity` installs both, then run "
            ".venv-parity/bin/python -m benchmarks.decoder"
        ) from error

    unet = UNet2DConditionModel.from_config(unet_json(config.unet)).eval()
    state_dict = to_state_dict({"unet": params}, unet_table(config.unet))
    unet.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()})
    scheduler = EulerDiscreteScheduler.from_config(scheduler_json(config))
    scheduler.set_timesteps(NUM_STEPS)
    latents, condition, time_ids = (torch.from_numpy(inputs[name]) for name in ("latents", "condition", "time_ids"))
    timestep = scheduler.timesteps[STEP]
    added = {"text_embeds": condition.mean(1), "time_ids": time_ids}

    @torch.inference_mode()
    def step(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        scheduler._step_index = STEP
        scaled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        predicted = unet(scaled, timestep, encoder_hidden_states=condition, added_cond_kwargs=added).sample
        wanted, null = predicted.chunk(2)
        guided = null + GUIDANCE_SCALE * (wanted - null)
        return scheduler.step(guided, timestep, latents).prev_sample.numpy()

    return step


def unet_step(images: int, rounds: int) -> dict[str, object]:
    """Time both steps in turns, after a check that they give the same numbers."""
    config, random = tiny_decoder(), np.random.default_rng(1)
    recipe = recipes.get("openmoji_tiny_decoder")
    side = recipe.decoder.image_size // recipe.decoder.latent_factor
    unet, tokens = config.unet, recipe.model.num_visual_tokens
    latents = random.normal(size=(images, unet.in_channels, side, side)) * 5
    condition = random.normal(size=(2 * images, tokens, unet.cross_attention_width))
    inputs = {"latents": latents.astype(np.float32), "condition": condition.astype(np.float32)}
    inputs["time_ids"] = np.tile(np.array([64, 64, 0, 0, 64, 64], np.int32), (2 * images, 1))
    params = random_params(jax.eval_shape(lambda: init_unet(config, jax.random.key(0))))
    ours, theirs = our_step(config, params, inputs), torch_step(config, params, inputs)
    threads = sorted({1, os.cpu_count() or 1})
    difference = max(float(np.abs(ours() - theirs(count)).max()) for count in threads)
    here: list[float] = []
    there: dict[int, list[float]] = {count: [] for count in threads}
    for _ in range(rounds):
        for count in threads:
            there[count].append(_milliseconds(partial(theirs, count)))
        here.append(_milliseconds(ours))
    medians = {count: statistics.median(times) for count, times in there.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "torch_over_ours": medians[best] / statistics.median(here),
        "torch_ms": medians[best],
        "torch_threads": best,
        "ours_ms": statistics.median(here),
        "images": images,
        "rounds": rounds,
        "max_difference": difference,
        "of_values_up_to": float(np.abs(ours()).max()),
    }


def reconstruct(run: Path, split: str, pictures: int | None = None, **sampler: Any) -> dict[str, object]:
    """Redraw the held-out pictures of a split; `sampler` are settings of the decoder in place of the run's."""
    config = load_config(run)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **sampler))
    if pictures is not None:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, num_samples=pictures))
    params = load_params(run, config)
    originals = read_images(config, split, splits(config, None)[split])
    compared = likeness(config.model, params["visual_encoder"], originals, redraw(config, params, originals)).means()
    return {
        "psnr_db": compared["psnr_db"],
        "psnr_mean_db": compared["psnr_mean_db"],
        "ssim": compared["ssim"],
        "embedding_cosine": compared["embedding_cosine"],
        "images": len(originals),
        "guidance_scale": config.decoder.guidance_scale,
        "num_sampling_steps": config.decoder.num_sampling_steps,
    }


def in_proportion() -> ExperimentConfig:
    """The 64 px decoder with frozen networks as large beside its U-Net as at full size and 512 px (`image_flops`)."""
    base = recipes.get("openmoji_64_decoder")
    vision = dataclasses.replace(base.model.vision, width=448, num_layers=11, mlp_width=3840)  # a quarter of Emu2's
    unet = dataclasses.replace(
        base.decoder.unet, in_channels=4, out_channels=4, cross_attention_width=vision.width, condition_radius=None
    )
    vae = VAEConfig(block_out_channels=(24, 48, 96, 96), norm_groups=8)
    return dataclasses.replace(
        base,
        name="in proportion",
        model=dataclasses.replace(base.model, vision=vision),
        optimizer=dataclasses.replace(base.optimizer, frozen=("visual_encoder", "vae")),
        decoder=dataclasses.replace(base.decoder, unet=unet, vae=vae, latent="autoencoder_kl"),
    )


def image_flops(config: ExperimentConfig) -> dict[str, object]:
    """Model FLOPs of a training step for one image: the U-Net's, forward and backward, and the frozen networks'."""
    task, size = make_task(config, None), config.decoder.image_size
    shapes = {"weight": (1,), "images": (1, size, size, 3)}
    unet = task.model_flops({"weight": (1,), "embeddings": (1,)})
    encoder = count_flops(
        partial(encode_images, dataclasses.replace(config.model, remat="none")),
        jax.eval_shape(lambda: init_visual_encoder(config.model, jax.random.key(0))),
        jax.ShapeDtypeStruct(shapes["images"], jnp.uint8),
    )
    pixels = task.model_flops(shapes)
    return {
        "recipe": config.name,
        "image_size": size,
        "unet": unet,
        "encoder": encoder,
        "vae": pixels - unet - encoder,
        "pixels_over_stored": pixels / unet,
    }


def embeddings_over_pixels(run: Path | None, steps: int, images: int | None) -> dict[str, object]:
    """The next steps from pixels and from a store made here, in turns, on the first shard of the source."""
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            config, run = in_proportion(), Path(folder) / "run"
            params = _untrained(config, run)
        else:
            config = load_config(run)
            params = load_params(run, config)
        if images is not None:
            config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, batch_images=images))
        source = next(source for source in config.data.sources if source.kind == "image_text")
        shard = expand_shards(source.shards, f"data.sources.{source.name}.shards")[0]
        store = Path(folder) / "store"
        sides = {}
        for name, embeddings in (("pixels", None), ("stored", str(store))):
            own = dataclasses.replace(source, shards=str(shard), embeddings=embeddings)
            sides[name] = dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, sources=(own,)),
                train=dataclasses.replace(config.train, init_from=None),
            )
        with contextlib.redirect_stdout(sys.stderr):
            encode_crops(sides["pixels"], run, source.name, store, epochs=1, batch=64, part=Part())
        takes = {name: _training(side, params) for name, side in sides.items()}
        losses: dict[str, list[float]] = {name: [] for name in takes}
        seconds: dict[str, list[float]] = {name: [] for name in takes}
        for number in range(steps + 1):
            for name, take in takes.items():
                began = time.perf_counter()
                losses[name].append(take())
                if number:  # the first step compiles
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    pixels, stored = np.array(losses["pixels"]), np.array(losses["stored"])
    return {
        "speedup": medians["pixels"] / medians["stored"],
        "max_rel_loss_diff": float(np.abs(stored / pixels - 1).max()),
        "flops_ratio": image_flops(config)["pixels_over_stored"],
        "networks": config.name,
        "pixels_s": medians["pixels"],
        "stored_s": medians["stored"],
        "first_loss": losses["pixels"][0],
        "last_loss": losses["pixels"][-1],
        "steps": steps,
        "batch_images": config.decoder.batch_images,
    }


def _untrained(config: ExperimentConfig, run: Path) -> Any:
    """Random parameters, saved as a run's first checkpoint for those who read them from there."""
    params = random_params(jax.eval_shape(make_task(config, None).init, jax.random.key(0)))
    checkpointer = Checkpointer(run, dataclasses.replace(config.checkpoint, asynchronous=False), print)
    checkpointer.save(0, {"params": params}, {}, "")
    return params


def _training(config: ExperimentConfig, params: Any) -> Callable[[], float]:
    """A function that takes the next training step, data included, and gives its loss."""
    data = open_input(config, None)
    task = make_task(config, None)
    program = build_program(task, config)
    wanted = program.abstract_state
    # All zeros is how AdamW starts. Copies of the parameters, for the step takes over the state's memory.
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), wanted)
    state["params"] = jax.tree.map(
        lambda array, leaf: jax.device_put(jnp.copy(array), leaf.sharding), params, dict(wanted["params"])
    )
    place, batches = BatchPlacer(program.mesh), data.iterate(0)

    def take() -> float:
        nonlocal state
        state, log = program.step(state, place(next(batches).arrays))
        term = log["terms"]["noise"]
        return float(term.sum) / float(term.weight)

    return take


def _milliseconds(step: Callable[[], object]) -> float:
    """Of a step that follows one of its own kind: the first after the other side's finds its threads asleep."""
    step()
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def measure(case: str, run: Path | None, rounds: int, images: int | None) -> Iterator[dict[str, object]]:
    """The lines of a case."""
    if case == "unet-step":
        yield from (unet_step(images, rounds) for images in (1, 8))
        return
    if case == "embeddings-over-pixels":
        yield embeddings_over_pixels(run, rounds, images)
        return
    if case == "image-flops":
        names = ("openmoji_64_decoder", "emu2_37b_decoder_512", "emu2_37b_decoder", "emu2_37b_video_decoder")
        for config in (in_proportion(), *map(recipes.get, names)):  # of the video decoder, its image network
            yield image_flops(dataclasses.replace(config, train=dataclasses.replace(config.train, task="decoder")))
        return
    if run is None:
        raise UserError(f"--run: needed for {case}; a work directory of `emu2 train` with a decoder's recipe")
    if case in ("reconstruct-seen", "reconstruct-unseen"):
        yield reconstruct(run, "scenes" if case == "reconstruct-seen" else "unseen", images)
    elif case == "guidance-steps":
        for scale, count in GUIDANCE_STEPS:
            for split in ("scenes", "unseen"):
                redrawn = reconstruct(run, split, images, guidance_scale=scale, num_sampling_steps=count)
                yield {"split": split, **redrawn}
    else:
        setting, values = ABLATIONS[case]
        for value in values:
            for split in ("scenes", "unseen"):
                yield {"split": split, **reconstruct(run, split, images, **{setting: value})}


def main() -> None:
    """Print one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="work directory of a trained decoder, for the first cases")
    parser.add_argument("--images", type=int, help="pictures to redraw, or of a training step; default: the config's")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["unet-step"])
    parser.add_argument("--rounds", type=int, default=30, help="of unet-step, and steps of embeddings-over-pixels")
    arguments = parser.parse_args()
    try:
        for case in arguments.cases:
            for numbers in measure(case, arguments.run, arguments.rounds, arguments.images):
                print(json.dumps({"case": case, **numbers}), flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
