"""Cached generation against recomputing the whole sequence, one prompt at a time, for every new element."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu2_jax.config import ModelConfig
from emu2_jax.errors import UserError
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.prompt import Link
from emu2_jax.models import emu2
from emu2_jax.tokenizer import Tokenizer

MAX_TOKENS = 6
NUM_VISUAL_TOKENS = tiny.CONFIG.model.num_visual_tokens
CAPACITY = 48


class Spelled(Tokenizer):
    """Shows ids instead of text, so that a test sees every one of them."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    return Spelled(sentencepiece_model)


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> ModelConfig:
    language = dataclasses.replace(tiny.CONFIG.model.language, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(tiny.CONFIG.model, language=language)


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Any:
    return jax.tree.map(jnp.asarray, tiny.random_parameters(lambda key: emu2.init(config, key)))


@pytest.fixture(scope="module")
def prompts() -> list[list[Link]]:
    """Of different lengths, with no, one and two pictures, which come first, in the middle and last."""
    first, second = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    return [["a red apple"], [first, "the sun"], ["two cats", second, "on the", first], []]


class Recompute:
    """The whole sequence through the model for every new element: no cache, no padding on the left, no batch."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = jax.jit(lambda params, images: emu2.encode_images(config, params["visual_encoder"], images))
        positions, causal = jnp.arange(CAPACITY)[None], jnp.tril(jnp.ones((1, CAPACITY, CAPACITY), bool))
        self.run = jax.jit(lambda params, x: emu2.merge(config, params).language_model(x, positions, causal))

    def inputs(self, params: Any, prompt: list[Link]) -> list[np.ndarray]:
        """What the language model reads, position after position."""
        table = np.asarray(params["language_model"]["token_embedding"])
        up = np.asarray(params["project_up"]["kernel"])
        x = [table[self.tokenizer.bos_id]]
        for link in prompt:
            if isinstance(link, str):
                x += list(table[self.tokenizer.encode(link)])
            else:
                embeddings = np.asarray(self.encode(params, jnp.asarray(link)[None]))[0]
                marks = table[self.tokenizer.image_start_id], table[self.tokenizer.image_end_id]
                x += [marks[0], *(embeddings @ up), marks[1]]
        return x

    def hidden(self, params: Any, x: list[np.ndarray]) -> np.ndarray:
        """State at the newest of the positions."""
        padded = np.zeros((1, CAPACITY, x[0].size), np.float32)
        padded[0, : len(x)] = x
        return np.asarray(self.run(params, jnp.asarray(padded)))[0, len(x) - 1]

    def text(self, params: Any, prompt: list[Link]) -> str:
        x = self.inputs(params, prompt)
        ids: list[int] = []
        while len(ids) < MAX_TOKENS:
            best = int((self.hidden(params, x) @ np.asarray(params["language_model"]["head"])).argmax())
            if best == self.tokenizer.eos_id:
                break
            ids.append(best)
            x.append(np.asarray(params["language_model"]["token_embedding"])[best])
        return " ".join(map(str, ids))

    def image(self, params: Any, prompt: list[Link]) -> np.ndarray:
        x, embeddings = self.inputs(params, prompt), []
        x.append(np.asarray(params["language_model"]["token_embedding"])[self.tokenizer.image_start_id])
        for _ in range(NUM_VISUAL_TOKENS):
            embeddings.append(self.hidden(params, x) @ np.asarray(params["project_down"]["kernel"]))
            x.append(embeddings[-1] @ np.asarray(params["project_up"]["kernel"]))
        return np.stack(embeddings)


@pytest.fixture(scope="module")
def recompute(config: ModelConfig, tokenizer: Tokenizer) -> Recompute:
    return Recompute(config, tokenizer)


@pytest.fixture(scope="module")
def generator(config: ModelConfig, params: Any, tokenizer: Tokenizer) -> Generator:
    return Generator(config, params, tokenizer)


def test_cached_text_equals_recomputing(
    generator: Generator, recompute: Recompute, params: Any, prompts: list[list[Link]]
) -> None:
    texts = generator.text(prompts, max_tokens=MAX_TOKENS)
    assert texts == [recompute.text(params, prompt) for prompt in prompts]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) == MAX_TOKENS for text in texts)


def test_cached_images_equal_recomputing(
    generator: Generator, recompute: Recompute, params: Any, prompts: list[list[Link]]
) -> None:
    embeddings = generator.image_embeddings(prompts)
    assert embeddings.shape == (4, NUM_VISUAL_TOKENS, 16)
    assert embeddings.dtype == np.float32
    expected = np.stack([recompute.image(params, prompt) for prompt in prompts])
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_a_prompt_gives_the_same_alone_as_in_a_batch(generator: Generator, prompts: list[list[Link]]) -> None:
    together = generator.text(prompts, max_tokens=MAX_TOKENS)
    assert generator.text([prompts[0]], max_tokens=MAX_TOKENS) == together[:1]
    np.testing.assert_allclose(
        generator.image_embeddings([prompts[1]])[0], generator.image_embeddings(prompts)[1], rtol=1e-4, atol=1e-4
    )


def test_text_ends_before_the_end_token_and_other_rows_go_on(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, recompute: Recompute, prompts: list[list[Link]]
) -> None:
    """The head is turned so that the second prompt ends with its third token."""
    table = np.asarray(params["language_model"]["token_embedding"])
    x = recompute.inputs(params, prompts[1])
    x += [table[int(i)] for i in recompute.text(params, prompts[1]).split()[:2]]
    direction = recompute.hidden(params, x)
    before = recompute.hidden(params, x[:-1]), recompute.hidden(params, x[:-2])
    for state in before:  # the two states before it must not lean towards the end
        direction = direction - (direction @ state) / (state @ state) * state
    head = params["language_model"]["head"].at[:, tokenizer.eos_id].set(100.0 * direction)
    turned = params | {"language_model": params["language_model"] | {"head": head}}
    expected = [recompute.text(turned, prompt) for prompt in prompts]
    assert len(expected[1].split()) <= 2
    assert max(len(text.split()) for text in expected) > len(expected[1].split())
    assert Generator(config, turned, tokenizer).text(prompts, max_tokens=MAX_TOKENS) == expected


@pytest.mark.parametrize("shape", [(16, 16, 3), (4, 4, 3)])
def test_a_picture_of_another_shape_is_an_error(shape: tuple[int, ...], generator: Generator) -> None:
    generate: Callable[[Any], Any] = generator.image_embeddings
    with pytest.raises(
        UserError, match=r"^prompt link 2: image of shape \(.*\), uint8; the encoder reads \(8, 8, 3\), uint8$"
    ):
        generate([["a cat", np.zeros(shape, np.uint8)]])
