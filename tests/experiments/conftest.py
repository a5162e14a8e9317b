"""A corpus small enough to build once per test run, and the settings that make a recipe small enough to train on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.corpora.openmoji import build
from experiments.openmoji_tiny import CORPORA

SMALL = """\
model.vision.width = 32
model.vision.num_layers = 1
model.vision.mlp_width = 48
model.language.width = 32
model.language.num_layers = 1
model.language.mlp_width = 48
data.global_batch_rows = 2
data.row_length = 128
data.image_slots = 5
data.packing_pool = 32
train.log_every_steps = 1
evaluation.num_samples = 4
evaluation.num_pictures = 2
evaluation.max_text_tokens = 8
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The minimal OpenMoji corpus."""
    directory = tmp_path_factory.mktemp("corpus") / "openmoji"
    build(directory, CORPORA["minimal"], processes=1, progress=lambda *_: None)
    return directory


@pytest.fixture(scope="session")
def gin_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Overrides that point the pretraining recipes to the corpus, at minimum size."""
    path = tmp_path_factory.mktemp("gin") / "small.gin"
    data = f"""\
data.tokenizer = {corpus}/tokenizer.model
data.sources.pairs.shards = {corpus}/train/pairs-*.tar
evaluation.scenes = {corpus}/heldout/scenes-*.tar
evaluation.unseen = {corpus}/heldout/unseen-*.tar
"""
    path.write_text(SMALL + data, encoding="utf-8")
    return path
