"""Memory of weights in and out, and exactness of the round trip.

    python -m benchmarks.weights [--dir DIR] [--model wide]

Makes a checkpoint of random bfloat16 weights, in 60 decoder layers and at least 4 GB, in the Hugging Face form of Emu2;
then, each in a process of its own so that its peak memory is its own:

* `import`: the files straight onto the device, shard by shard (`weights.placement`);
* `convert`: the files to a work directory (`emu2 convert`);
* `export`: the work directory back to files (`emu2 export`), compared with the first ones bit by bit;

and `roundtrip`: every form, float32 and bfloat16, at a small size, in this process. One JSON line per case. Memory is
what Linux reports as the process's highest resident set (VmHWM); `baseline` is that of the same process after the
same work on a model of a megabyte: Python, JAX, Orbax, their compiled code and their thread pools.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from emu2_jax import sharding
from emu2_jax.config import LanguageConfig, MeshConfig, ModelConfig, VisionConfig
from emu2_jax.models import emu2
from emu2_jax.task import Params
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.export import export
from emu2_jax.weights.files import open_weights
from emu2_jax.weights.names import Form, table
from emu2_jax.weights.parameters import ComputedParameter, Parts
from emu2_jax.weights.placement import place
from emu2_jax.weights.state_dict import flatten, to_params, to_state_dict
from emu2_jax.weights.stream import open_parameters, write_parameters

FORM: Form = "emu2_hf"
ROUND_TRIPS: tuple[Form, ...] = ("emu2", "emu2_hf", "llama_hf", "eva_timm", "eva_open_clip", "eva_clip")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: 60 layers, a quarter as wide as LLaMA-33B; the embedding is the largest stored tensor, as it is there.
MODELS = {
    "large": ModelConfig(
        vision=VisionConfig(width=448, num_layers=16, num_heads=4, mlp_width=3840),
        language=LanguageConfig(width=1664, num_heads=13, num_kv_heads=13, mlp_width=4480),
    ),
    # Emu2's own widths and so its own tensors, the largest that there are, in two layers.
    "wide": ModelConfig(vision=VisionConfig(num_layers=2), language=LanguageConfig(num_layers=2)),
    "small": ModelConfig(
        vision=VisionConfig(image_size=56, width=32, num_layers=2, num_heads=2, mlp_width=48),
        language=LanguageConfig(vocab_size=320, width=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=96),
        num_visual_tokens=4,
    ),
}


def main() -> None:
    """Run every case, or the one that a parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work (a temporary directory)")
    parser.add_argument(
        "--model", choices=["large", "wide"], default="large", help="60 layers, or 2 of Emu2's own width (large)"
    )
    parser.add_argument("--case", choices=["generate", *CASES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run = generate if arguments.case == "generate" else partial(measure, arguments.case)
        print(json.dumps(run(arguments.dir, arguments.model)))
        return
    root = Path(tempfile.mkdtemp(prefix="emu2-weights-", dir=arguments.dir))
    try:
        for case in ("generate", *CASES):
            command = [sys.executable, "-m", "benchmarks.weights", "--case", case, "--dir", str(root)]
            command += ["--model", arguments.model]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            if case != "generate":
                print(result.stdout.splitlines()[-1], flush=True)
    finally:
        shutil.rmtree(root)
    print(json.dumps(round_trip()))


def generate(root: Path, large: str) -> dict[str, Any]:
    """Random weights as files, large and small; every tensor its own draw."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        # Random signs and mantissas at one exponent: finite numbers that do not compress.
        return (rng.integers(0, 1 << 16, shape, dtype=np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)).view(BFLOAT16)

    class Drawn(ComputedParameter):
        """Every part drawn when it is read, so that the generator needs no memory either."""

        def read_into(self, parts: Parts) -> None:
            for _, array in parts:
                array[...] = draw(array.shape)

    for name in ("small", large):
        rows = table(FORM, MODELS[name])
        drawn = {row.path: Drawn(row.layout.our_shape, BFLOAT16, lambda: np.zeros(0)) for row in rows.rows}
        export(drawn, rows, root / name / "files")
    return {"case": "generate"}


def import_to_device(folder: Path, model: ModelConfig) -> int:
    """Files to the device; gives the bytes that have to be there."""
    mesh = sharding.make_mesh(MeshConfig())
    imported = import_weights([Source.open(str(folder / "files"))], table(FORM, model).parts, model)
    arrays = jax.block_until_ready(place(imported.parameters, mesh))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def convert(folder: Path, model: ModelConfig) -> int:
    """Files to a work directory; nothing has to stay in memory."""
    imported = import_weights([Source.open(str(folder / "files"))], table(FORM, model).parts, model)
    dtypes = {path: parameter.dtype for path, parameter in imported.parameters.items()}
    write_parameters(folder / "workdir", imported.parameters, dtypes, "")
    return 0


def export_again(folder: Path, model: ModelConfig) -> int:
    """A work directory to files; nothing has to stay in memory."""
    export(open_parameters(folder / "workdir"), table(FORM, model), folder / "again")
    return 0


CASES: dict[str, Callable[[Path, ModelConfig], int]] = {
    "import": import_to_device,
    "convert": convert,
    "export": export_again,
}


def measure(case: str, root: Path, large: str) -> dict[str, Any]:
    """One case: once small, for the baseline, then large."""
    CASES[case](root / "small", MODELS["small"])
    baseline = peak_rss()
    began = time.perf_counter()
    shards = CASES[case](root / large, MODELS[large])
    seconds, peak = time.perf_counter() - began, peak_rss()
    stored = open_weights(str(root / large / "files"))
    line = {
        "case": case,
        "stored_gb": round(sum(tensor.nbytes for tensor in stored.values()) / 1e9, 2),
        "layers": MODELS[large].language.num_layers,
        "shards_gb": round(shards / 1e9, 2),
        "rss_mb_beyond_shards": round((peak - shards) / 1e6),
        "rss_mb_baseline": round(baseline / 1e6),
        "rss_mb_working": round((peak - shards - baseline) / 1e6),
        "largest_tensor_mb": round(max(tensor.nbytes for tensor in stored.values()) / 1e6),
        "seconds": round(seconds, 1),
    }
    if case == "export":
        again = open_weights(str(root / large / "again"))
        line["bit_exact"] = stored.keys() == again.keys() and all(
            stored[name].array().tobytes() == again[name].array().tobytes() for name in stored
        )
    return line


def peak_rss() -> int:
    """The highest resident set of this process so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def round_trip() -> dict[str, Any]:
    """State dict -> parameters -> state dict in memory, and -> work directory -> files, at a small size."""
    model = MODELS["small"]
    exact = True
    with tempfile.TemporaryDirectory(prefix="emu2-weights-") as folder:
        for dtype in (np.dtype(np.float32), BFLOAT16):
            params = cast(emu2.init(model, jax.random.key(0)), dtype)
            for form in ROUND_TRIPS:
                rows = table(form, model)
                first = to_state_dict(params, rows)
                exact &= same_bits(to_state_dict(to_params(first, rows), rows), first)
                root = Path(folder) / f"{form}-{dtype.name}"
                export(in_memory(params), rows, root / "files", shard_bytes=20_000)
                imported = import_weights([Source.open(f"{form}={root / 'files'}")], rows.parts, model).parameters
                write_parameters(root / "workdir", imported, {path: p.dtype for path, p in imported.items()}, "")
                export(open_parameters(root / "workdir"), rows, root / "again", shard_bytes=30_000)
                again = {name: tensor.array() for name, tensor in open_weights(str(root / "again")).items()}
                exact &= same_bits(again, first)
    return {"case": "roundtrip", "bit_exact": exact, "forms": list(ROUND_TRIPS), "dtypes": ["float32", "bfloat16"]}


def cast(params: Params, dtype: np.dtype) -> Params:
    """Parameters in another dtype, on the host."""
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def in_memory(params: Params) -> dict[str, ComputedParameter]:
    """Arrays as parameters to export."""
    return {path: ComputedParameter(x.shape, x.dtype, partial(np.asarray, x)) for path, x in flatten(params).items()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two state dicts are the same, names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


if __name__ == "__main__":
    main()
