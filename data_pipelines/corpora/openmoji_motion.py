"""Things that move: short videos of one drawing on its way, and storyboards of one that wanders about.

Frames are scenes, so that what may not be seen in training can be kept out of them (`HeldOutRules`).
"""

from __future__ import annotations

import dataclasses
import fractions
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from jaxtyping import UInt8

from data_pipelines.corpora.openmoji_drawings import Emoji
from data_pipelines.corpora.openmoji_scenes import (
    COLOURS,
    CORNERS,
    SIZES,
    Background,
    Position,
    Scene,
    SceneObject,
    Size,
    describe,
    describe_background,
    place,
    place_phrase,
    render,
)
from data_pipelines.corpora.openmoji_text import with_article

NUM_FRAMES = 16
FRAMES_PER_SECOND = 8

#: What lies halfway between two corners.
_HALFWAY: dict[frozenset[Position], Position] = {
    frozenset[Position](("top left", "top right")): "top",
    frozenset[Position](("bottom left", "bottom right")): "bottom",
    frozenset[Position](("top left", "bottom left")): "left",
    frozenset[Position](("top right", "bottom right")): "right",
    frozenset[Position](("top left", "bottom right")): "centre",
    frozenset[Position](("top right", "bottom left")): "centre",
}


@dataclass(frozen=True)
class Clip:
    """A video before it is drawn."""

    caption: str
    frames: tuple[Scene, ...]


def random_clip(emoji: Sequence[Emoji], *, image_size: int, rng: random.Random) -> Clip:
    """One drawing moves from corner to corner; along an edge another may stay where it is."""
    moving, staying = rng.sample(list(emoji), 2)
    start, end = rng.sample(CORNERS, 2)
    size = rng.choice(SIZES)
    background = Background("plain", (rng.choice(list(COLOURS)),))
    seed = rng.random()  # one for both ends, so that the drawing keeps its size and its place within the corner
    first, last = (_at(moving, size, corner, image_size, random.Random(seed)) for corner in (start, end))
    others: tuple[SceneObject, ...] = ()
    free = [corner for corner in CORNERS if corner not in (start, end)]
    halfway = _HALFWAY[frozenset((start, end))]
    if halfway != "centre" and rng.random() < 0.5:
        others = (_at(staying, rng.choice(SIZES), rng.choice(free), image_size, rng),)
    frames = []
    for i in range(NUM_FRAMES):
        share = i / (NUM_FRAMES - 1)
        where = start if share < 1 / 3 else end if share > 2 / 3 else halfway
        frames.append(Scene(image_size, background, (*others, _between(first, last, share, where))))
    return Clip(_clip_caption(first, last, others, background, rng), tuple(frames))


def _at(emoji: Emoji, size: Size, corner: Position, image_size: int, rng: random.Random) -> SceneObject:
    placed = place(emoji, 1, size, corner, CORNERS, image_size, rng)
    assert placed is not None, "one drawing fits into every corner"
    return placed


def _between(first: SceneObject, last: SceneObject, share: float, position: Position) -> SceneObject:
    """The drawing on its way: at `first` for share 0, at `last` for share 1."""
    (left, top, right, bottom), (to_left, to_top, _, _) = first.boxes[0], last.boxes[0]
    x, y = round(left + share * (to_left - left)), round(top + share * (to_top - top))
    return dataclasses.replace(first, position=position, boxes=((x, y, x + right - left, y + bottom - top),))


def _clip_caption(
    first: SceneObject,
    last: SceneObject,
    others: Sequence[SceneObject],
    background: Background,
    rng: random.Random,
) -> str:
    ends = (first.position, last.position)
    what = f"{first.noun_phrase} moves from the {ends[0]} to the {ends[1]}"
    for other in others:
        stays = f"{other.noun_phrase} stays {place_phrase(other.position)}"
        what = f"{what} while {stays}" if rng.random() < 0.5 else f"{stays} while {what}"
    where = describe_background(background)
    return rng.choice((f"{what}, on {where}", f"on {where}: {what}", f"a video of {where}: {what}"))


def encode_mp4(
    pictures: Sequence[UInt8[np.ndarray, "S S 3"]], frames_per_second: int | fractions.Fraction = FRAMES_PER_SECOND
) -> bytes:
    """The pictures as an mp4 file (H.264); equal pictures give equal bytes with the same version of PyAV."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the number of threads changes the bytes
        # With its macroblock tree x264 gives now and then other bytes for the same small pictures (of 60 clips, 15 came
        # out in two ways over 12 runs); without it, never.
        stream.options = {"crf": "18", "preset": "medium", "flags": "+bitexact", "x264-params": "mbtree=0"}
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, fractions.Fraction(1, frames_per_second)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def draw(frames: Sequence[Scene]) -> bytes:
    """The mp4 file of a clip's frames. H.264 takes even numbers of pixels: an odd last row and column are left out."""
    even = frames[0].image_size // 2 * 2
    return encode_mp4([render(frame)[:even, :even] for frame in frames])


# Storyboards


@dataclass(frozen=True)
class Storyboard:
    """Frames of a longer video and what is said with each."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]


def random_storyboard(emoji: Sequence[Emoji], *, image_size: int, rng: random.Random) -> Storyboard:
    """One drawing in 5 to 8 frames: it goes to other corners, stays, grows and shrinks. Later texts say only "it"."""
    one, corner, size = rng.choice(emoji), rng.choice(CORNERS), rng.choice(SIZES)
    background = Background("plain", (rng.choice(list(COLOURS)),))
    seed = rng.random()

    def scene() -> Scene:
        return Scene(image_size, background, (_at(one, size, corner, image_size, random.Random(seed)),))

    scenes = [scene()]
    texts = [f"this is {with_article(one.name)}: {describe(scenes[0], rng)}"]
    for _ in range(rng.randint(4, 7)):
        event = rng.choice(("goes", "goes", "changes", "stays"))
        if event == "goes":
            corner = rng.choice([other for other in CORNERS if other != corner])
            texts.append(rng.choice((f"it goes to the {corner}", f"now it is {place_phrase(corner)}")))
        elif event == "changes":
            size = "small" if size == "large" else "large"
            texts.append(f"it {'grows' if size == 'large' else 'shrinks'}")
        else:
            texts.append("it stays where it is")
        scenes.append(scene())
    return Storyboard(tuple(texts), tuple(scenes))
