"""Grounded captions: phrases of a caption tied to boxes of its picture, as text and location tokens.

The caption "a red dog and a cat" with boxes for "a red dog" and two boxes for "a cat" becomes

    <grounding> <phrase> a red dog </phrase> <object> x y x y </object> and <phrase> a cat </phrase>
    <object> x y x y </delimiter_of_multi_objects/> x y x y </object>

where x and y are one location token each: left and top, then right and bottom of the box. Phrases may also stand
after their boxes. Source: paper, section 2.2 (coordinates 0 ... 224, names of the tokens from the release). Rounding to
the nearest of these and the place of `<grounding>` are this project's choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.kinds import SampleError, decode_json
from emu2_jax.tokenizer import (
    GROUNDING,
    NEXT_BOX,
    OBJECT_END,
    OBJECT_START,
    PHRASE_END,
    PHRASE_START,
    Tokenizer,
    location_token,
)

#: The largest coordinate: a box's edge at share s of the picture's side is round(s * MAX_COORDINATE).
MAX_COORDINATE = 224

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture's sides, 0 ... 1


@dataclass(frozen=True)
class Phrase:
    """A stretch of a caption and where in the picture it is."""

    start: int  #: character of the caption
    end: int  #: character after the last one
    boxes: tuple[Box, ...]  #: at least one


@dataclass(frozen=True)
class GroundedCaption:
    """A caption and its phrases, which do not overlap and stand in their order."""

    text: str
    phrases: tuple[Phrase, ...]


def decode_grounded(data: bytes) -> GroundedCaption:
    """The grounded caption in a `.json` of GRIT's layout (`corpora/grit.py`). Raises `SampleError`.

    Boxes of equal stretches of the caption belong together. Where stretches overlap the longest is taken, so that a
    referring expression wins over the noun chunks in it; among equally long ones the first in the caption.
    """
    fields = decode_json(data)
    text = fields.get("caption")
    if not isinstance(text, str) or not text.strip():
        raise SampleError("missing_text", "wanted a text in field 'caption' of the .json")
    boxes: dict[tuple[int, int], list[Box]] = {}
    for name in ("ref_exps", "noun_chunks"):
        for start, end, box in _entries(fields, name, len(text)):
            if text[start:end].strip() and box not in boxes.setdefault((start, end), []):
                boxes[start, end].append(box)
    taken: list[tuple[int, int]] = []
    for start, end in sorted((span for span in boxes if boxes[span]), key=lambda span: (span[0] - span[1], span)):
        if all(end <= other_start or other_end <= start for other_start, other_end in taken):
            taken.append((start, end))
    if not taken:
        raise SampleError("no_grounded_phrase", "neither 'ref_exps' nor 'noun_chunks' of the .json has a phrase")
    return GroundedCaption(text, tuple(Phrase(*span, tuple(boxes[span])) for span in sorted(taken)))


def _entries(fields: Mapping[str, Any], name: str, length: int) -> Iterator[tuple[int, int, Box]]:
    entries = fields.get(name) or []
    if isinstance(entries, str):  # downloaders that keep tables of text write lists as text
        entries = decode_json(b'{"entries": %s}' % entries.encode("utf-8", "replace")).get("entries")
    if not isinstance(entries, list):
        raise SampleError("malformed_boxes", f"field {name!r} of the .json is a {type(entries).__name__}, no list")
    for entry in entries:
        numbers = entry[:6] if isinstance(entry, list) else []
        if len(numbers) < 6 or not all(isinstance(n, int | float) and -1e9 < n < 1e9 for n in numbers):
            raise SampleError(
                "malformed_boxes",
                f"{name} has {str(entry)[:80]}; wanted [first character, end, left, top, right, bottom, ...]",
            )
        start, end = int(numbers[0]), int(numbers[1])
        left, top, right, bottom = (min(max(float(n), 0.0), 1.0) for n in numbers[2:])
        if not 0 <= start < end <= length:
            raise SampleError("malformed_boxes", f"{name} has characters {start} to {end} of a caption of {length}")
        if any(not -0.01 <= n <= 1.01 for n in numbers[2:]) or left >= right or top >= bottom:
            raise SampleError(
                "malformed_boxes", f"{name} has the box {numbers[2:]}; wanted shares of the sides, 0 to 1"
            )
        yield start, end, (left, top, right, bottom)


def encode_grounded(caption: GroundedCaption, tokenizer: Tokenizer, phrase_first: Sequence[bool]) -> list[int]:
    """Token ids of a grounded caption; `phrase_first[i]` puts phrase i before its boxes.

    Each stretch of text is encoded on its own, without white space at its ends, so the number of ids does not depend
    on the order.
    """
    special = tokenizer.special_ids
    ids = [special[GROUNDING]]
    position = 0
    for phrase, first in zip(caption.phrases, phrase_first, strict=True):
        ids += tokenizer.encode_plain(caption.text[position : phrase.start].strip())
        words = tokenizer.encode_plain(caption.text[phrase.start : phrase.end].strip())
        named = [special[PHRASE_START], *words, special[PHRASE_END]]
        placed = [special[OBJECT_START], *_locations(phrase.boxes, tokenizer), special[OBJECT_END]]
        ids += named + placed if first else placed + named
        position = phrase.end
    return ids + tokenizer.encode_plain(caption.text[position:].strip())


def count_grounded(caption: GroundedCaption, tokenizer: Tokenizer) -> int:
    """How many ids `encode_grounded` gives."""
    return len(encode_grounded(caption, tokenizer, [True] * len(caption.phrases)))


def _locations(boxes: Sequence[Box], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for i, box in enumerate(boxes):
        if i:
            ids.append(tokenizer.special_ids[NEXT_BOX])
        ids += [tokenizer.special_ids[location_token(coordinate(share))] for share in box]
    return ids


def coordinate(share: float) -> int:
    """The location index of an edge at `share` of the picture's side; halves are rounded up."""
    return math.floor(share * MAX_COORDINATE + 0.5)
