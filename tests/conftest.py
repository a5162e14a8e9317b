"""Settings of every test: CPU only, array annotations checked, and the tiny model that most tests run."""

from __future__ import annotations

import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"  # before the first import of jax

import pytest
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook

#: The modules that handle arrays. Their calls are checked against the shape and dtype annotations, also while jax
#: traces them; that costs nothing once a function is compiled. mypy sees to the others: beartype cannot check protocols.
ARRAY_MODULES = ("generate", "losses", "metrics", "models", "optimizer", "sharding")
ARRAY_MODULES += ("diffusion.decoder", "diffusion.schedule", "diffusion.unet")

# The numeric tower: an int is a float, as it is for mypy.
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook([f"emu2_jax.{module}" for module in ARRAY_MODULES], BEARTYPE)
warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

import jax
import tiny

from emu2_jax.config import ExperimentConfig

# Tests compile much and run little.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def tiny_config() -> ExperimentConfig:
    """The smallest Emu2 that has every part: two layers each, grouped-query attention, four embeddings per image."""
    return tiny.CONFIG
