"""What `emu2 data` does with the shards of a recipe or of a pattern."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.index import SampleIndex
from data_pipelines.sources import open_source
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError
from emu2_jax.tokenizer import Tokenizer
from experiments.inputs import open_tokenizer
from experiments.runs import resolve


def index_recipe(recipe: str, gin_files: Sequence[Path], gin_flags: Sequence[str], *, processes: int) -> None:
    """Build the indexes of every source that a recipe uses."""
    config, _ = resolve(recipe, gin_files, gin_flags)
    sources = [source for source in config.data.sources if source.weight > 0]
    if not sources:
        raise ConfigError(f"{recipe}: has no data.sources with a weight above 0")
    tokenizer = open_tokenizer(config) if config.data.tokenizer else None
    for source in sources:
        _index(config.data, source, tokenizer, processes)


def index_shards(
    shards: str, kind: Any, tokenizer: Path, *, caption: str, index_dir: str | None, salvage: bool, processes: int
) -> None:
    """Build the indexes of the shards that a pattern names."""
    source = SourceConfig(name="shards", kind=kind, shards=shards, caption=caption)
    config = DataConfig(sources=(source,), index_dir=index_dir, damaged_shards="salvage" if salvage else "stop")
    # Whether too many samples are bad is for the run to judge, by its own settings.
    _index(dataclasses.replace(config, max_bad_share=1.0), source, Tokenizer(tokenizer), processes)


def _index(config: DataConfig, source: SourceConfig, tokenizer: Tokenizer | None, processes: int) -> None:
    began = time.perf_counter()
    index = open_source(config, source, tokenizer, processes=processes)
    print(f"{source.name}: {describe(index)}; {time.perf_counter() - began:.1f} s")


def describe(index: SampleIndex) -> str:
    """Counts of an index, and its bad samples by cause with an example of each."""
    text = f"{len(index):,} samples in {len(index.paths):,} shards"
    text += f", {int(index.tokens.sum()):,} tokens, {int(index.is_image.sum()):,} images"
    causes = collections.Counter(bad.cause for bad in index.bad)
    for cause, count in causes.most_common():
        example = next(bad for bad in index.bad if bad.cause == cause)
        text += f"\n  {cause}: {count:,}, for example {example.shard}, sample {example.key!r}, byte {example.offset}"
    return text
