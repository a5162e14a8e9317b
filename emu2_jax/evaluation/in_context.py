"""In-context learning on held-out episodes: does accuracy rise with the examples in the prompt, and is it them?

An episode's query is asked after 0, 1, 2, ... of its examples. Beside each accuracy stand two controls: the same
prompts with the answers exchanged among the examples, and with every picture taken out. What a model can do from its
weights alone stays in both; what it takes from the examples goes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from jaxtyping import Float, UInt8
from scipy import stats

Pixels = UInt8[np.ndarray, "S S 3"]
Link = str | Pixels
Condition = Literal["examples", "shuffled", "no_images"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


class Example(Protocol):
    """Pictures and the answer to them: `text`, or without one the last picture."""

    @property
    def images(self) -> Sequence[Pixels]:
        """In their order."""
        ...

    @property
    def text(self) -> str:
        """ "" where a picture is the answer."""
        ...


class Episode(Protocol):
    """Examples of one task, and the query whose answer is asked for."""

    @property
    def key(self) -> str:
        """Which it is."""
        ...

    @property
    def task(self) -> str:
        """What accuracies are summed up by."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """At least as many as the most shots."""
        ...

    @property
    def query(self) -> Example:
        """Its answer is what is asked for."""
        ...

    @property
    def wrong(self) -> Sequence[Pixels]:
        """Not the answer, where a picture is asked for."""
        ...

    @property
    def pattern(self) -> str | None:
        """Regular expression of answers in the right notation, where there is one."""
        ...


class Model(Protocol):
    """What is asked of the model that is measured."""

    def answers(self, prompts: Sequence[Sequence[Link]]) -> list[str]:
        """The text that follows each prompt, up to the next image or the end of the document."""
        ...

    def drawn(self, prompts: Sequence[Sequence[Link]]) -> Float[np.ndarray, "B N E"]:
        """The visual embeddings of the image that follows each prompt."""
        ...

    def embeddings(self, images: Sequence[Pixels]) -> Float[np.ndarray, "images N E"]:
        """What the visual encoder makes of images."""
        ...


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question, its answer and whether that is right."""

    key: str
    task: str
    shots: int
    condition: Condition
    prompt: Sequence[Link]
    truth: str  # "" where a picture is asked for
    answer: str  # where a picture is asked for: which of the pictures it is nearest to, "right" or "wrong 2"
    correct: bool
    follows_pattern: bool | None  # of formats: whether the answer is in the right notation, whatever it says


class Accuracy(NamedTuple):
    """A share of right answers and its 95 % interval (Wilson)."""

    accuracy: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: Sequence[bool]) -> Accuracy:
        """Raises `ValueError` for no answers at all."""
        interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        return cls(sum(right) / len(right), float(interval.low), float(interval.high), len(right))


def prompt_of(episode: Episode, shots: int, condition: Condition) -> list[Link] | None:
    """The last `shots` examples and the query without its answer; None where a condition makes no sense.

    Shuffled, each example has the answer of the one after it, the last that of the first. That takes two different
    answers at least. Without images nothing is left of a task that is answered with a picture.
    """
    examples = list(episode.examples[len(episode.examples) - shots :])
    drawing = not episode.query.text
    answers: list[Link] = [one.text or one.images[-1] for one in examples]
    if condition == "shuffled":
        turned = answers[1:] + answers[:1]
        if all(map(_same, answers, turned)):
            return None
        answers = turned
    if condition == "no_images" and (drawing or not shots):
        return None
    links: list[Link] = []
    for example, answer in zip(examples, answers, strict=True):
        if condition != "no_images":
            links += example.images if example.text else example.images[:-1]
        links.append(answer)
    if condition != "no_images":
        links += episode.query.images[:-1] if drawing else episode.query.images
    return links


def _same(first: Link, second: Link) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return isinstance(first, str) and isinstance(second, str) and first == second
    return np.array_equal(first, second)


def measure(
    episodes: Sequence[Episode], shots: Sequence[int], model: Model, progress: Callable[[int, int], None]
) -> Iterator[Answered]:
    """Every question of every episode, answered. `progress` is told how many are done, and of how many.

    Raises `ValueError` when an episode has fewer examples than the most `shots`.
    """
    questions = [
        (episode, count, condition, prompt)
        for condition in CONDITIONS
        for count in shots
        for episode in episodes
        if (prompt := prompt_of(_with_examples(episode, count), count, condition)) is not None
    ]
    done = 0
    progress(done, len(questions))
    for drawing in (False, True):
        asked = [one for one in questions if bool(one[0].query.text) != drawing]
        for start in range(0, len(asked), _AT_ONCE):
            batch = asked[start : start + _AT_ONCE]
            yield from (_draw if drawing else _write)(batch, model)
            done += len(batch)
            progress(done, len(questions))


#: Questions between two calls of `progress`.
_AT_ONCE = 64

_Question = tuple[Episode, int, Condition, list[Link]]


def _with_examples(episode: Episode, shots: int) -> Episode:
    if len(episode.examples) < shots:
        raise ValueError(f"{episode.key}: has {len(episode.examples)} examples; {shots} shots are asked for")
    return episode


def _write(batch: Sequence[_Question], model: Model) -> Iterator[Answered]:
    for (episode, count, condition, prompt), answer in zip(
        batch, model.answers([prompt for *_, prompt in batch]), strict=True
    ):
        given, truth = answer.strip(), episode.query.text.strip()
        follows = None if episode.pattern is None else re.fullmatch(episode.pattern, given) is not None
        yield Answered(episode.key, episode.task, count, condition, prompt, truth, given, given == truth, follows)


def _draw(batch: Sequence[_Question], model: Model) -> Iterator[Answered]:
    """A drawn picture is right when its embeddings are nearer to those of the true picture than of any wrong one."""
    drawn = model.drawn([prompt for *_, prompt in batch])
    for (episode, count, condition, prompt), made in zip(batch, drawn, strict=True):
        choices = model.embeddings([episode.query.images[-1], *episode.wrong])
        nearest = int(np.square(choices - made[None]).mean((1, 2)).argmin())
        answer = f"wrong {nearest}" if nearest else "right"
        yield Answered(episode.key, episode.task, count, condition, prompt, "", answer, nearest == 0, None)


def nearest_pictures(episodes: Sequence[Episode], shots: Sequence[int], model: Model) -> dict[str, dict[str, float]]:
    """shots -> how often the example whose picture's embeddings are nearest to the query's has the right answer.

    No language model takes part: it is what the encoder lets one read out of the examples, by the cosine of embeddings
    less the mean of all. `episodes` have one picture an example and answer it with a text.
    """
    pictures = [[one.images[0] for one in (*episode.examples, episode.query)] for episode in episodes]
    embedded = [model.embeddings(some).reshape(len(some), -1) for some in pictures]
    mean = np.concatenate(embedded).mean(0)
    found: dict[str, dict[str, float]] = {}
    for count in shots:
        right = []
        for episode, own in zip(episodes, embedded, strict=True):
            texts = [one.text for one in episode.examples]
            directions = (own - mean) / np.maximum(np.linalg.norm(own - mean, axis=1, keepdims=True), 1e-12)
            likeness = directions[:-1] @ directions[-1]
            first = len(texts) - count
            right.append(count > 0 and texts[first + int(likeness[first:].argmax())] == episode.query.text)
        found[str(count)] = Accuracy.of(right)._asdict()
    return found


def summarise(answered: Sequence[Answered]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """task -> condition -> shots -> accuracy with its interval. A task whose answers have a notation is there twice:
    "formats" counts answers that are right as a whole, "formats_notation" those in the right notation."""
    groups: dict[tuple[str, str, int], list[bool]] = {}
    for one in answered:
        groups.setdefault((one.task, one.condition, one.shots), []).append(one.correct)
        if one.follows_pattern is not None:
            groups.setdefault((f"{one.task}_notation", one.condition, one.shots), []).append(one.follows_pattern)
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (task, condition, shots), right in sorted(groups.items()):
        table.setdefault(task, {}).setdefault(condition, {})[str(shots)] = Accuracy.of(right)._asdict()
    return table
