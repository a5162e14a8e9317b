"""From a sample's parts to a document: the order of texts and images, its length, its token ids.

A document is `<s>`, the elements, `</s>`. A text is its token ids, an image `[IMG]`, N visual positions, `[/IMG]`. With
N = 2, a text of 3 tokens and an image give 2 + 3 + (2 + 2) = 9 positions, in either order:

    <s> [IMG] v v [/IMG] a red cat </s>        <s> a red cat [IMG] v v [/IMG] </s>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from data_pipelines.index import BadSample, SampleError, SampleIndex
from data_pipelines.order import uniforms
from data_pipelines.samples import decode_image, read_part, read_text
from data_pipelines.shards import ShardReader
from emu2_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentRules:
    """What decides the shape of a document."""

    visual_tokens: int  #: N, positions of an image, without [IMG] and [/IMG]
    image_size: int  #: pixels, side of the square an image is squeezed to
    max_positions: int  #: documents are cut here
    max_images: int
    image_first_probability: float  #: that the image of a slot comes before the text of the same slot

    @property
    def image_positions(self) -> int:
        """Positions of an image with [IMG] and [/IMG]."""
        return self.visual_tokens + 2


@dataclass(frozen=True)
class Outline:
    """What of a sample goes into its document, known before any image is read."""

    parts: tuple[int, ...]  # numbers of parts in the index, in the order of the document
    positions: tuple[int, ...]  # that each takes; fewer than it has for a text that is cut
    length: int  # positions of the whole document
    num_images: int
    is_cut: bool  # something did not fit; then there is no </s>, because the document does not end there


@dataclass(frozen=True)
class Document:
    """One document of T positions."""

    tokens: Int32[np.ndarray, " T"]
    is_visual: Bool[np.ndarray, " T"]
    images: Sequence[UInt8[np.ndarray, "S S 3"]]


def order_parts(index: SampleIndex, sample: int, rules: DocumentRules, seed: int) -> list[int]:
    """The parts of a sample in the order of its document.

    Slots keep their order; within each the image comes first with `rules.image_first_probability`, by a draw that
    depends on `seed` (one for each source and epoch) and the part alone.
    """
    first, last = int(index.starts[sample]), int(index.starts[sample + 1])
    slots = index.slots[first:last].tolist()
    image_first = uniforms(seed, np.arange(first, last)) < rules.image_first_probability
    order = list(range(first, last))
    for i in range(len(order) - 1):
        if slots[i] == slots[i + 1] and image_first[i]:  # stored as text, image
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def outline(index: SampleIndex, sample: int, rules: DocumentRules, seed: int) -> Outline:
    """The document of a sample, cut to the rules' limits: texts anywhere, images whole or not at all.

    At the first thing that does not fit the document is over; what follows is dropped.
    """
    parts: list[int] = []
    positions: list[int] = []
    used, num_images, is_cut = 1, 0, False  # <s>
    for part in order_parts(index, sample, rules, seed):
        room = rules.max_positions - used
        if index.is_image[part]:
            wanted = rules.image_positions
            taken = wanted if wanted <= room and num_images < rules.max_images else 0
        else:
            wanted = int(index.tokens[part])
            taken = min(wanted, room)
        if taken:
            parts.append(part)
            positions.append(taken)
            used += taken
            num_images += int(index.is_image[part])
        is_cut = taken < wanted
        if is_cut:
            break
    is_cut = is_cut or used == rules.max_positions
    return Outline(tuple(parts), tuple(positions), used + (not is_cut), num_images, is_cut)


def measure(
    index: SampleIndex, samples: Int64[np.ndarray, " n"], rules: DocumentRules, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Positions and images of the documents of `samples`, from the index alone."""
    images = index.num_images[samples]
    lengths = 2 + index.num_tokens[samples] + images * rules.image_positions
    for i in np.flatnonzero((lengths > rules.max_positions) | (images > rules.max_images)):
        cut = outline(index, int(samples[i]), rules, seed)
        lengths[i], images[i] = cut.length, cut.num_images
    return lengths, images


def read_document(
    index: SampleIndex, reader: ShardReader, tokenizer: Tokenizer, sample: int, plan: Outline, rules: DocumentRules
) -> tuple[Document | None, list[BadSample]]:
    """Reads and decodes a sample into its document, and lists what could not be used.

    An interleaved document whose image cannot be used goes on without it; in every other case, and when nothing is
    left, there is no document.
    """
    tokens = [tokenizer.bos_id]
    first_visual: list[int] = []
    images: list[np.ndarray] = []
    bad: list[BadSample] = []
    for part, positions in zip(plan.parts, plan.positions, strict=True):
        try:
            if index.is_image[part]:
                images.append(decode_image(read_part(reader, index, sample, part), rules.image_size))
                first_visual.append(len(tokens) + 1)
                tokens += _image_tokens(tokenizer, rules.visual_tokens)
            else:
                tokens += _text_tokens(index, reader, tokenizer, sample, part)[:positions]
        except SampleError as error:
            bad.append(index.bad_sample(sample, part, error))
            if index.kind != "interleaved" or not index.is_image[part]:
                return None, bad
    if len(tokens) == 1:
        return None, bad
    if not plan.is_cut:
        tokens.append(tokenizer.eos_id)
    is_visual = np.zeros(len(tokens), np.bool_)
    for first in first_visual:
        is_visual[first : first + rules.visual_tokens] = True
    return Document(np.array(tokens, np.int32), is_visual, images), bad


def _image_tokens(tokenizer: Tokenizer, visual_tokens: int) -> list[int]:
    return [tokenizer.image_start_id, *[tokenizer.image_id] * visual_tokens, tokenizer.image_end_id]


def _text_tokens(index: SampleIndex, reader: ShardReader, tokenizer: Tokenizer, sample: int, part: int) -> list[int]:
    tokens = tokenizer.encode_plain(read_text(reader, index, sample, part))
    if len(tokens) != index.tokens[part]:
        raise SampleError("changed_text", f"{len(tokens)} tokens where the index has {index.tokens[part]}")
    return tokens
