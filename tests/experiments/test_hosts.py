"""Several hosts, for real: processes on loopback with devices of their own, started as a user starts them.

One run goes through everything that can happen to it: two hosts, of which one gets SIGTERM; then four with a device
each, of which one is killed, after the newest checkpoint was damaged; then one process, on one device, to the end. It
must be the run of a process that was never disturbed. All share jax's compilation cache: what one run has compiled the
next one of its mesh does not.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emu2_jax.metrics import JSONL, read_lines
from experiments.cli import EXIT_BAD_INPUT, EXIT_STOPPED
from experiments.launch import EXIT_HOST_LOST

NUM_STEPS = 20
PATIENCE_S = 400  # for a machine that does much else
#: Relative, of the losses: the order of sums over devices differs. What is counted is exact.
TOLERANCE = 2e-6
LOSSES = ("loss", "loss/text", "loss/regression", "grad_norm")
COUNTS = ("tokens", "images", "documents", "source", "epoch", "bad_samples", "samples/pairs", "samples/interleaved")


@dataclass
class Hosts:
    """Processes of one run."""

    processes: list[subprocess.Popen[str]]

    def end(self, timeout_s: float = PATIENCE_S) -> list[str]:
        """What each of them printed, once all have ended."""
        try:
            return [process.communicate(timeout=timeout_s)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    @property
    def codes(self) -> list[int]:
        return [process.returncode for process in self.processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    settings: list[str | Path],
    *,
    hosts: int,
    devices: int,
    cache: Path | None = None,
    only: tuple[int, ...] = (),
    own: dict[int, list[str]] | None = None,
) -> Hosts:
    """`emu2 train` on `hosts` processes of `devices` devices each, or on some of them; `own` are flags of one host."""
    port, processes = free_port(), []
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for host in only or range(hosts):
        where = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(hosts), "--process_id", str(host)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "experiments.cli", "train", "openmoji_tiny_stage2", *map(str, settings)]
                + (where if hosts > 1 else [])
                + (own or {}).get(host, []),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "XLA_FLAGS": "",
                    **(caching if cache else {}),
                },
                start_new_session=True,  # so that all of it can be held
            )
        )
    return Hosts(processes)


def wait_for_step(hosts: Hosts, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and all(process.poll() is None for process in hosts.processes):
        if any(line["step"] >= step for line in read_lines(workdir / JSONL)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {hosts.end(5)}")


def terminate(hosts: Hosts, host: int) -> None:
    """SIGTERM to one host. jax looks for it once a second; host 0 is held meanwhile, or the run might be over."""
    os.killpg(hosts.processes[0].pid, signal.SIGSTOP)
    hosts.processes[host].send_signal(signal.SIGTERM)
    time.sleep(1.5)
    os.killpg(hosts.processes[0].pid, signal.SIGCONT)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def by_step(workdir: Path) -> dict[int, dict[str, Any]]:
    merged: dict[int, dict[str, Any]] = {}
    for line in read_lines(workdir / JSONL):
        merged.setdefault(line["step"], {}).update(line)
    return merged


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@dataclass
class History:
    """What happened to the run."""

    workdir: Path
    undisturbed: Path
    stopped: list[str]
    stopped_codes: list[int]
    stopped_at: int  # the newest checkpoint then
    lost: list[str]
    lost_codes: list[int]
    seconds_to_end: float  # from the kill to the end of the last host
    finished: str
    finished_code: int


@pytest.fixture(scope="module")
def common(corpus: Path, gin_file: Path) -> list[str | Path]:
    return [
        f"--gin_file={gin_file}",
        f"--gin.data.sources.interleaved.shards={corpus}/train/interleaved-*.tar",
        f"--gin.data.sources.text.shards={corpus}/train/text-*.tar",
        *("--gin.train.init_from=None", f"--gin.train.num_steps={NUM_STEPS}", "--gin.checkpoint.every_steps=2"),
        *("--gin.objective.visual_input_noise=0.1", "--gin.optimizer.frozen=()", "--gin.data.global_batch_rows=4"),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def history(common: list[str | Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("hosts")
    workdir, undisturbed = folder / "run", folder / "undisturbed"
    reference = start([*common, "--workdir", undisturbed], hosts=1, devices=1, cache=cache)

    settings = [*common, "--workdir", workdir, "--allow_config_change=mesh"]
    two = start(settings, hosts=2, devices=2, cache=cache)
    wait_for_step(two, workdir, 3)
    terminate(two, 1)
    stopped = two.end()
    stopped_at = checkpoints(workdir)[-1]

    # What host 1 has written of the newest checkpoint is lost. Not all hosts miss it.
    shutil.rmtree(workdir / "checkpoints" / f"{stopped_at:08d}" / "state" / "ocdbt.process_1")
    four = start([*settings, "--heartbeat_timeout_s=20"], hosts=4, devices=1, cache=cache)
    wait_for_step(four, workdir, stopped_at + 1)
    four.processes[2].kill()
    began = time.monotonic()
    lost = four.end()
    seconds_to_end = time.monotonic() - began

    one = start(settings, hosts=1, devices=1, cache=cache)
    (finished,) = one.end()
    (output,) = reference.end()
    assert reference.codes == [0], output
    return History(
        *(workdir, undisturbed, stopped, two.codes, stopped_at, lost, four.codes, seconds_to_end),
        *(finished, one.codes[0]),
    )


def test_the_run_ends_where_an_undisturbed_one_does(history: History) -> None:
    """On 2, 4 and 1 processes, on 4, 4 and 1 devices: losses to the tolerance, everything that is counted exactly."""
    assert history.finished_code == 0, history.finished
    ours, theirs = by_step(history.workdir), by_step(history.undisturbed)
    assert list(ours) == list(theirs) == list(range(1, NUM_STEPS + 1))
    for step, line in theirs.items():
        assert {name: ours[step].get(name) for name in COUNTS} == {name: line.get(name) for name in COUNTS}
        for name in LOSSES:
            assert ours[step].get(name) == pytest.approx(line.get(name), rel=TOLERANCE), (step, name)
    assert len({line["loss"] for line in theirs.values()}) == NUM_STEPS  # a step that was repeated would show


def test_sigterm_on_one_host_saves_on_all(history: History) -> None:
    assert history.stopped_codes == [EXIT_STOPPED, EXIT_STOPPED], history.stopped
    for output in history.stopped:
        assert f"stopped by a signal after step {history.stopped_at};" in last_line(output)
    assert history.stopped_at < NUM_STEPS


def test_a_checkpoint_that_one_host_cannot_read_is_passed_over_by_all(history: History) -> None:
    output = history.lost[0]
    assert f"checkpoint {history.stopped_at} cannot be read (on host" in output
    assert "resuming openmoji_tiny_stage2 after step" in output
    assert (history.workdir / "checkpoints" / f"{history.stopped_at:08d}.incomplete").is_dir()


def test_a_killed_host_ends_all_with_a_line(history: History) -> None:
    assert history.lost_codes[2] == -signal.SIGKILL
    others = [0, 1, 3]
    assert [history.lost_codes[host] for host in others] == [EXIT_HOST_LOST] * 3, history.lost
    for host in others:
        line = last_line(history.lost[host])
        assert line.startswith(f"emu2: host {host} of 4: ")
        assert "the same command goes on from the last checkpoint" in line
    assert history.seconds_to_end < 100  # the default of --heartbeat_timeout_s


def test_a_silent_host_ends_the_others(common: list[str | Path], cache: Path, tmp_path: Path) -> None:
    """Its connections do not break, as when a machine hangs: only its heartbeat tells."""
    settings = [*common, "--workdir", tmp_path / "run", "--heartbeat_timeout_s=5"]
    hosts = start(settings, hosts=2, devices=1, cache=cache)
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "run" / "checkpoints").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(hosts.processes[1].pid, signal.SIGSTOP)
    try:
        output = hosts.processes[0].communicate(timeout=PATIENCE_S)[0]
    finally:
        os.killpg(hosts.processes[1].pid, signal.SIGKILL)
        hosts.end()
    assert hosts.codes[0] == EXIT_HOST_LOST, output
    assert last_line(output).startswith("emu2: host 0 of 2: ")
    assert "the same command goes on from the last checkpoint" in last_line(output)


def test_only_host_0_reports(history: History) -> None:
    for outputs in (history.stopped, history.lost):
        assert "pairs: 2 shards, 200 samples" in outputs[0]
        assert not any("samples" in output or "step/s" in output for output in outputs[1:])


def test_the_time_of_all_starts_is_counted(history: History) -> None:
    last = by_step(history.workdir)[NUM_STEPS]
    assert last["seconds/lost"] > 0  # steps after the checkpoint that was gone on with
    for activity in ("step", "data_wait", "checkpoint", "compile", "start"):
        assert last[f"seconds/{activity}"] > by_step(history.undisturbed)[1].get(f"seconds/{activity}", 0) * 0.1


def test_hosts_of_different_configs_do_not_start(common: list[str | Path], tmp_path: Path) -> None:
    own = {1: ["--gin.optimizer.learning_rate=0.5"]}
    hosts = start([*common, "--workdir", tmp_path / "run"], hosts=2, devices=1, own=own)
    outputs = hosts.end()
    assert hosts.codes == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], outputs
    for output in outputs:
        assert "hosts differ: optimizer.learning_rate is" in last_line(output)
        assert "0.5 on host 1" in last_line(output)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_on_one_host_is_said_on_all(common: list[str | Path], tmp_path: Path) -> None:
    own = {1: ["--gin.data.sorces=1"]}
    hosts = start([*common, "--workdir", tmp_path / "run"], hosts=2, devices=1, own=own)
    outputs = hosts.end()
    assert hosts.codes == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], outputs
    assert last_line(outputs[0]).startswith("emu2: host 0 of 2: host 1 failed, so this one ends too: data.sorces")
    assert last_line(outputs[1]).startswith("emu2: host 1 of 2: data.sorces")


def test_too_many_bad_samples_end_all(
    history: History, corpus: Path, common: list[str | Path], cache: Path, tmp_path: Path
) -> None:
    """Each host judges what it has read; the first to have read too many says so, the other ends with it."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in (corpus / "train").glob("pairs-*.tar"):
        data = bytearray(shard.read_bytes())
        at = -1
        while (at := data.find(b"IDAT", at + 1)) >= 0:
            data[at + 8 : at + 28] = bytes(20)
        (shards / shard.name).write_bytes(data)
    settings = [*common, f"--gin.data.sources.pairs.shards={shards}/pairs-*.tar", "--workdir", tmp_path / "run"]
    hosts = start(settings, hosts=2, devices=2, cache=cache)
    outputs = hosts.end()
    assert hosts.codes == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], outputs
    lines = [last_line(output) for output in outputs]
    first = next(host for host, line in enumerate(lines) if "so this one ends too" not in line)
    reason = lines[first].removeprefix(f"emu2: host {first} of 2: ")
    assert reason.startswith("data.sources.pairs: ") and "data.max_bad_share = 0.01 allows" in reason
    other = 1 - first
    assert lines[other] == f"emu2: host {other} of 2: host {first} failed, so this one ends too: {reason}"


@pytest.mark.parametrize(("host", "said"), [(0, "2 hosts did not come together"), (1, "nothing answers at 127.0.0.1")])
def test_a_host_that_waits_in_vain_says_so(host: int, said: str, common: list[str | Path], tmp_path: Path) -> None:
    settings = [*common, "--workdir", tmp_path / "run", "--start_timeout_s=2"]
    hosts = start(settings, hosts=2, devices=1, only=(host,))
    (output,) = hosts.end()
    assert hosts.codes == [EXIT_BAD_INPUT], output
    assert said in last_line(output)
