"""The sources of a run: which are used, their indexes, and the embeddings that stand in for their images."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.embedding_store import EmbeddingStore, Settings, epoch_directory, num_epochs
from data_pipelines.index import SampleIndex
from data_pipelines.index_files import IndexRules, open_index
from data_pipelines.remote import Patience, RemoteFiles
from data_pipelines.samples import SampleCounts
from data_pipelines.shards import expand_shards
from emu2_jax.config import DataConfig, SourceConfig
from emu2_jax.errors import ConfigError, DataError
from emu2_jax.tokenizer import Tokenizer


def used_sources(config: DataConfig) -> list[SourceConfig]:
    """Those that take part: weight 0 leaves a source out."""
    return [source for source in config.sources if source.weight > 0]


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raises `ConfigError` when names or weights do not go together."""
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.sources: names must be unique; got {', '.join(names)}")
    for source in sources:
        if source.weight < 0:
            raise ConfigError(f"data.sources.{source.name}.weight: got {source.weight:g}; wanted 0 or more")
    if not any(source.weight > 0 for source in sources):
        raise ConfigError("data.sources: no source has a weight above 0")


def remote_files(config: DataConfig) -> RemoteFiles:
    """What reads shards behind URLs, as patient as the config says."""
    # Neighbours are worth keeping only where they come soon.
    return RemoteFiles(_patience(config), cache_bytes=config.read_ahead_mb << 20 if config.shuffle_window else 0)


def _patience(config: DataConfig) -> Patience:
    return Patience(attempts=config.read_attempts, timeout_s=config.read_timeout_s)


def open_source(
    config: DataConfig, source: SourceConfig, tokenizer: Tokenizer | None, *, processes: int = 1
) -> SampleIndex:
    """The index of a source, built where it is missing, on `processes` cores if more than one.

    Raises `DataError` for shards that are missing or, unless they are to be salvaged, damaged; when more samples are
    bad than `data.max_bad_share` allows; and when none is left.
    """
    paths = expand_shards(source.shards, f"data.sources.{source.name}.shards")
    rules = IndexRules(
        source.kind,
        tokenizer,
        salvage=config.damaged_shards == "salvage",
        caption=source.caption,
        patience=_patience(config),
        directory=config.index_dir,
    )
    index = open_index(paths, rules, threads=config.read_threads, processes=processes)
    where = f"data.sources.{source.name}"
    if index.bad:
        found = SampleCounts()
        found.add(len(index) + len(index.bad), index.bad)
        found.lose(_lost(index))
        found.check(config.max_bad_share, index.bad[0], where)
    if not len(index):
        raise DataError(f"{where}: none of its samples can be used; for example {index.bad[0]}")
    return index


def _lost(index: SampleIndex) -> int:
    """An estimate of the samples in shards of which nothing is left: as many as in the others."""
    empty = len(index.paths) - len(np.unique(index.shards))
    return round(empty * len(index) / max(1, len(index.paths) - empty))


def summary_of(index: SampleIndex) -> dict[str, int]:
    """Shards, samples, and how many were left out when the index was built, by cause."""
    causes = collections.Counter(bad.cause for bad in index.bad)
    return {"shards": len(index.paths), "samples": len(index), **causes}


def store_settings_of(settings: Settings | None, source: str) -> Settings:
    """`settings`, which a source with stored embeddings needs. Raises `ConfigError` where only pixels are read."""
    if settings is None:
        raise ConfigError(f"data.sources.{source}.embeddings: this command reads pixels; unset it")
    return settings


def open_store(source: SourceConfig, index: SampleIndex, store_settings: Settings | None) -> EmbeddingStore | None:
    """The embeddings that stand in for a source's images, if it names any; made with `store_settings`, or refused."""
    if source.embeddings is None:
        return None
    path = f"data.sources.{source.name}.embeddings"
    return EmbeddingStore(source.embeddings, index, store_settings_of(store_settings, source.name), path)


def open_crop_stores(source: SourceConfig, index: SampleIndex, store_settings: Settings | None) -> list[EmbeddingStore]:
    """The embeddings and latents of a source's crops, an epoch each; made with `store_settings`, or refused."""
    path = f"data.sources.{source.name}.embeddings"
    settings = {**store_settings_of(store_settings, source.name), "source": source.name}
    directory = Path(str(source.embeddings))
    return [
        EmbeddingStore(str(epoch_directory(directory, epoch)), index, {**settings, "epoch": epoch}, path)
        for epoch in range(num_epochs(directory, path))
    ]


def share_of_host(total: int, hosts: int, host: int | Sequence[int]) -> list[int]:
    """Which of `total` rows host number `host` of `hosts` takes: a contiguous share.

    Several numbers are the shares of a host that holds more than one, in their order.
    """
    shares = [host] if isinstance(host, int) else host
    return [row for share in shares for row in range(total * share // hosts, total * (share + 1) // hosts)]
