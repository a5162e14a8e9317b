"""Checkpoints written and read piece by piece: ordinary ones, exact, and never half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_weights import BFLOAT16

from emu2_jax import checkpoint
from emu2_jax.checkpoint import FOLDER, Checkpointer, load_parts, saved_parts
from emu2_jax.config import CheckpointConfig
from emu2_jax.errors import WeightsError
from emu2_jax.weights import stream
from emu2_jax.weights.parameters import ComputedParameter, Parts, grid, read, whole
from emu2_jax.weights.state_dict import flatten


class Watched(ComputedParameter):
    """A stacked parameter that notes what is asked of it."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.shape, array.dtype, lambda: array)
        self.stacked = True
        self.asked: list[tuple[int, ...]] = []

    def read_into(self, parts: Parts) -> None:
        """Note the shapes, then fill."""
        self.asked += [array.shape for _, array in parts]
        super().read_into(parts)


def computed(tree: Any) -> dict[str, ComputedParameter]:
    return {path: ComputedParameter(x.shape, x.dtype, lambda x=x: x) for path, x in flatten(tree).items()}  # type: ignore[misc]


def write(folder: Path, tree: Any, dtype: Any = None) -> None:
    parameters = computed(tree)
    stream.write_parameters(folder, parameters, {path: dtype or p.dtype for path, p in parameters.items()}, "text")


def test_the_trainer_reads_it(tmp_path: Path, params: dict[str, Any]) -> None:
    write(tmp_path, params, BFLOAT16)
    assert saved_parts(tmp_path) == set(params)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=here), params)
    loaded = flatten(load_parts(tmp_path, wanted, fit=lambda path, saved, shape: None))
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(loaded[path], array.astype(BFLOAT16).astype(np.float32), err_msg=path)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_it_comes_back_to_the_bit(tmp_path: Path, params: dict[str, Any], dtype: Any) -> None:
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    write(tmp_path, cast)
    saved = stream.open_parameters(tmp_path)
    for path, array in flatten(cast).items():
        assert saved[path].stacked == ("/layers/" in path)
        np.testing.assert_array_equal(read(saved[path], whole(array.shape)), array, err_msg=path, strict=True)
        part = tuple(slice(n // 2, n) for n in array.shape)
        np.testing.assert_array_equal(read(saved[path], part), array[part], err_msg=path, strict=True)


def test_no_piece_is_larger_than_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 64)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2048)
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(5, 32, 48)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    parameters = {"a/layers/large": Watched(large), "a/layers/small": Watched(small)}
    dtypes = {path: np.dtype(np.float32) for path in parameters}
    stream.write_parameters(tmp_path, parameters, dtypes, "")
    assert all(shape[0] == 1 and np.prod(shape) * 4 <= 2048 for shape in parameters["a/layers/large"].asked)
    assert {shape[0] for shape in parameters["a/layers/small"].asked} <= {1, 2}  # 64 bytes: two layers
    saved = stream.open_parameters(tmp_path)
    np.testing.assert_array_equal(read(saved["a/layers/large"], whole(large.shape)), large)
    np.testing.assert_array_equal(read(saved["a/layers/small"], whole(small.shape)), small)
    assert sum(1 for _ in grid((5, 32, 48), (1, 16, 32))) == 5 * 2 * 2


def test_the_trainer_s_checkpoints_are_cut_by_layer_too(tmp_path: Path) -> None:
    """Or one layer of a large model could not be exported without reading all of them."""
    layers = jax.numpy.arange(3 * 512 * 1024, dtype=jax.numpy.float32).reshape(3, 512, 1024)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), print)
    checkpointer.save(1, {"params": {"a": {"layers": layers}}, "step": jax.numpy.zeros(())}, {}, "")
    checkpointer.close()
    saved = stream.open_parameters(tmp_path)["a/layers"]
    assert isinstance(saved, stream.SavedParameter) and saved.chunk == (1, 512, 1024)
    np.testing.assert_array_equal(read(saved, (slice(1, 2), slice(0, 2), slice(0, 1024))), layers[1:2, :2])


def test_a_full_disk_is_found_out_before_anything_is_written(
    tmp_path: Path, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = stream.shutil.disk_usage(tmp_path)._replace(free=1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: free)  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match=r"new: needs 0\.0 GB, its disk has 0\.0 GB free"):
        write(tmp_path / "new", params)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stream.appearing_whole(tmp_path / "new") as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []
    with stream.appearing_whole(tmp_path / "new") as temporary:
        (temporary / FOLDER).mkdir()
        assert not (tmp_path / "new").exists()
    with pytest.raises(WeightsError, match="exists already and is not empty"), stream.appearing_whole(tmp_path / "new"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
