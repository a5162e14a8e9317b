"""What the OpenMoji corpus keeps away from training: emoji, pairs of emoji, and places on backgrounds.

Every choice is a hash of the seed and of the thing itself, so it does not depend on how many samples are made.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.corpora.openmoji_drawings import Emoji, catalogue
from data_pipelines.corpora.openmoji_scenes import Position, Scene


def hash_share(*parts: object) -> float:
    """A number in [0, 1) that is the same for equal `parts` on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56


def split_emoji(
    groups: Sequence[str], num_emoji: int | None, unseen_share: float, seed: int
) -> tuple[tuple[Emoji, ...], tuple[Emoji, ...]]:
    """The emoji that training may show, and those that it never shows.

    `num_emoji` are taken of those in `groups` (None = all), and of these `unseen_share` (at least one) go unseen.
    """
    emoji = [one for group in groups for one in catalogue(group)]
    taken = sorted(emoji, key=lambda one: hash_share(seed, "taken", one.code))[:num_emoji]
    by_hash = sorted(taken, key=lambda one: hash_share(seed, "unseen", one.code))
    num_unseen = max(1, round(unseen_share * len(by_hash)))
    return tuple(by_hash[num_unseen:]), tuple(by_hash[:num_unseen])


@dataclass(frozen=True)
class HeldOutRules:
    """Which combinations of seen emoji are kept away from training."""

    seed: int
    pair_share: float  #: share of the unordered pairs of two emoji that are held out
    placement_share: float  #: share of the triples (emoji, first background colour, position) that are held out

    def holds_out_pair(self, first: Emoji, second: Emoji) -> bool:
        """Whether no training picture or document shows both of two different emoji."""
        codes = sorted((first.code, second.code))
        return first != second and hash_share(self.seed, "pair", *codes) < self.pair_share

    def holds_out_placement(self, emoji: Emoji, colour: str, position: Position) -> bool:
        """Whether no training picture shows the emoji at that place on that colour."""
        return hash_share(self.seed, "placement", emoji.code, colour, position) < self.placement_share

    def holds_out_any(self, scenes: Sequence[Scene]) -> bool:
        """Whether a document of these scenes, one or several, holds anything that is held out."""
        shown = sorted({thing.emoji.code: thing.emoji for scene in scenes for thing in scene.objects}.items())
        pairs = itertools.combinations((emoji for _, emoji in shown), 2)
        return any(self.holds_out_pair(first, second) for first, second in pairs) or any(
            self.holds_out_placement(thing.emoji, scene.background.colours[0], thing.position)
            for scene in scenes
            for thing in scene.objects
        )

    def in_words(self) -> list[str]:
        """The rules for people to read."""
        pairs, placements = f"{self.pair_share:.0%}", f"{self.placement_share:.0%}"
        return [
            f"{pairs} of the unordered pairs of emoji, by hash: never in one training picture or document",
            f"{placements} of (emoji, first background colour, position), by hash: never in a training picture",
        ]
