"""Where a run's time goes, and which of its steps were slow."""

from __future__ import annotations

import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from emu2_jax.goodput import ACTIVITIES, Goodput, Profiler, SlowStep, SlowSteps, merge_slow_steps


def test_every_second_belongs_to_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 15.0, 15.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    goodput = Goodput()
    assert [goodput.lap("start"), goodput.lap("step"), goodput.lap("start")] == [2.0, 3.0, 0.5]
    assert goodput.values() == {"seconds/start": 2.5, "seconds/step": 3.0}


def line(number: int, **seconds: float) -> dict[str, float]:
    return {"step": number, **{f"seconds/{name}": value for name, value in seconds.items()}}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], {"step": 4.0}),  # no log: what the checkpoint says
        ([line(1, step=2.0), line(2, step=4.0)], {"step": 4.0}),  # stopped right after it
        ([line(2, step=4.0), line(3, step=7.0)], {"step": 4.0, "lost": 3.0}),  # killed one step later
        # The last line of a stopped run was given the time of writing its checkpoint.
        ([line(2, step=4.0, checkpoint=1.5)], {"step": 4.0, "checkpoint": 1.5}),
    ],
)
def test_the_time_of_steps_that_are_done_again_is_lost(
    lines: list[dict[str, float]], expected: dict[str, float]
) -> None:
    goodput = Goodput()
    goodput.go_on({"step": 4.0}, lines, step=2)
    assert goodput.seconds == {**dict.fromkeys(ACTIVITIES, 0.0), **expected}


def slow_steps(*laps: dict[str, float]) -> list[SlowStep]:
    found, totals = SlowSteps(host=3), dict.fromkeys(ACTIVITIES, 0.0)
    found.note(0, totals)
    for step, lap in enumerate(laps, start=1):
        for name, seconds in lap.items():
            totals[name] += seconds
        found.note(step, totals)
    return found.found


def test_a_slow_step_is_named_with_what_it_coincided_with() -> None:
    usual = [{"step": 1.0}] * 8
    assert slow_steps(*usual, {"step": 1.9}) == []
    assert slow_steps(*usual, {"step": 1.0, "data_wait": 2.0}) == [SlowStep(9, 3, 3.0, 1.0, "data_wait", 2.0)]
    assert slow_steps(*usual, {"step": 2.75, "data_wait": 0.25}) == [SlowStep(9, 3, 3.0, 1.0, "step", 2.75)]
    assert slow_steps({"step": 1.0}, {"step": 5.0}) == []  # nothing is usual yet


def test_of_all_hosts_the_one_that_knows_a_cause_is_named() -> None:
    waited, knows = SlowStep(9, 0, 3.0, 1.0, "step", 2.9), SlowStep(9, 2, 3.0, 1.0, "data_wait", 2.0)
    assert merge_slow_steps([[waited], [], [knows]]) == [knows._asdict()]
    merged = merge_slow_steps([[waited], [waited._replace(host=1)]])
    assert merged == [{"step": 9, "host": None, "step_s": 3.0, "usual_s": 1.0, "cause": "step"}]


def test_a_trace_is_written_of_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = Profiler((2, 2), tmp_path, said.append)
    began, ended = [], []
    for step in range(1, 6):
        began.append(profiler.before(step))
        jnp.ones(3).sum().block_until_ready()
        ended.append(profiler.ends_with(step))
        if ended[-1]:
            profiler.write()
    assert (began.index(True), began.count(True)) == (1, 1)
    assert (ended.index(True), ended.count(True)) == (2, 1)
    assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    assert said == [f"a trace of 2 steps from step 2 on is in {tmp_path}/profile"]
