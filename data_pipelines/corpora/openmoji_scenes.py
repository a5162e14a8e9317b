"""Scenes: a few drawings on a coloured background, their pictures and true descriptions of them.

A `Scene` says exactly where every drawing lies; `render` draws it, `describe` puts it into one of many wordings, each
of which is true and names the background and every object's count, size, name and place.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.corpora.openmoji_drawings import Emoji, sprite, sprite_size
from data_pipelines.corpora.openmoji_text import counted, joined, with_article

Size = Literal["large", "small"]
Pattern = Literal["plain", "split left and right", "split top and bottom", "fading", "bordered"]
Position = Literal[
    "left", "right", "top", "bottom", "centre", "top left", "top right", "bottom left", "bottom right"
]  # fmt: skip
Box = tuple[int, int, int, int]  # pixels: left, top, right, bottom; right and bottom lie just outside

POSITIONS: tuple[Position, ...] = get_args(Position)
SIZES: tuple[Size, ...] = get_args(Size)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

#: Background colours: name -> RGB. None is dark, because OpenMoji draws black outlines.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (165, 165, 165),
    "pink": (255, 178, 205),
    "red": (230, 75, 75),
    "orange": (250, 160, 65),
    "yellow": (255, 230, 95),
    "green": (75, 175, 85),
    "light green": (185, 235, 170),
    "blue": (70, 125, 230),
    "light blue": (170, 215, 250),
    "purple": (160, 100, 205),
    "brown": (160, 110, 70),
}


@dataclass(frozen=True)
class Background:
    """What fills the picture behind the objects."""

    pattern: Pattern
    colours: tuple[str, ...]  #: names in `COLOURS`; one if plain, else two: left/right, top/bottom, inside/border


@dataclass(frozen=True)
class SceneObject:
    """One or several equal drawings that stand together."""

    emoji: Emoji
    size: Size
    position: Position  #: where the group stands in the picture
    boxes: tuple[Box, ...]  #: one per drawing

    @property
    def count(self) -> int:
        """How many drawings the group has."""
        return len(self.boxes)

    @property
    def noun_phrase(self) -> str:
        """The group in words, without its place: "three small dogs"."""
        return counted(self.count, f"{self.size} {self.emoji.name}")


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    image_size: int  #: pixels, side of the square picture
    background: Background
    objects: tuple[SceneObject, ...]

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Scene:
        """The scene that `to_json` wrote; fields that a scene does not have are ignored."""
        background = Background(fields["background"]["pattern"], tuple(fields["background"]["colours"]))
        objects = (
            SceneObject(Emoji(**o["emoji"]), o["size"], o["position"], tuple((*box,) for box in o["boxes"]))
            for o in fields["objects"]
        )
        return cls(fields["image_size"], background, tuple(objects))


# Drawing


def render(scene: Scene) -> UInt8[np.ndarray, "S S 3"]:
    """The picture of a scene, RGB."""
    image = _background_image(scene.background, scene.image_size).copy()
    for thing in scene.objects:
        for left, top, right, bottom in thing.boxes:
            mark = sprite(thing.emoji.code, max(right - left, bottom - top), scene.image_size)
            image.paste(mark, (left, top), mark)
    return np.asarray(image)


@functools.lru_cache(maxsize=128)
def _background_image(background: Background, size: int) -> Image.Image:
    first, last = (np.array(COLOURS[name], np.float32) for name in (background.colours[0], background.colours[-1]))
    down, across = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    match background.pattern:
        case "plain":
            share: np.ndarray = np.zeros((size, size))
        case "split left and right":
            share = across >= size / 2
        case "split top and bottom":
            share = down >= size / 2
        case "fading":
            share = down / (size - 1)
        case "bordered":
            to_edge = np.minimum(np.minimum(down, across), np.minimum(size - 1 - down, size - 1 - across))
            share = to_edge < max(1, size // 20)
    pixels = first + share[..., None] * (last - first)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


# Composing

#: Side of a drawing as a share of the picture's side: the range it is drawn from, and the least that is let pass where
#: there is little room.
_SIDE_RANGE: Mapping[Size, tuple[float, float]] = {"large": (0.45, 0.6), "small": (0.25, 0.31)}
_SIDE_MIN: Mapping[Size, float] = {"large": 0.42, "small": 0.22}
_MAX_COUNT: Mapping[Size, int] = {"large": 2, "small": 4}  # more would not fit
_MAX_SHIFT = 0.08  #: how far from the middle of its room a group may stand, as a share of the picture's side

#: The places that the objects of a scene take together, by the number of objects.
LAYOUTS: Mapping[int, tuple[tuple[Position, ...], ...]] = {
    1: tuple((position,) for position in POSITIONS),
    2: (
        ("left", "right"),
        ("top", "bottom"),
        ("top left", "bottom right"),
        ("bottom left", "top right"),
    ),
    3: (
        ("left", "centre", "right"),
        ("top", "centre", "bottom"),
        ("top left", "top right", "bottom"),
        ("top", "bottom left", "bottom right"),
        ("left", "top right", "bottom right"),
        ("top left", "bottom left", "right"),
    ),
    4: (("top left", "top right", "bottom left", "bottom right"),),
}
CORNERS = LAYOUTS[4][0]


def place(
    emoji: Emoji,
    count: int,
    size: Size,
    position: Position,
    layout: Sequence[Position],
    image_size: int,
    rng: random.Random,
) -> SceneObject | None:
    """A group of drawings at one of the places of `layout`, or None where that many of that size do not fit.

    Groups at different places of one layout never overlap.
    """
    room_left, room_top, room_right, room_bottom = (
        fraction * image_size for fraction in _room(position, layout, size if count == 1 else None)
    )
    width, height = room_right - room_left, room_bottom - room_top
    columns, rows = _grid(count, width, height)
    gap = max(1, image_size // 64)
    room_per_drawing = min(width / columns, height / rows) - gap
    side = min(rng.uniform(*_SIDE_RANGE[size]) * image_size, room_per_drawing)
    if side < _SIDE_MIN[size] * image_size:
        return None
    pitch = int(side) + gap
    middle_x = (room_left + room_right) / 2 + _shift(width - columns * pitch, image_size, rng)
    middle_y = (room_top + room_bottom) / 2 + _shift(height - rows * pitch, image_size, rng)
    boxes = []
    for index in range(count):
        row, column = divmod(index, columns)
        in_this_row = min(columns, count - row * columns)
        x = middle_x + (column - (in_this_row - 1) / 2) * pitch
        y = middle_y + (row - (rows - 1) / 2) * pitch
        boxes.append(_box(emoji, int(side), x, y, image_size))
    return SceneObject(emoji, size, position, tuple(boxes))


def _room(
    position: Position, layout: Sequence[Position], single_size: Size | None
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the room for a group, as shares of the picture's side."""
    thirds = len(layout) == 3 and "centre" in layout
    # A large drawing that is alone may reach over the middle and is still clearly on its side.
    reach = 1 / 3 if thirds else 0.64 if len(layout) == 1 and single_size == "large" else 1 / 2
    spans = {"left": (0.0, reach), "top": (0.0, reach), "right": (1 - reach, 1.0), "bottom": (1 - reach, 1.0)}
    across = down = (0.0, 1.0)
    if thirds and position == "centre":
        across, down = ((reach, 1 - reach), down) if "left" in layout else (across, (reach, 1 - reach))
    for word in position.split():
        if word in ("left", "right"):
            across = spans[word]
        elif word in ("top", "bottom"):
            down = spans[word]
    return across[0], down[0], across[1], down[1]


def _grid(count: int, width: float, height: float) -> tuple[int, int]:
    """Columns and rows in which `count` drawings stand in a room of that shape."""
    if count == 4 or (count == 3 and width == height):
        return 2, 2
    return (count, 1) if width >= height else (1, count)


def _shift(slack: float, image_size: int, rng: random.Random) -> float:
    limit = min(max(slack, 0.0) / 2, _MAX_SHIFT * image_size)
    return rng.uniform(-limit, limit)


def _box(emoji: Emoji, side: int, x: float, y: float, image_size: int) -> Box:
    """Box of a drawing with its longer side `side` and its middle at (x, y), all in pixels."""
    width, height = sprite_size(emoji.code, side, image_size)
    left, top = round(x - width / 2), round(y - height / 2)
    left, top = min(max(left, 0), image_size - width), min(max(top, 0), image_size - height)
    return left, top, left + width, top + height


def random_background(rng: random.Random) -> Background:
    """A background: seven in ten are plain, all patterns and ordered pairs of colours possible."""
    pattern: Pattern = rng.choices(PATTERNS, weights=(70, 5, 5, 10, 10))[0]
    return Background(pattern, tuple(rng.sample(list(COLOURS), 1 if pattern == "plain" else 2)))


def random_scene(emoji: Sequence[Emoji], *, image_size: int, max_count: int, rng: random.Random) -> Scene:
    """A scene with one group of each of 1 to 4 emoji, at most `max_count` drawings each, at places of its own."""
    background = random_background(rng)
    while True:
        layout = list(rng.choice(LAYOUTS[len(emoji)]))
        rng.shuffle(layout)
        objects = [
            random_object(one, position, layout, image_size=image_size, max_count=max_count, rng=rng)
            for one, position in zip(emoji, layout, strict=True)
        ]
        placed = tuple(one for one in objects if one is not None)
        if len(placed) == len(objects):
            return Scene(image_size, background, placed)


def random_object(
    emoji: Emoji,
    position: Position,
    layout: Sequence[Position],
    *,
    image_size: int,
    max_count: int,
    rng: random.Random,
) -> SceneObject | None:
    """A group of `emoji` of random size and count, or None where it does not fit."""
    size = rng.choice(SIZES)
    counts = range(1, min(max_count, _MAX_COUNT[size]) + 1)
    count = rng.choices(counts, weights=[1 / n for n in counts])[0]
    return place(emoji, count, size, position, layout, image_size, rng)


# Describing

_PLACE_PHRASES: Mapping[Position, str] = {
    "left": "on the left",
    "right": "on the right",
    "centre": "in the centre",
    **{position: f"at the {position}" for position in POSITIONS if position.startswith(("top", "bottom"))},
}
#: How the first object stands to the second, in a scene of just these two places.
_RELATIONS: Mapping[tuple[Position, Position], tuple[str, ...]] = {
    ("left", "right"): ("to the left of", "left of"),
    ("right", "left"): ("to the right of", "right of"),
    ("top", "bottom"): ("above", "over"),
    ("bottom", "top"): ("below", "under"),
}


def describe(scene: Scene, rng: random.Random) -> str:
    """A true description in one of many wordings, 10 to 50 words and 19 on average, lower case, no full stop.

    "two small dogs at the bottom right and a large owl at the top left, on a light blue background"
    """
    things = list(scene.objects)
    rng.shuffle(things)
    background = describe_background(scene.background)
    match rng.randrange(6):
        case 0:
            return f"{background} with {_describe_objects(things, rng)}"
        case 1:
            return f"a picture of {_describe_objects(things, rng)}, on {background}"
        case 2:
            return f"on {background}: {_describe_objects(things, rng, place_first=rng.random() < 0.3)}"
        case _:
            return f"{_describe_objects(things, rng, place_first=rng.random() < 0.3)}, on {background}"


def _describe_objects(things: Sequence[SceneObject], rng: random.Random, place_first: bool = False) -> str:
    if len(things) == 2 and rng.random() < 0.4:
        relation = _RELATIONS.get((things[0].position, things[1].position))
        if relation is not None:
            return f"{things[0].noun_phrase} {rng.choice(relation)} {things[1].noun_phrase}"
    phrases = []
    for thing in things:
        where = place_phrase(thing.position)
        phrases.append(f"{where} {thing.noun_phrase}" if place_first else f"{thing.noun_phrase} {where}")
    return joined(phrases)


def place_phrase(position: Position) -> str:
    """Where something stands: "on the left", "at the top left"."""
    return _PLACE_PHRASES[position]


def describe_background(background: Background) -> str:
    """The background as a noun phrase: "a red background", "a background fading down from red to blue"."""
    first, last = background.colours[0], background.colours[-1]
    match background.pattern:
        case "plain":
            return with_article(f"{first} background")
        case "split left and right":
            return f"a background {first} on the left and {last} on the right"
        case "split top and bottom":
            return f"a background {first} at the top and {last} at the bottom"
        case "fading":
            return f"a background fading down from {first} to {last}"
        case "bordered":
            return f"{with_article(first)} background bordered in {last}"
