"""Special tokens and the legacy splitting, with a SentencePiece model trained on the spot."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import sentencepiece

from emu2_jax import tokenizer as tokenizer_lib
from emu2_jax.errors import DataError, UserError
from emu2_jax.tokenizer import CHAT_SPECIAL_TOKENS, SPECIAL_TOKENS, Picture, Prompt, Tokenizer, Video

GOLDEN = Path(__file__).parent / "golden" / "tokenizer.json"


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


def test_the_models_own_control_tokens_are_recognised(tokenizer: Tokenizer) -> None:
    """White space goes on both sides of <s> and </s>, and stays next to <unk>, as in the release."""
    cat, sun = tokenizer.encode("a cat"), tokenizer.encode("the sun")
    assert tokenizer.encode("a cat</s>the sun") == [*cat, tokenizer.eos_id, *sun]
    assert tokenizer.encode("<s> a cat </s> the sun") == [tokenizer.bos_id, *cat, tokenizer.eos_id, *sun]
    assert tokenizer.encode("a cat<unk>the sun") == [*cat, 0, *sun]
    assert tokenizer.encode("a cat <unk> the sun") == [*tokenizer.encode("a cat "), 0, *tokenizer.encode(" the sun")]


def test_what_lies_around_a_skipped_token_is_decoded_together(tokenizer: Tokenizer) -> None:
    """A piece from the middle of a word goes on where the text stopped, whatever stood in between."""
    word, middle = tokenizer.encode("cat"), tokenizer.encode("cats")[-1]
    ids = [*word, tokenizer.image_start_id, middle]
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode([*word, middle])


PROMPTS: tuple[tuple[Prompt, str], ...] = (
    ([], ""),
    (["a cat"], "a cat"),
    ([Picture(2)], "[IMG]<image><image>[/IMG]"),
    (["a cat", Picture(3), "the sun"], "a cat[IMG]<image><image><image>[/IMG]the sun"),
    ([Picture(1), Picture(1), "two cats"], "[IMG]<image>[/IMG][IMG]<image>[/IMG]two cats"),
    ([Video(2, 2), "the sun"], "[VIDEO][IMG][gIMG][gIMG][/IMG][IMG][gIMG][gIMG][/IMG]the sun"),
    ([Video(1, 1), Picture(1)], "[VIDEO][IMG][gIMG][/IMG][IMG]<image>[/IMG]"),
    (
        ["[USER] a cat", Picture(1), "[ASSISTANT] the sun </s>"],
        "[USER] a cat[IMG]<image>[/IMG][ASSISTANT] the sun </s>",
    ),
)


@pytest.mark.parametrize(("prompt", "text"), PROMPTS)
def test_prompts_become_ids_and_come_back(prompt: Prompt, text: str, sentencepiece_model: Path) -> None:
    """The ids are those of the prompt as the release writes it, after <s>."""
    tokenizer = Tokenizer(sentencepiece_model, CHAT_SPECIAL_TOKENS)
    ids = tokenizer.encode_prompt(prompt)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert tokenizer.decode_prompt(ids) == list(prompt)


def test_neighbouring_texts_are_one_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_prompt(["a red ", "apple"]) == tokenizer.encode_prompt(["a red apple"])


@pytest.mark.parametrize("text", ["a <image> cat", "[gIMG]"])
def test_a_placeholder_in_a_text_is_refused(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"^prompt: the text holds \S+, which stands for an image; give the image itself$"
    ):
        tokenizer.encode_prompt([Picture(1), text])


@pytest.mark.parametrize(
    "text", ["a cat [IMG] <image>", "[IMG] <image> [gIMG] [/IMG]", "[VIDEO] a cat", "[IMG] [/IMG]"]
)
def test_what_is_not_a_whole_image_is_shown_as_text(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_prompt(tokenizer.encode(text)) == [text]


def test_frames_of_two_sizes_are_not_one_video(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(Video(2, 2).text + "[IMG][gIMG][/IMG]")
    assert tokenizer.decode_prompt(ids) == [Video(2, 2), "[IMG] [gIMG] [/IMG]"]


@pytest.fixture(scope="module")
def llama_file() -> Path:
    path = os.environ.get("EMU2_LLAMA_TOKENIZER")
    if path is None:
        pytest.skip("EMU2_LLAMA_TOKENIZER does not name LLaMA's tokenizer.model")
    return Path(path)


@pytest.mark.parametrize("vocabulary", SPECIAL_TOKENS)
def test_ids_with_llamas_own_file_are_those_of_the_released_tokenizer(vocabulary: str, llama_file: Path) -> None:
    """The golden ids come from `transformers` 4.31, which the release used; `make test-parity` asks it again."""
    golden = json.loads(GOLDEN.read_text())
    assert hashlib.sha256(llama_file.read_bytes()).hexdigest() == golden["sha256"], "not LLaMA's first tokenizer.model"
    tokenizer = Tokenizer(llama_file, SPECIAL_TOKENS[vocabulary])
    expected = golden[vocabulary]
    assert tokenizer.vocab_size == expected["vocab_size"] == {"base": 32272, "chat": 32274}[vocabulary]
    for text, ids, decoded in zip(golden["texts"], expected["ids"], expected["decoded"], strict=True):
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == ids, repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == decoded, repr(text)
