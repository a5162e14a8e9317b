"""Answers are the same on one device and on meshes of eight, each of which holds its share of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("sharded_generation.py")


def test_answers_on_eight_devices_equal_those_on_one() -> None:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    root = SCRIPT.parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, **settings, "PYTHONPATH": path},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 2
    for mesh, found in report.items():
        # Over `data` parameters are replicated.
        assert found.pop("share of a weight on a device") == (1 / 4 if mesh.startswith("data 2") else 1 / 8)
        assert found.pop("choices") < 1e-4, mesh
        for kind, answers in found.items():
            assert answers["same ids"] and answers["embeddings"] < 1e-4, (mesh, kind)
