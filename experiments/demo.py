"""The main job at laptop size: corpus, three training stages, evaluation, report; in the commands a user would type.

Each step runs as a process of its own, so its command line can be copied, its memory is measured alone, and a demo that
was stopped goes on where it was. What has been done is noted in RUN/demo.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from emu2_jax.errors import CheckpointError, UserError
from emu2_jax.report import run_summary, write_report
from experiments.describe import image_reading, parameter_counts
from experiments.evaluate import FOLDER as EVALUATION
from experiments.openmoji_tiny import DATA
from experiments.runs import load_config

#: (stage, recipe, what it is)
STAGES = (
    ("stage1", "openmoji_tiny_stage1", "Stage 1: captioning, all parts train"),
    ("stage2", "openmoji_tiny_stage2", "Stage 2: text and regression, encoder frozen"),
    ("decoder", "openmoji_tiny_decoder", "Visual decoder: U-Net on frozen embeddings"),
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

#: Overrides of `--minimal`: every part runs, nothing is learned.
MINIMAL: Mapping[str, Sequence[str]] = {
    "stage1": ("train.num_steps=3", "data.global_batch_rows=2"),
    "stage2": ("train.num_steps=3", "data.global_batch_rows=2"),
    "decoder": ("train.num_steps=3", "decoder.batch_images=4", "decoder.num_sampling_steps=3"),
}
MINIMAL_EVALUATION = ("evaluation.num_samples=4", "evaluation.num_pictures=2", "evaluation.max_text_tokens=8")


def run_demo(run: Path, *, minimal: bool) -> None:
    """Do what is left to do of the demo in `run`; says so when that is nothing.

    Raises `UserError` when a step fails (its own message stands above) or `run` holds a demo of the other size.
    """
    run.mkdir(parents=True, exist_ok=True)
    progress = _Progress(run / "demo.json", minimal=minimal)
    if progress.is_done("report") and (run / "report.html").exists():
        print(run_summary(run))
        print(f"the demo in {run} is done; delete the directory to run it anew")
        return
    data = run / "data"
    progress.step("data", _emu2("data", "openmoji", "--preset", "minimal" if minimal else "tiny", "--out", str(data)))
    for stage, recipe, _ in STAGES:
        progress.step(stage, _emu2("train", recipe, "--workdir", str(run / stage), *_overrides(run, stage, minimal)))
    progress.step("evaluate", _emu2("evaluate", str(run)))
    _write_metrics(run, progress)
    progress.call("report", lambda: write_report(run))
    print(run_summary(run))


def _emu2(*arguments: str) -> list[str]:
    return ["emu2", *arguments]


def _overrides(run: Path, stage: str, minimal: bool) -> list[str]:
    """What differs from the recipe: nothing, unless the run lies elsewhere or is minimal."""
    settings: list[str] = []
    default = Path(DATA)
    if run != default.parent:
        settings += [
            f"evaluation.scenes={run}/data/heldout/scenes-*.tar",
            f"evaluation.unseen={run}/data/heldout/unseen-*.tar",
            f"data.tokenizer={run}/data/tokenizer.model",
            f"data.sources.pairs.shards={run}/data/train/pairs-*.tar",
        ]
        if stage == "stage2":
            for kind in ("interleaved", "text"):
                settings.append(f"data.sources.{kind}.shards={run}/data/train/{kind}-*.tar")
        if stage != "stage1":
            settings.append(f"train.init_from={run}/stage1")
    if minimal:
        settings += [*MINIMAL[stage], *MINIMAL_EVALUATION]
    return [f"--gin.{setting}" for setting in settings]


class _Progress:
    """Which steps are done, how long they took over all attempts, and the most memory that one of them held."""

    def __init__(self, path: Path, *, minimal: bool) -> None:
        self._path = path
        if path.exists():
            self._notes = json.loads(path.read_text(encoding="utf-8"))
            if self._notes["minimal"] != minimal:
                kind = "minimal" if self._notes["minimal"] else "full"
                raise CheckpointError(f"{path.parent}: holds a {kind} demo; give another --run")
        else:
            self._notes = {"minimal": minimal, "done": [], "wall_s": {}, "peak_rss_mb": 0.0}

    def is_done(self, name: str) -> bool:
        return name in self._notes["done"]

    @property
    def notes(self) -> Mapping[str, Any]:
        return self._notes

    def step(self, name: str, command: Sequence[str]) -> None:
        """Run a command unless it is done. Interrupting the demo stops the command too, its state saved."""
        if self.is_done(name):
            return
        print(f"\n$ {' '.join(command)}", flush=True)

        def run() -> None:
            # The module, not the script: it runs whether or not the virtual environment is on the PATH.
            child = subprocess.Popen([sys.executable, "-m", "experiments.cli", *command[1:]])
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.wait()
                raise
            if code:
                raise UserError(f"demo: `{' '.join(command)}` ended with exit code {code}; see above")

        self.call(name, run)

    def call(self, name: str, function: Callable[[], object]) -> None:
        """Run a step in this process unless it is done; its time counts also when it fails."""
        began = time.perf_counter()
        try:
            function()
            self._notes["done"].append(name)
        finally:
            wall_s = self._notes["wall_s"]
            wall_s[name] = wall_s.get(name, 0.0) + time.perf_counter() - began
            self._notes["peak_rss_mb"] = max(self._notes["peak_rss_mb"], _peak_rss_mb())
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self._notes, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)


def _peak_rss_mb() -> float:
    """Largest resident size of this process or of any finished child, MB (Linux counts in KiB)."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * 1024 / 1e6


def _write_metrics(run: Path, progress: _Progress) -> None:
    numbers = json.loads((run / EVALUATION / "heldout.json").read_text(encoding="utf-8"))
    wall_s = sum(progress.notes["wall_s"].values())
    measured = {**numbers, "wall_s": wall_s, "peak_rss_mb": progress.notes["peak_rss_mb"]}
    metrics = {**measured, "bars": _bars(measured), "machine": _machine(), "versions": _versions()}
    (run / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (run / "stages.json").write_text(json.dumps(_stages(run, progress), indent=1) + "\n", encoding="utf-8")


def _bars(numbers: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """What the full demo is meant to reach, and whether it did."""
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, value: float, wanted: str, passed: bool, meaning: str) -> None:
        bars[name] = {"value": value, "bar": wanted, "passed": passed, "meaning": meaning}

    ratio = numbers["caption_nll"] / numbers["caption_nll_shuffled"]
    bar("caption_nll_ratio", ratio, "at most 0.7", ratio <= 0.7, "loss on true captions / the same with wrong images")
    mse, mean_mse = numbers["visual_mse"], numbers["visual_mse_mean"]
    bar("visual_mse", mse, f"below {mean_mse:.4f}", mse < mean_mse, "regression error against the mean embedding's")
    psnr, mean_psnr = numbers["decoder_psnr_db"], numbers["decoder_psnr_mean_db"]
    bar("decoder_psnr_db", psnr, "at least 18", psnr >= 18, "autoencoded held-out scenes, decibels")
    gain = psnr - mean_psnr
    bar("decoder_psnr_gain_db", gain, "at least 6", gain >= 6, "the same, above drawing the mean image")
    bar("wall_s", numbers["wall_s"], "at most 900", numbers["wall_s"] <= 900, "seconds, on two cores")
    rss = numbers["peak_rss_mb"]
    bar("peak_rss_mb", rss, "at most 6000", rss <= 6000, "largest process, megabytes")
    return bars


def _stages(run: Path, progress: _Progress) -> list[dict[str, Any]]:
    stages = []
    for stage, _, title in STAGES:
        config = load_config(run / stage)
        counts = parameter_counts(config)
        stages.append(
            {
                "name": stage,
                "title": title,
                "workdir": stage,
                "trained": [part for part in counts if part not in config.optimizer.frozen],
                "frozen": [part for part in counts if part in config.optimizer.frozen],
                "data": [source.name for source in config.data.sources],
                "images": image_reading(config),
                "steps": config.train.num_steps,
                "wall_s": progress.notes["wall_s"][stage],
                "parameters": counts,
            }
        )
    return stages


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_gb, 1),
        "load": load,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
