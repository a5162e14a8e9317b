"""English for the OpenMoji corpus: noun phrases, and passages of prose.

The prose is `pydoc_data.topics`, the language reference that ships with Python. It differs between Python versions, so
`corpus.json` records the version.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
from collections.abc import Sequence

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_IRREGULAR_PLURALS = {
    "mouse": "mice",
    "ox": "oxen",
    "goose": "geese",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "scarf": "scarves",
    "sheaf": "sheaves",
    "die": "dice",
    "snowman": "snowmen",
    **{word: word for word in ("fish", "blowfish", "jellyfish", "deer", "moose", "bison", "squid", "shrimp")},
    **{word: f"{word}es" for word in ("tomato", "potato", "mango", "mosquito", "volcano", "tornado", "buffalo")},
}
_VOWEL_LETTER_CONSONANT_SOUND = re.compile(r"(uni|ewe|eu|one\b|u\b)", re.IGNORECASE)
_HEAD_END = re.compile(r" (?:of|with|without|in|on|behind) ")


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an": "an owl", "a unicorn", "a large owl"."""
    vowel = phrase[0].lower() in "aeiou" and not _VOWEL_LETTER_CONSONANT_SOUND.match(phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(noun: str) -> str:
    """Plural of a noun phrase: "red apples", "mice", "ears of corn", "computer mice"."""
    if head_end := _HEAD_END.search(noun):
        return plural(noun[: head_end.start()]) + noun[head_end.start() :]
    start, _, word = noun.rpartition(" ")
    return f"{start} {_plural_word(word)}".lstrip()


def _plural_word(word: str) -> str:
    if word in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[word]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def counted(count: int, phrase: str) -> str:
    """A noun phrase with its number: counted(1, "large owl") = "a large owl", counted(3, ...) = "three large owls"."""
    return with_article(phrase) if count == 1 else f"{NUMBER_WORDS[count]} {plural(phrase)}"


def joined(phrases: Sequence[str]) -> str:
    """Phrases as an English list: "x", "x and y", "x, y and z"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


@functools.lru_cache(maxsize=4)
def prose_passages(max_chars: int) -> tuple[str, ...]:
    """Passages of at most `max_chars` characters (but whole sentences), each from one topic of the reference.

    Grammar, code, tables and headings are left out, and a paragraph that several topics share appears once.
    """
    seen: set[str] = set()
    passages = []
    for topic in sorted(pydoc_data.topics.topics):
        blocks = [
            block
            for paragraph in prose_paragraphs(pydoc_data.topics.topics[topic])
            if paragraph not in seen and not seen.add(paragraph)  # type: ignore[func-returns-value]
            for block in _fill(re.split(r"(?<=[.:;!?]) (?=[A-Z])", paragraph), " ", max_chars)
        ]
        passages += _fill(blocks, "\n\n", max_chars)
    return tuple(passages)


def prose_paragraphs(reference: str) -> list[str]:
    """The paragraphs of a plain-text reference page that read as prose, each on one line."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", reference):
        if block.startswith(("   ", "\n   ")):  # code, grammar, or a note inside a list
            continue
        if re.match(r"\n?[^*\[\n].*\n   ", block):  # a term, then its explanation
            block = block.strip("\n").partition("\n")[2]
        text = " ".join(re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", block).split())
        text = re.sub(r"^(\* |\[\d+\] )", "", text)
        prose_share = sum(c.isalpha() or c == " " for c in text) / max(len(text), 1)
        if prose_share > 0.85 and len(text) > 60 and not text[0].islower() and text.endswith((".", ":")):
            paragraphs.append(text)
    return paragraphs


def _fill(pieces: Sequence[str], separator: str, max_chars: int) -> list[str]:
    """Neighbouring pieces joined to stretches of at most `max_chars`, or to one piece where that is longer."""
    stretches: list[str] = []
    for piece in pieces:
        if stretches and len(stretches[-1]) + len(separator) + len(piece) <= max_chars:
            stretches[-1] += separator + piece
        else:
            stretches.append(piece)
    return stretches
