"""Interleaved documents: a few scenes and the texts between them, where earlier pictures help with later text.

Three kinds: *changes* (one thing happens from picture to picture), *counting*, and *comparisons* of two pictures.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipelines.corpora.openmoji_drawings import Emoji
from data_pipelines.corpora.openmoji_scenes import (
    COLOURS,
    CORNERS,
    POSITIONS,
    SIZES,
    Background,
    Position,
    Scene,
    SceneObject,
    Size,
    describe,
    place,
    place_phrase,
)
from data_pipelines.corpora.openmoji_text import NUMBER_WORDS, with_article

_OPENERS = ("then", "now", "next", "after that")


@dataclass(frozen=True)
class Story:
    """An interleaved document: texts[i] comes before scenes[i]; one more text may close it."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]


def random_story(emoji: Sequence[Emoji], *, image_size: int, max_count: int, rng: random.Random) -> Story:
    """A document of 2 to 4 pictures with drawings of `emoji`, of which a story uses up to five."""
    match rng.choices(("changes", "counting", "comparison"), weights=(6, 2 if max_count > 1 else 0, 2))[0]:
        case "changes":
            return _changes(emoji, image_size, rng)
        case "counting":
            return _counting(emoji, image_size, max_count, rng)
        case _:
            return _comparison(emoji, image_size, rng)


def _colour(rng: random.Random, other_than: str | None = None) -> str:
    return rng.choice([name for name in COLOURS if name != other_than])


def _single(
    emoji: Emoji, size: Size, position: Position, layout: Sequence[Position], image_size: int, rng: random.Random
) -> SceneObject:
    placed = place(emoji, 1, size, position, layout, image_size, rng)
    assert placed is not None, "one drawing fits into every room of these layouts"
    return placed


# Changes

#: What happens: from a scene and the emoji that may still appear to the next scene and its event in words.
_Change = Callable[[Scene, list[Emoji], random.Random], tuple[Scene, str]]


def _changes(emoji: Sequence[Emoji], image_size: int, rng: random.Random) -> Story:
    cast = rng.sample(list(emoji), 5)
    things = [
        _single(cast.pop(), rng.choice(SIZES), position, CORNERS, image_size, rng)
        for position in rng.sample(CORNERS, rng.choice((1, 2)))
    ]
    scenes = [Scene(image_size, Background("plain", (_colour(rng),)), tuple(things))]
    texts = [describe(scenes[0], rng)]
    for _ in range(rng.choice((1, 2, 3))):
        change = rng.choice(_possible_changes(scenes[-1]))
        scene, event = change(scenes[-1], cast, rng)
        scenes.append(scene)
        texts.append(f"{rng.choice(_OPENERS)} {event}")
    if rng.random() < 0.5:
        texts.append(f"in the end: {describe(scenes[-1], rng)}")
    return Story(tuple(texts), tuple(scenes))


def _add(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    position = rng.choice(_free_corners(scene))
    thing = _single(cast.pop(), rng.choice(SIZES), position, CORNERS, scene.image_size, rng)
    event = f"{thing.noun_phrase} appears {place_phrase(position)}"
    return dataclasses.replace(scene, objects=(*scene.objects, thing)), event


def _remove(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    gone = rng.choice(scene.objects)
    rest = tuple(thing for thing in scene.objects if thing is not gone)
    return dataclasses.replace(scene, objects=rest), f"the {gone.emoji.name} disappears"


def _move(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    old = rng.choice(scene.objects)
    position = rng.choice(_free_corners(scene))
    new = _single(old.emoji, old.size, position, CORNERS, scene.image_size, rng)
    return _with_changed(scene, old, new), f"the {old.emoji.name} moves to the {position}"


def _swap(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    old = rng.choice(scene.objects)
    new = _single(cast.pop(), old.size, old.position, CORNERS, scene.image_size, rng)
    return _with_changed(scene, old, new), f"the {old.emoji.name} turns into {with_article(new.emoji.name)}"


def _resize(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    old = rng.choice(scene.objects)
    size: Size = "small" if old.size == "large" else "large"
    new = _single(old.emoji, size, old.position, CORNERS, scene.image_size, rng)
    return _with_changed(scene, old, new), f"the {old.emoji.name} becomes {size}"


def _recolour(scene: Scene, cast: list[Emoji], rng: random.Random) -> tuple[Scene, str]:
    colour = _colour(rng, other_than=scene.background.colours[0])
    return dataclasses.replace(scene, background=Background("plain", (colour,))), f"the background turns {colour}"


def _possible_changes(scene: Scene) -> list[_Change]:
    changes: list[_Change] = [_move, _swap, _resize, _recolour]
    if len(scene.objects) < 3:
        changes += [_add, _add]
    if len(scene.objects) > 1:
        changes.append(_remove)
    return changes


def _free_corners(scene: Scene) -> list[Position]:
    return [corner for corner in CORNERS if corner not in {thing.position for thing in scene.objects}]


def _with_changed(scene: Scene, old: SceneObject, new: SceneObject) -> Scene:
    return dataclasses.replace(scene, objects=tuple(new if thing is old else thing for thing in scene.objects))


# Counting


def _counting(emoji: Sequence[Emoji], image_size: int, max_count: int, rng: random.Random) -> Story:
    one = rng.choice(emoji)
    position = rng.choice(POSITIONS)
    background = Background("plain", (_colour(rng),))
    counts = list(range(1, rng.randint(2, max_count) + 1))
    if rng.random() < 0.3:
        counts.reverse()
    scenes = [_crowd(one, count, position, background, image_size, rng) for count in counts]
    texts = [describe(scenes[0], rng)]
    for scene in scenes[1:]:
        verb = "is" if scene.objects[0].count == 1 else "are"
        texts.append(f"{rng.choice(_OPENERS)} there {verb} {scene.objects[0].noun_phrase}")
    if rng.random() < 0.5:
        texts.append(f"we counted {', '.join(NUMBER_WORDS[count] for count in counts)}")
    return Story(tuple(texts), tuple(scenes))


def _crowd(
    emoji: Emoji, count: int, position: Position, background: Background, image_size: int, rng: random.Random
) -> Scene:
    crowd = place(emoji, count, "small", position, (position,), image_size, rng)
    assert crowd is not None, "up to four small drawings fit everywhere in a scene of their own"
    return Scene(image_size, background, (crowd,))


# Comparisons


@dataclass(frozen=True)
class _Shot:
    """A picture of one drawing, by the four things in which two pictures can differ."""

    emoji: Emoji
    size: Size
    position: Position
    colour: str

    def scene(self, image_size: int, rng: random.Random) -> Scene:
        thing = _single(self.emoji, self.size, self.position, (self.position,), image_size, rng)
        return Scene(image_size, Background("plain", (self.colour,)), (thing,))


def _comparison(emoji: Sequence[Emoji], image_size: int, rng: random.Random) -> Story:
    one, other = rng.sample(list(emoji), 2)
    first = _Shot(one, rng.choice(SIZES), rng.choice(POSITIONS), _colour(rng))
    match rng.randrange(4):
        case 0:
            second = dataclasses.replace(first, emoji=other)
            difference = f"first {with_article(one.name)}, then {with_article(other.name)}"
        case 1:
            second = dataclasses.replace(first, colour=_colour(rng, other_than=first.colour))
            difference = f"first the background is {first.colour}, then {second.colour}"
        case 2:
            second = dataclasses.replace(first, size="small" if first.size == "large" else "large")
            difference = f"first the {one.name} is {first.size}, then {second.size}"
        case _:
            position = rng.choice([position for position in POSITIONS if position != first.position])
            second = dataclasses.replace(first, position=position)
            places = (place_phrase(shot.position) for shot in (first, second))
            difference = f"first the {one.name} is {', then '.join(places)}"
    shift = rng.random()  # one for both, so that nothing else differs
    scenes = (first.scene(image_size, random.Random(shift)), second.scene(image_size, random.Random(shift)))
    texts = (f"first picture: {describe(scenes[0], rng)}", f"second picture: {describe(scenes[1], rng)}")
    return Story((*texts, f"the difference: {difference}"), scenes)
