"""`emu2 evaluate` of a visual decoder: how its drawings of held-out pictures compare with the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from data_pipelines.images import ImageRules
from data_pipelines.pairs import read_pairs
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError, UserError
from emu2_jax.evaluation.autoencoding import contact_sheet, likeness, redraw
from emu2_jax.evaluation.clip_image import open_measures
from emu2_jax.task import Params

FOLDER = "evaluation"
NUMBERS = "autoencoding.json"


def evaluate_decoder(
    config: ExperimentConfig, params: Params, *, shards: str | None = None, out: Path | None = None
) -> dict[str, float]:
    """Redraw the held-out pictures that the config names, or those of `shards`, and measure the likeness.

    `config` is the run's own, or with settings of the sampling changed. Writes `out`/autoencoding.json and a contact
    sheet for each split, unless `out` is None. Numbers of pictures of unseen objects end in `_unseen`.
    """
    patterns = splits(config, shards)
    found = {split: read_images(config, split, pattern) for split, pattern in patterns.items()}
    measures = open_measures(config.evaluation)
    numbers: dict[str, float] = {}
    for split, originals in tqdm(found.items(), "evaluate", unit="split", disable=None):
        redrawn = redraw(config, params, originals)
        compared = likeness(config.model, params["visual_encoder"], originals, redrawn, measures)
        suffix = "_unseen" if split == "unseen" else ""
        numbers |= {f"{name}{suffix}": value for name, value in compared.means().items()}
        numbers[f"num_images{suffix}"] = len(originals)
        if out is not None:
            shown = config.evaluation.num_pictures
            _write_sheet(out / f"{split}.png", originals[:shown], redrawn[:shown])
    if out is not None:
        _write_text(out / NUMBERS, json.dumps(numbers, indent=1) + "\n")
    return numbers


def splits(config: ExperimentConfig, shards: str | None) -> Mapping[str, str]:
    """Name and shards of what is evaluated."""
    if shards is not None:
        return {"shards": shards}
    named = {"scenes": config.evaluation.scenes, "unseen": config.evaluation.unseen}
    patterns = {split: pattern for split, pattern in named.items() if pattern}
    if not patterns:
        raise ConfigError("evaluation.scenes: names no shards of held-out image-text pairs; --shards names others")
    return patterns


def read_images(config: ExperimentConfig, split: str, pattern: str) -> UInt8[np.ndarray, "images S S 3"]:
    """The first `evaluation.num_samples` pictures of the shards, at the size that is drawn."""
    # Measured on faithful pixels, whatever the training read, so that numbers of different runs compare.
    rules = ImageRules(apply_exif_orientation=config.data.apply_exif_orientation)
    path = "--shards" if split == "shards" else f"evaluation.{split}"
    found = read_pairs(pattern, config.decoder.image_size, config.evaluation.num_samples, path, rules)
    if len(found) < 2:
        raise ConfigError(f"{path}: {pattern} holds {len(found)} pictures; comparing with another one needs at least 2")
    return np.stack([image for _, image, _ in found])


def _write_sheet(path: Path, originals: np.ndarray, redrawn: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}")
    _folder(path)
    contact_sheet(originals, redrawn).save(temporary, format="PNG")
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    _folder(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}") from error
