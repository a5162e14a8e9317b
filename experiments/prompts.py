"""Prompts from the command line and from files: texts, pictures by their paths, videos, boxes, fields to fill in."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.images import decode_image
from data_pipelines.kinds import SampleError
from data_pipelines.video import sample_frames
from emu2_jax.errors import DataError, UserError
from emu2_jax.generation.prompt import Box, Frames, Link
from emu2_jax.generation.template import fill

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov"})
BOX, PLACE = "box:", "place:"  # on the command line: a box as an image, as location tokens

Values = Mapping[str, Any]  # of one row, by field


@dataclass(frozen=True)
class LinkReader:
    """Turns what stands for a link into the link. Raises `DataError` for a file that cannot be read."""

    image_size: int  #: pixels, side of the encoder's input
    video_frames: int = 8  #: frames taken of a video, one from the middle of each of so many equal stretches (paper: 8)

    def argument(self, text: str) -> Link:
        """A link of the command line: the path of a picture or a video, `box:l,t,r,b`, `place:l,t,r,b`, else text."""
        for prefix in (BOX, PLACE):
            if text.startswith(prefix):
                edges = text[len(prefix) :].split(",")
                return self._box(edges, "image" if prefix == BOX else "tokens", text)
        suffix = Path(text).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return self.image(Path(text))
        return self.video(Path(text), self.video_frames) if suffix in VIDEO_SUFFIXES else text

    def entry(self, entry: Any, folder: Path, where: str) -> Link:
        """A link of a prompt file: a text, or an object that says what it is; paths are relative to the file."""
        if isinstance(entry, str):
            return entry
        keys = set(entry) if isinstance(entry, dict) else None
        if keys == {"image"}:
            return self.image(folder / str(entry["image"]))
        if keys is not None and isinstance(entry.get("frames"), list) and keys == {"frames"}:
            return Frames([self.image(folder / str(path)) for path in entry["frames"]])
        if keys is not None and "video" in keys and keys <= {"video", "frames"}:
            frames = entry.get("frames", self.video_frames)
            if not isinstance(frames, int) or frames < 1:
                raise UserError(f"{where}: frames of a video: got {frames!r}, wanted a number, at least 1")
            return self.video(folder / str(entry["video"]), frames)
        if keys is not None and "box" in keys and keys <= {"box", "form"} and isinstance(entry["box"], list):
            return self._box(entry["box"], entry.get("form", "image"), where)
        raise UserError(
            f'{where}: got {json.dumps(entry)[:80]}; wanted a text, {{"image": PATH}}, {{"video": PATH, "frames": 8}}, '
            '{"frames": [PATH, ...]} or {"box": [left, top, right, bottom], "form": "image" or "tokens"}'
        )

    def image(self, path: Path) -> np.ndarray:
        """The pixels of a picture file."""
        try:
            return decode_image(_bytes(path), self.image_size)
        except SampleError as error:
            raise DataError(f"{path}: is not an image that can be decoded: {error}") from error

    def video(self, path: Path, frames: int) -> Frames:
        """Frames of a video file."""
        try:
            return Frames(sample_frames(_bytes(path), np.full(frames, 0.5), self.image_size))
        except SampleError as error:
            raise DataError(f"{path}: is not a video that can be decoded: {error}") from error

    def _box(self, edges: Sequence[Any], form: Any, where: str) -> Box:
        try:
            left, top, right, bottom = (float(edge) for edge in edges)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: wanted four numbers, left, top, right and bottom as shares of the sides"
            ) from error
        if form not in ("image", "tokens"):
            raise UserError(f'{where}: form: got {form!r}, wanted "image" or "tokens"')
        return Box(left, top, right, bottom, form)


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt with what its answer is filed under."""

    name: str
    links: list[Link]


def prompts_of_arguments(arguments: Sequence[str], reader: LinkReader, values: Path | None) -> list[NamedPrompt]:
    """The prompt of the command line, or one for each row of `values`, its fields filled in."""
    if values is None:
        return [NamedPrompt("000", [reader.argument(text) for text in arguments])]
    return [
        NamedPrompt(f"{number:03d}", [reader.argument(fill(text, row, where)) for text in arguments])
        for number, (where, row) in enumerate(read_values(values))
    ]


def prompts_of_file(path: Path, reader: LinkReader, values: Path | None) -> list[NamedPrompt]:
    """The prompts of a .json file (one prompt, or a list of named ones) or of the lines of a .jsonl file.

    With `values` each is a template, and there is a prompt for each of its rows.
    """
    rows: list[tuple[str, Values] | None] = [None] if values is None else [*read_values(values)]
    found: list[NamedPrompt] = []
    for number, (where, entry) in enumerate(_entries(path)):
        name = f"{number:03d}"
        links = entry
        if isinstance(entry, dict):
            name, links = str(entry.get("name", name)), entry.get("prompt")
        if not isinstance(links, list) or "/" in name:
            raise UserError(f'{where}: wanted a list of links, or {{"name": NAME, "prompt": [LINK, ...]}}')
        for row_number, row in enumerate(rows):
            filled = links if row is None else [_filled(link, *row) for link in links]
            read = [reader.entry(link, path.parent, f"{where}, link {i}") for i, link in enumerate(filled, start=1)]
            found.append(NamedPrompt(name if row is None else f"{name}-{row_number:03d}", read))
    names = [prompt.name for prompt in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two prompts have the name {twice}")
    return found


def read_values(path: Path) -> list[tuple[str, Values]]:
    """The rows of a .csv file (its first line names the fields) or a .jsonl file, each with where it stands."""
    if path.suffix.lower() == ".csv":
        lines = csv.DictReader(_text(path).splitlines())
        # DictReader files what a line has too much of under None, and fills up what it lacks with None.
        rows: list[Any] = [
            {name: x for name, x in line.items() if name is not None and x is not None} for line in lines
        ]
    else:
        rows = [row for _, row in _entries(path)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is no object of fields and values")
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return [(f"row {number} of {path}", row) for number, row in enumerate(rows, start=1)]


def _filled(entry: Any, where: str, row: Values) -> Any:
    """A link of a prompt file with the fields of all its texts filled in."""
    if isinstance(entry, str):
        return fill(entry, row, where)
    if isinstance(entry, dict):
        return {name: _filled(value, where, row) for name, value in entry.items()}
    return [_filled(value, where, row) for value in entry] if isinstance(entry, list) else entry


def _entries(path: Path) -> list[tuple[str, Any]]:
    """What a .json file holds, one prompt or a list of them, or each line of a .jsonl file."""
    text = _text(path)
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        return [(f"{path}, line {number}", _json(line, f"{path}, line {number}")) for number, line in lines]
    whole = _json(text, str(path))
    many = isinstance(whole, list) and bool(whole) and all(isinstance(x, list) or _is_named(x) for x in whole)
    return [(f"{path}, prompt {number}", x) for number, x in enumerate(whole)] if many else [(str(path), whole)]


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and "prompt" in entry


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
