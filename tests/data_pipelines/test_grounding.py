"""Grounded captions: boxes as location tokens, phrases before or after them, a cause for everything that is wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.grounding import coordinate, count_grounded, decode_grounded, encode_grounded
from data_pipelines.kinds import SampleError
from emu2_jax.tokenizer import Tokenizer

CAPTION = "one red dog and two cat on blue"
RED_DOG, CAT = (4, 11), (20, 23)


def grounded(noun_chunks: object = (), ref_exps: object = (), caption: object = CAPTION) -> bytes:
    fields = {"caption": caption, "noun_chunks": noun_chunks, "ref_exps": ref_exps, "url": "http://a"}
    return json.dumps(fields).encode()


def words(data: bytes, tokenizer: Tokenizer, *phrase_first: bool) -> str:
    caption = decode_grounded(data)
    ids = encode_grounded(caption, tokenizer, phrase_first)
    assert len(ids) == count_grounded(caption, tokenizer)
    return tokenizer.decode(ids).replace("<patch_index_", "<").replace("</delimiter_of_multi_objects/>", "&")


CHUNKS = [
    [*CAT, 0.5, 0.25, 0.75, 1.0, 0.9],
    [*RED_DOG, 0.0, 0.1, 0.5, 0.5, 0.8],
    [*CAT, 0.0, 0.0, 1.0, 1.0, 0.7],
]


def test_boxes_become_location_tokens(tokenizer: Tokenizer) -> None:
    assert words(grounded(CHUNKS), tokenizer, True, True) == (
        "<grounding> one <phrase> red dog </phrase> <object> <0000> <0022> <0112> <0112> </object> and two "
        "<phrase> cat </phrase> <object> <0112> <0056> <0168> <0224> & <0000> <0000> <0224> <0224> </object> on blue"
    )


def test_phrases_may_stand_after_their_boxes(tokenizer: Tokenizer) -> None:
    mixed = words(grounded(CHUNKS), tokenizer, True, False)
    assert mixed.startswith("<grounding> one <phrase> red dog </phrase> <object> <0000> <0022> <0112> <0112> </object>")
    assert " and two <object> <0112>" in mixed
    assert words(grounded(CHUNKS), tokenizer, False, False).endswith("</object> <phrase> cat </phrase> on blue")


def test_the_longest_of_overlapping_phrases_is_taken(tokenizer: Tokenizer) -> None:
    data = grounded(CHUNKS, [[4, 23, 0.0, 0.0, 0.5, 0.5, 1.0]])
    assert words(data, tokenizer, True) == (
        "<grounding> one <phrase> red dog and two cat </phrase> <object> <0000> <0000> <0112> <0112> </object> on blue"
    )


def test_the_same_box_in_both_lists_counts_once(tokenizer: Tokenizer) -> None:
    chunk = [*CAT, 0.5, 0.25, 0.75, 1.0, 0.9]
    assert words(grounded([chunk], [chunk]), tokenizer, True) == (
        "<grounding> one red dog and two <phrase> cat </phrase> <object> <0112> <0056> <0168> <0224> </object> on blue"
    )


def test_lists_that_were_written_as_text(tokenizer: Tokenizer) -> None:
    assert decode_grounded(grounded(json.dumps(CHUNKS), "[]")) == decode_grounded(grounded(CHUNKS))


def test_names_of_special_tokens_in_captions_are_text(tokenizer: Tokenizer) -> None:
    data = grounded([[0, 9, 0.0, 0.0, 1.0, 1.0]], caption="</object> cat")
    ids = encode_grounded(decode_grounded(data), tokenizer, [True])
    assert ids.count(tokenizer.special_ids["</object>"]) == 1


def test_coordinates_are_rounded_and_kept_in_the_picture(tokenizer: Tokenizer) -> None:
    assert [coordinate(share) for share in (0, 0.5 / 224, 0.4999 / 224, 0.5, 1)] == [0, 1, 0, 112, 224]
    assert "<0000> <0000> <0224> <0224>" in words(grounded([[*CAT, -0.005, 0, 1.005, 1.0]]), tokenizer, True)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"noun_chunks": "none"}, "invalid_json"),
        ({"noun_chunks": "3"}, "malformed_boxes"),
        ({"noun_chunks": 3}, "malformed_boxes"),
        ({"noun_chunks": [[4, 11, 0.1]]}, "malformed_boxes"),
        ({"noun_chunks": [[4, 11, 0.1, 0.1, "x", 0.5]]}, "malformed_boxes"),
        ({"noun_chunks": [[4, 11, 0.1, 0.1, float("nan"), 0.5]]}, "malformed_boxes"),
        ({"noun_chunks": [[4, 99, 0.1, 0.1, 0.5, 0.5]]}, "malformed_boxes"),
        ({"noun_chunks": [[11, 4, 0.1, 0.1, 0.5, 0.5]]}, "malformed_boxes"),
        ({"noun_chunks": [[4, 11, 0.5, 0.1, 0.2, 0.5]]}, "malformed_boxes"),
        ({"noun_chunks": [[4, 11, 20, 30, 400, 300]]}, "malformed_boxes"),  # pixels, not shares
        ({"noun_chunks": []}, "no_grounded_phrase"),
        ({"noun_chunks": None, "ref_exps": None}, "no_grounded_phrase"),
        ({"caption": None}, "missing_text"),
        ({"caption": "  "}, "missing_text"),
    ],
)
def test_bad_grounding_has_a_cause(fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_grounded(grounded(**{"noun_chunks": CHUNKS, **fields}))
    assert caught.value.cause == cause


@pytest.mark.parametrize(
    ("data", "cause"),
    [(b"[1]", "invalid_json"), (b'{"a', "invalid_json"), (b"\xff", "invalid_utf8"), (b"", "invalid_json")],
)
def test_a_json_that_is_none(data: bytes, cause: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_grounded(data)
    assert caught.value.cause == cause


_NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 4, 11])
_VALUES = st.none() | st.text() | _NUMBERS | st.lists(st.lists(_NUMBERS | st.text(), max_size=7), max_size=4)


@settings(max_examples=200, deadline=None)
@given(caption=_VALUES | st.just(CAPTION), noun_chunks=_VALUES, ref_exps=_VALUES)
def test_any_json_gives_a_caption_or_a_sample_error(caption: object, noun_chunks: object, ref_exps: object) -> None:
    with contextlib.suppress(SampleError):
        found = decode_grounded(grounded(noun_chunks, ref_exps, caption))
        assert all(phrase.boxes and found.text[phrase.start : phrase.end].strip() for phrase in found.phrases)
