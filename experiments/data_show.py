"""`emu2 data show`: a page with what the model is given, drawn from the very arrays that a step reads.

Packed rows are drawn element by element: tokens as text, visual positions as the image in their slot, documents apart,
and in colour what carries loss. For the visual decoder the page shows its crops.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.clips import open_clip_pipeline
from data_pipelines.crops import ImagePipeline, open_image_pipeline
from data_pipelines.pipeline import open_pipeline
from emu2_jax import losses
from emu2_jax.config import DataConfig, ExperimentConfig, ObjectiveConfig
from emu2_jax.errors import UserError
from emu2_jax.report import page_environment, write_page
from emu2_jax.tokenizer import Tokenizer
from experiments.describe import image_reading
from experiments.inputs import open_tokenizer, timing

TEMPLATE = "data_show.html.jinja"
#: In every page that this command writes: only such a page is overwritten.
MARK = "<!-- emu2 data show -->"
THUMBNAIL_SIDE = 160  # pixels


@dataclasses.dataclass(frozen=True)
class Element:
    """A token, or all the visual positions of one image."""

    text: str
    positions: int
    loss: str  # "text", "visual", or "" where nothing is supervised
    weight: float  # mean over the positions
    is_special: bool
    slot: int | None  # of an image
    about: str  # shown when pointed at


@dataclasses.dataclass(frozen=True)
class Document:
    """One segment of a row."""

    number: int
    positions: int
    elements: Sequence[Element]


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row."""

    source: str
    epoch: int
    length: int
    documents: Sequence[Document]
    holes: int  # positions of samples that could not be used, between documents
    padding: int  # positions after the last document
    slots: Sequence[str | None]  # images as data URIs; None = empty
    bad: Sequence[str]

    @property
    def used(self) -> int:
        """Positions of documents."""
        return sum(document.positions for document in self.documents)


@dataclasses.dataclass(frozen=True)
class CropView:
    """An image of the visual decoder and its micro-conditions."""

    source: str
    picture: str
    original: str
    corner: str
    side: int


def show(config: ExperimentConfig, out: Path, *, num_rows: int, first: int = 0) -> Path:
    """Writes the page of `num_rows` rows (or decoder images), from number `first` of the run on.

    Raises `UserError` when `out` exists and is not a page of this command.
    """
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{out}: exists and is not a page that this command wrote; give another name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent}: is no directory to write a page into")
    if num_rows < 1 or first < 0:
        raise UserError(f"--rows {num_rows} --first {first}: wanted at least one row, and rows are counted from 0")
    numbers = range(first, first + num_rows)
    template = page_environment(Path(__file__).parent).get_template(TEMPLATE)
    shown = {"rows": rows(config, numbers)} if config.train.task == "pretrain" else {"crops": crops(config, numbers)}
    page = template.render(
        mark=MARK, config=config, reading=image_reading(config), first=first, **{"rows": [], "crops": [], **shown}
    )
    return write_page(out, page)


def rows(config: ExperimentConfig, numbers: Sequence[int]) -> list[Row]:
    """The packed rows with these numbers. Taken one at a time: a step of a large run holds thousands of images."""
    tokenizer = open_tokenizer(config)
    pipeline = open_pipeline(
        _row_by_row(config.data),
        visual_tokens=config.model.num_visual_tokens,
        image_size=config.model.vision.image_size,
        tokenizer=tokenizer,
    )
    found = []
    for number in numbers:
        batch = pipeline.batch(number)
        fields = {name: array[0] for name, array in batch.fields.items()}
        found.append(
            Row(
                source=batch.sources[0],
                epoch=batch.epochs[batch.sources[0]],
                length=len(fields["tokens"]),
                documents=list(documents(batch.fields, config.objective, tokenizer, config.model.num_visual_tokens)),
                holes=_holes(fields["segment_ids"]),
                padding=int(len(fields["tokens"]) - _end(fields["segment_ids"])),
                slots=[
                    thumbnail(image) if is_full else None
                    for image, is_full in zip(fields["images"], fields["image_mask"], strict=True)
                ],
                bad=[str(bad) for bad in batch.bad],
            )
        )
    return found


def _row_by_row(data: DataConfig) -> DataConfig:
    """The same rows in the same order, one in each step, of pixels wherever those are."""
    sources = tuple(dataclasses.replace(source, batch_rows=None, embeddings=None) for source in data.sources)
    return dataclasses.replace(data, sources=sources, global_batch_rows=1, max_bad_share=1.0)


def _end(segment_ids: np.ndarray) -> int:
    used = np.flatnonzero(segment_ids)
    return int(used[-1]) + 1 if len(used) else 0


def _holes(segment_ids: np.ndarray) -> int:
    return int((segment_ids[: _end(segment_ids)] == 0).sum())


def documents(
    batch: dict[str, np.ndarray], objective: ObjectiveConfig, tokenizer: Tokenizer, visual_tokens: int
) -> Iterator[Document]:
    """The documents of a batch of one row, in their order; an image takes `visual_tokens` positions."""
    elements = list(_elements(batch, objective, tokenizer, visual_tokens))
    segments = batch["segment_ids"][0]
    for number in sorted(set(segments[segments > 0].tolist())):
        own = [element for at, element in elements if segments[at] == number]
        yield Document(number, int((segments == number).sum()), own)


def _elements(
    batch: dict[str, np.ndarray], objective: ObjectiveConfig, tokenizer: Tokenizer, visual_tokens: int
) -> Iterator[tuple[int, Element]]:
    """Every element of a row with the position it begins at. What the objective supervises is asked of the objective:
    position t - 1 holds the weight of the element at t."""
    ids = {"image_start_id": tokenizer.image_start_id, "image_end_id": tokenizer.image_end_id}
    targets = losses.next_elements({name: jnp.asarray(array) for name, array in batch.items()}, objective, **ids)
    text = np.roll(np.asarray(targets.text_weights)[0], 1) * (objective.text_loss_weight > 0)
    visual = np.roll(np.asarray(targets.visual_weights)[0], 1) * (objective.regression_loss_weight > 0)
    tokens, segments, is_visual = (batch[name][0] for name in ("tokens", "segment_ids", "is_visual"))
    slots = np.where(is_visual, batch["visual_index"][0] // visual_tokens, -1)

    def key(at: int) -> tuple[int, int, int]:
        return int(segments[at]), int(slots[at]), -1 if is_visual[at] else at

    for _, run in groupby(np.flatnonzero(segments).tolist(), key):
        span = list(run)
        at, token = span[0], int(tokens[span[0]])
        loss, weight = ("visual", visual[span].mean()) if is_visual[at] else ("text", text[at])
        name = f"{len(span)} visual positions" if is_visual[at] else f"id {token}: {tokenizer.piece(token)}"
        place = f"position {at}" if len(span) == 1 else f"positions {at} to {span[-1]}"
        yield (
            at,
            Element(
                text=tokenizer.piece(token).replace("▁", " "),
                positions=len(span),
                loss=loss if weight > 0 else "",
                weight=float(weight),
                is_special=token in tokenizer.special_ids.values() or token in (tokenizer.bos_id, tokenizer.eos_id),
                slot=int(slots[at]) if is_visual[at] else None,
                about=f"{place}, {name}, " + (f"{loss} loss of weight {weight:g}" if weight > 0 else "no loss"),
            ),
        )


def crops(config: ExperimentConfig, numbers: Sequence[int]) -> list[CropView]:
    """The decoder's images, or clips side by side, with these numbers; those that cannot be used are left out."""
    data, decoder = _row_by_row(config.data), config.decoder
    size, scale = decoder.image_size, decoder.random_scale_max
    pipeline: ImagePipeline
    if config.train.task == "video_decoder":
        pipeline = open_clip_pipeline(
            data, image_size=size, batch_clips=1, timing=timing(config), random_scale_max=scale
        )
    else:
        pipeline = open_image_pipeline(data, image_size=size, batch_images=1, random_scale_max=scale)
    found = []
    for number in numbers:
        batch = pipeline.batch(number)
        if not batch.fields["weight"][0]:
            continue
        height, width, top, left, side, _ = batch.fields["time_ids"][0].tolist()
        image = batch.fields["images"][0]
        picture = thumbnail(_tiled(image) if image.ndim == 4 else image)
        found.append(CropView(batch.sources[0], picture, f"{width} x {height}", f"{left}, {top}", side))
    return found


def _tiled(frames: UInt8[np.ndarray, "T S S 3"]) -> UInt8[np.ndarray, "K K 3"]:
    """The frames of a clip in reading order on one square, what is left of it black."""
    count, size = frames.shape[:2]
    side = math.ceil(count**0.5)
    tiles = np.concatenate([frames, np.zeros((side**2 - count, *frames.shape[1:]), np.uint8)])
    rows = tiles.reshape(side, side, size, size, 3).swapaxes(1, 2)
    return rows.reshape(side * size, side * size, 3)


def thumbnail(image: UInt8[np.ndarray, "S S 3"]) -> str:
    """An image as a data URI, small ones exact and large ones shrunk."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if picture.width <= THUMBNAIL_SIDE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
