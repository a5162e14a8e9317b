"""Files straight onto devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_weights import save_form

HERE = Path(__file__).parent


def test_every_device_gets_its_shard(tmp_path: Path, params: dict[str, Any]) -> None:
    path = save_form(tmp_path / "x.safetensors", params, "emu2_hf")
    command = [sys.executable, HERE / "sharded_placement.py", path]
    root = HERE.parent.parent
    result = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": ""}
    )
    assert result.stdout == "same on 8 devices\n", result.stderr[-2000:]
