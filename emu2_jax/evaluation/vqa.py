"""VQA accuracy, and what the official evaluation does to answers before it compares them.

Source: visualqa.org/evaluation.html, and the evaluation code that is published there, whose peculiarities are kept
(they are marked): scores must be those of everybody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

#: Fewer answers cannot give an accuracy of 1: three of the others have to agree.
MIN_ANSWERS = 4

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # without apostrophe ("girl's"), colon ("2:50 pm") and period
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
#: Peculiar: meant to look for a digit before the period as well, it looks at what follows alone.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # peculiar: a flag is passed as the number of replacements

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS: Mapping[str, str] = {
    "none": "0",
    **{word: str(n) for n, word in enumerate(("zero", "one", "two", "three", "four", "five"))},
    **{word: str(n) for n, word in enumerate(("six", "seven", "eight", "nine", "ten"), start=6)},
}

#: Contractions that lose their apostrophe in what people type: it is put back.
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't "
    "y'all you'd you'll you're you've"
)
#: Of these, one of the two may be missing.
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in (*_TWO_APOSTROPHES.split(), "y'all'd've"):
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
    table["y'alld've"] = "y'all'd've"
    # Peculiar: the first loses its apostrophe; the last three are one word, of which the first form lacks the first.
    return table | {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}


_CONTRACTIONS = _contractions()


def processed(answer: str) -> str:
    """An answer as it is compared: lower case, without punctuation and articles, numbers as digits, don't for dont."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    # Peculiar: a comma within a number anywhere, or white space beside a mark, makes a mark vanish altogether.
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        vanishes = has_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if vanishes else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy: min(1, how many others gave that answer / 3), averaged over leaving each person's answer out.

    Peculiar: where all people gave the very same answer, nothing is processed.
    """
    given = answer.replace("\n", " ").replace("\t", " ").strip()
    people = [truth.replace("\n", " ").replace("\t", " ").strip() for truth in truths]
    if len(set(people)) > 1:
        given, people = processed(given), [processed(one) for one in people]
    same = sum(one == given for one in people)
    scores = [min(1.0, (same - (one == given)) / 3) for one in people]
    return sum(scores) / len(scores)


def matches(answer: str, truths: Sequence[str]) -> bool:
    """Whether a processed answer is one of the processed true ones."""
    return processed(answer) in {processed(one) for one in truths}
