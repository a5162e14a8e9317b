"""A benchmark as it is read: its questions, the examples there are, and which of these go before which question."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines.annotated import AnnotatedImages, open_annotated
from data_pipelines.images import ImageRules
from emu2_jax.config import ExperimentConfig, FewShotConfig
from emu2_jax.errors import ConfigError
from emu2_jax.evaluation import retrieval
from emu2_jax.evaluation.few_shot_tasks import Question, Task

PATH = "evaluation.few_shot"


@dataclass(frozen=True)
class ImageSide:
    """Images that are asked about, or that examples show: of a dataset, those that are used."""

    images: AnnotatedImages
    numbers: Sequence[int]  #: in `images`
    questions: Sequence[Sequence[Question]]  #: of each; `Question.image` is a place in `numbers`

    @property
    def keys(self) -> list[str]:
        """Of the samples."""
        return [self.images.keys[number] for number in self.numbers]

    @property
    def places(self) -> list[str]:
        """Where the samples are."""
        return [self.images.places[number] for number in self.numbers]

    def pixels(self, image: int) -> UInt8[np.ndarray, "S S 3"]:
        """One image, by its place among those that are used."""
        return self.images.pixels(self.numbers[image])

    @property
    def digest(self) -> str:
        """Changes with every key, question and answer, and with their order."""
        return self._digest(())

    @property
    def digest_with_places(self) -> str:
        """Changes with where the samples are, too."""
        return self._digest(self.places)

    def _digest(self, more: Sequence[str]) -> str:
        digest = hashlib.sha256(json.dumps(list(more)).encode())
        for several in self.questions:
            for one in several:
                digest.update(json.dumps([one.key, dict(one.values), one.shown, one.truth]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Benchmark:
    """Questions and examples."""

    query_side: ImageSide
    support_side: ImageSide | None  #: None: nobody asks for examples
    queries: Sequence[Question]


def open_benchmark(config: ExperimentConfig, task: Task) -> Benchmark:
    """Read the data that `evaluation.few_shot` names. Raises `UserError` for what cannot be used."""
    settings = config.evaluation.few_shot
    size = config.model.vision.image_size
    rules = ImageRules(apply_exif_orientation=config.data.apply_exif_orientation)
    if not settings.queries:
        raise ConfigError(f"{PATH}.queries: names no data; wanted shards, or tfds:DATASET@SPLIT (docs/few-shot.md)")
    images = open_annotated(settings.queries, size, f"{PATH}.queries", rules)
    asked = [question for several in _questions(task, images) for question in several]
    kept = _drawn(settings, "queries", len(asked), settings.num_queries)
    query_side, queries = _side(images, [asked[i] for i in kept])
    if not queries:
        raise ConfigError(f"{PATH}.queries: {settings.queries} holds no questions")
    if not max(settings.shots):
        return Benchmark(query_side, None, queries)
    if not settings.support:
        raise ConfigError(f"{PATH}.support: names no data, which {max(settings.shots)} shots are taken from")
    shown = open_annotated(settings.support, size, f"{PATH}.support", rules)
    by_image = [several for several in _questions(task, shown) if several]
    by_image = [by_image[i] for i in _drawn(settings, "support", len(by_image), settings.num_support)]
    support_side, _ = _side(shown, [question for several in by_image for question in several])
    own = set(query_side.places) & set(support_side.places)
    if len(by_image) - bool(own) < max(settings.shots):
        raise ConfigError(
            f"{PATH}.shots: {max(settings.shots)}, but {settings.support} has {len(by_image)} images with an answer"
            f"{' (a question never gets its own as an example)' if own else ''}; ask for fewer"
        )
    return Benchmark(query_side, support_side, queries)


def _questions(task: Task, images: AnnotatedImages) -> Iterable[list[Question]]:
    for number, fields in enumerate(images.fields()):
        yield list(task.questions(images.keys[number], number, fields, images.places[number]))


def _drawn(settings: FewShotConfig, what: str, count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` numbers in their order, the same for the same seed; all for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    rng = np.random.default_rng([settings.seed, retrieval.hashed(what)])
    return sorted(rng.choice(count, size=wanted, replace=False).tolist())


def _side(images: AnnotatedImages, questions: Sequence[Question]) -> tuple[ImageSide, list[Question]]:
    """The images of some questions, in their order, and the questions with their images' new numbers."""
    numbers = sorted({question.image for question in questions})
    places = {number: place for place, number in enumerate(numbers)}
    moved = [_at(question, places[question.image]) for question in questions]
    several: list[list[Question]] = [[] for _ in numbers]
    for question in moved:
        several[question.image].append(question)
    return ImageSide(images, numbers, several), moved


def _at(question: Question, image: int) -> Question:
    return Question(**{**vars(question), "image": image})


class Chooser:
    """Which examples go before a question: as many as the most shots, of which fewer shots take the first.

    An image gives one example at most: of its questions, one that the seed draws for each query.
    """

    def __init__(
        self,
        settings: FewShotConfig,
        data: Benchmark,
        features: tuple[Float[np.ndarray, "Q E"], Float[np.ndarray, "S E"]] | None,
    ) -> None:
        """`features` of the images of both sides, of length 1 each, for RICES."""
        self._settings = settings
        self._data = data
        self._features = features
        support = [] if data.support_side is None else data.support_side.places
        rows = {place: row for row, place in enumerate(support)}
        self._left_out = [rows.get(place) for place in data.query_side.places]
        self.examples = functools.lru_cache(maxsize=None)(self._examples)

    def ordered(self, questions: range, position: int, shots: int) -> list[Question]:
        """The examples of one of a block of questions as they stand in its prompt."""
        chosen = self.examples(questions)[position][:shots]
        nearest_last = self._settings.selection == "rices" and self._settings.most_similar_last
        return chosen[::-1] if nearest_last else chosen

    def _examples(self, questions: range) -> list[list[Question]]:
        """Of a block of questions. Blocks are the same on any number of hosts: so are rounding and ties."""
        most, side = max(self._settings.shots), self._data.support_side
        if side is None:
            return [[] for _ in questions]
        asked = [self._data.queries[number] for number in questions]
        left_out = [self._left_out[one.image] for one in asked]
        rows: Sequence[Int[np.ndarray, " k"]]
        if self._features is not None:
            queries, support = self._features
            rows = retrieval.most_similar(queries[[one.image for one in asked]], support, most, left_out)
        else:
            seed, count = self._settings.seed, len(side.numbers)
            rows = [
                retrieval.random_examples(seed, one.key, count, most, own)
                for one, own in zip(asked, left_out, strict=True)
            ]
        return [[self._one_of(side, int(row), one) for row in own] for own, one in zip(rows, asked, strict=True)]

    def _one_of(self, side: ImageSide, row: int, query: Question) -> Question:
        several = side.questions[row]
        return several[retrieval.hashed(self._settings.seed, query.key, several[0].key) % len(several)]
