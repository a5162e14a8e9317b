"""The recipes by name: functions without arguments that return an `ExperimentConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping

from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from experiments import (
    decoder,
    openmoji_64,
    openmoji_small,
    openmoji_tiny,
    openmoji_video,
    pretrain,
    video_decoder,
)

RECIPES: Mapping[str, Callable[[], ExperimentConfig]] = {
    "openmoji_tiny_stage1": openmoji_tiny.stage1,
    "openmoji_tiny_stage2": openmoji_tiny.stage2,
    "openmoji_tiny_decoder": openmoji_tiny.decoder,
    "openmoji_tiny_video_decoder": openmoji_video.video_decoder,
    "openmoji_small_stage1a": openmoji_small.stage1a,
    "openmoji_small_stage1b": openmoji_small.stage1b,
    "openmoji_small_stage2": openmoji_small.stage2,
    "openmoji_64_stage1": openmoji_64.stage1,
    "openmoji_64_decoder": openmoji_64.decoder,
    "emu2_37b_stage1a": pretrain.stage1a,
    "emu2_37b_stage1b": pretrain.stage1b,
    "emu2_37b_stage2": pretrain.stage2,
    "emu2_37b_decoder": decoder.decoder,
    "emu2_37b_video_decoder": video_decoder.video_decoder,
    "emu2_37b_decoder_512": decoder.decoder_512,
}

Sweep = Callable[[], Iterator[tuple[str, dict[str, str]]]]

#: Named variants of a recipe: (variant, override path -> value).
SWEEPS: Mapping[str, Sweep] = {"openmoji_tiny_stage2": openmoji_tiny.sweep}


def get(name: str) -> ExperimentConfig:
    """The recipe's config. Raises `ConfigError` with the nearest name when there is none."""
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no recipe {name!r}; nearest: {nearest}; all: {', '.join(RECIPES)}")
    return RECIPES[name]()
