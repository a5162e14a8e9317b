"""PyTorch files; run where PyTorch is installed (`make test-parity`), for it is an optional dependency."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from emu2_jax.errors import WeightsError
from emu2_jax.weights.files import open_weights

torch = pytest.importorskip("torch", reason="PyTorch is an optional dependency; make test-parity installs it")


class Code:
    """What a malicious file would hold."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo code ran > ran.txt",)


def test_a_state_dict(tmp_path: Path) -> None:
    a, b = torch.arange(12.0).reshape(3, 4), torch.arange(6).to(torch.bfloat16)
    for wrapped in ({"a": a, "b": b}, {"module": {"a": a, "b": b}}):
        torch.save(wrapped, tmp_path / "x.bin")
        opened = open_weights(str(tmp_path / "x.bin"))
        np.testing.assert_array_equal(opened["a"].array(), a.numpy(), strict=True)
        np.testing.assert_array_equal(opened["b"].read(1, 3), np.array([1, 2]).astype(ml_dtypes.bfloat16), strict=True)


def test_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match=r"x\.bin: refused: it holds more than tensors"):
        open_weights("x.bin")
    assert not (tmp_path / "ran.txt").exists()


def test_truncated(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-500])
    with pytest.raises(WeightsError, match=r"x\.pt: cannot be read \(truncated, or"):
        open_weights(str(tmp_path / "x.pt"))


def test_a_tensor_of_integers_and_a_number(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3, dtype=torch.int64)}, tmp_path / "x.pth")
    assert open_weights(str(tmp_path / "x.pth"))["a"].dtype_name == "int64"
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="epoch is a int, wanted a tensor"):
        open_weights(str(tmp_path / "x.pth"))
