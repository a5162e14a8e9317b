"""Where each kind of sample has its text, and what is no text."""

from __future__ import annotations

import pytest

from data_pipelines import kinds
from data_pipelines.kinds import SampleError, check_text_size, decode_caption, part_slot


@pytest.mark.parametrize(
    ("kind", "suffix", "caption", "slot"),
    [
        ("video_text", "mp4", "txt", (0, True)),
        ("video_text", "webm", "txt", (0, True)),
        ("video_text", "txt", "txt", (0, False)),
        ("video_text", "jpg", "txt", None),
        ("image_text", "mp4", "txt", None),
        ("grounded", "jpg", "txt", (0, True)),
        ("grounded", "json", "txt", (0, False)),
        ("grounded", "txt", "txt", None),
        ("image_text", "json", "json.caption", (0, False)),
        ("image_text", "txt", "json.caption", None),
        ("image_text", "alt.txt", "alt.txt", (0, False)),
        ("image_text", "caption", "Caption", (0, False)),
        ("image_text", "txt", "alt.txt", None),
    ],
)
def test_parts_of_each_kind(kind: str, suffix: str, caption: str, slot: tuple[int, bool] | None) -> None:
    assert part_slot(kind, suffix, caption) == slot  # type: ignore[arg-type]


def test_captions_from_fields_of_the_json() -> None:
    data = b'{"caption": " a cat ", "meta": {"title": "b"}, "a.b": "c"}'
    assert decode_caption(data, "json.caption") == "a cat"
    assert decode_caption(data, "json.meta.title") == "b"
    assert decode_caption(data, "json.a.b") == "c"
    assert decode_caption(b" text {} ", "txt") == "text {}"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b'{"other": "a"}', "missing_text"),
        (b'{"caption": null}', "missing_text"),
        (b'{"caption": ["a"]}', "missing_text"),
        (b'{"caption": " "}', "empty_text"),
        (b'{"caption": "\\ud800"}', "invalid_utf8"),
        (b'"caption"', "invalid_json"),
        (b"{" * 100_000, "invalid_json"),
        (b'{"caption": "\xff"}', "invalid_utf8"),
    ],
)
def test_missing_captions_have_a_cause(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_caption(data, "json.caption")
    assert caught.value.cause == cause


def test_enormous_texts_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MAX_TEXT_BYTES", 10)
    check_text_size(10)
    with pytest.raises(SampleError, match="text_too_large: 11 bytes; at most 10"):
        check_text_size(11)
