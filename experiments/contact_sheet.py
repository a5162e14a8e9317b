"""Variants of a prompt chain side by side: one picture, or one page."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emu2_jax.report import page_environment

TEMPLATE = "contact_sheet.html.jinja"
#: Pixels: least side of a cell, the text's size, and room around things. Characters of a line come from the first two.
CELL, FONT, MARGIN = 160, 13, 8
COLUMNS = 6


@dataclass(frozen=True)
class Variant:
    """What replaced the link, and what the model answered."""

    label: str
    given: np.ndarray | None  # the link's picture, if it is one
    text: str
    images: Sequence[np.ndarray]  # drawn, 8 bits


def write_sheet(path: Path, chain: Sequence[str], number: int, variants: Sequence[Variant]) -> None:
    """The variants as a page (.html) or a picture; `chain` is how its links are named, `number` the one that varies."""
    if path.suffix.lower() == ".html":
        path.write_text(_page(chain, number, variants), encoding="utf-8")
    else:
        _picture(chain, number, variants).save(path)


def _picture(chain: Sequence[str], number: int, variants: Sequence[Variant]) -> Image.Image:
    font = ImageFont.load_default(FONT)
    columns = min(COLUMNS, len(variants))
    cells = [_cell(variant, font) for variant in variants]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    rows = -(-len(cells) // columns)
    heading = " | ".join("..." if i == number else link for i, link in enumerate(chain, start=1))
    lines = textwrap.wrap(heading, max(20, columns * (width + MARGIN) // (FONT * 3 // 5))) or [""]
    top = MARGIN + len(lines) * (FONT + 5) + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top + rows * (height + MARGIN)), "white")
    ImageDraw.Draw(sheet).multiline_text((MARGIN, MARGIN), "\n".join(lines), "black", font)
    for i, cell in enumerate(cells):
        sheet.paste(cell, (MARGIN + i % columns * (width + MARGIN), top + i // columns * (height + MARGIN)))
    return sheet


def _cell(variant: Variant, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """The replaced link on top, then the answer."""
    pictures = [_shown(image) for image in variant.images]
    given = [] if variant.given is None else [_shown(variant.given)]
    width = max([CELL, *(image.width for image in pictures + given)])
    characters = width // (FONT * 3 // 5)
    label = [] if given else textwrap.wrap(variant.label.strip(), characters)
    text = textwrap.wrap(variant.text, characters)
    line = FONT + 4
    height = sum(image.height + 4 for image in given + pictures) + line * (len(label) + len(text)) + 4
    cell = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(cell)
    y = 0
    for image in given:
        cell.paste(image, (0, y))
        y += image.height + 4
    for words in label:
        draw.text((0, y), words, "black", font)
        y += line
    for image in pictures:
        cell.paste(image, (0, y))
        y += image.height + 4
    for words in text:
        draw.text((0, y), words, "#444444", font)
        y += line
    return cell


def _shown(pixels: np.ndarray) -> Image.Image:
    """A picture at the cell's size at least, small ones in whole pixels."""
    scale = max(1, CELL // pixels.shape[1])
    return Image.fromarray(np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1))


def _page(chain: Sequence[str], number: int, variants: Sequence[Variant]) -> str:
    entries = [
        {
            "label": variant.label,
            "given": None if variant.given is None else _data_uri(variant.given),
            "text": variant.text,
            "images": [_data_uri(image) for image in variant.images],
        }
        for variant in variants
    ]
    links = [{"text": link, "varies": i == number} for i, link in enumerate(chain, start=1)]
    template = page_environment(Path(__file__).parent).get_template(TEMPLATE)
    return template.render(links=links, variants=entries, title="Variants of a prompt chain")


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    _shown(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
