"""The kinds of samples: which members a sample has, and how the text in them is found.

A part of a sample is either its text or something seen (a picture or a video). Text is a member of its own, or a
field of the sample's `.json`; a grounded sample's text is the whole `.json` (see `grounding.py`).
"""

from __future__ import annotations

import json
from typing import Any

from emu2_jax.config import SampleKind as Kind
from emu2_jax.errors import DataError

IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp"})
VIDEO_SUFFIXES = frozenset({"mp4", "webm", "mkv", "mov", "avi"})
TEXT_SUFFIX = "txt"
JSON_SUFFIX = "json"

#: Kinds whose samples are one text and one thing seen.
PAIR_KINDS = frozenset({"image_text", "video_text", "grounded"})

#: Bytes; a longer text part is no text that belongs into one document, and would stall the tokenizer.
MAX_TEXT_BYTES = 16 << 20


class SampleError(DataError):
    """One sample cannot be used; `cause` is the word it is counted under."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail


def part_slot(kind: Kind, suffix: str, caption: str = TEXT_SUFFIX) -> tuple[int, bool] | None:
    """Place of a part within its sample, and whether it is seen; None for members this kind does not read.

    Interleaved "3.txt" and "3.jpg" are the text and the image of slot 3; the other kinds have slot 0 only. `caption`
    says where the text of an image-text or video-text pair is (`SourceConfig.caption`).
    """
    if kind == "text":
        return (0, False) if suffix == TEXT_SUFFIX else None
    number, _, extension = suffix.rpartition(".")
    if kind == "interleaved":
        if extension != TEXT_SUFFIX and extension not in IMAGE_SUFFIXES:
            return None
        numbered = number.isdecimal() and number.isascii() and len(number) < 10
        return (int(number), extension != TEXT_SUFFIX) if numbered else None
    if number in ("", "0") and extension in (VIDEO_SUFFIXES if kind == "video_text" else IMAGE_SUFFIXES):
        return 0, True
    wanted = JSON_SUFFIX if kind == "grounded" else _text_member(caption)
    return (0, False) if suffix in (wanted, f"0.{wanted}") else None


def _text_member(caption: str) -> str:
    return JSON_SUFFIX if caption.startswith(f"{JSON_SUFFIX}.") else caption.lower()


def check_text_size(size: int) -> None:
    """Raises `SampleError` for a text part of `size` bytes that is too long to be read."""
    if size > MAX_TEXT_BYTES:
        raise SampleError("text_too_large", f"{size} bytes; at most {MAX_TEXT_BYTES}")


def decode_text(data: bytes) -> str:
    """The text of a text part. Raises `SampleError` when it is not UTF-8, holds a NUL or nothing but white space.

    White space at both ends goes: every stretch of text stands between special tokens (see `emu2_jax.tokenizer`).
    """
    return _stripped(_utf8(data))


def decode_caption(data: bytes, caption: str = TEXT_SUFFIX) -> str:
    """The text of a text part, or the field of a `.json` that `caption` ("json.FIELD") names. Raises `SampleError`.

    "json.meta.title" is the field `title` of the object `meta`, unless there is a field called "meta.title".
    """
    if not caption.startswith(f"{JSON_SUFFIX}."):
        return decode_text(data)
    path = caption.removeprefix(f"{JSON_SUFFIX}.")
    value = _field(decode_json(data), path)
    if not isinstance(value, str):
        found = "there is none" if value is None else f"it is a {type(value).__name__}"
        raise SampleError("missing_text", f"wanted a text in field {path!r} of the .json; {found}")
    return _stripped(value)


def decode_json(data: bytes) -> dict[str, Any]:
    """The object in a `.json` part. Raises `SampleError` when there is none."""
    try:
        value = json.loads(_utf8(data))
    except (ValueError, RecursionError) as error:
        raise SampleError("invalid_json", str(error)) from error
    if not isinstance(value, dict):
        raise SampleError("invalid_json", f"wanted an object, got a {type(value).__name__}")
    return value


def _field(value: dict[str, Any], path: str) -> Any:
    if path in value:
        return value[path]
    name, dot, rest = path.partition(".")
    inner = value.get(name) if dot else None
    return _field(inner, rest) if isinstance(inner, dict) else None


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("invalid_utf8", f"{error.reason} at byte {error.start} of the text") from error


def _stripped(text: str) -> str:
    text = text.strip()
    if "\0" in text:
        raise SampleError("nul_in_text", f"NUL at character {text.index(chr(0))}: binary data, not a text")
    if not text:
        raise SampleError("empty_text", "the text part holds no text")
    try:
        text.encode("utf-8")  # JSON may hold halves of surrogate pairs
    except UnicodeEncodeError as error:
        raise SampleError("invalid_utf8", f"{error.reason} at character {error.start} of the text") from error
    return text
