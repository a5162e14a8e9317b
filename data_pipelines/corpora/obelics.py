"""OBELICS: web pages as paragraphs and pictures in the order of the page.

How it is distributed: parquet (JSON lines are read too), one document a row, with the columns

    images            [null, "http://.../a.jpg", null, ...]       URL of the picture at each place, or null
    texts             ["A paragraph.", null, "Another.", ...]     paragraph at each place, or null
    general_metadata  '{"url": "http://...", ...}'                of the page, a string that holds JSON

where exactly one of the two lists has something at each place. The pictures are to be downloaded with img2dataset.

What it becomes: shards of kind `interleaved`. A picture and the paragraph that follows it directly are the image and
the text of one slot; any other paragraph, and a picture before another picture, has a slot to itself. A picture that
was not downloaded leaves its slot to the paragraph; the document stays. (OBELICS assigns no texts to pictures; that a
picture goes with what follows it is this project's choice.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.corpora.converted import convert_documents
from data_pipelines.corpora.downloaded import DownloadedImages, image_suffix
from data_pipelines.corpora.records import Record
from data_pipelines.kinds import Kind

KIND: Kind = "interleaved"


def convert(
    documents: Sequence[Path], images: Sequence[Path], out_dir: Path, *, samples_per_shard: int = 1000
) -> Counter[str]:
    """Writes the documents with the pictures found in `images` into shards (`converted.convert_documents`)."""
    return convert_documents(
        "obelics",
        documents,
        images,
        out_dir,
        _slots,
        _provenance,
        samples_per_shard=samples_per_shard,
        columns=("images", "texts", "general_metadata"),
    )


def _slots(record: Record, downloaded: DownloadedImages, counts: Counter[str]) -> tuple[dict[str, bytes], int] | None:
    urls, texts = record.fields.get("images"), record.fields.get("texts")
    if not isinstance(urls, list) or not isinstance(texts, list) or len(urls) != len(texts):
        return None
    parts: dict[str, bytes] = {}
    slot = num_images = 0
    has_image = False  # the slot has an image and waits for the paragraph after it
    for url, text in zip(urls, texts, strict=True):
        if isinstance(text, str) and text.strip():
            parts[f"{slot}.txt"] = text.encode("utf-8", "replace")
            slot, has_image = slot + 1, False
        elif isinstance(url, str):
            data = downloaded.get(url=url)
            if data is None:
                counts["missing_image"] += 1
                continue
            slot += has_image
            parts[f"{slot}.{image_suffix(data)}"] = data
            has_image = True
            num_images += 1
    return parts, num_images


def _provenance(record: Record) -> Mapping[str, Any]:
    return {"file": record.file, "row": record.number, "url": _page_url(record)}


def _page_url(record: Record) -> str | None:
    try:
        metadata = json.loads(record.fields.get("general_metadata") or "{}")
    except (ValueError, TypeError):
        return None
    return metadata.get("url") if isinstance(metadata, dict) else None
