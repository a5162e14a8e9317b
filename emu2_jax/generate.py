"""Interleaved generation: one cached decoder for text tokens and visual embeddings.

A prompt is prefilled once; then each step adds one element, a token id that is embedded or a regressed visual
embedding that goes back through `project_up`. Prompts of different lengths are padded on the left, so that all rows of
a batch write the same cache slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from emu2_jax.config import ModelConfig
from emu2_jax.errors import UserError
from emu2_jax.models import emu2
from emu2_jax.models.llama import KeyValueCache
from emu2_jax.task import Params
from emu2_jax.tokenizer import IMAGE_START, Picture, Tokenizer

#: Prompts are padded to a multiple of this many positions, so that few lengths are ever compiled.
LENGTH_BUCKET = 32

Link = str | UInt8[np.ndarray, "S S 3"]  # one piece of a prompt: text, or a square RGB image of the encoder's size


class Decoding(NamedTuple):
    """Where a batch of sequences stands between two elements."""

    hidden: Float[Array, "B D"]  # after the final norm, at the newest element
    cache: KeyValueCache
    visible: Bool[Array, "B S"]  # cache slots that hold an element of the row's sequence
    position: Int[Array, "B"]  # rotary position of the next element
    slot: Int[Array, ""]  # cache slot of the next element


class PromptBatch(NamedTuple):
    """Left-padded prompts as arrays (fields as in `emu2_jax.sequence`)."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    present: Bool[Array, "B T"]  # False on padding
    is_visual: Bool[Array, "B T"]
    visual_index: Int[Array, "B T"]
    images: UInt8[Array, "B M S S 3"]


class Generator:
    """A trained Emu2, ready to continue prompts.

    Compiles once per (batch size, padded prompt length, number of images, number of new elements).
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._text = jax.jit(functools.partial(_generate_text, config), static_argnames=("num_tokens", "end_id"))
        self._image = jax.jit(functools.partial(_generate_image, config))

    def text(self, prompts: Sequence[Sequence[Link]], *, max_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, up to `</s>` or `max_tokens`."""
        tokenizer = self.tokenizer
        ids = np.asarray(self._text(self.params, self._batch(prompts), num_tokens=max_tokens, end_id=tokenizer.eos_id))
        return [tokenizer.decode(_until(row.tolist(), tokenizer.eos_id), skip_special_tokens=True) for row in ids]

    def image_embeddings(self, prompts: Sequence[Sequence[Link]]) -> Float[np.ndarray, "B N E"]:
        """The N visual embeddings of the image that follows each prompt (`[IMG]` is appended to it)."""
        return np.asarray(self._image(self.params, self._batch(prompts, tail=IMAGE_START)))

    def _batch(self, prompts: Sequence[Sequence[Link]], tail: str = "") -> PromptBatch:
        rows = [self._elements(prompt, tail) for prompt in prompts]
        longest = max(len(ids) for ids, _ in rows)
        length = -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET
        slots = max(len(images) for _, images in rows)
        size, num = self.config.vision.image_size, self.config.num_visual_tokens
        tokens = np.full((len(rows), length), self.tokenizer.pad_id, np.int32)
        positions, visual_index = np.zeros_like(tokens), np.zeros_like(tokens)
        present, is_visual = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        pictures = np.zeros((len(rows), slots, size, size, 3), np.uint8)
        for row, (ids, images) in enumerate(rows):
            own = slice(length - len(ids), length)
            tokens[row, own] = ids
            positions[row, own] = np.arange(len(ids))
            present[row, own] = True
            is_visual[row] = tokens[row] == self.tokenizer.image_id
            visual_index[row, is_visual[row]] = np.arange(len(images) * num)
            for slot, image in enumerate(images):
                pictures[row, slot] = image
        arrays = (tokens, positions, present, is_visual, visual_index, pictures)
        return PromptBatch(*(jnp.asarray(array) for array in arrays))

    def _elements(self, prompt: Sequence[Link], tail: str) -> tuple[list[int], list[np.ndarray]]:
        """`<s>`, then the links and the tail: token ids, with `[IMG] <image> x N [/IMG]` where an image lies."""
        links: list[str | Picture] = []
        images: list[np.ndarray] = []
        for link in prompt:
            if isinstance(link, str):
                links.append(link)
            else:
                self._check_size(link)
                links.append(Picture(self.config.num_visual_tokens))
                images.append(link)
        return self.tokenizer.encode_prompt([*links, tail]), images

    def _check_size(self, image: np.ndarray) -> None:
        size = self.config.vision.image_size
        if image.shape != (size, size, 3):
            raise UserError(f"prompt image has shape {image.shape}; the encoder reads ({size}, {size}, 3)")


def _until(ids: list[int], end_id: int) -> list[int]:
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _prefill(config: ModelConfig, params: Params, prompts: PromptBatch, new_elements: int) -> Decoding:
    """Run the prompts through the model once and fill the cache, with room for `new_elements` more."""
    dtype = jnp.dtype(config.compute_dtype)
    model = emu2.merge(config, params)
    rows, length = prompts.tokens.shape
    x = model.language_model.embed(prompts.tokens, dtype)
    if prompts.images.shape[1]:
        flat = prompts.images.reshape(-1, *prompts.images.shape[2:])
        embeddings = emu2.encode_images(config, params["visual_encoder"], flat)
        visual_inputs = model.project_up(embeddings.reshape(rows, -1, embeddings.shape[-1]).astype(dtype))
        x = emu2.interleave(x, visual_inputs, prompts.is_visual, prompts.visual_index)
    capacity = length + new_elements
    visible = jnp.pad(prompts.present, [(0, 0), (0, new_elements)])
    causal = jnp.arange(capacity)[None, :] <= jnp.arange(length)[:, None]
    cache = KeyValueCache.empty(config.language, rows, capacity, dtype)
    mask = visible[:, None, :] & causal[None]
    hidden, cache = model.language_model.decode(x, prompts.positions, mask, cache, 0)
    return Decoding(hidden[:, -1], cache, visible, prompts.positions[:, -1] + 1, jnp.asarray(length, jnp.int32))


def _extend(model: emu2.Emu2, decoding: Decoding, x: Float[Array, "B D"]) -> Decoding:
    """Add one element, given as the embedding that the language model reads."""
    visible = decoding.visible | (jnp.arange(decoding.visible.shape[1]) == decoding.slot)[None]
    hidden, cache = model.language_model.decode(
        x[:, None], decoding.position[:, None], visible[:, None, :], decoding.cache, decoding.slot
    )
    return Decoding(hidden[:, 0], cache, visible, decoding.position + 1, decoding.slot + 1)


def _generate_text(
    config: ModelConfig, params: Params, prompts: PromptBatch, *, num_tokens: int, end_id: int
) -> Int[Array, "B num_tokens"]:
    """Greedy token ids; after `</s>` a row repeats it, and the loop ends once every row has ended."""
    model = emu2.merge(config, params)
    dtype = jnp.dtype(config.compute_dtype)
    decoding = _prefill(config, params, prompts, num_tokens)
    ids = jnp.full((prompts.tokens.shape[0], num_tokens), end_id, jnp.int32)
    ended = jnp.zeros(prompts.tokens.shape[0], bool)

    def unfinished(carry: tuple[Array, Array, Array, Decoding]) -> Array:
        count, _, ended, _ = carry
        return (count < num_tokens) & ~ended.all()

    def add_token(carry: tuple[Array, Array, Array, Decoding]) -> tuple[Array, Array, Array, Decoding]:
        count, ids, ended, decoding = carry
        token = jnp.where(ended, end_id, model.language_model.logits(decoding.hidden).argmax(-1)).astype(jnp.int32)
        ids = ids.at[:, count].set(token)
        decoding = _extend(model, decoding, model.language_model.embed(token, dtype))
        return count + 1, ids, ended | (token == end_id), decoding

    return jax.lax.while_loop(unfinished, add_token, (jnp.zeros((), jnp.int32), ids, ended, decoding))[1]


def _generate_image(config: ModelConfig, params: Params, prompts: PromptBatch) -> Float[Array, "B N E"]:
    """Regress N embeddings, each fed back; the first is read at `[IMG]`, the prompt's last element. float32."""
    model = emu2.merge(config, params)

    def add_embedding(decoding: Decoding, _: None) -> tuple[Decoding, Array]:
        embedding = model.project_down(decoding.hidden)
        return _extend(model, decoding, model.project_up(embedding)), embedding.astype(jnp.float32)

    decoding = _prefill(config, params, prompts, config.num_visual_tokens)
    _, embeddings = jax.lax.scan(add_embedding, decoding, None, length=config.num_visual_tokens)
    return jnp.moveaxis(embeddings, 0, 1)
