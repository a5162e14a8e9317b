"""The answers of a few-shot evaluation on disk: appended as they come, gone on with after a stop, put together at last.

Questions are answered in blocks. A block after one number of shots is the unit of work: it is there whole or not at
all, and is computed the same whoever does it, so the parts of several processes come to what one process would write.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from emu2_jax.errors import ConfigError, DataError
from emu2_jax.evaluation.few_shot import Answered
from experiments.encode import Part
from experiments.runs import write_atomically

SETTINGS = "settings.json"


class Unit(NamedTuple):
    """A block of questions after one number of shots."""

    shots: int
    block: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All units there are to do."""

    shots: Sequence[int]
    num_questions: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks of questions; the last may be smaller."""
        return -(-self.num_questions // self.block_size)

    def questions(self, block: int) -> range:
        """Numbers of the questions of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.num_questions))

    def blocks_of(self, part: Part) -> range:
        """The blocks that a part does."""
        return range(part.number - 1, self.num_blocks, part.count)

    def units(self) -> list[Unit]:
        """In the order of the final file."""
        return [Unit(shots, block) for shots in self.shots for block in range(self.num_blocks)]


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` the place of answers with these settings. Raises `ConfigError` when it is that of others."""
    check_settings(folder, settings)
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when `folder` holds answers of other settings."""
    path = folder / SETTINGS
    now = json.loads(json.dumps(settings))
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not what this command writes: {error}") from error
    differing = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {saved.get(name)!r} -> {now.get(name)!r}" for name in differing[:4])
        raise ConfigError(
            f"{folder}: holds answers of another setting (saved -> now): {shown}"
            f"{f'; and {len(differing) - 4} more' if len(differing) > 4 else ''}; give another --out, or remove it"
        )


class AnswerFile:
    """The file that one part appends to; a context manager. Raises `ConfigError` when another process has it."""

    def __init__(self, folder: Path, part: Part, plan: Plan) -> None:
        self._path = folder / f"answers-{part.number}-of-{part.count}.jsonl"
        self._plan = plan

    def __enter__(self) -> Self:
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{self._path}: another process is writing it; wait for it or stop it") from error
        whole = sum(size for *_, size in _units(self._path, self._plan))
        self._file.truncate(whole)  # what a stop cut short is done again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, answered: Sequence[Answered]) -> None:
        """The answers of a unit, all together."""
        lines = "".join(json.dumps(_without_score(one)) + "\n" for one in answered)
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _without_score(one: Answered) -> dict[str, Any]:
    return {name: value for name, value in vars(one).items() if name not in ("score", "right")}


def read_units(folder: Path, plan: Plan) -> dict[Unit, list[Answered]]:
    """Every whole unit that any part has written."""
    found: dict[Unit, list[Answered]] = {}
    for path in sorted(folder.glob("answers-*-of-*.jsonl")):
        for unit, answered, _ in _units(path, plan):
            found.setdefault(unit, answered)
    return found


def _units(path: Path, plan: Plan) -> Iterator[tuple[Unit, list[Answered], int]]:
    """The whole units at the front of a file, with their sizes in bytes."""
    answered: list[Answered] = []
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                answered.append(Answered(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: is no answer: {error}") from error
            size += len(line)
            unit = Unit(answered[0].shots, answered[0].number // plan.block_size)
            wanted = plan.questions(unit.block)
            if len(answered) == len(wanted):
                if [(one.shots, one.number) for one in answered] != [(unit.shots, i) for i in wanted]:
                    raise DataError(f"{path}, line {number}: the answers are not in their order; remove the file")
                yield unit, answered, size
                answered, size = [], 0
