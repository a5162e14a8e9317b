"""Weight files: what is read without reading them, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tiny_weights import BFLOAT16, save

from emu2_jax.errors import WeightsError
from emu2_jax.weights.files import check_dtypes, missing_files, open_weights

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(6).astype(BFLOAT16)


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def test_a_file_that_the_library_wrote(tmp_path: Path) -> None:
    opened = open_weights(str(save(tmp_path / "x.safetensors", {"a": A, "b": B})))
    assert {name: (tensor.shape, tensor.dtype, tensor.nbytes) for name, tensor in opened.items()} == {
        "a": ((3, 4), np.dtype(np.float32), 48),
        "b": ((6,), BFLOAT16, 12),
    }
    np.testing.assert_array_equal(opened["a"].array(), A, strict=True)
    np.testing.assert_array_equal(opened["b"].read(2, 5), B[2:5], strict=True)


def test_shards_with_an_index_by_directory_or_by_name(tmp_path: Path) -> None:
    save(tmp_path / "1.safetensors", {"a": A})
    save(tmp_path / "2.safetensors", {"b": B})
    path = index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    for where in (tmp_path, path):
        assert {name: tensor.file[-13:] for name, tensor in open_weights(str(where)).items()} == {
            "a": "1.safetensors",
            "b": "2.safetensors",
        }
    assert missing_files(str(path)) is None
    (tmp_path / "2.safetensors").unlink()
    assert missing_files(str(path)) == ["a", "b"]
    with pytest.raises(WeightsError, match=r"names 2 files, of which 1 are not there: 2\.safetensors"):
        open_weights(str(path))


def test_an_index_of_a_variant(tmp_path: Path) -> None:
    save(tmp_path / "model.bf16-00001-of-00001.safetensors", {"a": A})
    weight_map = {"a": "model.bf16-00001-of-00001.safetensors"}
    path = index(tmp_path, weight_map, "model.safetensors.index.bf16.json")
    assert list(open_weights(str(tmp_path))) == list(open_weights(str(path))) == ["a"]
    index(tmp_path, weight_map)
    with pytest.raises(WeightsError, match=r"holds several: model\.safetensors\.index\.bf16\.json, "):
        open_weights(str(tmp_path))


def test_any_path_that_fsspec_knows(tmp_path: Path) -> None:
    local = save(tmp_path / "x.safetensors", {"a": A, "b": B})
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/model.safetensors", local.read_bytes())
    for path in ("memory://bucket", "memory://bucket/model.safetensors"):
        opened = open_weights(path)
        np.testing.assert_array_equal(opened["a"].read(4, 8), A[1], strict=True)
    with pytest.raises(WeightsError, match=r"^memory://bucket/other.safetensors: no such file"):
        open_weights("memory://bucket/other.safetensors")


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    save(tmp_path / "1.safetensors", {"a": A})
    path = index(tmp_path, {"a": "1.safetensors", "c": "1.safetensors"})
    with pytest.raises(WeightsError, match=r"index\.json: promises c in 1\.safetensors, which does not hold it$"):
        open_weights(str(path))


@pytest.mark.parametrize("cut", [4, 30, -1])
def test_truncated(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "x.safetensors", {"a": A, "b": B})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"x\.safetensors: .*truncated") as error:
        open_weights(str(path))
    assert cut != -1 or "b ends at byte" in str(error.value) or "a ends at byte" in str(error.value)


def test_sizes_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match=r"a has 8 bytes, which F32 \[3\] has not"):
        open_weights(str(path))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 2) + b"[]", b"<html>not found</html>"])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.safetensors: "):
        open_weights(str(path))


def test_a_dtype_that_no_weight_has(tmp_path: Path) -> None:
    opened = open_weights(str(save(tmp_path / "x.safetensors", {"a": A, "q": np.zeros(3, np.int8)})))
    with pytest.raises(WeightsError, match=r"x\.safetensors: q has dtype I8; wanted one of F64, F32, F16, BF16"):
        check_dtypes(opened.values())


def test_which_file_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no weight files"):
        open_weights(str(tmp_path))
    save(tmp_path / "a.safetensors", {"a": A})
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert list(open_weights(str(tmp_path))) == ["a"]
    save(tmp_path / "b.safetensors", {"b": B})
    with pytest.raises(WeightsError, match=r"holds several: a\.safetensors, b\.safetensors; name the one to read"):
        open_weights(str(tmp_path))
    with pytest.raises(WeightsError, match=r"notes\.txt: is no weight file"):
        (tmp_path / "notes.txt").write_text("")
        open_weights(str(tmp_path / "notes.txt"))


def test_pytorch_files_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"needs PyTorch: pip install 'emu2_jax\[torch\]'"):
        open_weights(str(tmp_path))
