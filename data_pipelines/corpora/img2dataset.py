"""Image-text pairs as img2dataset writes them (LAION-2B, LAION-COCO, COYO, CapsFusion): read as they are.

A download is a directory of

    00000.tar           000000000.jpg  000000000.txt  000000000.json  000000001.jpg  ...   (.png and .webp too)
    00000_stats.json    {"count": 10000, "successes": 8731, "failed_to_download": 1150, ...}
    00000.parquet       what the .json members say, as a table; not read

where `.txt` is the caption and `.json` has `url`, `caption`, `status`, `width`, `height` and whatever columns were
asked for. The statistics are written last: a tar without them may be a download that was killed.

In a config: kind `image_text`. CapsFusion-120M is a table of URLs with several captions each, of which a column
(`capsfusion`) is downloaded either as the caption, or by `save_additional_columns`; then `caption = json.capsfusion`
takes it from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.index import SampleIndex
from data_pipelines.kinds import Kind

KIND: Kind = "image_text"


def remarks(index: SampleIndex) -> Iterator[tuple[str, str]]:
    """What the statistics beside a shard say against it, in a word and in a sentence: nothing where they agree."""
    shard = Path(index.paths[0])
    stats = shard.with_name(f"{shard.stem}_stats.json")
    try:
        fields = json.loads(stats.read_text(encoding="utf-8"))
        successes = int(fields["successes"])
    except FileNotFoundError:
        yield "no_statistics", f"{shard}: no {stats.name} beside it; the download may not have been finished"
        return
    except (OSError, ValueError, LookupError, TypeError):
        yield "bad_statistics", f"{stats}: no statistics of a download; wanted an object with the number of `successes`"
        return
    found = len(index) + len(index.bad)
    if found != successes:
        line = f"{shard}: holds {found} samples, but {stats.name} says {successes}; the download may have been resumed"
        yield "other_statistics", line
