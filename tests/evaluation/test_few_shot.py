"""Prompts letter for letter, the fields they are made of, and the scores of answers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from emu2_jax.config import ExperimentConfig, FewShotConfig, validate
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.evaluation.few_shot import (
    Answered,
    Shown,
    answer_in,
    probability_of_yes,
    prompt_of,
    roc_auc,
    summarise,
)
from emu2_jax.evaluation.few_shot_tasks import TASKS, Question, Task, resolve
from emu2_jax.generation.prompt import Box

PEOPLE = ["cat"] * 6 + ["kitten"] * 4


def questions(task: Task, fields: dict[str, Any], image: int = 0) -> list[Question]:
    return list(task.questions(f"{image:04d}", image, fields, f"shard.tar#{image:04d}"))


def written_out(task: Task, examples: list[Question], query: Question, separator: str = ". ") -> str:
    return "".join(
        link if isinstance(link, str) else f"[image {'s' if link.of_support else 'q'}{link.image}]"
        for link in prompt_of(task, examples, query, separator)
    )


def ask(number: int, what: str, answers: list[str]) -> Question:
    return questions(TASKS["vqav2"], {"question": what, "answers": answers}, number)[0]


def test_the_papers_prompts() -> None:
    task = TASKS["vqav2"]
    query = ask(0, "what is it?", PEOPLE)
    assert written_out(task, [], query) == (
        "[image q0] based on the picture, answer in one word or phrase. what is it? short answer:"
    )
    examples = [ask(1, "how many?", ["2", "two", "two", "two"]), ask(2, "is it red?", ["yes"] * 4)]
    assert written_out(task, examples, query) == (
        "[image s1] based on the picture, how many? short answer: two. "
        "[image s2] based on the picture, is it red? short answer: yes. "
        "[image q0] based on the picture, what is it? short answer:"
    )
    links = prompt_of(task, examples[:1], query, ". ")
    assert links[0] == Shown(True, 1) and links[2] == Shown(False, 0)


def test_prompts_of_the_other_tasks() -> None:
    caption = questions(TASKS["coco_captions"], {"captions": ["a cat", "one cat"]}, 3)[0]
    assert written_out(TASKS["coco_captions"], [caption], caption) == "[image s3] a cat. [image q3]"

    refcoco = TASKS["refcoco"]
    fields = {"question": "the left dog", "box": [20, 30, 20, 30], "width": 200, "height": 100}
    dog = questions(refcoco, fields, 4)[0]
    box = Box(0.1, 0.3, 0.2, 0.6, form="tokens").text
    assert box == "<object><patch_index_0022><patch_index_0067><patch_index_0045><patch_index_0134></object>"
    start = "<grounding><phrase>the left dog</phrase>"
    assert written_out(refcoco, [dog], dog) == f"[image s4]{start} {box}. [image q4]{start}"

    meme = questions(TASKS["hateful_memes"], {"text": "look {here}", "label": 1}, 5)[0]
    assert written_out(TASKS["hateful_memes"], [meme], meme) == (
        '[image s5] based on the picture, is the meme with the words "look {here}" hateful? short answer: yes. '
        '[image q5] based on the picture, is the meme with the words "look {here}" hateful? short answer:'
    )


def test_settings_change_a_task() -> None:
    settings = FewShotConfig(
        task="gqa", prompt="Q: {question} {image} in {place}:", answer="meta.answer", items="asked", max_tokens=3
    )
    task = resolve(settings)
    assert (task.score, task.max_tokens, task.zero_shot_prompt) == ("exact", 3, settings.prompt)
    fields = {
        "place": "Rome",
        "asked": [{"question": "a?", "meta": {"answer": 1}}, {"question": "b?", "meta.answer": "x"}],
    }
    first, second = questions(task, fields, 7)
    assert (first.key, first.truth, second.key, second.shown) == ("0007/0", ["1"], "0007/1", "x")
    assert written_out(task, [second], first, "\n") == "Q: b? [image s7] in Rome: x\nQ: a? [image q7] in Rome:"


def test_fields_of_tfds_and_of_the_official_annotations() -> None:
    task = resolve(FewShotConfig(task="coco_captions", answer="captions.text"))
    fields = {"captions": {"text": ["a", "b"], "id": [1, 2]}}
    assert questions(task, fields)[0].truth == ["a", "b"]
    listed = {"captions": [{"text": "a"}, {"text": "b"}]}
    assert questions(task, listed)[0].truth == ["a", "b"]

    official = {"question": "?", "answers": [{"answer": one, "answer_confidence": "yes"} for one in PEOPLE]}
    assert questions(TASKS["vizwiz"], official)[0].truth == PEOPLE

    settings = FewShotConfig(task="refcoco", items="objects.refexp", question="raw", answer="bbox", box_form="yxyx")
    refexp = {"raw": [["left", "small"], ["red"]], "refexp_id": [[3, 4], [5]]}
    objects = {"objects": {"bbox": [[0.2, 0.1, 0.6, 0.5], [0, 0, 1, 1]], "refexp": refexp}}
    found = questions(resolve(settings), objects)
    assert [(one.key, one.values["question"], one.truth) for one in found] == [
        ("0000/0", "left", [0.1, 0.2, 0.5, 0.6]),
        ("0000/1", "small", [0.1, 0.2, 0.5, 0.6]),
        ("0000/2", "red", [0.0, 0.0, 1.0, 1.0]),
    ]


@pytest.mark.parametrize(
    ("settings", "fields", "said"),
    [
        ({"prompt": "{image} {sky}?"}, {"question": "?", "answers": PEOPLE}, "{sky}, which it has not; it has quest"),
        ({}, {"answers": PEOPLE}, "has no field 'question'; it has answers"),
        ({}, {"question": "?"}, "has no field 'answers'"),
        ({}, {"question": "?", "answers": ["a", "b"]}, "has 2 answers; VQA accuracy needs those of several people"),
        ({}, {"question": "?", "answers": [[1]]}, "wanted a text or a list of texts"),
        ({"task": "hateful_memes"}, {"text": "", "label": 2}, "field 'label' is 2; wanted 0 or 1"),
        ({"task": "refcoco"}, {"question": "", "box": [1, 2, 3, 4]}, "a box in pixels needs the picture's width"),
        ({"task": "refcoco"}, {"question": "", "box": [1, 2], "width": 9, "height": 9}, "no xywh_pixels box"),
        ({"items": "asked"}, {"asked": "no list"}, "field 'asked' (evaluation.few_shot.items) is no list of objects"),
    ],
)  # fmt: skip
def test_a_sample_that_does_not_fit(settings: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        questions(resolve(FewShotConfig(**settings)), fields)
    assert said in str(error.value) and str(error.value).startswith("shard.tar#0000")


def test_settings_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no task 'vqa2'; nearest: vqav2; known: vqav2, okvqa"):
        resolve(FewShotConfig(task="vqa2"))
    with pytest.raises(ConfigError, match=r"prompt: .*wanted \{image\} in it once"):
        resolve(FewShotConfig(prompt="{question}"))
    config = ExperimentConfig(name="any")
    for change in (
        {"shots": (4, 4)},
        {"shots": ()},
        {"batch": 0},
        {"num_queries": 0},
        {"separator": " "},
        {"seed": -1},
    ):
        few_shot = dataclasses.replace(config.evaluation.few_shot, **change)
        evaluation = dataclasses.replace(config.evaluation, few_shot=few_shot)
        with pytest.raises(ConfigError, match=rf"evaluation\.few_shot\.{next(iter(change))}: must"):
            validate(dataclasses.replace(config, evaluation=evaluation))


def test_an_answer_ends_where_the_next_example_would_begin() -> None:
    assert answer_in(" red apple. It is large", ". ") == "red apple"
    assert answer_in("red apple.", ". ") == "red apple"
    assert answer_in("2.5 km", ". ") == "2.5 km"
    assert answer_in("one\ntwo", "\n") == "one"


def answered(task: str, answers: list[str], truths: list[Any], yes: list[float] | None = None) -> Any:
    given = [
        Answered(
            shots=4, number=i, query=f"{i}", examples=[], prompt=[], truth=truth, written=answer, answer=answer,
            yes=None if yes is None else yes[i],
        )
        for i, (answer, truth) in enumerate(zip(answers, truths, strict=True))
    ]  # fmt: skip
    return summarise(TASKS[task], given)


def test_scores_of_questions() -> None:
    each, summary = answered("vqav2", ["Cat", "kitten", "dog"], [PEOPLE, ["cat"] * 8 + ["kitten"] * 2, PEOPLE])
    assert [one.score for one in each] == pytest.approx([1, 0.6, 0])
    assert [one.right for one in each] == [True, True, False]
    assert summary["vqa_accuracy"] == pytest.approx(1.6 / 3) and summary["n"] == 3
    assert summary["exact_match_processed"] == pytest.approx(2 / 3)
    assert summary["standard_error"] == pytest.approx(np.std([1, 0.6, 0], ddof=1) / math.sqrt(3))

    each, summary = answered("gqa", ["cat", "Cat", "a cat", "dog"], [["cat"]] * 4)
    assert (summary["exact_match"], summary["exact_match_processed"]) == (0.25, 0.75)


def test_scores_of_boxes() -> None:
    truth = [0.0, 0.0, 0.5, 0.5]
    answers = ["[0,0,112,112]", "[0,0,112,56]", "[0,0,112,55]", "nowhere"]
    each, summary = answered("refcoco", answers, [truth] * 4)
    assert [one.right for one in each] == [True, True, False, False]  # an overlap of exactly 0.5 counts
    assert summary["accuracy_at_0.5"] == 0.5 and summary["with_a_box"] == 0.75
    assert summary["mean_overlap"] == pytest.approx((1 + 0.5 + 55 / 112) / 4)


def test_scores_of_yes_and_no() -> None:
    each, summary = answered("hateful_memes", ["yes", "no", "no"], [1, 0, 1], [0.9, 0.2, 0.2])
    assert summary["roc_auc"] == pytest.approx(0.75) and summary["accuracy"] == pytest.approx(2 / 3)
    assert [one.right for one in each] == [True, True, False]


def test_roc_auc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 5, 100):
        for decimals in (1, 8):  # with ties, and without
            truth = np.concatenate([[0, 1], rng.integers(0, 2, size)])
            scores = rng.random(size + 2).round(decimals)
            assert roc_auc(truth, scores) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert math.isnan(roc_auc(np.ones(3), np.ones(3)))


def test_the_probability_of_yes() -> None:
    log_probabilities = np.log(np.array([[0.3, 0.1], [0.001, 0.001]]))
    assert probability_of_yes(log_probabilities) == pytest.approx([0.75, 0.5])
    assert probability_of_yes(np.array([[-5000.0, 0.0], [0.0, -5000.0]])) == pytest.approx([0, 1])
