"""Held-out pictures that a visual decoder redraws while it trains, for the eye and for the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from emu2_jax import hosts
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.evaluation.autoencoding import contact_sheet, psnr_db, redraw
from emu2_jax.report import PREVIEWS
from emu2_jax.task import Params
from experiments.autoencode import read_images, splits

#: Pairs beside each other: a sheet stays narrow enough for the report.
COLUMNS = 4

#: Shown the parameters after a step; gives numbers to log.
Watch = Callable[[int, Params], Mapping[str, float]]


def open_previews(config: ExperimentConfig, workdir: Path) -> Watch | None:
    """What draws the first `evaluation.num_pictures` pictures of each held-out split; None when none are asked for.

    Drawn from the same noise each time, with the sampler's settings of the run, into WORKDIR/previews/STEP-SPLIT.png.
    Raises `ConfigError` or `DataError` when the pictures cannot be had: before training, not in the middle of it.
    """
    if config.train.task != "decoder" or config.evaluation.preview_every_steps is None:
        return None
    if hosts.count() > 1:
        raise ConfigError("evaluation.preview_every_steps: previews are drawn on one host only; unset it, and evaluate")
    originals = {
        split: read_images(config, split, pattern)[: config.evaluation.num_pictures]
        for split, pattern in splits(config, None).items()
    }
    folder = workdir / PREVIEWS

    def watch(step: int, params: Params) -> dict[str, float]:
        numbers = {}
        for split, images in originals.items():
            drawn = redraw(config, params, images)
            values = psnr_db(drawn.astype(np.float32) / 255.0, images.astype(np.float32) / 255.0)
            numbers[f"preview_psnr_db/{split}"] = float(values.mean())
            folder.mkdir(exist_ok=True)
            name = f"{step:08d}-{split}.png"
            contact_sheet(images, drawn, columns=COLUMNS).save(folder / f".{name}", format="PNG")
            os.replace(folder / f".{name}", folder / name)
        return numbers

    return watch
