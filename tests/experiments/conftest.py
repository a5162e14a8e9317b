"""A corpus small enough to build once per test run, and the settings that make a recipe small enough to train on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
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


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For files whose runs take the same step, or draw with the same sampler."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
