"""Every recipe without a device: valid, of exactly the size that the paper's numbers give, and with a place for every
leaf."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, Mesh

from emu2_jax import optimizer, overrides, sharding
from emu2_jax.config import DecoderConfig, ExperimentConfig, UNetConfig, VisionConfig, validate
from emu2_jax.diffusion.decoder import DecoderTask, init_unet
from emu2_jax.diffusion.video import VideoDecoderTask
from emu2_jax.errors import ConfigError
from emu2_jax.models.emu2 import PretrainTask
from emu2_jax.task import Task
from experiments import pretrain, recipes

FULL_SIZE = [name for name in recipes.RECIPES if name.startswith("emu2_37b")]
PRETRAINING = [name for name in FULL_SIZE if "stage" in name]


def task_of(config: ExperimentConfig) -> Task:
    if config.train.task == "decoder":
        return DecoderTask(config)
    if config.train.task == "video_decoder":
        return VideoDecoderTask(config)
    return PretrainTask(config, image_start_id=32001, image_end_id=32002)


@functools.cache
def shapes_of(name: str) -> dict[str, Any]:
    return dict(jax.eval_shape(task_of(recipes.get(name)).init, jax.random.key(0)))


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    """Devices that need not be there."""
    return cast(Mesh, AbstractMesh((data, fsdp, tensor), sharding.AXES))


def visual_encoder_size(grid: int) -> int:
    """By hand: fused qkv and output, q and v biases (not k), MLP with biases, two LayerNorms, per block; then patches,
    CLS and a position for each."""
    width, mlp, layers = 1792, 15360, 64
    attention = 3 * width * width + 2 * width + width * width + width
    block = attention + (width * mlp + mlp + mlp * width + width) + 2 * 2 * width
    return layers * block + (14 * 14 * 3 * width + width) + width + (1 + grid * grid) * width


def language_model_size(vocab: int) -> int:
    """By hand: four square attention matrices, three MLP matrices, two RMSNorms, per block; norm, embedding, head."""
    width, mlp, layers = 6656, 17920, 60
    return layers * (4 * width * width + 3 * width * mlp + 2 * width) + width + 2 * vocab * width


CONNECTOR = 1792 * 6656


@pytest.mark.parametrize(("name", "grid"), [("stage1a", 16), ("stage1b", 32), ("stage2", 32)])
def test_the_full_model_has_exactly_the_papers_parameters(name: str, grid: int) -> None:
    counts = {part: size(tree) for part, tree in shapes_of(f"emu2_37b_{name}").items()}
    assert counts == {
        "visual_encoder": visual_encoder_size(grid),
        "project_up": CONNECTOR,
        "language_model": language_model_size(32272),
        "project_down": CONNECTOR,
    }


def test_the_parameter_counts_in_numbers() -> None:
    """Written out, so that an error in a formula above cannot hide one in the model."""
    counts = {part: size(tree) for part, tree in shapes_of("emu2_37b_stage2").items()}
    assert counts == {
        "visual_encoder": 4_350_093_568,
        "project_up": 11_927_552,
        "language_model": 32_532_564_480,
        "project_down": 11_927_552,
    }
    assert sum(counts.values()) == 36_906_513_152


def test_the_u_net_has_sdxls_parameters() -> None:
    """SDXL-base counts 2,567,463,684; it conditions on 2048 channels and 1280 pooled ones (2816 with the time ids).

    Emu2's has 256 channels less in each cross-attention key and value, and 3328 - 2816 more into the added embedding.
    """
    sdxl = DecoderConfig(unet=UNetConfig(cross_attention_width=2048, pooled_width=1280))
    assert size(jax.eval_shape(lambda: init_unet(sdxl, jax.random.key(0)))) == 2_567_463_684

    # Transformers of the way down, the bottom and the way up; 2 layers each at 640 channels, 10 at 1280.
    key_and_value_outputs = 2 * (640 * (2 + 3) * 2 + 1280 * (2 + 1 + 3) * 10)
    expected = 2_567_463_684 - 256 * key_and_value_outputs + (3328 - 2816) * 4 * 320
    assert size(shapes_of("emu2_37b_decoder")["unet"]) == expected == 2_525_520_644


def test_the_video_decoder_is_stable_diffusions_u_net_with_layers_of_time() -> None:
    # 865,910,724 parameters in Stable Diffusion 2.1, whose cross-attention reads 1024 channels and not 1792: keys and
    # values of the transformers of the way down, the bottom and the way up, a layer each.
    shapes = shapes_of("emu2_37b_video_decoder")
    key_and_value_outputs = 2 * (320 * (2 + 3) + 640 * (2 + 3) + 1280 * (2 + 1 + 3))
    assert size(shapes["unet"]) == 865_910_724 + (1792 - 1024) * key_and_value_outputs

    def convolution(channels: int) -> int:
        return 3 * channels * channels + channels

    def attention(channels: int) -> int:
        return 4 * channels * channels + channels

    # Two convolutions in each residual block: 2 a level on the way down, 2 at the bottom, 3 a level on the way up.
    blocks = 2 * (5 * convolution(320) + 5 * convolution(640) + (5 + 5 + 2) * convolution(1280))
    scales = sum(map(convolution, (320, 640, 1280))) + sum(map(convolution, (1280, 1280, 640)))
    ends = convolution(320) + convolution(4)
    attentions = 5 * attention(320) + 5 * attention(640) + 6 * attention(1280)
    assert size(shapes["temporal"]) == blocks + scales + ends + attentions == 200_762_612


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("emu2_37b_stage1a", {"project_down"}),
        ("emu2_37b_stage1b", {"project_down"}),
        ("emu2_37b_stage2", {"visual_encoder"}),
        ("emu2_37b_decoder", {"visual_encoder", "vae"}),
        ("emu2_37b_video_decoder", {"visual_encoder", "vae"}),
    ],
)
def test_what_trains_and_what_is_frozen(name: str, frozen: set[str]) -> None:
    trained, still = optimizer.split_frozen(recipes.get(name).optimizer, shapes_of(name))
    assert set(still) == frozen
    assert set(trained) == set(shapes_of(name)) - frozen


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_valid_and_says_its_own_name(name: str) -> None:
    config = recipes.get(name)
    assert validate(config) is config
    assert config.name == name


@pytest.mark.parametrize(
    "mesh",
    [mesh_of(1, 64, 1), mesh_of(2, 8, 4), mesh_of(16, 16, 1)],
    ids=lambda mesh: "x".join(map(str, mesh.axis_sizes)),
)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_leaf_has_a_place_on_a_pod_and_no_large_one_is_replicated(name: str, mesh: Mesh) -> None:
    shapes = shapes_of(name)
    shardings = sharding.parameter_shardings(shapes, mesh)
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        replicated = where.shard_shape(leaf.shape) == leaf.shape
        assert not (replicated and math.prod(leaf.shape) > 2**20), sharding.path_of(path)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_moments_exist_for_trained_parts_only_and_lie_as_their_parameters_do(name: str) -> None:
    config = recipes.get(name)
    mesh = mesh_of(2, 2, 2)
    trained, _ = optimizer.split_frozen(config.optimizer, shapes_of(name))
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    state = jax.eval_shape(tx.init, trained)
    shardings = sharding.optimizer_shardings(tx, state, trained, mesh)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape != ()]
    assert sum(math.prod(leaf.shape) for leaf in moments) == 2 * size(trained)
    places = [
        where for where, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True) if leaf.shape
    ]
    assert places == 2 * jax.tree.leaves(sharding.parameter_shardings(trained, mesh))


def test_bytes_of_stage_2_on_each_of_64_devices() -> None:
    """By hand: frozen encoder in bfloat16, the rest in float32 with two moments; only norms and biases are whole."""
    config, mesh = recipes.get("emu2_37b_stage2"), mesh_of(1, 64, 1)
    shapes = shapes_of("emu2_37b_stage2")
    trained, frozen = optimizer.split_frozen(config.optimizer, shapes)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.model.frozen_dtype), frozen)
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    state = jax.eval_shape(tx.init, trained)

    whole = 64 * (1792 + 1792 + 1792 + 15360 + 1792 + 4 * 1792)  # q, v, output, up and down biases; two LayerNorms
    encoder = 2 * ((visual_encoder_size(32) - whole) // 64 + whole)
    whole = (60 * 2 + 1) * 6656
    language_model = 4 * ((language_model_size(32272) - whole) // 64 + whole)
    connector = 4 * 2 * CONNECTOR // 64

    def bytes_of(tree: Any) -> int:
        return sharding.bytes_per_device(tree, sharding.parameter_shardings(tree, mesh))

    assert bytes_of(frozen) == encoder
    assert bytes_of(trained) == language_model + connector
    counters = sum(np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state) if leaf.shape == ())
    moments = sharding.bytes_per_device(state, sharding.optimizer_shardings(tx, state, trained, mesh))
    assert moments == 2 * (language_model + connector) + counters
    assert 6.0e9 < encoder + 3 * (language_model + connector) < 6.5e9


def settings(name: str) -> tuple[Any, ...]:
    config = recipes.get(name)
    chosen = config.optimizer
    return (config.train.num_steps, chosen.beta1, chosen.beta2, chosen.epsilon, chosen.clip_norm, chosen.schedule)


def test_optimiser_settings_are_the_papers() -> None:
    """Sections 4 and 5 of the paper, and tables 6 and 7."""
    assert settings("emu2_37b_stage1a") == (35_200, 0.9, 0.95, 1e-6, 5.0, "cosine")
    assert settings("emu2_37b_stage1b") == (4_000, 0.9, 0.95, 1e-6, 5.0, "cosine")
    assert settings("emu2_37b_stage2") == (20_350, 0.9, 0.95, 1e-6, 5.0, "cosine")
    assert settings("emu2_37b_decoder") == (8_000, 0.9, 0.999, 1e-8, 1.0, "linear")


def test_peak_learning_rates_and_warm_ups_are_the_papers() -> None:
    def peaks(name: str) -> dict[str, float]:
        config = recipes.get(name).optimizer
        parts = set(shapes_of(name)) - set(config.frozen)
        return {part: optimizer.peak_learning_rate(config, part) for part in sorted(parts)}

    stage1 = {"language_model": 3e-5, "project_up": 1e-4, "visual_encoder": 5e-5}
    assert peaks("emu2_37b_stage1a") == peaks("emu2_37b_stage1b") == stage1
    assert peaks("emu2_37b_stage2") == {"language_model": 1e-5, "project_down": 1e-5, "project_up": 1e-5}
    assert peaks("emu2_37b_decoder") == {"unet": 1e-4}
    assert recipes.get("emu2_37b_stage1a").optimizer.warmup_ratio == 0.02
    assert recipes.get("emu2_37b_stage2").optimizer.warmup_ratio == 0.1
    assert recipes.get("emu2_37b_decoder").optimizer.warmup_steps == 2_500
    assert recipes.get("emu2_37b_decoder").optimizer.weight_decay == 0.01


def test_model_data_and_decoder_settings_are_the_papers() -> None:
    sizes = {name: recipes.get(name).model.vision.image_size for name in FULL_SIZE}
    assert sizes == {
        "emu2_37b_stage1a": 224,
        "emu2_37b_stage1b": 448,
        "emu2_37b_stage2": 448,
        "emu2_37b_decoder": 448,
        "emu2_37b_decoder_512": 448,
        "emu2_37b_video_decoder": 448,
    }
    for name in PRETRAINING:
        config = recipes.get(name)
        assert config.model.num_visual_tokens == 64
        assert config.model.compute_dtype == "bfloat16"
        assert config.data.row_length == 2048
        assert config.data.mixing == "one_source_per_step"
    assert recipes.get("emu2_37b_stage1b").objective.regression_loss_weight == 0.0
    assert recipes.get("emu2_37b_stage2").data.image_first_probability == 0.5
    decoder = recipes.get("emu2_37b_decoder").decoder
    assert (decoder.batch_images, decoder.image_size, decoder.condition_dropout) == (2048, 1024, 0.1)
    assert (decoder.noise_offset, decoder.guidance_scale, decoder.num_sampling_steps) == (0.1, 3.0, 50)
    assert (decoder.beta_start, decoder.beta_end, decoder.num_train_timesteps) == (0.00085, 0.012, 1000)
    assert (decoder.prediction, decoder.latent_scale, decoder.latent_factor) == ("epsilon", 0.13025, 8)


def test_rows_hold_the_papers_samples_and_divide_over_256_devices() -> None:
    """The nearest multiple of 256: with multiples of 64 no number of micro-batches divided all sources' rows."""
    assert pretrain.rows_for(12_800, 22) == 512  # 582 rows
    assert pretrain.rows_for(12_800, 17) == 768  # 753
    assert pretrain.rows_for(800, 1) == 768
    assert pretrain.rows_for(100, 1) == 256
    samples = {
        "emu2_37b_stage1a": {"laion": (6144, 22), "webvid": (768, 3)},
        "emu2_37b_stage1b": {"laion": (6144, 22), "webvid": (768, 3)},
        "emu2_37b_stage2": {
            "image_text": (12_800, 22), "grounded": (12_800, 17), "video_text": (6_400, 3), "mmc4": (3_200, 2),
            "storyboard": (3_200, 1), "text": (800, 1),
        },
    }  # fmt: skip
    for name in PRETRAINING:
        for source in recipes.get(name).data.sources:
            paper, per_row = samples[name][source.name]
            assert source.batch_rows is not None
            assert source.batch_rows % 256 == 0
            assert abs(source.batch_rows * per_row / paper - 1) <= 1 / 8, source.name


def test_sources_are_read_as_the_paper_reads_them() -> None:
    kinds = {name: {s.name: s.kind for s in recipes.get(name).data.sources} for name in PRETRAINING}
    assert kinds["emu2_37b_stage1a"] == {"laion": "image_text", "webvid": "video_text"} == kinds["emu2_37b_stage1b"]
    assert set(kinds["emu2_37b_stage2"].values()) == {"image_text", "grounded", "video_text", "interleaved", "text"}
    data = recipes.get("emu2_37b_stage2").data
    sources = {source.name: source for source in data.sources}
    assert sources["video_text"].video_frames == recipes.get("emu2_37b_stage1a").data.sources[1].video_frames == 8
    assert (sources["mmc4"].images_per_document, sources["mmc4"].max_document_positions) == (8, 1024)
    assert all(source.max_document_positions is None for source in data.sources if source.name != "mmc4")
    assert data.max_document_positions is None and data.phrase_first_probability == 0.7
    steps = {name: source.weight for name, source in sources.items()}
    assert sum(steps.values()) == 20_300  # of 20,350
    assert steps["image_text"] + steps["grounded"] == 12_500 and steps["text"] == 2_300


def test_tiny_recipes_differ_from_the_full_ones_in_numbers_only() -> None:
    """The same parts, and the same leaves in each of them."""
    for stage in ("stage2", "decoder"):
        small, large = shapes_of(f"openmoji_tiny_{stage}"), shapes_of(f"emu2_37b_{stage}")
        assert set(small) == set(large) - {"vae"}  # the tiny decoder's latents are space-to-depth
        for part in set(small) - {"unet"}:  # a U-Net of fewer levels has fewer blocks
            assert tiny.leaf_paths(small[part]) == tiny.leaf_paths(large[part])


@pytest.mark.parametrize("name", recipes.SWEEPS)
def test_every_variant_of_a_sweep_applies_and_changes_something(name: str) -> None:
    base = recipes.get(name)
    variants = dict(recipes.SWEEPS[name]())
    assert len(variants) > 1
    seen = []
    for values in variants.values():
        config, _ = overrides.apply(base, overrides.parse_flags(f"--gin.{path}={v}" for path, v in values.items()))
        seen.append(validate(config))
    assert len({dataclasses.replace(config, name="") for config in seen}) == len(variants)


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^no recipe 'emu2_37b_stage3'; nearest: emu2_37b_stage2;"):
        recipes.get("emu2_37b_stage3")


def test_the_224_px_encoder_differs_in_its_positions_only() -> None:
    small, large = shapes_of("emu2_37b_stage1a")["visual_encoder"], shapes_of("emu2_37b_stage1b")["visual_encoder"]
    assert small.pop("position_embedding").shape == (257, 1792)
    assert large.pop("position_embedding").shape == (1025, 1792)
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, large)
    assert VisionConfig(image_size=224).grid_size == 16
