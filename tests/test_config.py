"""What crosses fields is checked before anything runs, and the message starts with the path to change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
import tiny

from emu2_jax.config import ExperimentConfig, SourceConfig, UNetConfig, validate
from emu2_jax.errors import ConfigError, UserError


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """`config` with the leaves at these dotted paths replaced."""
    for path, value in values.items():
        head, _, rest = path.partition(".")
        config = dataclasses.replace(config, **{head: changed(getattr(config, head), {rest: value}) if rest else value})
    return config


def source(name: str = "pairs", **settings: Any) -> SourceConfig:
    return SourceConfig(**{"name": name, "kind": "image_text", "shards": "pairs.tar", **settings})


def test_a_good_config_comes_back_unchanged(tiny_config: ExperimentConfig) -> None:
    assert validate(tiny_config) is tiny_config


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("model.vision.image_size", {"model.vision.image_size": 9}),
        ("model.vision.width", {"model.vision.num_heads": 3}),
        ("model.num_visual_tokens", {"model.num_visual_tokens": 8}),
        ("model.num_visual_tokens", {"model.num_visual_tokens": 9}),  # 3 x 3 from a 4 x 4 grid
        ("model.num_visual_tokens", {"model.num_visual_tokens": 64}),  # 8 x 8 from a 4 x 4 grid
        ("model.language.width", {"model.language.width": 34}),
        ("model.language.num_heads", {"model.language.width": 12, "model.language.num_kv_heads": 4}),
        ("model.language.num_kv_heads", {"model.language.num_kv_heads": 3}),
        ("model.language.attention_head_width", {"model.language.attention_head_width": 0}),
        ("model.language.attention_head_width", {"model.language.attention_head_width": 7}),
        ("optimizer.accumulation_steps", {"optimizer.accumulation_steps": 0}),
        ("optimizer.micro_batch_rows", {"optimizer.micro_batch_rows": 0}),
        ("optimizer.micro_batch_rows", {"optimizer.micro_batch_rows": 2, "optimizer.accumulation_steps": 2}),
        ("optimizer.warmup_ratio", {"optimizer.warmup_ratio": 1.0}),
        ("optimizer.warmup_ratio", {"optimizer.warmup_ratio": -0.1}),
        ("train.num_steps", {"train.num_steps": 0}),
        ("train.log_every_steps", {"train.log_every_steps": 0}),
        ("checkpoint.every_steps", {"checkpoint.every_steps": 0}),
        ("data.sources.pairs", {"data.sources": (source(), source())}),
        ("data.sources.pairs.weight", {"data.sources": (source(weight=-1.0),)}),
        ("data.sources.pairs.image_slots", {"data.sources": (source(),), "data.image_slots": 0}),
        (
            "data.sources.pairs.image_slots",
            {"data.sources": (source(image_slots=0),), "data.mixing": "one_source_per_step"},
        ),
        ("data.sources.pairs.batch_rows", {"data.sources": (source(batch_rows=4),)}),
        ("data.sources.pairs.image_slots", {"data.sources": (source(image_slots=4),)}),
        ("data.row_length", {"data.row_length": 7}),  # <s> [IMG] v v v v [/IMG] </s> is 8
        ("data.sources.pairs.embeddings", {"data.sources": (source(embeddings="store"),)}),
        (
            "data.sources.pairs.embeddings",
            {"data.sources": (source(kind="text", embeddings="store"),), "optimizer.frozen": ("visual_encoder",)},
        ),
        ("data.global_batch_rows", {"data.global_batch_rows": 0}),
        ("data.image_first_probability", {"data.image_first_probability": 1.5}),
        ("data.phrase_first_probability", {"data.phrase_first_probability": -0.5}),
        ("data.sources.pairs.max_document_positions", {"data.sources": (source(max_document_positions=5),)}),
        ("data.sources.pairs.caption", {"data.sources": (source(caption="json."),)}),
        ("data.sources.pairs.caption", {"data.sources": (source(caption="json"),)}),
        ("data.sources.pairs.caption", {"data.sources": (source(kind="text", caption="json.text"),)}),
        ("data.sources.pairs.images_per_document", {"data.sources": (source(images_per_document=8),)}),
        (
            "data.sources.pairs.images_per_document",
            {"data.sources": (source(kind="interleaved", images_per_document=0),)},
        ),
        ("data.sources.pairs.video_frames", {"data.sources": (source(kind="video_text", video_frames=0),)}),
        ("data.sources.pairs.video_frames", {"data.sources": (source(kind="video_text", video_frames=99),)}),
        (
            "data.sources.pairs.video_frames",  # 3 + 8 x 6 positions
            {"data.sources": (source(kind="video_text"),), "data.image_slots": 8, "data.row_length": 50},
        ),
        ("data.max_bad_share", {"data.max_bad_share": -0.1}),
    ],
)
def test_a_bad_config_is_named_by_path(path: str, values: dict[str, Any], tiny_config: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: [^\n]+$"):
        validate(changed(tiny_config, values))


UNET = UNetConfig(
    block_out_channels=(32, 64),
    transformer_layers_per_block=(0, 1),
    num_attention_heads=(1, 2),
    cross_attention_width=16,
)


DECODER_TASK: dict[str, Any] = {"train.task": "decoder", "optimizer.frozen": ("visual_encoder", "vae")}


def test_a_good_decoder_passes(tiny_config: ExperimentConfig) -> None:
    validate(changed(tiny_config, DECODER_TASK | {"decoder.unet": UNET}))


def test_a_decoder_trains_on_a_frozen_encoder(tiny_config: ExperimentConfig) -> None:
    config = changed(tiny_config, {"train.task": "decoder", "decoder.unet": UNET})
    with pytest.raises(ConfigError, match=r"^optimizer.frozen: must hold visual_encoder"):
        validate(config)


def test_a_decoder_trains_on_a_frozen_vae_where_there_is_one(tiny_config: ExperimentConfig) -> None:
    without = DECODER_TASK | {"decoder.unet": UNET, "optimizer.frozen": ("visual_encoder",)}
    with pytest.raises(ConfigError, match=r"^optimizer.frozen: must hold vae"):
        validate(changed(tiny_config, without))
    validate(changed(tiny_config, without | {"decoder.latent": "space_to_depth"}))


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("decoder.vae.block_out_channels", {"decoder.vae.norm_groups": 48}),
        ("decoder.latent_factor", {"decoder.latent_factor": 4}),
        ("decoder.steps_offset", {"decoder.steps_offset": -1}),
        ("decoder.unet.transformer_layers_per_block", {"decoder.unet.transformer_layers_per_block": (1,)}),
        ("decoder.unet.num_attention_heads", {"decoder.unet.num_attention_heads": (1, 2, 4)}),
        ("decoder.image_size", {"decoder.image_size": 1000}),
        ("decoder.unet.cross_attention_width", {"decoder.unet.cross_attention_width": 32}),
    ],
)
def test_a_bad_decoder_is_named_by_path_when_it_is_what_trains(
    path: str, values: dict[str, Any], tiny_config: ExperimentConfig
) -> None:
    config = changed(changed(tiny_config, {"decoder.unet": UNET}), values)
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: [^\n]+$"):
        validate(changed(config, DECODER_TASK))
    validate(config)


@pytest.mark.parametrize(
    "values",
    [
        {"data.row_length": 8},
        {"data.sources": (source(), source("others", kind="interleaved"))},
        {"data.sources": (source(kind="text"),), "data.image_slots": 0},
        {"data.sources": (source(kind="video_text"),), "data.image_slots": 8, "data.row_length": 51},
        {"data.sources": (source(kind="interleaved", images_per_document=8, max_document_positions=16),)},
        {"data.sources": (source(caption="json.meta.title"), source("grounded", kind="grounded"))},
        {"data.sources": (source(batch_rows=4, image_slots=1),), "data.mixing": "one_source_per_step"},
        {"model.num_visual_tokens": 16},
        {"model.num_visual_tokens": 1},
    ],
    ids=str,
)
def test_the_edge_of_what_is_allowed(values: dict[str, Any], tiny_config: ExperimentConfig) -> None:
    validate(changed(tiny_config, values))


def test_config_errors_are_the_users_to_fix() -> None:
    assert issubclass(ConfigError, UserError)


def test_every_leaf_of_the_config_can_be_compared_and_hashed(tiny_config: ExperimentConfig) -> None:
    assert hash(tiny_config) == hash(changed(tiny_config, {}))
    assert tiny_config == tiny.CONFIG != changed(tiny_config, {"train.seed": 1})
