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
from emu2_jax.errors import ConfigError, UserError
from emu2_jax.generation import generator as generator_module
from emu2_jax.generation.answer import Wanted
from emu2_jax.generation.generator import Generator, bucket, padded
from emu2_jax.generation.prompt import Box, Embedded, Frames, Link
from emu2_jax.generation.sampling import Sampling
from emu2_jax.models import emu2, layers
from emu2_jax.tokenizer import Tokenizer

MAX_TOKENS = 6
NUM_VISUAL_TOKENS = tiny.CONFIG.model.num_visual_tokens
CAPACITY = 96


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

    def mixture(self, params: Any, prompt: list[Link], wanted: Wanted) -> tuple[list[int], np.ndarray]:
        """Text and images as the greedy model decides: ids of the elements, and the embeddings."""
        table, head = (np.asarray(params["language_model"][name]) for name in ("token_embedding", "head"))
        up, down = (np.asarray(params[name]["kernel"]) for name in ("project_up", "project_down"))
        x, ids, embeddings = self.inputs(params, prompt), [], []
        words = images = 0

        def draw() -> None:
            for _ in range(NUM_VISUAL_TOKENS):
                embeddings.append(self.hidden(params, x) @ down)
                x.append(embeddings[-1] @ up)
                ids.append(self.tokenizer.image_id)

        for number in range(wanted.forced_images):
            x.append(table[self.tokenizer.image_start_id])
            if number:
                ids.append(self.tokenizer.image_start_id)
            draw()
            images += 1
            if number + 1 < wanted.forced_images or wanted.max_tokens:
                x.append(table[self.tokenizer.image_end_id])
                ids.append(self.tokenizer.image_end_id)
        while words < wanted.max_tokens:
            scores = self.hidden(params, x) @ head
            if images == wanted.most_images > 0:
                scores[self.tokenizer.image_start_id] = -np.inf
            best = int(scores.argmax())
            words += 1
            if best == self.tokenizer.eos_id:
                break
            ids.append(best)
            x.append(table[best])
            if best == self.tokenizer.image_start_id and images < wanted.most_images:
                draw()
                images += 1
                if words < wanted.max_tokens:
                    x.append(table[self.tokenizer.image_end_id])
                    ids.append(self.tokenizer.image_end_id)
        return ids, np.array(embeddings, np.float32).reshape(-1, NUM_VISUAL_TOKENS, 16)


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


def eager(params: Any, tokenizer: Tokenizer) -> Any:
    """Parameters of a model that often chooses `[IMG]`."""
    head = params["language_model"]["head"]
    head = head.at[:, tokenizer.image_start_id].multiply(5.0)
    return params | {"language_model": params["language_model"] | {"head": head}}


@pytest.fixture(scope="module")
def eager_generator(config: ModelConfig, params: Any, tokenizer: Tokenizer) -> Generator:
    return Generator(config, eager(params, tokenizer), tokenizer)


MIXTURES = (
    Wanted(max_tokens=5, max_images=2),
    Wanted(max_tokens=4, forced_images=1),
    Wanted(max_tokens=3, forced_images=2, max_images=3),
    Wanted(max_tokens=0, forced_images=2),
    Wanted(max_tokens=5, max_images=0),
)


@pytest.mark.parametrize("wanted", MIXTURES, ids=str)
def test_mixtures_equal_recomputing(
    wanted: Wanted, eager_generator: Generator, params: Any, tokenizer: Tokenizer, recompute: Recompute, prompts: Any
) -> None:
    params = eager(params, tokenizer)
    answers = eager_generator.generate_batch(prompts, wanted)
    opened = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, embeddings = recompute.mixture(params, prompt, wanted)
        assert answer.token_ids.tolist() == ids
        assert answer.embeddings.shape == embeddings.shape
        np.testing.assert_allclose(answer.embeddings, embeddings, rtol=1e-4, atol=1e-4)
        drawn = [link for link in answer.links if isinstance(link, Embedded)]
        np.testing.assert_array_equal(np.array([link.embeddings for link in drawn]).ravel(), answer.embeddings.ravel())
        opened += len(drawn)
    assert opened > 0 or not wanted.most_images
    assert all(answer.embeddings.shape[0] == 0 for answer in answers) or wanted.most_images
    if wanted is not MIXTURES[2]:
        return
    single = eager_generator.generate(prompts[1], wanted)  # one row has a loop of its own
    assert single.token_ids.tolist() == answers[1].token_ids.tolist()
    np.testing.assert_allclose(single.embeddings, answers[1].embeddings, rtol=1e-4, atol=1e-4)


def test_answers_equal_what_the_model_says_of_them_in_packed_rows(
    config: ModelConfig, eager_generator: Generator, params: Any, tokenizer: Tokenizer, prompts: list[list[Link]]
) -> None:
    """Prompts and their answers as documents of one packed row: each position foretells the next element."""
    params, generator, wanted = eager(params, tokenizer), eager_generator, MIXTURES[0]
    rows = [generator.layout.elements(prompt) for prompt in prompts]
    answers = generator.generate_batch(prompts, wanted)
    tokens = np.concatenate(
        [np.concatenate([row.tokens, made.token_ids]) for row, made in zip(rows, answers, strict=True)]
    )
    lengths = [len(row) + len(made.token_ids) for row, made in zip(rows, answers, strict=True)]
    segments = np.repeat(np.arange(1, len(rows) + 1), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    seen: list[np.ndarray] = []
    for prompt, made in zip(prompts, answers, strict=True):
        for link in prompt:
            if not isinstance(link, str):
                encoded = emu2.encode_images(config, params["visual_encoder"], jnp.asarray(link)[None])
                seen.append(np.asarray(encoded[0]))
        seen += list(made.embeddings)
    model = emu2.merge(config, params)
    is_visual = (tokens == tokenizer.image_id)[None]
    index = np.where(is_visual, np.cumsum(is_visual) - 1, 0)
    x = emu2.interleave(
        model.language_model.embed(jnp.asarray(tokens)[None], jnp.dtype("float32")),
        model.project_up(jnp.asarray(np.concatenate(seen))[None]),
        jnp.asarray(is_visual),
        jnp.asarray(index),
    )
    mask = layers.packed_causal_mask(jnp.asarray(segments)[None])
    hidden = model.language_model(x, jnp.asarray(positions)[None], mask)[0]
    best, regressed = np.asarray(model.language_model.logits(hidden)), np.asarray(model.project_down(hidden))
    start = 0
    for row, made, length in zip(rows, answers, lengths, strict=True):
        embeddings = made.embeddings.reshape(-1, 16)
        drawn = images = 0
        for at in range(start + len(row), start + length):
            token, before = tokens[at], tokens[at - 1]
            if token == tokenizer.image_id:
                np.testing.assert_allclose(regressed[at - 1], embeddings[drawn], rtol=1e-4, atol=1e-4)
                drawn += 1
            elif before != tokenizer.image_id:  # [/IMG] is given, not chosen
                scores = best[at - 1].copy()
                scores[tokenizer.image_start_id] = -np.inf if images == 2 else scores[tokenizer.image_start_id]
                assert scores.argmax() == token
                images += token == tokenizer.image_start_id
        assert drawn == len(embeddings)
        start += length


def test_nothing_is_compiled_in_use(config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Any) -> None:
    generator = Generator(config, params, tokenizer)
    wanted = Wanted(max_tokens=4, max_images=1)
    generator.warm_up(24, wanted)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for prompt in prompts:
        generator.generate(prompt, wanted)
    assert compiled == []
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert compiled, "the listener hears of compilations"


def test_a_prompt_read_in_stretches_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Any
) -> None:
    """Stretches of 8, which end within images and leave shorter rows behind."""
    whole = Generator(config, params, tokenizer)
    monkeypatch.setattr(generator_module, "MAX_CHUNK", 8)
    parts = Generator(config, params, tokenizer)
    wanted = Wanted(max_tokens=3, forced_images=1)
    for a, b in zip(whole.generate_batch(prompts, wanted), parts.generate_batch(prompts, wanted), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.embeddings, b.embeddings, rtol=1e-4, atol=1e-4)


def test_progress_changes_nothing(generator: Generator, prompts: Any) -> None:
    seen: list[int] = []
    wanted = Wanted(max_tokens=40)
    told = generator.generate_batch(prompts, wanted, progress=seen.append)
    assert [answer.text for answer in told] == [answer.text for answer in generator.generate_batch(prompts, wanted)]
    assert seen[0] == 1 and seen == sorted(seen) and seen[-1] == max(len(answer.token_ids) for answer in told)


def test_draws_depend_on_the_seed_and_the_prompts_number_alone(generator: Generator, prompts: Any) -> None:
    def texts(seed: int, batch: Any) -> list[str]:
        sampling = Sampling(temperature=2.0, top_k=40, seed=seed)
        return [answer.text for answer in generator.generate_batch(batch, Wanted(max_tokens=6, decoding=sampling))]

    first = texts(0, prompts)
    assert texts(0, prompts[:1]) == first[:1] and texts(0, prompts) == first
    assert texts(1, prompts) != first
    same = texts(0, [prompts[0]] * 3)
    assert same[0] == first[0] and len(set(same)) == 3


def test_bfloat16_is_near_float32(config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Any) -> None:
    wanted = Wanted(max_tokens=0, forced_images=1)
    exact = Generator(config, params, tokenizer).generate(prompts[1], wanted).embeddings
    rounded = Generator(config, params, tokenizer, dtype="bfloat16").generate(prompts[1], wanted).embeddings
    assert rounded.dtype == np.float32
    first = np.abs(rounded[0, 0] - exact[0, 0]).max() / np.abs(exact[0, 0]).max()
    assert 0 < first < 0.1


def test_videos_boxes_and_drawn_images_in_a_prompt(
    generator: Generator, recompute: Recompute, params: Any, tokenizer: Tokenizer, prompts: Any
) -> None:
    """The same positions as the images on their own; frames come behind [VIDEO]."""
    picture = prompts[1][0]
    embeddings = np.asarray(recompute.encode(params, jnp.asarray(picture)[None]))[0]
    texts = generator.text([[picture, "the sun"], [Embedded(embeddings), "the sun"]], max_tokens=4)
    assert texts[0] == texts[1]
    box = Box(0.25, 0.25, 1.0, 0.75)
    drawn = generator.text([[box, "the sun"], [box.picture(8), "the sun"]], max_tokens=4)
    assert drawn[0] == drawn[1]
    elements = generator.layout.elements([Frames([picture, picture]), "a cat"])
    frame = [tokenizer.image_start_id, *[tokenizer.frame_id] * NUM_VISUAL_TOKENS, tokenizer.image_end_id]
    assert elements.tokens.tolist()[: 2 + 2 * len(frame)] == [tokenizer.bos_id, tokenizer.video_id, *frame, *frame]
    assert [visual.start for visual in elements.visuals] == [3, 3 + len(frame)]


def test_a_prompt_that_is_too_long_says_by_how_much_and_can_be_cut_by_links(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Any
) -> None:
    generator = Generator(config, params, tokenizer, context=24)
    prompt = [*prompts[1], *prompts[1], "a cat"]
    length = len(generator.layout.elements(prompt))
    with pytest.raises(UserError, match=rf"takes {length} positions, {length - 18} more than the 18 .* truncate"):
        generator.generate(prompt, Wanted(max_tokens=6))
    cut = generator.generate(prompt, Wanted(max_tokens=6, truncate="first"))
    assert cut.links_left_out == 1
    assert cut.text == generator.generate(prompt[1:], Wanted(max_tokens=6)).text
    last = generator.generate(prompt, Wanted(max_tokens=6, truncate="last"))
    assert last.text == generator.generate(prompt[: len(prompt) - last.links_left_out], Wanted(max_tokens=6)).text
    with pytest.raises(ConfigError, match="leave none of 24 to a prompt"):
        generator.generate([], Wanted(max_tokens=24))


def test_log_probabilities_of_choices_equal_recomputing(
    generator: Generator, recompute: Recompute, params: Any, prompts: list[list[Link]]
) -> None:
    """Choices of different lengths, after prompts of different lengths that end in a text, in an image, in nothing."""
    choices = [" the red apple", " a", " a cat and the sun"]
    found = generator.log_probabilities(prompts, choices)

    head = np.asarray(params["language_model"]["head"])
    for prompt, row in zip(prompts, found, strict=True):
        after_image = bool(prompt) and not isinstance(prompt[-1], str)  # white space beside [/IMG] goes
        front = list(prompt[:-1]) if prompt and not after_image else list(prompt)
        last = str(prompt[-1]) if prompt and not after_image else ""
        texts = [[*front, one.strip() if after_image else last + one] for one in choices]
        elements = [generator.layout.elements(text) for text in texts]
        start = min(generator.layout.elements(prompt).common(one) for one in elements)
        for text, one, log_probability in zip(texts, elements, row, strict=True):
            x = recompute.inputs(params, text)
            assert 0 < start < len(x) == len(one)
            scores = [recompute.hidden(params, x[:at]) @ head for at in range(start, len(x))]
            each = jax.nn.log_softmax(jnp.asarray(np.stack(scores)))[np.arange(len(scores)), one.tokens[start:]]
            np.testing.assert_allclose(log_probability, float(each.sum()), atol=1e-4)


def test_more_choices_than_a_batch_and_prompts_that_are_too_long(
    config: ModelConfig, params: Any, tokenizer: Tokenizer
) -> None:
    small = Generator(config, params, tokenizer, context=8, max_batch=1)
    found = small.log_probabilities([["a red"], ["the sun"]], [" apple", " cat"])
    assert found.shape == (2, 2) and (found < 0).all()
    np.testing.assert_allclose(found[1:], small.log_probabilities([["the sun"]], [" apple", " cat"]), atol=1e-6)
    with pytest.raises(UserError, match=r"positions, .* more than the 8 that there are for it"):
        small.log_probabilities([["a red apple and the sun and a cat"]], [" apple"])


def test_encoding_images_is_what_prompts_do(generator: Generator, recompute: Recompute, params: Any) -> None:
    images = np.random.default_rng(1).integers(0, 256, (19, 8, 8, 3)).astype(np.uint8)
    expected = np.asarray(recompute.encode(params, jnp.asarray(images)))
    np.testing.assert_allclose(generator.encode(list(images)), expected, atol=1e-5)
    assert generator.encode([]).shape == (0, *expected.shape[1:])


def test_buckets() -> None:
    sizes = sorted({bucket(n) for n in range(1, 300)})
    assert sizes == [16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    assert all(n <= bucket(n) <= max(16, 1.25 * n) for n in range(1, 5000))
    assert [padded(n) for n in (16, 512, 513, 1100)] == [16, 512, 528, 1024 + 80]
