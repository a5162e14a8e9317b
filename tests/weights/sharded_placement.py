"""Run by `test_placement.py` with 8 devices: files onto a mesh, exact and laid out as the trainer wants."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import sys
from pathlib import Path

import jax
import numpy as np
import tiny
from tiny_weights import model_of

from emu2_jax import sharding
from emu2_jax.config import MeshConfig
from emu2_jax.models import emu2
from emu2_jax.weights import placement
from emu2_jax.weights.convert import Source, import_weights
from emu2_jax.weights.state_dict import flatten


def check(path: Path) -> None:
    """Place the tiny model of a file on two meshes, layer by layer and in one run of all layers."""
    source = Source.open(str(path))
    model = model_of(source.form)
    wanted = flatten(tiny.random_parameters(lambda key: emu2.init(model, key)))
    imported = import_weights([source], ["visual_encoder", "language_model", "project_up"], model)
    meshes = (1, MeshConfig(data=2, fsdp=2, tensor=2)), (1 << 20, MeshConfig(fsdp=4, tensor=2))
    for block_bytes, mesh_config in meshes:
        mesh = sharding.make_mesh(mesh_config)
        placement.BLOCK_BYTES = block_bytes
        for name, array in flatten(placement.place(imported.parameters, mesh)).items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
            spec = sharding.spec(name, array.shape, mesh.shape)
            assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), array.ndim), name


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check(Path(argument))
    print("same on 8 devices")
