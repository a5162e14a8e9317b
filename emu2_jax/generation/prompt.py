"""Prompts: chains of links, each a text, an image, a box, the frames of a video; and what elements they become.

    ["What is this?", image, "A cat. ", Box(0.1, 0.2, 0.5, 0.6), Frames([frame, frame])]

becomes `<s>`, the tokens of the texts, `[IMG]`, N visual positions and `[/IMG]` for each image, and `[VIDEO]` before
frames, whose positions are `[gIMG]`. Texts that are neighbours are tokenised as one; special tokens in them count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from emu2_jax.errors import UserError
from emu2_jax.tokenizer import (
    NUM_PATCH_INDEX_TOKENS,
    OBJECT_END,
    OBJECT_START,
    Picture,
    Tokenizer,
    Video,
    location_token,
)

Pixels = UInt8[np.ndarray, "S S 3"]  # a square RGB image of the encoder's size


@dataclass(frozen=True)
class Embedded:
    """An image by its visual embeddings: worked out beforehand, or drawn by the model itself."""

    embeddings: Float[np.ndarray, "N E"]


@dataclass(frozen=True)
class Frames:
    """Frames of a video, in their order."""

    images: Sequence[Pixels]


#: Location tokens run 0 ... 224; the last 32 that the release has are not used (paper, section 2.2).
MAX_COORDINATE = 224
assert MAX_COORDINATE < NUM_PATCH_INDEX_TOKENS


@dataclass(frozen=True)
class Box:
    """A box in a picture, its edges as shares of the picture's sides, 0 ... 1.

    As an image it is a white outline, 3 pixels wide at 448, on black (release; Emu2-Gen). As tokens it is
    `<object>`, four location tokens, `</object>`, as in grounded captions.
    """

    left: float
    top: float
    right: float
    bottom: float
    form: Literal["image", "tokens"] = "image"

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise UserError(
                f"box {self.left:g},{self.top:g},{self.right:g},{self.bottom:g}: wanted left, top, right, bottom as "
                "shares of the picture's sides, 0 to 1, left before right and top before bottom"
            )

    @property
    def text(self) -> str:
        """The box as tokens."""
        edges = (self.left, self.top, self.right, self.bottom)
        places = "".join(location_token(math.floor(edge * MAX_COORDINATE + 0.5)) for edge in edges)
        return OBJECT_START + places + OBJECT_END

    def picture(self, size: int) -> Pixels:
        """The box as an image of `size` pixels a side."""
        pixels = np.zeros((size, size, 3), np.uint8)
        pen = max(1, round(3 * size / 448))
        left, right = _stretch(self.left, self.right, size)
        top, bottom = _stretch(self.top, self.bottom, size)
        pixels[top:bottom, left:right] = 255
        pixels[top + pen : bottom - pen, left + pen : right - pen] = 0
        return pixels


def _stretch(first: float, last: float, size: int) -> tuple[int, int]:
    """Pixels from `first` to `last` of a side, one at least."""
    begin = min(round(first * size), size - 1)
    return begin, max(begin + 1, round(last * size))


Link = str | Pixels | Embedded | Frames | Box
Prompt = Sequence[Link]

#: Which whole links to leave out of a prompt that is too long: from its front, or from its end.
Truncation = Literal["first", "last"]


@dataclass(frozen=True)
class Visual:
    """The image at N visual positions of a prompt."""

    source: Pixels | Float[np.ndarray, "N E"]  # pixels, or embeddings that are there already
    start: int  #: its first position
    length: int  #: N
    digest: bytes  #: equal for equal images


@dataclass(frozen=True)
class Elements:
    """A prompt as the language model reads it, one entry per position."""

    tokens: Int32[np.ndarray, " T"]
    visuals: tuple[Visual, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def is_visual(self) -> Bool[np.ndarray, " T"]:
        """Which positions hold visual embeddings."""
        mask = np.zeros(len(self.tokens), bool)
        for visual in self.visuals:
            mask[visual.start : visual.start + visual.length] = True
        return mask

    def front(self, length: int) -> Elements:
        """The first `length` elements, which must not end within an image."""
        visuals = tuple(visual for visual in self.visuals if visual.start < length)
        return Elements(self.tokens[:length], visuals)

    def common(self, other: Elements) -> int:
        """How many positions at the front are the same in both; an image is the same as a whole or not at all."""
        shorter = min(len(self), len(other))
        same = self.tokens[:shorter] == other.tokens[:shorter]
        length = shorter if same.all() else int(same.argmin())
        theirs = {visual.start: visual for visual in other.visuals}
        for visual in self.visuals:
            if visual.start >= length:
                break
            twin = theirs.get(visual.start)
            if twin is None or twin.digest != visual.digest or visual.start + visual.length > length:
                return visual.start
        return length


@dataclass(frozen=True)
class Layout:
    """The settings that decide how links become elements."""

    tokenizer: Tokenizer
    image_size: int  #: pixels, side of the encoder's input
    visual_tokens: int  #: N of a still image
    frame_tokens: int  #: N of a video's frame

    def elements(self, prompt: Sequence[Any], tail: str = "") -> Elements:
        """The elements of a prompt, `<s>` first, then `tail`, more text. Raises `UserError`."""
        parts: list[str | Picture | Video] = []
        sources: list[tuple[np.ndarray, int]] = []
        for number, link in enumerate(prompt, start=1):
            if isinstance(link, str):
                parts.append(link)
            elif isinstance(link, Box) and link.form == "tokens":
                parts.append(link.text)
            elif isinstance(link, Frames):
                if not link.images:
                    raise UserError(f"prompt link {number}: a video without frames")
                parts.append(Video(len(link.images), self.frame_tokens))
                sources += [(self._pixels(image, number), self.frame_tokens) for image in link.images]
            else:
                parts.append(Picture(self.visual_tokens))
                sources.append((self._still(link, number), self.visual_tokens))
        tokens = np.array(self.tokenizer.encode_prompt([*parts, tail]), np.int32)
        places = (self.tokenizer.image_id, self.tokenizer.frame_id)
        starts = np.flatnonzero(np.isin(tokens, places) & ~np.isin(np.roll(tokens, 1), places))
        visuals = tuple(
            Visual(source, int(start), length, _digest(source, length))
            for (source, length), start in zip(sources, starts, strict=True)
        )
        return Elements(tokens, visuals)

    def _still(self, link: Any, number: int) -> np.ndarray:
        if isinstance(link, Box):
            return link.picture(self.image_size)
        if not isinstance(link, Embedded):
            return self._pixels(link, number)
        if link.embeddings.ndim != 2 or len(link.embeddings) != self.visual_tokens:
            shape = link.embeddings.shape
            raise UserError(f"prompt link {number}: embeddings of shape {shape}; wanted ({self.visual_tokens}, width)")
        return np.asarray(link.embeddings, np.float32)

    def _pixels(self, image: Any, number: int) -> np.ndarray:
        size = self.image_size
        shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
        if shape is None:
            raise UserError(
                f"prompt link {number}: is a {type(image).__name__}; wanted a text, an image, Embedded, Frames or Box"
            )
        if shape != (size, size, 3) or dtype != np.uint8:
            raise UserError(
                f"prompt link {number}: image of shape {shape}, {dtype}; the encoder reads ({size}, {size}, 3), uint8"
            )
        return image

    def positions(self, prompt: Prompt) -> list[int]:
        """How many positions each link takes; of neighbouring texts, each on its own."""
        return [len(self.elements([link])) - 1 for link in prompt]

    def fit(self, prompt: Prompt, tail: str, room: int, truncate: Truncation | None) -> tuple[Elements, int]:
        """The elements of a prompt that may take `room` positions, and how many of its links were left out.

        Raises `UserError` that says by how much it is too long, when it may not be cut or nothing of it fits.
        """
        elements = self.elements(prompt, tail)
        if len(elements) <= room:
            return elements, 0
        for left_out, shorter in enumerate(_shorter(prompt, truncate), start=1):
            cut = self.elements(shorter, tail)
            if len(cut) <= room and shorter:
                return cut, left_out
        links = ", ".join(f"{number}: {length}" for number, length in enumerate(self.positions(prompt), start=1))
        raise UserError(
            f"prompt: takes {len(elements)} positions, {len(elements) - room} more than the {room} that there are for "
            f"it; positions of its links: {links}; leave some out, or let truncate='first' (or 'last') do it by "
            "whole links"
        )


def _shorter(prompt: Prompt, truncate: Truncation | None) -> Iterator[Prompt]:
    for count in range(1, len(prompt) if truncate is not None else 0):
        yield prompt[count:] if truncate == "first" else prompt[: len(prompt) - count]


def _digest(source: np.ndarray, length: int) -> bytes:
    kind = f"{source.dtype} {source.shape} {length}".encode()
    return hashlib.blake2b(kind + np.ascontiguousarray(source).tobytes(), digest_size=16).digest()
