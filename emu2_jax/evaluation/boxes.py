"""Boxes that a model names: read from its text, and compared with the true one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from emu2_jax.generation.prompt import MAX_COORDINATE

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture's sides

#: How a dataset writes a box: edges as shares of the sides (`yxyx`: top, left, bottom, right, as TFDS has it), in
#: pixels, or in pixels as left, top, width, height (COCO).
BoxForm = Literal["xyxy", "yxyx", "xyxy_pixels", "xywh_pixels"]

_LOCATIONS = re.compile(r"<patch_index_(\d{4})>\s*" * 4)
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_NUMBERS = re.compile(r"[,\s]+".join([_NUMBER] * 4))


def parse(text: str) -> Box | None:
    """The first box of a text: four location tokens, or four numbers ("[12,40,100,224]"); None where there is none.

    Location tokens and numbers run 0 ... 224; numbers that are all at most 1 are taken for shares.
    """
    for pattern in (_LOCATIONS, _NUMBERS):
        if found := pattern.search(text):
            edges = [float(edge) for edge in found.groups()]
            scale = 1.0 if pattern is _NUMBERS and max(edges) <= 1 else MAX_COORDINATE
            left, top, right, bottom = (min(edge / scale, 1.0) for edge in edges)
            return left, top, right, bottom
    return None


def as_shares(edges: Sequence[float], form: BoxForm, width: int, height: int) -> Box:
    """A box of a dataset as shares of the sides of its picture, `width` x `height` pixels.

    Raises `ValueError` when it is no box within the picture.
    """
    a, b, c, d = map(float, edges)
    if form == "yxyx":
        a, b, c, d = b, a, d, c
    elif form != "xyxy":
        if form == "xywh_pixels":
            c, d = a + c, b + d
        a, b, c, d = a / width, b / height, c / width, d / height
    slack = 0.01  # annotators go over the edge by a pixel or two
    if not (-slack <= a < c <= 1 + slack and -slack <= b < d <= 1 + slack):
        raise ValueError(f"left {a:g}, top {b:g}, right {c:g}, bottom {d:g} as shares of the sides")
    return max(a, 0.0), max(b, 0.0), min(c, 1.0), min(d, 1.0)


def overlap(first: Box, second: Box) -> float:
    """Intersection over union; 0 for a box whose edges are the wrong way round."""

    def area(box: Box) -> float:
        return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)

    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    common = area((left, top, right, bottom))
    union = area(first) + area(second) - common
    return common / union if common and area(first) and area(second) else 0.0
