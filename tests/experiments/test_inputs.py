"""What a run reads, as its config names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from emu2_jax.config import ExperimentConfig
from emu2_jax.errors import ConfigError
from emu2_jax.tokenizer import Tokenizer
from experiments.inputs import open_tokenizer


def config(model_file: Path, vocab_size: int, **data: Any) -> ExperimentConfig:
    language = dataclasses.replace(tiny.CONFIG.model.language, vocab_size=vocab_size)
    return dataclasses.replace(
        tiny.CONFIG,
        model=dataclasses.replace(tiny.CONFIG.model, language=language),
        data=dataclasses.replace(tiny.CONFIG.data, tokenizer=str(model_file), **data),
    )


def test_the_chat_vocabulary_is_a_setting(sentencepiece_model: Path) -> None:
    base = Tokenizer(sentencepiece_model).vocab_size
    assert "[USER]" not in open_tokenizer(config(sentencepiece_model, base)).special_ids
    chat = open_tokenizer(config(sentencepiece_model, base + 2, special_tokens="chat"))
    assert chat.special_ids["[ASSISTANT]"] == base + 1


def test_a_vocabulary_of_another_size_than_the_embedding_is_an_error(sentencepiece_model: Path) -> None:
    base = Tokenizer(sentencepiece_model).vocab_size
    wanted = rf"^model\.language\.vocab_size: is {base}, .* has {base + 2} with data\.special_tokens = chat; set it to "
    with pytest.raises(ConfigError, match=wanted + rf"{base + 2}$"):
        open_tokenizer(config(sentencepiece_model, base, special_tokens="chat"))
