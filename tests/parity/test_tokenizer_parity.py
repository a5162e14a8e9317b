"""The tokenizer against the released one, on thousands of texts that mix words, white space and special tokens."""

from __future__ import annotations

import json
import random

import pytest
import tokenizer_reference as reference

from emu2_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

FRAGMENTS = (
    *("<s>", "</s>", "<unk>", " ", "  ", "\n", "\t", "\u00a0", "a", "cat", " the cat", "Hello, world!", "0", "12"),
    *("[", "]", "<", ">", "</", "/>", "[IMG", "IMG]", "[[IMG]]", "<image", "\u2581", "\u2581\u2581x", "<0x0A>"),
    *("\u65e5\u672c", "\u00e9", "\U0001f600", "\u0000x", "[/VIDEO]", "[USER]: ", "[ASSISTANT]:"),
    *("<patch_index_9999>", "<p>"),
)


@pytest.fixture(scope="module")
def model() -> str:
    path = reference.tokenizer_file()
    if path is None:
        pytest.skip("EMU2_LLAMA_TOKENIZER does not name LLaMA's tokenizer.model")
    if not reference.PYTHON.exists():
        pytest.skip(f"{reference.PYTHON} is not there: `make test-parity PYTHON=python3.11` installs it")
    return path


@pytest.mark.parametrize("vocabulary", SPECIAL_TOKENS)
def test_ids_and_texts_are_those_of_the_release(vocabulary: str, model: str) -> None:
    names = SPECIAL_TOKENS[vocabulary]
    tokenizer, rng = Tokenizer(model, names), random.Random(0)
    fragments = [*FRAGMENTS, *names[:16], *names[-3:]]
    texts = ["".join(rng.choices(fragments, k=rng.randint(0, 9))) for _ in range(4000)]
    common = tokenizer.encode("The cat sat on the mat")
    ids = [
        [rng.choice([rng.randrange(tokenizer.vocab_size), rng.randrange(259), *common]) for _ in range(length)]
        for length in rng.choices(range(11), k=4000)
    ]
    answers = reference.ask(model, names, texts, ids)
    assert answers["size"] == tokenizer.vocab_size
    for text, expected in zip(texts, answers["encoded"], strict=True):
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == expected, repr(text)
    for row, expected in zip(ids, answers["decoded"], strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == expected, row


def test_the_golden_file_is_what_the_release_gives(model: str) -> None:
    assert json.loads(reference.GOLDEN.read_text()) == reference.golden(model)
