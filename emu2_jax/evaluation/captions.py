"""Caption metrics of the COCO evaluation: CIDEr, BLEU-4, ROUGE-L, by `pycocoevalcap` (its parts that need no Java).

That package splits captions into words with a program in Java. Here NLTK's Treebank tokenizer does, arranged to give
the same words; docs/few-shot.md has where they differ. Both packages come with `pip install 'emu2_jax[captions]'`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from emu2_jax.errors import UserError

#: Words that are left out. Source: pycocoevalcap, `PTBTokenizer`.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
#: Brackets as the Penn Treebank spells them; in lower case they are not among those that are left out.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SENTENCE_END = re.compile(r"(?<=\w\w[.])\s+|(?<=[!?])\s+")  # not after "u.s."


class CaptionScores(NamedTuple):
    """Of all captions, and CIDEr of each."""

    cider: float  # 1.177 is what papers print as 117.7
    bleu_4: float
    rouge_l: float
    cider_of_each: list[float]


def score(captions: Sequence[str], truths: Sequence[Sequence[str]]) -> CaptionScores:
    """Captions against the true ones of each picture; words count by how rare they are among all `truths`.

    Raises `UserError` when the packages are not there.
    """
    cider_class, bleu_class, rouge_class, tokenizer = _packages()
    given = {i: [_words(tokenizer, caption)] for i, caption in enumerate(captions)}
    true = {i: [_words(tokenizer, caption) for caption in several] for i, several in enumerate(truths)}
    cider, each = cider_class().compute_score(true, given)
    bleu, _ = bleu_class(4).compute_score(true, given, verbose=0)
    rouge, _ = rouge_class().compute_score(true, given)
    return CaptionScores(float(cider), float(bleu[3]), float(rouge), [float(one) for one in each])


def check_installed() -> None:
    """Raises `UserError` when captions could not be scored: better before they are written than after."""
    _packages()


def _packages() -> tuple[Any, Any, Any, Any]:
    try:
        from nltk.tokenize import TreebankWordTokenizer
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError(f"captions: to score them, pip install 'emu2_jax[captions]' ({error})") from error
    return Cider, Bleu, Rouge, TreebankWordTokenizer()


def _words(tokenizer: Any, caption: str) -> str:
    sentences = _SENTENCE_END.split(caption.lower().strip())
    words = (word for sentence in sentences for word in tokenizer.tokenize(sentence))
    return " ".join(_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION)
