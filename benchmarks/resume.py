"""`python -m benchmarks.resume`: the size of the data position in a checkpoint, and the time to go on from it.

A million pairs in a thousand shards (one shard under a thousand names). The position lies deep in a later epoch, near
the end of a planned block, where most has to be planned; timed are opening the stored indexes, restoring, and the first
batch of one row. What is imported first is not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image

from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.pipeline import Pipeline, open_pipeline
from data_pipelines.planning import BLOCK_SAMPLES
from data_pipelines.position import saved_of
from data_pipelines.shard_writer import ShardWriter
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.tokenizer import Tokenizer

WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "red",
    "cat",
    "on",
    "blue",
    "mat",
    "and",
    "two",
    "dogs",
    "near",
    "one",
    "tree",
    "in",
)
EPOCH = 3


def make_tokenizer(folder: Path) -> Tokenizer:
    """One id a word."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_prefix=str(folder / "words"),
        model_type="word",
        vocab_size=3 + len(set(WORDS)),
        minloglevel=2,
    )
    return Tokenizer(folder / "words.model")


def make_shards(folder: Path, shards: int, samples: int) -> None:
    """A shard of small pairs, under many names."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(picture, "PNG")
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(2.95, 0.72, samples)).round().clip(3, 300).astype(int)
    with ShardWriter(folder / "pairs-00000.tar") as shard:
        for number, length in enumerate(lengths.tolist()):
            caption = " ".join(rng.choice(WORDS, length))
            shard.write(f"{number:06d}", {"png": picture.getvalue(), "txt": caption.encode()})
    for number in range(1, shards):
        os.link(folder / "pairs-00000.tar", folder / f"pairs-{number:05d}.tar")


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="of each shard")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder)
        make_shards(folder, arguments.shards, arguments.samples)
        source = SourceConfig(name="pairs", kind="image_text", shards=f"{folder}/pairs-*.tar")
        config = DataConfig(sources=(source,), image_slots=23, global_batch_rows=1, read_threads=2)
        paths = sorted(str(path) for path in folder.glob("pairs-*.tar"))
        began = time.perf_counter()
        open_index(paths, IndexRules("image_text", tokenizer), processes=os.cpu_count() or 1)
        indexed_s = time.perf_counter() - began

        def open_all() -> Pipeline:
            return open_pipeline(config, visual_tokens=64, image_size=224, tokenizer=tokenizer)

        state = _far_state(open_all(), arguments.shards * arguments.samples)
        text = json.dumps(state)
        began = time.perf_counter()
        pipeline = open_all()
        opened_s = time.perf_counter() - began
        pipeline.restore(json.loads(text))
        batch = pipeline.batch(state["step"])
        restored_s = time.perf_counter() - began
        assert batch.epochs == {"pairs": EPOCH} and not batch.bad
    line = {
        "case": "resume",
        "state_bytes": len(text),
        "restore_and_first_row_s": round(restored_s, 3),
        "of_which_open_s": round(opened_s, 3),
        "first_indexing_s": round(indexed_s, 1),
    }
    print(json.dumps(line), flush=True)


def _far_state(pipeline: Pipeline, samples: int) -> dict[str, Any]:
    """A position in a later epoch, near the end of a block in its middle.

    How many rows came before is made up: nothing depends on it but the numbers of the rows.
    """
    block = -(-samples // BLOCK_SAMPLES) // 2
    first_row = 47_000 * EPOCH + 23_000
    state = pipeline.state(0)
    saved = saved_of(state)["pairs"]._replace(epoch=EPOCH, block=block, first_row=first_row)
    state["sources"]["pairs"] = list(saved)
    pipeline.restore(state)
    rows = 0
    while saved_of(pipeline.state(first_row + rows + 100))["pairs"].first_row == first_row:
        rows += 100
    return pipeline.state(first_row + rows)


if __name__ == "__main__":
    main()
