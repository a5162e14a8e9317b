"""Special tokens and the legacy splitting, with a SentencePiece model trained on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from emu2_jax import tokenizer as tokenizer_lib
from emu2_jax.errors import DataError
from emu2_jax.tokenizer import CHAT_SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    return Tokenizer(sentencepiece_model)


@pytest.fixture(scope="module")
def pieces(sentencepiece_model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))


def test_special_tokens_follow_the_pieces_in_the_release_order(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    """After LLaMA's 32000 pieces these offsets are the release's ids 32000, 32001, ..."""
    offsets = {token: i - pieces.get_piece_size() for token, i in tokenizer.special_ids.items()}
    expected = {
        "[PAD]": 0,
        "[IMG]": 1,
        "[/IMG]": 2,
        "<image>": 3,
        "[gIMG]": 4,
        "[/gIMG]": 5,
        "[EOC]": 6,
        "[VIDEO]": 7,
        "<grounding>": 8,
        "<phrase>": 9,
        "</phrase>": 10,
        "<object>": 11,
        "</object>": 12,
        "</delimiter_of_multi_objects/>": 13,
        "<REC>": 14,
        "<patch_index_0000>": 15,
        "<patch_index_0256>": 271,
    }
    assert {token: offsets[token] for token in expected} == expected
    assert sorted(offsets.values()) == list(range(272))
    assert tokenizer.vocab_size == pieces.get_piece_size() + 272
    named = (tokenizer.pad_id, tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.image_id)
    assert named == tuple(pieces.get_piece_size() + offset for offset in range(4))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_chat_adds_two(sentencepiece_model: Path, tokenizer: Tokenizer) -> None:
    chat = Tokenizer(sentencepiece_model, CHAT_SPECIAL_TOKENS)
    assert chat.vocab_size == tokenizer.vocab_size + 2
    assert chat.special_ids["[USER]"] == tokenizer.vocab_size
    assert chat.special_ids["[ASSISTANT]"] == tokenizer.vocab_size + 1


def test_plain_text_is_what_sentencepiece_makes_of_it(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    """No <s>, no </s>."""
    assert tokenizer.encode("a red apple") == pieces.encode("a red apple")
    assert tokenizer.encode("") == []


@pytest.mark.parametrize(
    ("text", "stretches"),
    [
        ("a red apple[IMG]the sun", ["a red apple", "[IMG]", "the sun"]),
        ("a red apple [IMG] the sun", ["a red apple", "[IMG]", "the sun"]),
        ("[IMG] the sun \n", ["[IMG]", "the sun \n"]),
        ("  a red apple \t[IMG]", ["  a red apple", "[IMG]"]),
        ("[IMG] [/IMG]", ["[IMG]", "[/IMG]"]),
        ("[IMG]<image><image>[/IMG] a cat", ["[IMG]", "<image>", "<image>", "[/IMG]", "a cat"]),
        ("a <patch_index_0012><patch_index_0224> cat", ["a", "<patch_index_0012>", "<patch_index_0224>", "cat"]),
        ("[IMGx] [img]", ["[IMGx] [img]"]),
    ],
)
def test_white_space_next_to_a_special_token_is_dropped_and_stretches_are_encoded_alone(
    text: str, stretches: list[str], tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    expected: list[int] = []
    for stretch in stretches:
        special = tokenizer.special_ids.get(stretch)
        expected += pieces.encode(stretch) if special is None else [special]
    assert tokenizer.encode(text) == expected


def test_text_after_a_special_token_begins_a_word(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    """The legacy mode: "[IMG]cat" holds the piece "_cat" or "_c", never a piece from the middle of a word."""
    after = tokenizer.encode("[IMG]cat")[1]
    assert pieces.id_to_piece(after).startswith("\u2581")
    assert tokenizer.encode("[IMG]cat") == tokenizer.encode("[IMG]   cat")


def test_a_kept_space_would_be_seen(tokenizer: Tokenizer) -> None:
    """The model keeps white space, as LLaMA's does, so that the tests above can fail."""
    assert tokenizer.encode("the  sun") != tokenizer.encode("the sun")
    assert tokenizer.encode(" the sun") != tokenizer.encode("the sun")


def test_counts_are_lengths(tokenizer: Tokenizer) -> None:
    texts = ["", "a red apple", "[IMG] cat"]
    assert tokenizer.count_plain(texts) == [len(tokenizer.encode_plain(text)) for text in texts]


def test_plain_text_cannot_open_an_image(tokenizer: Tokenizer) -> None:
    assert tokenizer.image_start_id in tokenizer.encode("a caption with [IMG] in it")
    assert not set(tokenizer.encode_plain("a caption with [IMG] in it")) & set(tokenizer.special_ids.values())


def test_unknown_words_in_brackets_are_text(tokenizer: Tokenizer) -> None:
    for text in ("[b]", "<b>", "</b>", "[a[IMG"):
        assert tokenizer.encode(text) == tokenizer.encode_plain(text)


def test_decoding_gives_the_text_back_and_names_or_skips_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("a red apple [IMG] the sun"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<s> a red apple [IMG] the sun </s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red apple the sun"
    assert tokenizer.decode([]) == ""


def test_the_fingerprint_changes_with_the_model_and_with_the_special_tokens(
    sentencepiece_model: Path, tokenizer: Tokenizer
) -> None:
    assert Tokenizer(sentencepiece_model).fingerprint == tokenizer.fingerprint
    assert Tokenizer(sentencepiece_model, CHAT_SPECIAL_TOKENS).fingerprint != tokenizer.fingerprint


def test_a_missing_or_foreign_model_file_is_one_clear_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing.model"
    with pytest.raises(DataError, match=rf"^{missing}: cannot read the SentencePiece model: No such file"):
        Tokenizer(missing)
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"not a model")
    with pytest.raises(DataError, match=rf"^{foreign}: is not a SentencePiece model$"):
        Tokenizer(foreign)
    empty = tmp_path / "empty.model"
    empty.touch()
    with pytest.raises(DataError, match=rf"^{empty}: is not a SentencePiece model$"):
        Tokenizer(empty)


def test_the_released_vocabulary_has_272_special_tokens() -> None:
    assert len(tokenizer_lib.BASE_SPECIAL_TOKENS) == 272
    assert len(set(CHAT_SPECIAL_TOKENS)) == len(CHAT_SPECIAL_TOKENS) == 274
