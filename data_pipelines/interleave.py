"""From a sample's parts to a document: the order of texts and images, its length, its token ids.

A document is `<s>`, the elements, `</s>`. A text is its token ids, an image `[IMG]`, N visual positions, `[/IMG]`. With
N = 2, a text of 3 tokens and an image give 2 + 3 + (2 + 2) = 9 positions, in either order:

    <s> [IMG] v v [/IMG] a red cat </s>        <s> a red cat [IMG] v v [/IMG] </s>

A video is `[VIDEO]` and then its sampled frames, each as an image: 1 + 2 x (2 + 2) = 9 positions for two frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Int32, Int64

from data_pipelines.embedding_store import EMBEDDINGS, EmbeddingStore
from data_pipelines.grounding import decode_grounded, encode_grounded
from data_pipelines.images import RELEASE_RULES, ImageRules, decode_image
from data_pipelines.index import BadSample, SampleIndex
from data_pipelines.kinds import SampleError
from data_pipelines.order import stream_seed, uniforms
from data_pipelines.samples import read_part, read_text
from data_pipelines.shards import ShardReader
from data_pipelines.video import sample_frames
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.sequence import RowShape
from emu2_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentRules:
    """What decides the shape of a document."""

    visual_tokens: int  #: N, positions of an image, without [IMG] and [/IMG]
    image_size: int  #: pixels, side of the square an image is squeezed to
    max_positions: int  #: documents are cut here
    max_images: int
    image_first_probability: float  #: that the image of a slot comes before the text of the same slot
    phrase_first_probability: float = 1.0  #: that a grounded phrase comes before its boxes
    images_per_document: int | None = None  #: images sampled from a document, each with its text; None = all
    video_frames: int | None = None  #: frames sampled from a video; None where what is seen are images
    images: ImageRules = RELEASE_RULES  #: how files become pixels

    @classmethod
    def of(cls, config: DataConfig, source: SourceConfig, shape: RowShape) -> Self:
        """The rules for the documents of a source, in rows of that shape."""
        return cls(
            visual_tokens=shape.visual_tokens,
            image_size=shape.image_size,
            max_positions=source.max_document_positions or config.max_document_positions or shape.length,
            max_images=shape.image_slots,
            image_first_probability=config.image_first_probability,
            phrase_first_probability=config.phrase_first_probability,
            images_per_document=source.images_per_document,
            video_frames=source.video_frames if source.kind == "video_text" else None,
            images=ImageRules.of(config),
        )

    @property
    def visual_positions(self) -> int:
        """Positions of an image with [IMG] and [/IMG], or of a video with [VIDEO]."""
        image = self.visual_tokens + 2
        return image if self.video_frames is None else 1 + self.video_frames * image

    @property
    def visual_images(self) -> int:
        """Image slots that an image, or a video, takes."""
        return 1 if self.video_frames is None else self.video_frames


@dataclass(frozen=True)
class Outline:
    """What of a sample goes into its document, known before any image is read."""

    parts: tuple[int, ...]  # numbers of parts in the index, in the order of the document
    positions: tuple[int, ...]  # that each takes; fewer than it has for a text that is cut
    length: int  # positions of the whole document
    num_images: int
    is_cut: bool  # something did not fit; then there is no </s>, because the document does not end there
    seed: int  # of the draws that are made when the sample is read: frames of a video, order of phrases and boxes


@dataclass(frozen=True)
class Document:
    """One document of T positions."""

    tokens: Int32[np.ndarray, " T"]
    is_visual: Bool[np.ndarray, " T"]
    images: Sequence[np.ndarray]  # uint8 [S S 3], or embeddings [N E] that were worked out beforehand


def order_parts(index: SampleIndex, sample: int, rules: DocumentRules, seed: int) -> list[int]:
    """The parts of a sample in the order of its document.

    Slots keep their order; within each the image comes first with `rules.image_first_probability`, by a draw that
    depends on `seed` (one for each source and epoch) and the part alone. With `rules.images_per_document` only the
    slots of that many images, drawn the same way, are in it.
    """
    first, last = int(index.starts[sample]), int(index.starts[sample + 1])
    order = list(range(first, last))
    if rules.images_per_document is not None:
        order = _sampled_parts(index, order, rules.images_per_document, seed)
    slots = index.slots[order].tolist()
    image_first = uniforms(seed, np.array(order)) < rules.image_first_probability
    for i in range(len(order) - 1):
        if slots[i] == slots[i + 1] and image_first[i]:  # stored as text, image
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def _sampled_parts(index: SampleIndex, parts: list[int], count: int, seed: int) -> list[int]:
    """The parts in the slots of `count` images of a document; all of its texts when it has no image at all."""
    images = [part for part in parts if index.is_image[part]]
    if len(images) > count:
        draws = uniforms(stream_seed(seed, "images"), np.array(images))
        images = [images[i] for i in np.argsort(draws, kind="stable")[:count]]
    slots = {int(index.slots[part]) for part in images}
    return [part for part in parts if int(index.slots[part]) in slots] if slots else parts


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
            wanted = rules.visual_positions
            taken = wanted if wanted <= room and num_images + rules.visual_images <= rules.max_images else 0
        else:
            wanted = int(index.tokens[part])
            taken = min(wanted, room)
        if taken:
            parts.append(part)
            positions.append(taken)
            used += taken
            num_images += rules.visual_images if index.is_image[part] else 0
        is_cut = taken < wanted
        if is_cut:
            break
    is_cut = is_cut or used == rules.max_positions
    return Outline(tuple(parts), tuple(positions), used + (not is_cut), num_images, is_cut, seed)


def measure(
    index: SampleIndex, samples: Int64[np.ndarray, " n"], rules: DocumentRules, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Positions and images of the documents of `samples`, from the index alone."""
    if rules.images_per_document is None:
        tokens, seen = index.num_tokens[samples], index.num_images[samples]
    else:
        tokens, seen = _sampled_sizes(index, samples, rules.images_per_document, seed)
    lengths = 2 + tokens + seen * rules.visual_positions
    images = seen * rules.visual_images
    for i in np.flatnonzero((lengths > rules.max_positions) | (images > rules.max_images)):
        cut = outline(index, int(samples[i]), rules, seed)
        lengths[i], images[i] = cut.length, cut.num_images
    return lengths, images


def _sampled_sizes(
    index: SampleIndex, samples: Int64[np.ndarray, " n"], count: int, seed: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Text tokens and images of what `_sampled_parts` keeps of each sample, for all samples at once."""
    first, num_parts = index.starts[samples], index.starts[samples + 1] - index.starts[samples]
    documents = np.repeat(np.arange(len(samples)), num_parts)
    parts = np.arange(len(documents)) + np.repeat(first - (np.cumsum(num_parts) - num_parts), num_parts)
    is_image = index.is_image[parts]
    # The images of each document in the order of their draws, and the place of each in that order.
    images, of_document = parts[is_image], documents[is_image]
    order = np.lexsort((uniforms(stream_seed(seed, "images"), images), of_document))
    num_images = np.bincount(of_document, minlength=len(samples))
    places = np.empty(len(images), np.int64)
    places[order] = np.arange(len(images)) - np.repeat(np.cumsum(num_images) - num_images, num_images)
    taken = np.zeros(len(parts), np.bool_)
    taken[is_image] = places < count
    # A text stands directly before the image of its slot; it stays with it, or when its document has no image at all.
    same_slot = (np.diff(index.slots[parts]) == 0) & (np.diff(documents) == 0)
    kept = taken.copy()
    kept[:-1] |= same_slot & taken[1:]
    kept |= num_images[documents] == 0
    tokens = np.bincount(documents, weights=np.where(kept, index.tokens[parts], 0), minlength=len(samples))
    return tokens.astype(np.int64), np.minimum(num_images, count)


def read_texts(
    index: SampleIndex, reader: ShardReader, tokenizer: Tokenizer, sample: int, plan: Outline, rules: DocumentRules
) -> dict[int, list[int] | SampleError]:
    """Token ids of every text part of a document, by the number of the part, or why there are none.

    Apart from the images, because a picture empties the processor's caches: encoding a caption between two pictures
    takes four times as long as encoding it after another caption.
    """
    texts: dict[int, list[int] | SampleError] = {}
    for part in plan.parts:
        if not index.is_image[part]:
            try:
                texts[part] = _text_tokens(index, reader, tokenizer, sample, part, plan.seed, rules)
            except SampleError as error:
                texts[part] = error
    return texts


def read_document(
    index: SampleIndex,
    reader: ShardReader,
    tokenizer: Tokenizer,
    sample: int,
    plan: Outline,
    rules: DocumentRules,
    texts: Mapping[int, list[int] | SampleError] | None = None,
    store: EmbeddingStore | None = None,
) -> tuple[Document | None, list[BadSample]]:
    """Reads and decodes a sample into its document, and lists what could not be used; `texts` may have been read.

    With a `store`, embeddings stand in the places of the images.

    An interleaved document whose image cannot be used goes on without it; in every other case, and when nothing is
    left, there is no document. Raises nothing for what lies within the sample.
    """
    texts = read_texts(index, reader, tokenizer, sample, plan, rules) if texts is None else texts
    tokens = [tokenizer.bos_id]
    first_visual: list[int] = []
    images: list[np.ndarray] = []
    bad: list[BadSample] = []
    for part, positions in zip(plan.parts, plan.positions, strict=True):
        try:
            if not index.is_image[part]:
                tokens += _taken(texts[part])[:positions]
            elif rules.video_frames is None:
                images.append(_image(index, reader, sample, part, rules, store))
                first_visual.append(len(tokens) + 1)
                tokens += _image_tokens(tokenizer, tokenizer.image_id, rules.visual_tokens)
            else:
                draws = uniforms(stream_seed(plan.seed, "frames", part), np.arange(rules.video_frames))
                images += sample_frames(read_part(reader, index, sample, part), draws, rules.image_size)
                tokens.append(tokenizer.video_id)
                for _ in range(rules.video_frames):
                    first_visual.append(len(tokens) + 1)
                    tokens += _image_tokens(tokenizer, tokenizer.frame_id, rules.visual_tokens)
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


def _image(
    index: SampleIndex,
    reader: ShardReader,
    sample: int,
    part: int,
    rules: DocumentRules,
    store: EmbeddingStore | None,
) -> np.ndarray:
    if store is not None:
        return store.read(sample, part)[EMBEDDINGS]
    return decode_image(read_part(reader, index, sample, part), rules.image_size, rules.images)


def _taken(text: list[int] | SampleError) -> list[int]:
    if isinstance(text, SampleError):
        raise text
    return text


def _image_tokens(tokenizer: Tokenizer, placeholder: int, visual_tokens: int) -> list[int]:
    return [tokenizer.image_start_id, *[placeholder] * visual_tokens, tokenizer.image_end_id]


def _text_tokens(
    index: SampleIndex,
    reader: ShardReader,
    tokenizer: Tokenizer,
    sample: int,
    part: int,
    seed: int,
    rules: DocumentRules,
) -> list[int]:
    if index.kind == "grounded":
        caption = decode_grounded(read_part(reader, index, sample, part))
        draws = uniforms(stream_seed(seed, "phrases", part), np.arange(len(caption.phrases)))
        tokens = encode_grounded(caption, tokenizer, (draws < rules.phrase_first_probability).tolist())
    else:
        tokens = tokenizer.encode_plain(read_text(reader, index, sample, part))
    if len(tokens) != index.tokens[part]:
        raise SampleError("changed_text", f"{len(tokens)} tokens where the index has {index.tokens[part]}")
    return tokens
