"""Evaluate a run on held-out pairs and write what the report shows: numbers, captions and pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.images import ImageRules
from data_pipelines.pairs import read_pairs
from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.evaluation import heldout
from emu2_jax.evaluation.heldout import Drawing, Pair, Reading
from emu2_jax.generation.generator import Generator
from experiments.inputs import open_tokenizer
from experiments.runs import CONFIG, load_config, load_params

MODEL_STAGE = "stage2"
DECODER_STAGE = "decoder"
FOLDER = "evaluation"


def model_workdir(run: Path) -> Path:
    """The work directory of the model: `run` itself, or the last of its stages that trains Emu2."""
    if (run / CONFIG).exists():
        return run
    stages = (run / stage for stage in (MODEL_STAGE, "stage1"))
    return next((stage for stage in stages if (stage / CONFIG).exists()), run / MODEL_STAGE)


def evaluate_run(run: Path) -> dict[str, float]:
    """Measure RUN/stage2 with RUN/decoder on the held-out pairs its config names.

    Writes RUN/evaluation/{heldout,captions,autoencoded,drawn}.json and the pictures they name; returns the numbers of
    heldout.json. Raises `ConfigError` when the config names no held-out pairs.
    """
    config = load_config(run / MODEL_STAGE)
    decoder_config = load_config(run / DECODER_STAGE)
    tokenizer = open_tokenizer(config)
    params = load_params(run / MODEL_STAGE, config)
    decoder_params = load_params(run / DECODER_STAGE, decoder_config)
    null = Generator(config.model, params, tokenizer).image_embeddings([[]])[0]
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, float] = {}
    shown = _Shown(folder)
    progress = tqdm(total=4, desc="evaluate", unit="part")
    for split in ("scenes", "unseen"):
        pairs = _pairs(config, split)
        progress.set_postfix_str(f"{split}: captions and embeddings of {len(pairs)} pairs")
        read = heldout.read(config, params, tokenizer, pairs)
        to_draw = read.drawn_embeddings[: config.evaluation.num_pictures]
        progress.update()
        progress.set_postfix_str(f"{split}: images of {len(pairs)} pairs")
        drawing = heldout.draw(decoder_config, decoder_params, pairs, to_draw, null)
        suffix = "" if split == "scenes" else f"_{split}"
        numbers |= {f"{name}{suffix}": value for name, value in _numbers(read, drawing, pairs).items()}
        shown.add(split, config, pairs, read, drawing)
        progress.update()
    progress.close()
    shown.write()
    (folder / "heldout.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def _pairs(config: ExperimentConfig, split: str) -> list[Pair]:
    path = f"evaluation.{split}"
    pattern = getattr(config.evaluation, split)
    if not pattern:
        raise ConfigError(f"{path}: names no shards of held-out image-text pairs")
    size = config.model.vision.image_size
    # Measured on faithful pixels, whatever the training read, so that numbers of different runs compare.
    images = ImageRules(apply_exif_orientation=config.data.apply_exif_orientation)
    found = read_pairs(pattern, size, config.evaluation.num_samples, path, images)
    if len(found) < 2:
        raise ConfigError(f"{path}: {pattern} holds {len(found)} pairs; shuffled captions need at least 2")
    return [Pair(*pair) for pair in found]


def _numbers(read: Reading, drawing: Drawing, pairs: Sequence[Pair]) -> dict[str, float]:
    exact = [made.strip() == pair.caption.strip() for made, pair in zip(read.generated, pairs, strict=True)]
    return {
        "caption_nll": float(read.nll.sum() / read.num_tokens.sum()),
        "caption_nll_shuffled": float(read.nll_shuffled.sum() / read.num_tokens.sum()),
        "caption_exact_match": float(np.mean(exact)),
        "visual_mse": float(read.visual_mse.mean()),
        "visual_mse_free_running": float(read.visual_mse_free_running.mean()),
        "visual_mse_mean": read.visual_mse_mean,
        "decoder_psnr_db": float(drawing.psnr_db.mean()),
        "decoder_psnr_mean_db": float(drawing.psnr_mean_db.mean()),
        "num_pairs": float(len(pairs)),
    }


@dataclasses.dataclass
class _Shown:
    """The samples that the report shows, collected over the splits."""

    folder: Path
    lists: dict[str, list[dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {"captions": [], "autoencoded": [], "drawn": []}
    )

    def add(self, split: str, config: ExperimentConfig, pairs: Sequence[Pair], read: Reading, drawing: Drawing) -> None:
        for i, pair in enumerate(pairs[: config.evaluation.num_pictures]):
            true = self._picture("captions", split, i, pair.image)
            common: Mapping[str, Any] = {"key": pair.key, "split": split}
            self.lists["captions"].append(
                {
                    **common,
                    "image": true,
                    "true": pair.caption,
                    "generated": read.generated[i],
                    "nll": float(read.nll[i] / read.num_tokens[i]),
                    "nll_shuffled": float(read.nll_shuffled[i] / read.num_tokens[i]),
                }
            )
            decoded = self._picture("autoencoded", split, i, _to_uint8(drawing.autoencoded[i]))
            psnr_db = float(drawing.psnr_db[i])
            self.lists["autoencoded"].append({**common, "original": true, "decoded": decoded, "psnr_db": psnr_db})
            drawn = self._picture("drawn", split, i, _to_uint8(drawing.drawn[i]))
            self.lists["drawn"].append({"split": split, "text": pair.caption, "true": true, "drawn": drawn})

    def _picture(self, kind: str, split: str, number: int, image: np.ndarray) -> str:
        name = f"{kind}/{split}-{number:03d}.png"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        return name

    def write(self) -> None:
        for name, entries in self.lists.items():
            (self.folder / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
