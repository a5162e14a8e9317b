"""A chain computes what comes after the link that changed, and answers as if it had computed everything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emu2_jax.errors import UserError
from emu2_jax.generation.answer import IMAGE, Wanted
from emu2_jax.generation.chain import Chain
from emu2_jax.generation.generator import Generator
from emu2_jax.generation.sampling import Sampling
from emu2_jax.models import emu2
from emu2_jax.tokenizer import Tokenizer

N = tiny.CONFIG.model.num_visual_tokens


@pytest.fixture(scope="module")
def generator(sentencepiece_model: Path) -> Generator:
    tokenizer = Tokenizer(sentencepiece_model)
    language = dataclasses.replace(tiny.CONFIG.model.language, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(tiny.CONFIG.model, language=language)
    params = jax.tree.map(jnp.asarray, tiny.random_parameters(lambda key: emu2.init(config, key)))
    return Generator(config, params, tokenizer)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8))


def computed(generator: Generator, call: Any) -> tuple[Any, int]:
    before = generator.positions_computed
    answer = call()
    return answer, generator.positions_computed - before


def test_only_what_comes_after_a_changed_link_is_computed(generator: Generator, pictures: list[np.ndarray]) -> None:
    chain = Chain(generator, [pictures[0], "a red apple", pictures[1], "the sun"])
    wanted = Wanted(max_tokens=4)
    front = 1 + (N + 2)
    words = [len(generator.layout.elements([text])) - 1 for text in ("a red apple", "the sun", "a cat")]
    whole = front + words[0] + N + 2 + words[1]

    first, count = computed(generator, lambda: chain.generate(wanted))
    assert count == whole and first.text == generator.generate(chain.links, wanted).text
    again, count = computed(generator, lambda: chain.generate(wanted))
    assert count == 1 and again.text == first.text  # the last position, whose hidden state foretells the answer

    changed = chain.replace(4, "a cat")
    answer, count = computed(generator, lambda: changed.generate(wanted))
    assert count <= words[2] and answer.text == generator.generate(changed.links, wanted).text
    changed = chain.replace(3, pictures[2])
    answer, count = computed(generator, lambda: changed.generate(wanted))
    assert count == N + 1 + words[1]  # [IMG] is the same; the picture, [/IMG] and the text are not
    assert answer.text == generator.generate(changed.links, wanted).text
    changed = chain.replace(1, "a cat")
    answer, count = computed(generator, lambda: changed.generate(wanted))
    assert answer.text == generator.generate(changed.links, wanted).text and count > words[1] + N


def test_variants_are_one_batch_that_computes_what_they_share_once(
    generator: Generator, pictures: list[np.ndarray]
) -> None:
    chain = Chain(generator, [pictures[0], pictures[1], "a red apple", "the sun"])
    links = ["a cat", pictures[2], "two cats on the red sun"]
    prompts = [chain.replace(3, link).links for link in links]
    lengths = [len(generator.fit(prompt, IMAGE)[0]) for prompt in prompts]
    shared = 1 + 2 * (N + 2)
    answers, count = computed(generator, lambda: chain.variants(3, links, IMAGE))
    assert count == shared + sum(length - shared for length in lengths)
    for answer, prompt in zip(answers, prompts, strict=True):
        np.testing.assert_allclose(
            answer.embeddings, generator.generate(prompt, IMAGE).embeddings, rtol=1e-4, atol=1e-4
        )
    assert np.abs(answers[0].embeddings - answers[1].embeddings).max() > 1e-2
    _, count = computed(generator, lambda: chain.variants(3, links, IMAGE))
    assert count == sum(length - shared for length in lengths)


def test_variants_share_their_draws(generator: Generator) -> None:
    chain = Chain(generator, ["a cat", "the sun"])
    wanted = Wanted(max_tokens=6, decoding=Sampling(temperature=3.0, seed=4))
    answers = chain.variants(2, ["the sun", "the sun", "a red apple"], wanted)
    assert answers[0].text == answers[1].text != answers[2].text
    assert answers[0].text == chain.generate(wanted).text


def test_an_answer_can_be_a_link(generator: Generator) -> None:
    chain = Chain(generator, ["a red apple"])
    drawn = chain.generate(IMAGE)
    longer = chain.extend(*drawn.links, "the sun")
    assert len(generator.layout.elements(longer.links)) > len(generator.layout.elements(chain.links)) + N
    assert longer.generate().text == generator.generate([*chain.links, *drawn.links, "the sun"]).text


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_link_that_is_not_there(number: int, generator: Generator) -> None:
    with pytest.raises(UserError, match=f"has links 1 to 2; there is no link {number}$"):
        Chain(generator, ["a", "b"]).replace(number, "c")
