"""Settings of every test: CPU only, array annotations checked, and the tiny model that most tests run."""

from __future__ import annotations

import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"  # before the first import of jax

import pytest
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook

# Every call into the package is checked against its shape and dtype annotations, also while jax traces it. That costs
# nothing once a function is compiled.
install_import_hook("emu2_jax", "beartype.beartype")
warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

import tiny

from emu2_jax.config import ExperimentConfig


@pytest.fixture
def tiny_config() -> ExperimentConfig:
    """The smallest Emu2 that has every part: two layers each, grouped-query attention, four embeddings per image."""
    return tiny.CONFIG
