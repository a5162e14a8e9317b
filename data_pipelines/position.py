"""The position of an input: one small state, the same on all hosts, and what it may be restored into.

A step number gives rows only together with what it was counted over: the samples and their order, how rows are made,
and whose turn it is. The state holds a digest of each, so that another data set, tokenizer or mixture is noticed
when a run goes on, and how many rows each source has given, so that the sources can go on where they are when only
the mixture is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from data_pipelines.planning import START, Anchor
from emu2_jax.errors import DataError

#: Changes when a saved state would be read in another sense.
STATE_VERSION = 2


class Plan(Protocol):
    """The rows (or samples) of a source by number."""

    def anchor(self, row: int) -> Anchor:
        """Where the planning of a row can begin."""
        ...

    def restart(self, anchor: Anchor) -> None:
        """Go on from there."""
        ...


@dataclass(frozen=True)
class Identity:
    """What the row numbers of a source depend on."""

    data: str  # digest of the samples, their order and the lengths of their texts
    rules: str  # digest of the settings that make rows of them
    shards: int
    samples: int


class Saved(NamedTuple):
    """Where a source stands before a step; a plain list in a checkpoint, so that many sources take little room."""

    data: str  # as in `Identity`
    rules: str
    shards: int
    samples: int
    start: int  # rows before step `Position.since`
    rows: int  # rows before the step
    epoch: int  # of the block that the next row lies in, as are the next two; see `planning.Anchor`
    block: int
    first_row: int

    @property
    def anchor(self) -> Anchor:
        """Where planning can begin."""
        return Anchor(self.epoch, self.block, self.first_row)


def digest(*parts: object) -> str:
    """Eight hexadecimal digits that change with any of the parts."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:8]


@dataclass
class Track:
    """One source of a stream: its rows, and how many of them came before step `Position.since`."""

    name: str
    identity: Identity
    plan: Plan
    start: int = 0


class Position:
    """How many rows every source has given before a step."""

    def __init__(
        self,
        tracks: Sequence[Track],
        *,
        schedule: str,
        tokenizer: str,
    ) -> None:
        self._tracks = tracks
        self._schedule = schedule  # digest of what decides whose turn it is
        self._tokenizer = tokenizer  # fingerprint, or "" where none is used
        self._absent: dict[str, Saved] = {}  # saved states of sources that are not used now
        #: The step in which the schedule began; 0, or where its weights were changed.
        self.since = 0

    @property
    def num_sources(self) -> int:
        """Sources that are used."""
        return len(self._tracks)

    def start(self, source: int) -> int:
        """Rows of a source before step `since`."""
        return self._tracks[source].start

    def state(self, step: int, taken: Sequence[int]) -> dict[str, Any]:
        """The position before `step` (JSON); `taken` are the rows of each source from step `since` to there."""
        sources: dict[str, list[str | int]] = {name: list(saved) for name, saved in self._absent.items()}
        for track, rows_since in zip(self._tracks, taken, strict=True):
            rows = track.start + rows_since
            identity = track.identity
            saved = Saved(
                identity.data,
                identity.rules,
                identity.shards,
                identity.samples,
                track.start,
                rows,
                *track.plan.anchor(rows),
            )
            sources[track.name] = list(saved)
        return {
            "version": STATE_VERSION,
            "step": step,
            "since": self.since,
            "schedule": self._schedule,
            "tokenizer": self._tokenizer,
            "sources": sources,
        }

    def restore(self, state: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
        """Goes on from a saved position; returns a line for everything that is not as it was.

        Where the schedule changed, every source goes on with the row after its last. Where the rows of a source mean
        something else, it begins a new epoch. Raises `DataError` when the data or the tokenizer changed and `allowed`
        does not name the setting (or a section that holds it).
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"checkpoint: its data position is of version {state.get('version')}, this program reads "
                f"{STATE_VERSION}; its order of samples cannot be gone on with: take another work directory"
            )
        notes: list[str] = []
        if state["tokenizer"] != self._tokenizer:
            _check_allowed("data.tokenizer", "is not the tokenizer that this run was trained with", allowed)
        saved_sources = saved_of(state)
        for track in self._tracks:
            if track.name in saved_sources:
                self._check_same_data(track, saved_sources[track.name], allowed, state["tokenizer"])
        same_schedule = state["schedule"] == self._schedule
        self.since = state["since"] if same_schedule else state["step"]
        if not same_schedule:
            notes.append(f"data: the mixture changed; from step {self.since} on, each source goes on where it was")
        for track in self._tracks:
            saved = saved_sources.get(track.name)
            if saved is None:
                track.start = 0
                track.plan.restart(START)
                notes.append(f"data.sources.{track.name}: is new, and begins with its first epoch")
                continue
            track.start = saved.start if same_schedule else saved.rows
            anchor = saved.anchor
            if (saved.data, saved.rules) != (track.identity.data, track.identity.rules):
                anchor = Anchor(anchor.epoch + 1, 0, saved.rows)
                notes.append(
                    f"data.sources.{track.name}: its rows are not those of before; it breaks off epoch "
                    f"{anchor.epoch - 1} and begins epoch {anchor.epoch}"
                )
            track.plan.restart(anchor)
        names = {track.name for track in self._tracks}
        self._absent = {name: saved for name, saved in saved_sources.items() if name not in names}
        return notes

    def _check_same_data(self, track: Track, saved: Saved, allowed: Collection[str], saved_tokenizer: str) -> None:
        identity = track.identity
        if saved.data == identity.data or saved_tokenizer != self._tokenizer:
            return
        was, now = (saved.samples, saved.shards), (identity.samples, identity.shards)
        if was == now:
            difference = f"{now[0]:,} samples in {now[1]} shards as before, but not the same ones or in another order"
        else:
            difference = f"{now[0]:,} samples in {now[1]} shards, was {was[0]:,} in {was[1]}"
        text = f"is not the data that this run was trained on: {difference}"
        _check_allowed(f"data.sources.{track.name}.shards", text, allowed)


def saved_of(state: Mapping[str, Any]) -> dict[str, Saved]:
    """What a state says of each source."""
    return {name: Saved(*values) for name, values in state["sources"].items()}


def _check_allowed(path: str, problem: str, allowed: Collection[str]) -> None:
    if not any(path == name or path.startswith(f"{name}.") for name in allowed):
        raise DataError(
            f"{path}: {problem}. Put it back as it was, take another work directory, or go on with a new epoch by "
            f"--allow_config_change={path}"
        )
