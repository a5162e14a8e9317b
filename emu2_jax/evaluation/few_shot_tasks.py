"""The benchmarks of few-shot evaluation: how each asks, where its questions and answers stand, what its score is.

A sample is an image and an object of fields (docs/few-shot.md). Prompts of question answering are the paper's
(appendix E); it prints none for captions, boxes and Hateful Memes, so those are this project's choice.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from emu2_jax.config import FewShotConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.evaluation import boxes, vqa
from emu2_jax.generation import prompt as links
from emu2_jax.generation import template

Score = Literal["vqa", "exact", "yes_no", "captions", "box"]

#: What stands for "yes" and "no" in examples, and is weighed as an answer.
YES_NO = ("yes", "no")

_PROMPT = "{image} based on the picture, {question} short answer:"
_ZERO_SHOT_PROMPT = "{image} based on the picture, answer in one word or phrase. {question} short answer:"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image, as query or as example."""

    key: str  #: of its sample, and its place there where an image has several: "0007/2"
    image: int  #: number of its image
    values: Mapping[str, str]  #: fields of the prompts
    shown: str  #: the answer that an example shows
    truth: Any  #: what answers are compared with: texts, 0 or 1, a box (JSON)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark, or a kind of them."""

    name: str
    score: Score
    prompt: str = _PROMPT  #: of examples and query; an example goes on with a space and its answer
    zero_shot_prompt: str = _ZERO_SHOT_PROMPT
    items: str = ""  #: field that lists several questions about one image; "" = a sample is one question
    question: str = "question"  #: field of what {question} stands for, where a prompt has it
    answer: str = "answers"  #: field of the truth
    box_form: boxes.BoxForm = "xywh_pixels"
    max_tokens: int = 10
    length_penalty: float = -1.0  #: of beams (release, for short answers)
    paper: Mapping[int, float] = field(default_factory=dict)  #: shots -> its main score of Emu2, % (table 1)
    data: str = ""  #: splits, for people: queries; examples

    def questions(self, key: str, image: int, fields: Mapping[str, Any], where: str) -> Iterator[Question]:
        """What a sample asks; `where` names it. Raises `DataError`."""
        several = list(_expanded(fields, self.items.split(".") if self.items else [], where))
        for number, own in enumerate(several):
            place = f"{where}, question {number}" if self.items else where
            shown, truth = self._answer(own, place)
            yield Question(
                key=f"{key}/{number}" if self.items else key,
                image=image,
                values=self._values(own, place),
                shown=shown,
                truth=truth,
            )

    def _values(self, fields: Mapping[str, Any], where: str) -> dict[str, str]:
        values = {}
        for text in (self.prompt, self.zero_shot_prompt):
            for name in template.fields(text):
                if name == "question":
                    values[name] = str(_field(fields, self.question, where)).strip()
                elif name != "image":
                    if name not in fields:
                        raise DataError(
                            f"{where}: evaluation.few_shot.prompt {text!r} names the field {{{name}}}, which it has "
                            f"not; it has {', '.join(map(str, fields)) or 'none'}"
                        )
                    values[name] = str(fields[name]).strip()
        return values

    def _answer(self, fields: Mapping[str, Any], where: str) -> tuple[str, Any]:
        """The answer that an example shows, and the truth."""
        value = _field(fields, self.answer, where)
        if self.score == "yes_no":
            label = str(value).lower()
            if label not in ("0", "1", "true", "false", *YES_NO):
                raise DataError(f"{where}: field {self.answer!r} is {value!r}; wanted 0 or 1, or yes or no")
            truth = int(label in ("1", "true", "yes"))
            return YES_NO[1 - truth], truth
        if self.score == "box":
            box = self._box(value, fields, where)
            return links.Box(*box, form="tokens").text, list(box)
        texts = _texts(value)
        if not texts:
            raise DataError(f"{where}: field {self.answer!r} is {str(value)[:80]!r}; wanted a text or a list of texts")
        if self.score == "vqa" and len(texts) < vqa.MIN_ANSWERS:
            raise DataError(
                f"{where}: field {self.answer!r} has {len(texts)} answers; VQA accuracy needs those of several people, "
                f"{vqa.MIN_ANSWERS} at least (the benchmarks: 10); with one true answer take the task exact"
            )
        if self.score == "captions":
            return texts[0], texts
        return collections.Counter(texts).most_common(1)[0][0], texts  # of equally frequent ones the first

    def _box(self, value: Any, fields: Mapping[str, Any], where: str) -> boxes.Box:
        try:
            size = (int(fields[name]) for name in ("width", "height")) if "pixels" in self.box_form else (1, 1)
            left, top, right, bottom = value
            return boxes.as_shares((left, top, right, bottom), self.box_form, *size)
        except KeyError as error:
            raise DataError(
                f"{where}: a box in pixels needs the picture's {error.args[0]}; there is no such field"
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: field {self.answer!r}: {str(value)[:80]}: no {self.box_form} box: {error}"
            ) from error


def _expanded(fields: Mapping[str, Any], names: Sequence[str], where: str) -> Iterator[Mapping[str, Any]]:
    """One set of fields for each entry of a list in them: its own, and those around it."""
    if not names:
        yield fields
        return
    entries = _field(fields, names[0], where)
    if isinstance(entries, dict):  # TFDS: lists side by side
        entries = [_row(entries, i) for i in range(_length(entries))]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: field {names[0]!r} (evaluation.few_shot.items) is no list of objects")
    for entry in entries:
        yield from _expanded({**fields, **entry}, names[1:], where)


def _length(columns: Any) -> int:
    """Of lists side by side, which may lie in objects."""
    if isinstance(columns, Mapping):
        return max(map(_length, columns.values()), default=0)
    return len(columns) if isinstance(columns, list) else 0


def _row(columns: Any, number: int) -> Any:
    """Entry `number` of lists side by side; what is too short, or no list, has none."""
    if isinstance(columns, Mapping):
        rows = {name: _row(column, number) for name, column in columns.items()}
        return {name: row for name, row in rows.items() if row is not None}
    return columns[number] if isinstance(columns, list) and number < len(columns) else None


def _field(fields: Mapping[str, Any], path: str, where: str) -> Any:
    """A field by its name; "objects.bbox" is `bbox` of `objects`, or of each of them where that is a list."""
    found = _search(fields, path)
    if found is None:
        raise DataError(f"{where}: has no field {path!r}; it has {', '.join(map(str, fields)) or 'none'}")
    return found


def _search(value: Any, path: str) -> Any:
    if isinstance(value, list):
        found = [_search(one, path) for one in value]
        return None if None in found else found
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    name, dot, rest = path.partition(".")
    return _search(value[name], rest) if dot and name in value else None


def _texts(value: Any) -> list[str]:
    """A text or several; of objects (the annotations of VQA) their field `answer`."""
    values = value if isinstance(value, list) else [value]
    values = [one.get("answer") if isinstance(one, Mapping) else one for one in values]
    return [str(one).strip() for one in values] if all(isinstance(one, str | int | float) for one in values) else []


#: One of each kind, for data of one's own.
VQA = Task(name="vqa", score="vqa")
EXACT = Task(name="exact", score="exact", answer="answer")
YES_NO_TASK = Task(name="yes_no", score="yes_no", answer="label", max_tokens=1)
CAPTIONS = Task(
    name="captions",
    score="captions",
    prompt="{image}",
    zero_shot_prompt="{image}",
    answer="captions",
    max_tokens=40,
    length_penalty=1.0,
)
BOXES = Task(
    name="boxes",
    score="box",
    prompt="{image}<grounding><phrase>{question}</phrase>",
    zero_shot_prompt="{image}<grounding><phrase>{question}</phrase>",
    answer="box",
    box_form="xyxy",
    max_tokens=8,
)

_MEME = 'is the meme with the words "{text}" hateful? short answer:'


def _benchmark(task: Task, name: str, data: str, paper: Sequence[float] = (), **changed: Any) -> Task:
    scores = dict(zip((0, 4, 8, 16), paper, strict=True)) if paper else {}
    return dataclasses.replace(task, name=name, data=data, paper=scores, **changed)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _benchmark(VQA, "vqav2", "test-dev (by its server; val can be scored here); train", (33.5, 67.0, 67.8, 68.8)),
        _benchmark(VQA, "okvqa", "val; train", (26.7, 53.2, 54.1, 57.1)),
        _benchmark(VQA, "vizwiz", "test-dev (by its server; val can be scored here); train", (40.4, 54.6, 54.7, 57.0)),
        _benchmark(VQA, "textvqa", "val; train", (26.4, 48.2, 49.3, 50.3)),
        _benchmark(EXACT, "gqa", "test-dev; train"),
        _benchmark(
            YES_NO_TASK,
            "hateful_memes",
            "test_seen; train",
            (52.2, 62.4, 65.8, 66.0),
            prompt=f"{{image}} based on the picture, {_MEME}",
            zero_shot_prompt=f"{{image}} based on the picture, answer in one word or phrase. {_MEME}",
        ),
        _benchmark(CAPTIONS, "coco_captions", "Karpathy's test; train"),
        *(
            _benchmark(BOXES, name, "val, testA, testB; train", box_form="xywh_pixels")
            for name in ("refcoco", "refcocoplus", "refcocog")
        ),
        *(VQA, EXACT, YES_NO_TASK, CAPTIONS, BOXES),
    )
}


def resolve(settings: FewShotConfig) -> Task:
    """The task of a config, with what the config changes in it. Raises `ConfigError`."""
    path = "evaluation.few_shot"
    if settings.task not in TASKS:
        near = difflib.get_close_matches(settings.task, TASKS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{path}.task: no task {settings.task!r}; nearest: {near}; known: {', '.join(TASKS)}")
    names = {one.name for one in dataclasses.fields(Task)} & {one.name for one in dataclasses.fields(settings)}
    changed = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.prompt is not None and settings.zero_shot_prompt is None:
        changed["zero_shot_prompt"] = settings.prompt
    task = dataclasses.replace(TASKS[settings.task], **changed)
    for name in ("prompt", "zero_shot_prompt"):
        text = getattr(task, name)
        if template.fields(text).count("image") != 1:
            raise ConfigError(f"{path}.{name}: {text!r}: wanted {{image}} in it once")
    return task
