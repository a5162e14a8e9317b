"""Caption metrics, where their packages are installed: the words, and scores worked out by hand."""

from __future__ import annotations

import math

import pytest

from emu2_jax.evaluation import captions
from emu2_jax.evaluation.captions import score

pytest.importorskip("pycocoevalcap", reason="pip install 'emu2_jax[captions]'")
pytest.importorskip("nltk", reason="pip install 'emu2_jax[captions]'")


@pytest.mark.parametrize(
    ("caption", "words"),
    # As the Java program of pycocoevalcap splits them.
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("People (a man and a woman) can't ride 3 bikes!", "people -lrb- a man and a woman -rrb- ca n't ride 3 bikes"),
        ("It's 2:50 pm; the U.S. flag flies.", "it 's 2:50 pm the u.s. flag flies"),
        ("A black-and-white cat, sitting...", "a black-and-white cat sitting"),
        ("A $1.20 hot-dog & fries", "a $ 1.20 hot-dog & fries"),
        ("A cat sits. It sleeps.", "a cat sits it sleeps"),
        ("cannot", "can not"),
    ],
)  # fmt: skip
def test_words(caption: str, words: str) -> None:
    *_, tokenizer = captions._packages()
    assert captions._words(tokenizer, caption) == words


def test_scores_by_hand() -> None:
    """Three pictures with one true caption each; every word and every pair of words is of one caption alone."""
    truths = [["red dog runs fast"], ["blue cats sleep long"], ["green birds fly high"]]
    same = score([several[0] for several in truths], truths)
    assert same.cider == pytest.approx(10) and same.cider_of_each == pytest.approx([10, 10, 10])
    assert (same.bleu_4, same.rouge_l) == pytest.approx((1, 1))

    # Half of the words: of lengths 1 to 4, cosines of 2 of 4, 1 of 3, 0 of 2 and 0 of 1 n-grams in common, with norms
    # of all; all n-grams are equally rare. Lengths are equal, so nothing is taken off.
    half = score(["red dog swims slowly", *(several[0] for several in truths[1:])], truths)
    rare, unknown = math.log(3), math.log(3)  # an n-gram that no caption has counts as one that one has
    assert rare == unknown
    assert half.cider_of_each[0] == pytest.approx(10 * (2 / 4 + 1 / 3) / 4)
    assert half.cider == pytest.approx((20 + half.cider_of_each[0]) / 3)
