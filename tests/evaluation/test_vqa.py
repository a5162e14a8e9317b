"""The official VQA evaluation: its published rules, and what its published code gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu2_jax.evaluation import vqa

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vqa.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("Yes", "yes"),  # "making all characters lowercase"
        ("no.", "no"),  # "removing periods except if it occurs as decimal"
        ("2.5", "2.5"),
        ("two", "2"),  # "converting number words to digits"
        ("None", "0"),
        ("the dog on a mat", "dog on mat"),  # "removing articles (a, an, the)"
        ("dont", "don't"),  # "adding apostrophe if a contraction is missing it"
        ("couldntve", "couldntve"),  # not in the list: one apostrophe may be missing, not both
        ("couldn'tve", "couldn't've"),
        ("girl's", "girl's"),  # "we do not remove apostrophe because ..."
        ("2:50 pm", "2:50 pm"),  # "... and colons because they often refer to time"
        ("100,978", "100978"),  # "in case of comma, no space is inserted if it occurs between digits"
        ("t-shirt", "t shirt"),  # "replacing all punctuation with a space character"
        ("red, white", "red white"),
        (" red\n", "red"),
    ],
)
def test_the_published_rules(answer: str, compared: str) -> None:
    assert vqa.processed(answer) == compared


def test_answers_are_processed_as_the_published_code_does() -> None:
    """420 answers, every contraction among them, as VQAEval (here of salesforce-lavis 1.0.2) gave them."""
    assert {answer: vqa.processed(answer) for answer, _ in GOLDEN["processed"]} == dict(GOLDEN["processed"])


def test_accuracies_are_those_of_the_published_procedure() -> None:
    """Every person's answer compared with those of the others, one by one, after that processing."""
    for answer, people, accuracy in GOLDEN["accuracy"]:
        assert vqa.accuracy(answer, people) == pytest.approx(accuracy, abs=1e-9), (answer, people)


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Leaving one of those who agree out, k - 1 are left; leaving another out, k: of ten (k(k - 1) + (10 - k)k) / 30.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_accuracy_by_hand(agreeing: int, accuracy: float) -> None:
    people = ["two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa.accuracy("2" if 0 < agreeing < 10 else "two", people) == pytest.approx(accuracy)


def test_answers_that_are_all_alike_are_taken_letter_for_letter() -> None:
    assert vqa.accuracy("2", ["two"] * 10) == 0
    assert vqa.matches("2", ["two"] * 10)
