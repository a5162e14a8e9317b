"""Grounded image-text pairs in GRIT's layout (GRIT-20M, and grounded captions of one's own): read as they are.

GRIT is a table of URLs, captions and boxes, downloaded with img2dataset and
`--caption_col caption --save_additional_columns '["noun_chunks","ref_exps"]'` into

    00000.tar           000000000.jpg  000000000.txt  000000000.json  ...
    00000_stats.json    see img2dataset.py

where the `.json` has, among other fields,

    "caption":      "a wire hanger with a paper cover that reads we heart our customers"
    "noun_chunks":  [[19, 32, 0.0196, 0.3105, 0.9622, 0.9603, 0.7930], [0, 13, 0.0194, 0.0279, 0.9625, 0.9589, 0.7803]]
    "ref_exps":     [[0, 66, 0.0194, 0.0279, 0.9625, 0.9589, 0.7803]]

An entry is: first character of the phrase in the caption, character after its last one, then left, top, right and
bottom of its box as shares of the picture's width and height, then a confidence that is not read. Entries with equal
characters are several boxes of one phrase.

In a config: kind `grounded`. How a caption with its boxes becomes tokens is in `data_pipelines/grounding.py`.
"""

from __future__ import annotations

from data_pipelines.corpora.img2dataset import remarks as remarks
from data_pipelines.kinds import Kind

KIND: Kind = "grounded"
