"""Where the time of a run goes: every second of the loop belongs to one activity, and slow steps are named.

`Goodput` is a stop-watch that never pauses: each `lap` gives the time since the last one to an activity, so that the
activities add up to the run's time. The totals go over all starts of a run; `lost` is the time of steps that a kill
undid, because they came after the last checkpoint.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

#: start: until the loop begins (opening data, restoring, initialising). compile: the step's first call with a batch
#: shape. data_wait: for the next batch. checkpoint: what training waits for of a save. preview: drawing held-out
#: pictures. profile: writing a trace.
Activity = Literal["step", "data_wait", "checkpoint", "compile", "preview", "profile", "start", "lost"]
ACTIVITIES: tuple[str, ...] = get_args(Activity)
PREFIX = "seconds/"  #: of the totals in metrics.jsonl


class Goodput:
    """Seconds of each activity since the run first began."""

    def __init__(self, began: float | None = None) -> None:
        self._mark = time.perf_counter() if began is None else began
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)

    def lap(self, activity: Activity) -> float:
        """The time since the last lap was this activity's. Returns it."""
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self.seconds[activity] += elapsed
        return elapsed

    def go_on(self, saved: Mapping[str, float], lines: Sequence[Mapping[str, Any]], step: int) -> None:
        """Add what earlier starts took: `saved` with the checkpoint of `step`, and what their log says after it.

        `lines` are those of metrics.jsonl, also the ones of steps that are now done again: their time is lost.
        """

        def seconds_of(line: Mapping[str, Any]) -> dict[str, float]:
            return {key.removeprefix(PREFIX): line[key] for key in line if key.startswith(PREFIX)}

        kept, last = dict(saved), sum(saved.values())
        for line in lines:
            seconds = seconds_of(line)
            if line["step"] <= step and sum(seconds.values()) > sum(kept.values()):
                kept = seconds  # written after the state was copied, for this very step
            last = max(last, sum(seconds.values()))
        for name, value in kept.items():
            if name in self.seconds:
                self.seconds[name] += value
        self.seconds["lost"] += last - min(last, sum(kept.values()))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.seconds)

    def values(self) -> dict[str, float]:
        """What is logged; activities that took no time are left out."""
        return {f"{PREFIX}{name}": round(value, 3) for name, value in self.seconds.items() if value}


class SlowStep(NamedTuple):
    """A step that took much longer than those before it, as one host saw it."""

    step: int
    host: int
    step_s: float
    usual_s: float
    cause: str  #: the activity that took most of the excess; "step": none that this host knows of
    cause_s: float


class SlowSteps:
    """Finds steps that take over `FACTOR` times the median of the last `WINDOW`, and what fell together with them."""

    FACTOR, WINDOW, FEWEST = 2.0, 100, 8

    def __init__(self, host: int) -> None:
        self._host = host
        self._times_s: collections.deque[float] = collections.deque(maxlen=self.WINDOW)
        self._before: dict[str, float] | None = None
        self.found: list[SlowStep] = []

    def note(self, step: int, seconds: Mapping[str, float]) -> None:
        """A step is done; `seconds` are the totals of all activities now."""
        before, self._before = self._before, dict(seconds)
        if before is None:
            return
        spent = {name: seconds[name] - before[name] for name in seconds}
        step_s = sum(spent.values())
        if len(self._times_s) >= self.FEWEST:
            usual_s = statistics.median(self._times_s)
            if step_s > self.FACTOR * usual_s:
                other = {name: took for name, took in spent.items() if name != "step"}
                cause = max(other, key=lambda name: other[name])
                if other[cause] < (step_s - usual_s) / 2:
                    cause = "step"
                self.found.append(SlowStep(step, self._host, step_s, usual_s, cause, spent[cause]))
        self._times_s.append(step_s)


def merge_slow_steps(hosts: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, Any]]:
    """One entry for each slow step: of the host that knows a cause, for the others only waited for it."""
    by_step: dict[int, list[SlowStep]] = {}
    for found in hosts:
        for values in found:
            slow = SlowStep(*values)
            by_step.setdefault(slow.step, []).append(slow)
    merged = []
    for step in sorted(by_step):
        slow = max(by_step[step], key=lambda one: (one.cause != "step", one.cause_s if one.cause != "step" else 0.0))
        entry = slow._asdict()
        if slow.cause == "step":
            del entry["cause_s"]
            if len(by_step[step]) > 1:
                entry["host"] = None  # all of them waited for the devices, or for each other
        merged.append({name: round(value, 4) if isinstance(value, float) else value for name, value in entry.items()})
    return merged


class Profiler:
    """Writes a `jax.profiler` trace of some steps into the work directory, on every host."""

    FOLDER = "profile"

    def __init__(self, steps: tuple[int, int] | None, workdir: Path, say: Callable[[str], None]) -> None:
        self._first, self._count = steps or (0, 0)
        self._folder = workdir / self.FOLDER
        self._say = say
        self._running = False

    def before(self, step: int) -> bool:
        """Begin with the first of the steps; whether it did."""
        if not self._count or self._running or step != self._first:
            return False
        jax.profiler.start_trace(self._folder)
        self._running = True
        return True

    def ends_with(self, step: int) -> bool:
        """Whether the trace is to be written after this step; it must be done on the devices by then."""
        return self._running and step >= self._first + self._count - 1

    def write(self) -> None:
        """End the trace, if there is one."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._say(f"a trace of {self._count} steps from step {self._first} on is in {self._folder}")
