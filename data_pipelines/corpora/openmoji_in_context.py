"""Documents that only their own examples explain: what in-context learning is trained and measured on.

An `Episode` is a row of examples of one task and a last example, the query, whose answer is asked for. Six tasks:

* *names*: an emoji is called by a made-up word; the same word is right for every picture of it in the document.
* *formats*: what a picture shows, written down in a notation that the examples show.
* *counting*: how many drawings there are, in the way of writing numbers that the examples show.
* *marks*: which of two emoji the drawn circle is around.
* *patterns*: the next picture of a row.
* *settings*: the object of the first picture on the background of the second.

Names are drawn anew for each document, and a tenth of all names, of all formats and of the emoji are kept away from
training by a hash, so that a held-out episode cannot be answered from what training showed.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from data_pipelines.corpora.openmoji_drawings import Emoji
from data_pipelines.corpora.openmoji_scenes import (
    COLOURS,
    CORNERS,
    Background,
    Box,
    Scene,
    SceneObject,
    place,
    random_scene,
    render,
)
from data_pipelines.corpora.openmoji_splits import HeldOutRules, hash_share

Task = Literal["names", "formats", "counting", "marks", "patterns", "settings"]
TASKS: tuple[Task, ...] = get_args(Task)

#: Emoji that take part in an episode of names, each under a name of its own; blind guessing among them gives 1 / 8.
NUM_NAMES = 8
NUM_WRONG = 3  #: pictures beside the right one, where a picture is asked for; blind guessing gives 1 / 4
HELD_OUT_SHARE = 0.1  #: of names and of notations

_CONSONANTS = "bdfgjklmnprstvwz"
_VOWELS = "aeiou"
SYLLABLES: tuple[str, ...] = tuple(c + v for c in _CONSONANTS for v in _VOWELS)

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Shown:
    """One picture of an episode."""

    scene: Scene
    mark: Box | None = None  #: pixels; a circle is drawn around it

    def draw(self) -> UInt8[np.ndarray, "S S 3"]:
        """The picture, RGB."""
        pixels = render(self.scene)
        if self.mark is None:
            return pixels
        image = Image.fromarray(pixels)
        size = self.scene.image_size
        pad, width = size // 32, max(2, size // 24)
        left, top, right, bottom = self.mark
        edges = (max(left - pad, 0), max(top - pad, 0), min(right + pad, size - 1), min(bottom + pad, size - 1))
        pen = ImageDraw.Draw(image)
        pen.ellipse(edges, outline=(0, 0, 0), width=width + 2)
        pen.ellipse(edges, outline=(255, 0, 255), width=width)
        return np.asarray(image)


@dataclass(frozen=True)
class Example:
    """Pictures and the answer to them: a text, or (where `text` is empty) one more picture, the last."""

    pictures: tuple[Shown, ...]
    text: str = ""


@dataclass(frozen=True)
class Episode:
    """Examples of one task, and the query; the answer of the query is what is asked for."""

    task: Task
    examples: tuple[Example, ...]
    query: Example
    wrong: tuple[Shown, ...] = ()  #: where a picture is asked for: `NUM_WRONG` that are not the answer, each nearly
    pattern: str | None = None  #: of formats: what any text in the right notation matches as a whole

    @property
    def all_examples(self) -> tuple[Example, ...]:
        """The examples and then the query."""
        return (*self.examples, self.query)

    def to_json(self) -> dict[str, Any]:
        """What is shown and said, as plain JSON values."""
        return dataclasses.asdict(self)


def random_name(rng: random.Random, split: Split) -> str:
    """A made-up word of two syllables, of those that belong to `split`."""
    while True:
        name = rng.choice(SYLLABLES) + rng.choice(SYLLABLES)
        if (hash_share("name", name) < HELD_OUT_SHARE) == (split == "heldout"):
            return name


@dataclass(frozen=True)
class Notation:
    """How a list of counted things is written: `[apple: 2, cat: 1].` is `Notation("[", "].", ": ", ", ", False)`."""

    opening: str
    closing: str
    between: str  #: name and count
    separator: str  #: one thing and the next
    count_first: bool

    def write(self, things: Sequence[tuple[str, int]]) -> str:
        """The things with their counts in this notation."""
        items = ((str(count), name) if self.count_first else (name, str(count)) for name, count in things)
        return self.opening + self.separator.join(self.between.join(item) for item in items) + self.closing

    @property
    def pattern(self) -> str:
        """A regular expression of everything that is written in this notation, whatever the names and counts."""
        name, count = (
            r"(?:\d(?:st|nd|rd) )?[^\W\d_][^\W\d_ -]*(?:[ -][^\W\d_ -]+)*",
            r"\d",
        )  # "1st place medal", "yo-yo"
        item = re.escape(self.between).join((count, name) if self.count_first else (name, count))
        return f"{re.escape(self.opening)}{item}({re.escape(self.separator)}{item})*{re.escape(self.closing)}"


_BRACKETS = (("[", "]"), ("(", ")"), ("{", "}"), ("<", ">"), ("", ""))
_ENDS = ("", ".", "!", ";")
_BETWEEN = (": ", " = ", " x ", " - ", "~")
_SEPARATORS = (", ", "; ", " and ", " | ", " / ")


def random_notation(rng: random.Random, split: Split) -> Notation:
    """One of 1,000 notations, of those that belong to `split`."""
    while True:
        opening, closing = rng.choice(_BRACKETS)
        notation = Notation(
            opening, closing + rng.choice(_ENDS), rng.choice(_BETWEEN), rng.choice(_SEPARATORS), rng.random() < 0.5
        )
        if notation_is_held_out(notation) == (split == "heldout"):
            return notation


def notation_is_held_out(notation: Notation) -> bool:
    """Whether training never shows this notation; true of `[apple: 2, cat: 1].`."""
    fields = dataclasses.astuple(notation)
    return fields == ("[", "].", ": ", ", ", False) or hash_share("notation", *fields) < HELD_OUT_SHARE


#: Ways to write the numbers one to four.
_NUMERALS: tuple[tuple[str, ...], ...] = (
    ("1", "2", "3", "4"),
    ("one", "two", "three", "four"),
    ("i", "ii", "iii", "iv"),
    ("*", "**", "***", "****"),
)


class Episodes:
    """Draws episodes. `emoji` are those that they show: the seen ones in training, the unseen ones held out.

    Where an answer says an emoji's real name (formats, marks), held-out episodes show `named`, the seen ones: nobody
    can know the name of a thing never shown, and what is held out is the notation, or the pair of emoji in a picture.
    """

    def __init__(
        self, emoji: Sequence[Emoji], named: Sequence[Emoji], image_size: int, split: Split, rules: HeldOutRules
    ) -> None:
        self._emoji, self._named = list(emoji), list(named)
        self._size = image_size
        self._split: Split = split
        self._rules = rules

    def draw(self, task: Task, num_examples: int, rng: random.Random) -> Episode:
        """An episode of `num_examples` examples and a query."""
        make: Mapping[Task, Callable[[int, random.Random], Episode]] = {
            "names": self._names,
            "formats": self._formats,
            "counting": self._counting,
            "marks": self._marks,
            "patterns": self._pattern,
            "settings": self._settings,
        }
        return self._shown_in_split(lambda: make[task](num_examples, rng))

    def draw_two_names(self, rng: random.Random) -> Episode:
        """The easiest task of all, to begin with: two emoji, each of them four times."""
        return self._shown_in_split(lambda: self._names(7, rng, kinds=2))

    def _shown_in_split(self, make: Callable[[], Episode]) -> Episode:
        """An episode that shows nothing which is held out, unless all are."""
        while True:
            episode = make()
            if self._split == "heldout" or not self._holds_out_any(episode):
                return episode

    def _holds_out_any(self, episode: Episode) -> bool:
        """Whether a picture shows what training pictures never show."""
        return any(self._rules.holds_out_any([shown.scene]) for one in episode.all_examples for shown in one.pictures)

    def _names(self, num_examples: int, rng: random.Random, kinds: int | None = None) -> Episode:
        """Held out: every emoji once, in any order, as far as the examples go, and a query for any of them. In training
        there are fewer emoji in some documents and each comes back several times, so that most names can be foretold.
        """
        training = self._split == "train"
        if kinds is None:
            kinds = rng.randint(2, NUM_NAMES) if training else NUM_NAMES
        emoji = rng.sample(self._emoji, kinds)
        names: list[str] = []
        while len(names) < kinds:
            name = random_name(rng, self._split)
            if name not in names:
                names.append(name)
        turns: list[int] = []
        while len(turns) < num_examples + 1:
            turns += rng.sample(range(kinds), kinds)
        if not training:
            turns = [*turns[:num_examples], rng.randrange(kinds)]
        return _episode(
            "names",
            [
                Example((Shown(one_emoji(emoji[turn], self._size, rng)),), names[turn])
                for turn in turns[: num_examples + 1]
            ],
        )

    def _formats(self, num_examples: int, rng: random.Random) -> Episode:
        notation = random_notation(rng, self._split)
        examples = []
        for _ in range(num_examples + 1):
            emoji = rng.sample(self._named, rng.choice((1, 2)))
            scene = random_scene(emoji, image_size=self._size, max_count=3, rng=rng)
            things = [(thing.emoji.name, thing.count) for thing in scene.objects]
            examples.append(Example((Shown(scene),), notation.write(things)))
        return dataclasses.replace(_episode("formats", examples), pattern=notation.pattern)

    def _counting(self, num_examples: int, rng: random.Random) -> Episode:
        numerals = rng.choice(_NUMERALS)
        examples = []
        for _ in range(num_examples + 1):
            number = rng.randint(1, 4)
            scene = self._placed(rng.choice(self._emoji), number, rng)
            examples.append(Example((Shown(scene),), numerals[number - 1]))
        return _episode("counting", examples)

    def _placed(self, emoji: Emoji, number: int, rng: random.Random) -> Scene:
        group = place(emoji, number, "small", "centre", ("centre",), self._size, rng)
        assert group is not None, "four small drawings fit into the middle of a picture"
        return Scene(self._size, _plain(rng), (group,))

    def _marks(self, num_examples: int, rng: random.Random) -> Episode:
        examples = []
        for _ in range(num_examples + 1):
            scene = self._pair(self._two(rng), rng)
            thing = rng.choice(scene.objects)
            examples.append(Example((Shown(scene, mark=thing.boxes[0]),), thing.emoji.name))
        return _episode("marks", examples)

    def _two(self, rng: random.Random) -> list[Emoji]:
        """Two emoji; held out, two that no training picture shows together."""
        while True:
            first, second = rng.sample(self._named, 2)
            if self._split == "train" or self._rules.holds_out_pair(first, second):
                return [first, second]

    def _pair(self, emoji: Sequence[Emoji], rng: random.Random) -> Scene:
        layout = rng.choice((("left", "right"), ("top left", "bottom right"), ("bottom left", "top right")))
        return Scene(
            self._size,
            _plain(rng),
            tuple(_single(one, position, layout, self._size, rng) for one, position in zip(emoji, layout, strict=True)),
        )

    def _pattern(self, num_examples: int, rng: random.Random) -> Episode:
        """A row of pictures of which the last is asked for: two things that take turns, or a walk around the corners.

        Wrong are: the other thing, or a third, or the right one elsewhere; the other corners.
        """
        background, count = _plain(rng), num_examples + 1
        if rng.random() < 0.5:
            first, second, third = (
                Scene(self._size, background, (_single(one, "centre", ("centre",), self._size, rng),))
                for one in rng.sample(self._emoji, 3)
            )
            row = [(first, second)[i % 2] for i in range(count)]
            answer, other = row[-1], (first, second)[count % 2]
            moved = _single(answer.objects[0].emoji, CORNERS[0], CORNERS, self._size, rng)
            wrong = [other, third, Scene(self._size, background, (moved,))]
        else:
            emoji, start, step = rng.choice(self._emoji), rng.randrange(4), rng.choice((1, -1))
            clockwise = (CORNERS[0], CORNERS[1], CORNERS[3], CORNERS[2])
            corners = [
                Scene(self._size, background, (_single(emoji, corner, CORNERS, self._size, rng),))
                for corner in clockwise
            ]
            turns = [(start + step * i) % 4 for i in range(count)]
            row = [corners[turn] for turn in turns]
            wrong = [scene for turn, scene in enumerate(corners) if turn != turns[-1]]
        return _episode("patterns", [Example((Shown(scene),)) for scene in row], [Shown(scene) for scene in wrong])

    def _settings(self, num_examples: int, rng: random.Random) -> Episode:
        """Wrong are: the two pictures of the query, and the second's object on the first's background."""
        examples = []
        wrong: tuple[Shown, ...] = ()
        for _ in range(num_examples + 1):
            first, second = (_single(one, "centre", ("centre",), self._size, rng) for one in rng.sample(self._emoji, 2))
            old, new = (Background("plain", (name,)) for name in rng.sample(list(COLOURS), 2))
            shown = [
                Shown(Scene(self._size, background, (thing,)))
                for background, thing in ((old, first), (new, second), (new, first), (old, second))
            ]
            examples.append(Example(tuple(shown[:3])))
            wrong = (shown[0], shown[1], shown[3])
        return _episode("settings", examples, wrong)


def one_emoji(emoji: Emoji, image_size: int, rng: random.Random) -> Scene:
    """A picture of one or two drawings of an emoji, anywhere, on any background."""
    return random_scene([emoji], image_size=image_size, max_count=2, rng=rng)


def centred_emoji(emoji: Emoji, image_size: int, rng: random.Random) -> Scene:
    """A large drawing in the middle of a plain background."""
    return Scene(image_size, _plain(rng), (_single(emoji, "centre", ("centre",), image_size, rng),))


#: Examples of a training document: as many as give 9 to 16 pictures.
TRAINING_EXAMPLES: Mapping[Task, int] = {
    "names": 15,
    "formats": 8,
    "counting": 8,
    "marks": 8,
    "patterns": 8,
    "settings": 4,
}
_TRAINING_WEIGHTS: Mapping[Task, int] = {
    "formats": 2,
    "counting": 1,
    "marks": 2,
    "patterns": 1,
    "settings": 1,
}


def random_training_episode(episodes: Episodes, rng: random.Random) -> Episode:
    """An episode of any task but names, of which there are documents enough by themselves."""
    (task,) = rng.choices(list(_TRAINING_WEIGHTS), weights=list(_TRAINING_WEIGHTS.values()))
    return episodes.draw(task, TRAINING_EXAMPLES[task], rng)


def _episode(task: Task, examples: Sequence[Example], wrong: Sequence[Shown] = ()) -> Episode:
    """The last example is the query."""
    return Episode(task, tuple(examples[:-1]), examples[-1], tuple(wrong))


def _plain(rng: random.Random) -> Background:
    return Background("plain", (rng.choice(list(COLOURS)),))


def _single(emoji: Emoji, position: Any, layout: Sequence[Any], image_size: int, rng: random.Random) -> SceneObject:
    placed = place(emoji, 1, "large", position, layout, image_size, rng)
    assert placed is not None, "one drawing fits into every room of these layouts"
    return placed
