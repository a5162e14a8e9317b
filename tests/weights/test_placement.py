"""Files straight onto devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_weights import CLIP_FORMS, save_form

HERE = Path(__file__).parent


def test_every_device_gets_its_shard(tmp_path: Path, params: dict[str, Any], clip_params: dict[str, Any]) -> None:
    paths = [save_form(tmp_path / "emu2_hf.safetensors", params, "emu2_hf")]
    paths += [save_form(tmp_path / f"{form}.safetensors", clip_params, form) for form in CLIP_FORMS]
    command = [sys.executable, HERE / "sharded_placement.py", *paths]
    root = HERE.parent.parent
    result = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": f"{root}:{root / 'tests'}:{HERE}", "PATH": ""}
    )
    assert result.stdout == "same on 8 devices\n", result.stderr[-2000:]
