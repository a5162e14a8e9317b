"""Runs the real `emu2` command, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments import cli


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`emu2 ARGUMENTS` as a process of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def fail(arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints; asserts that it is one line and that the exit code is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == cli.EXIT_BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]
