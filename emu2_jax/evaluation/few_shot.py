"""Few-shot evaluation: prompts of examples and a query, and the scores of what comes after them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from emu2_jax.evaluation import boxes, captions, vqa
from emu2_jax.evaluation.few_shot_tasks import YES_NO, Question, Task
from emu2_jax.generation import template

#: A box is right when it overlaps the true one by this much (intersection over union).
RIGHT_OVERLAP = 0.5

_IMAGE = "\0"  # stands for the image while a prompt's fields are filled in; no text holds it


class Shown(NamedTuple):
    """An image in a prompt: a query's or an example's, and its number among those."""

    of_support: bool
    image: int


Link = str | Shown


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question, asked after some examples, and what came: a line of answers.jsonl."""

    shots: int
    number: int  #: of the query
    query: str  #: its key
    examples: Sequence[str]  #: their keys, in the order of the prompt
    prompt: Sequence[str | Mapping[str, str]]  #: texts and {"image": PLACE}
    truth: Any
    written: str  #: all that the model wrote
    answer: str  #: of that, the answer
    yes: float | None = None  #: probability of "yes" against "no"
    score: float | None = None  #: of this one alone
    right: bool | None = None  #: what the page filters by


def prompt_of(task: Task, examples: Sequence[Question], query: Question, separator: str) -> list[Link]:
    """Examples, each with its answer, and the query, joined by `separator`; texts and images in their order."""
    text = task.prompt if examples else task.zero_shot_prompt
    images = [*(Shown(True, one.image) for one in examples), Shown(False, query.image)]
    pieces = [f"{_filled(text, one)} {one.shown}" for one in examples]
    texts = separator.join([*pieces, _filled(text, query)]).split(_IMAGE)
    links: list[Link] = [texts[0]]
    for image, after in zip(images, texts[1:], strict=True):
        links += [image, after]
    return [link for link in links if link != ""]


def _filled(text: str, question: Question) -> str:
    return template.fill(text, {**question.values, "image": _IMAGE}, question.key)


def answer_in(written: str, separator: str) -> str:
    """The answer in what a model wrote: up to where the next example would begin."""
    answer = written.partition(separator)[0].strip()
    return answer.removesuffix(separator.strip()).strip()


def summarise(task: Task, answered: Sequence[Answered]) -> tuple[list[Answered], dict[str, float]]:
    """The answers to all queries after one number of examples, with the score of each, and the scores of all.

    The first of the scores is the benchmark's own. `standard_error` is that of a mean.
    """
    each, right, summary = _SCORERS[task.score](answered)
    scored = [
        Answered(**{**vars(one), "score": score, "right": bool(is_right)})
        for one, score, is_right in zip(answered, each, right, strict=True)
    ]
    return scored, {**summary, "n": len(answered)}


_Scored = tuple[Sequence[float], Sequence[bool], dict[str, float]]


def _vqa(answered: Sequence[Answered]) -> _Scored:
    each = [vqa.accuracy(one.answer, one.truth) for one in answered]
    matching = [vqa.matches(one.answer, one.truth) for one in answered]
    summary = {"vqa_accuracy": _mean(each), "standard_error": _error(each), "exact_match_processed": _mean(matching)}
    return each, [score >= 0.5 for score in each], summary


def _exact(answered: Sequence[Answered]) -> _Scored:
    """Letter for letter, and after the processing of the VQA evaluation."""
    each = [float(one.answer in one.truth) for one in answered]
    matching = [vqa.matches(one.answer, one.truth) for one in answered]
    summary = {"exact_match": _mean(each), "standard_error": _error(each), "exact_match_processed": _mean(matching)}
    return each, [score == 1 for score in each], summary


def _yes_no(answered: Sequence[Answered]) -> _Scored:
    each = [math.nan if one.yes is None else one.yes for one in answered]
    truth = np.array([one.truth for one in answered])
    right = (np.array(each) >= 0.5) == (truth == 1)
    return each, right.tolist(), {"roc_auc": roc_auc(truth, np.array(each)), "accuracy": _mean(right)}


def _captions(answered: Sequence[Answered]) -> _Scored:
    scores = captions.score([one.answer for one in answered], [one.truth for one in answered])
    summary = {"cider": scores.cider, "bleu_4": scores.bleu_4, "rouge_l": scores.rouge_l}
    return scores.cider_of_each, [one.answer in one.truth for one in answered], summary


def _box(answered: Sequence[Answered]) -> _Scored:
    found = [boxes.parse(one.answer) for one in answered]
    each = [0.0 if box is None else boxes.overlap(box, one.truth) for box, one in zip(found, answered, strict=True)]
    right = [overlap >= RIGHT_OVERLAP for overlap in each]
    summary = {
        "accuracy_at_0.5": _mean(right),
        "standard_error": _error(right),
        "mean_overlap": _mean(each),
        "with_a_box": _mean([box is not None for box in found]),
    }
    return each, right, summary


_SCORERS = {"vqa": _vqa, "exact": _exact, "yes_no": _yes_no, "captions": _captions, "box": _box}


def probability_of_yes(log_probabilities: Float[np.ndarray, "B 2"]) -> Float[np.ndarray, " B"]:
    """Of "yes" against "no", from their log-probabilities as answers."""
    assert log_probabilities.shape[1] == len(YES_NO)
    difference = log_probabilities[:, 1].astype(np.float64) - log_probabilities[:, 0]
    return 1 / (1 + np.exp(np.clip(difference, -700, 700)))


def roc_auc(truth: Int[np.ndarray, " B"], scores: Float[np.ndarray, " B"]) -> float:
    """Area under the curve of true over false positives: how often a 1 has a higher score than a 0, ties half.

    NaN when there are not both.
    """
    ones = int((truth == 1).sum())
    zeros = len(truth) - ones
    if not ones or not zeros:
        return math.nan
    ranks = stats.rankdata(scores)  # ties share theirs: Mann-Whitney's U
    return float((ranks[truth == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(np.asarray(values, np.float64)))


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(np.std(np.asarray(values, np.float64), ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
