"""The promise of resume: a run that was killed and started again gives the same bits as one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import command
import jax
import numpy as np
import pytest

from emu2_jax.metrics import JSONL
from experiments.cli import EXIT_STOPPED
from experiments.runs import load_config, load_params

NUM_STEPS = 12
#: What may differ between two runs of the same bits: how long things took.
TIMINGS = {
    "step_s",
    "data_wait_s",
    "data_wait_max_s",
    "data_queue_depth",
    "model_tflops_per_s",
    "tokens_per_s",
    "images_per_s",
    "slow_steps",
}


def start_training(workdir: Path, gin_file: Path, corpus: Path) -> subprocess.Popen[str]:
    return command.start(
        *("train", "openmoji_tiny_stage2", "--workdir", workdir, f"--gin_file={gin_file}"),
        f"--gin.data.sources.interleaved.shards={corpus}/train/interleaved-*.tar",
        f"--gin.data.sources.text.shards={corpus}/train/text-*.tar",
        *("--gin.train.init_from=None", f"--gin.train.num_steps={NUM_STEPS}", "--gin.checkpoint.every_steps=3"),
        *("--gin.objective.visual_input_noise=0.1", "--gin.optimizer.frozen=()"),
    )


def losses(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / JSONL).read_text(encoding="utf-8").splitlines()
    timed = ("seconds/", *TIMINGS)
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / JSONL
        if path.exists() and path.read_text(encoding="utf-8").count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, gin_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start_training(workdir, gin_file, corpus)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return workdir


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert losses(workdir) == losses(reference)
    assert [entry["step"] for entry in losses(workdir)] == list(range(1, NUM_STEPS + 1))
    ours, theirs = (load_params(path, load_config(path)) for path in (workdir, reference))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_killed_runs_end_with_the_same_bits(uninterrupted: Path, corpus: Path, gin_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    # Step 5 lies between checkpoints; 9 is one, so that the kill falls while it is being written.
    for step in (5, 9):
        process = start_training(workdir, gin_file, corpus)
        wait_for_step(process, workdir, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start_training(workdir, gin_file, corpus)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "resuming openmoji_tiny_stage2 after step" in output
    assert_same_run(workdir, uninterrupted)

    again = start_training(workdir, gin_file, corpus)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0
    assert f"openmoji_tiny_stage2 is finished: {NUM_STEPS} steps" in output


def test_sigterm_saves_and_leaves(uninterrupted: Path, corpus: Path, gin_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    process = start_training(workdir, gin_file, corpus)
    wait_for_step(process, workdir, 4)
    process.terminate()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_STOPPED, output
    stopped_after = len(losses(workdir))
    assert f"stopped by a signal after step {stopped_after}" in output
    process = start_training(workdir, gin_file, corpus)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"resuming openmoji_tiny_stage2 after step {stopped_after} of {NUM_STEPS}" in output
    assert_same_run(workdir, uninterrupted)
