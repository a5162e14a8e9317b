"""`emu2 data convert` and `emu2 data validate`: corpora as they are distributed, into and as what training reads."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data_pipelines.corpora import KINDS, SOURCES

CONVERT_EPILOG = """\
img2dataset, video2dataset and grit need no conversion: training reads their shards as they are. docs/sources.md has the
layout of each source. Examples:
  emu2 data convert mmc4 docs_*.jsonl.zip --images images/*.tar --out data/mmc4
  emu2 data convert text pile/*.jsonl.zst --tokenizer tokenizer.model --out data/pile
  emu2 data convert tfds coco_captions --split train --image image --text captions/text --out data/coco
"""

VALIDATE_EPILOG = """\
Reads and decodes everything as training would, and counts what cannot be used by cause. Exits with code 2 when a shard
is not of the layout. Examples:
  emu2 data validate img2dataset 'laion/{00000..00041}.tar'
  emu2 data validate img2dataset 'capsfusion/*.tar' --caption json.capsfusion
  emu2 data validate mmc4 'data/mmc4/*.tar'
"""

Command = Callable[[argparse.Namespace, list[str]], None]


#: Adds a command: its name, what it calls, its help line.
AddCommand = Callable[[str, Command, str], argparse.ArgumentParser]


def add_sources(convert: AddCommand) -> None:
    """Adds a sub-command for each source that has to be converted."""

    def add(name: str, function: Command, text: str, samples_per_shard: int = 1000) -> argparse.ArgumentParser:
        command = convert(name, function, text)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the shards")
        command.add_argument(
            "--samples_per_shard", type=int, default=samples_per_shard, help=f"at most ({samples_per_shard})"
        )
        return command

    for name, function, text in (
        ("mmc4", _mmc4, "web documents of MMC4: JSON lines (also zipped), images apart"),
        ("obelics", _obelics, "web documents of OBELICS: parquet, images apart"),
    ):
        documents = add(name, function, text)
        documents.add_argument("documents", nargs="+", type=Path)
        documents.add_argument(
            "--images", nargs="+", type=Path, required=True, help="directories of files, or shards of img2dataset"
        )
    storyboard = add("storyboard", _storyboard, "frames and subtitles of videos, numbered, a folder or a tar a video")
    storyboard.add_argument("inputs", nargs="+", type=Path, help="directories and tars")
    texts = add("text", _text, "language alone: JSON lines (.zst, .gz) or parquet", samples_per_shard=10_000)
    texts.add_argument("documents", nargs="+", type=Path)
    texts.add_argument("--field", default="text", help="field or column that holds the document (text)")
    texts.add_argument("--tokenizer", type=Path, help="split longer documents, by this SentencePiece model")
    texts.add_argument("--max_tokens", type=int, default=2046, help="tokens of a piece, at most (2046)")
    questions = add("openmoji_questions", _openmoji_questions, "questions about the scenes of the embedded corpus")
    questions.add_argument("shards", help="pattern of its shards of pairs: 'runs/demo/data/heldout/scenes-*.tar'")
    questions.add_argument("--samples", type=int, metavar="N", help="the first N scenes (all)")
    tfds = add("tfds", _tfds, "a prepared TFDS dataset that offers a data source")
    tfds.add_argument("dataset", help="name (coco_captions, vqa:1.0.0) or directory of a prepared version")
    tfds.add_argument("--split", required=True, help="train, validation, train[:10%%] ...")
    tfds.add_argument("--text", required=True, help="feature, or a sentence with features: 'a photo of a {label}'")
    tfds.add_argument("--image", help="feature; without one the shards hold texts alone")
    tfds.add_argument("--data_dir", type=Path, help="where the dataset was prepared (TFDS's own default)")


def add_validate(add: AddCommand) -> None:
    """Adds `validate`."""
    command = add("validate", _validate, "look through the shards of a source")
    names = sorted({*SOURCES, *KINDS})
    command.add_argument(
        "source", choices=names, metavar="SOURCE", help=f"{', '.join(SOURCES)}; or a kind: {', '.join(KINDS)}"
    )
    command.add_argument("shards", help="pattern as in a config: 'data/{000000..000041}.tar', 'data/*.tar'")
    command.add_argument("--caption", default="txt", help="where the text of a pair is: txt, or json.FIELD (txt)")
    command.add_argument("--samples", type=int, metavar="N", help="the first N samples of each shard (all)")
    command.epilog = VALIDATE_EPILOG


def _mmc4(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.mmc4 import convert

    size = arguments.samples_per_shard
    _report(convert(arguments.documents, arguments.images, arguments.out, samples_per_shard=size), arguments.out)


def _obelics(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.obelics import convert

    size = arguments.samples_per_shard
    _report(convert(arguments.documents, arguments.images, arguments.out, samples_per_shard=size), arguments.out)


def _storyboard(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.storyboard import convert

    _report(convert(arguments.inputs, arguments.out, samples_per_shard=arguments.samples_per_shard), arguments.out)


def _text(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.text import convert
    from emu2_jax.tokenizer import Tokenizer

    counts = convert(
        arguments.documents,
        arguments.out,
        field=arguments.field,
        tokenizer=None if arguments.tokenizer is None else Tokenizer(arguments.tokenizer),
        max_tokens=arguments.max_tokens,
        samples_per_shard=arguments.samples_per_shard,
    )
    _report(counts, arguments.out)


def _openmoji_questions(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.openmoji_questions import convert
    from data_pipelines.shards import expand_shards

    counts = convert(
        expand_shards(arguments.shards, "SHARDS"),
        arguments.out,
        max_samples=arguments.samples,
        samples_per_shard=arguments.samples_per_shard,
    )
    _report(counts, arguments.out)


def _tfds(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.tfds import convert

    counts = convert(
        arguments.dataset,
        arguments.out,
        split=arguments.split,
        text=arguments.text,
        image=arguments.image,
        data_dir=arguments.data_dir,
        samples_per_shard=arguments.samples_per_shard,
    )
    _report(counts, arguments.out)


def _validate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.validate import validate
    from data_pipelines.shards import expand_shards

    found = validate(
        expand_shards(arguments.shards, "SHARDS"),
        arguments.source,
        caption=arguments.caption,
        samples_per_shard=arguments.samples,
        threads=os.cpu_count() or 1,
    )
    for line in found.lines():
        print(line)
    found.check()


def _report(counts: Counter[str], out: Path) -> None:
    print(f"{out}: {', '.join(f'{count:,} {what}' for what, count in counts.items() if count)}")
