"""Settings of every test: CPU only, array annotations checked, and the tiny model that most tests run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before the first import of jax

import pytest
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook

#: The modules that annotate arrays. Their calls are checked against shapes and dtypes, also while jax traces them; that
#: costs nothing once a function is compiled. mypy sees to the others, which beartype cannot check (protocols).
ARRAY_MODULES = ("diffusion.decoder", "diffusion.schedule", "diffusion.unet", "generation", "losses", "models")

# The numeric tower: an int is a float, as it is for mypy.
BEARTYPE = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook([f"emu2_jax.{module}" for module in ARRAY_MODULES], BEARTYPE)
warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

import jax
import sentencepiece
import tiny

from emu2_jax.config import ExperimentConfig

# Tests compile much and run little.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def tiny_config() -> ExperimentConfig:
    """The smallest Emu2 that has every part: two layers each, grouped-query attention, four embeddings per image."""
    return tiny.CONFIG


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few words that treats white space, `<s>` and `</s>` as LLaMA's does."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sentences = ["a red apple", "the sun and a cat", "two cats on the red sun", "an apple for the cat"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path
