"""Video-text pairs as video2dataset writes them (WebVid-10M): read as they are, frames sampled while training.

A download is a directory of

    00000.tar           000000000.mp4  000000000.txt  000000000.json  000000001.mp4  ...   (.webm, .mkv, .mov, .avi too)
    00000_stats.json    {"count": 1000, "successes": 954, ...}
    00000.parquet       what the .json members say, as a table; not read

as img2dataset's, with a video in the place of the image.

In a config: kind `video_text`. Of each video `video_frames` frames (8) are taken, one from each of as many equal
stretches at a place drawn anew in each epoch. A caption may be taken from a field of the `.json` by `caption =
json.FIELD`.
"""

from __future__ import annotations

from data_pipelines.corpora.img2dataset import remarks as remarks
from data_pipelines.kinds import Kind

KIND: Kind = "video_text"
