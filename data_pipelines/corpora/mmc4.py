"""MMC4 and its subsets: web documents as sentences, with pictures assigned to sentences.

How it is distributed: JSON lines, one document a line, in zips of one file each (`docs_no_face_shard_0_v2.jsonl.zip`).
A document has, among other fields,

    "text_list":  ["First sentence.", "Second sentence.", ...]
    "image_info": [{"image_name": "b9040a0dbb22.jpg", "raw_url": "http://...", "matched_text_index": 1, ...}, ...]
    "url":        "http://..."

and its pictures are to be downloaded: as files called by their `image_name`, or by `raw_url` with img2dataset.

What it becomes: shards of kind `interleaved`. Sentence i is the text of a slot and the picture matched to it that
slot's image; a second picture of one sentence gets the next slot to itself. A picture that was not downloaded leaves
its sentence without one; the document stays. Which of its images a document is trained on is up to
`images_per_document`.
"""

from __future__ import annotations

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
        "mmc4", documents, images, out_dir, _slots, _provenance, samples_per_shard=samples_per_shard
    )


def _slots(record: Record, downloaded: DownloadedImages, counts: Counter[str]) -> tuple[dict[str, bytes], int] | None:
    texts, infos = record.fields.get("text_list"), record.fields.get("image_info") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not isinstance(infos, list):
        return None
    matched: dict[int, list[bytes]] = {}
    for info in infos:
        found = _picture(info, len(texts), downloaded, counts)
        if found is not None:
            matched.setdefault(found[0], []).append(found[1])
    parts: dict[str, bytes] = {}
    slot = 0
    for i, text in enumerate(texts):
        pictures = matched.get(i, [])
        if text.strip():
            parts[f"{slot}.txt"] = text.encode("utf-8", "replace")
        elif not pictures:
            continue
        for number, data in enumerate(pictures, start=slot):
            parts[f"{number}.{image_suffix(data)}"] = data
        slot += max(1, len(pictures))
    return parts, sum(map(len, matched.values()))


def _picture(
    info: object, num_texts: int, downloaded: DownloadedImages, counts: Counter[str]
) -> tuple[int, bytes] | None:
    """Number of the sentence and bytes of a picture; None when it cannot be had."""
    fields: Mapping[str, Any] = info if isinstance(info, dict) else {}
    index = fields.get("matched_text_index")
    if not isinstance(index, int) or not 0 <= index < num_texts:
        counts["malformed_image_info"] += 1
        return None
    data = downloaded.get(name=fields.get("image_name"), url=fields.get("raw_url"))
    if data is None:
        counts["missing_image"] += 1
        return None
    return index, data


def _provenance(record: Record) -> Mapping[str, Any]:
    return {"file": record.file, "line": record.number, "url": record.fields.get("url")}
