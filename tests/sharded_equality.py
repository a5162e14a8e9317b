"""Trains the tiny model on one device, on meshes of eight, and with accumulation; prints how far they end apart.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_equality.py

A program of its own because the number of host devices is fixed when jax starts. `test_sharded_equality.py` reads the
one line of JSON that it prints.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import tiny
from jax.sharding import PartitionSpec

from data_pipelines.embedding_store import EMBEDDINGS
from emu2_jax import sharding, shards
from emu2_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from emu2_jax.fingerprint import fingerprint
from emu2_jax.models import attention
from emu2_jax.train import BatchPlacer, Program, build_program
from experiments.encode import compiled

NUM_STEPS = 3
ROWS = 16
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0, epsilon=1e-6)
NOISY = dataclasses.replace(tiny.CONFIG.objective, visual_input_noise=0.1)  # draws for each row


class Run(NamedTuple):
    """What a run of three steps leaves behind."""

    losses: np.ndarray  # steps x (text, regression, gradient norm)
    params: dict[str, Any]
    misplaced: list[str]  # leaves of the final state that lie elsewhere than the table says


def batches() -> list[dict[str, np.ndarray]]:
    """Rows of different fill: images in some only, so that the terms' weights differ from device to device."""
    rng = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return rng.integers(3, 30, count).tolist()

    def row(number: int) -> list[tiny.Document]:
        documents: list[tiny.Document] = [[tiny.BOS, *words(1 + number % 4), tiny.EOS]]
        for _ in range(number % 3):
            documents.append([tiny.BOS, tiny.PICTURE, *words(1), tiny.EOS])
        return documents

    return [tiny.pack([row(number + step) for number in range(ROWS)], seed=step) for step in range(NUM_STEPS)]


def start(program: Program) -> Any:
    """The same random parameters on any mesh, and moments of zero."""
    params = tiny.random_parameters(tiny.task().init)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    state["params"] = params
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), state, program.abstract_state)


def train(
    mesh: MeshConfig, optimizer: OptimizerConfig, devices: list[jax.Device], objective: ObjectiveConfig = NOISY
) -> Run:
    config = dataclasses.replace(tiny.CONFIG, mesh=mesh, optimizer=optimizer, objective=objective)
    program = build_program(tiny.task(objective, optimizer), config, devices)
    state, place, losses = start(program), BatchPlacer(program.mesh), []
    for batch in batches():
        state, log = program.step(state, place(batch))
        means = [float(term.sum) / float(term.weight) for term in log["terms"].values()]
        losses.append([*means, float(log["grad_norm"])])
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(program.abstract_state), strict=True)
    misplaced = [
        jax.tree_util.keystr(path)
        for (path, leaf), wanted in leaves
        if not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    ]
    return Run(np.array(losses), jax.device_get(state["params"]), misplaced)


def moment_share(mesh: MeshConfig) -> float:
    """Bytes of Adam's moments on one device, as a share of all of them."""
    program = build_program(tiny.task(), dataclasses.replace(tiny.CONFIG, mesh=mesh, optimizer=OPTIMIZER))
    moments = start(program)["opt_state"]
    where = jax.tree.map(lambda leaf: leaf.sharding, moments)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(moments))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(moments))
    assert held == sharding.bytes_per_device(moments, where)
    return held / whole


def initial_params(mesh: MeshConfig, devices: list[jax.Device]) -> Any:
    program = build_program(tiny.task(), dataclasses.replace(tiny.CONFIG, mesh=mesh), devices)
    return jax.device_get(program.init()["params"])


def encode(mesh: MeshConfig, devices: list[jax.Device]) -> tuple[str, np.ndarray]:
    """Fingerprint of an encoder and what it makes of some pictures, as `emu2 encode` does on this mesh."""
    config = dataclasses.replace(tiny.CONFIG, mesh=mesh)
    laid = sharding.make_mesh(mesh, devices)
    params = {"visual_encoder": tiny.random_parameters(tiny.task().init)["visual_encoder"]}
    params = jax.device_put(params, sharding.parameter_shardings(params, laid))
    pictures = np.random.default_rng(3).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    run = compiled(config, laid, crops=False)
    found = run(params, jax.device_put(pictures, sharding.batch_sharding(laid)))[EMBEDDINGS]
    return fingerprint(params["visual_encoder"]), np.asarray(found, np.float32)


def heads_apart(devices: list[jax.Device]) -> float:
    """How far values and gradients of splash attention end apart with heads spread over `tensor`, and on one device."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    q, k, v, weights = np.random.default_rng(7).normal(size=(4, 4, 128, 2, 8)).astype(np.float32)
    documents = np.repeat([[1, 2]], 64, axis=1).repeat(4, axis=0).astype(np.int32)

    def attend(q: Any, k: Any, v: Any, weights: Any, documents: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            mixed = attention.attend(q, k, v, attention.Packed(documents), kernel="splash")
            return (mixed * weights).sum(), mixed

        gradients, mixed = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return (*gradients, mixed)

    rows = PartitionSpec(shards.ROWS)
    spread = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={*shards.ROWS}, check_vma=False)
    one, several = (jax.jit(run)(q, k, v, weights, documents) for run in (attend, spread))
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(one, several, strict=True))


def kernel_distance(rows: int) -> float:
    """How far splash on rows that the compiler spreads is from plain attention, values and gradients."""
    laid = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = sharding.batch_sharding(laid) if rows > 1 else sharding.replicated(laid)
    rng = np.random.default_rng(4)
    q, k, v, weights = (jax.device_put(rng.normal(size=(rows, 130, 2, 16)).astype(np.float32), where) for _ in range(4))

    def values_and_gradients(kernel: attention.Kernel) -> Any:
        @jax.jit
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            with jax.sharding.use_abstract_mesh(laid.abstract_mesh):
                mixed, back = jax.vjp(lambda *qkv: attention.attend(*qkv, kernel=kernel), q, k, v)
                return mixed, back(weights)

        assert ("shard_map" in str(jax.make_jaxpr(run)(q, k, v))) == (kernel == "splash")
        return run(q, k, v)

    found, wanted = values_and_gradients("splash"), values_and_gradients("plain")
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, wanted)))


def distance(a: Run, b: Run) -> dict[str, Any]:
    """Largest relative difference of the losses; of the parameters, relative to the largest one of their leaf."""
    params = jax.tree.map(lambda x, y: float(np.abs(x - y).max() / np.abs(x).max()), a.params, b.params)
    return {
        "losses": float(np.abs(a.losses / b.losses - 1).max()),
        "params": max(jax.tree.leaves(params)),
        "misplaced": b.misplaced,
    }


def main() -> None:
    devices = jax.devices()
    assert len(devices) == 8, f"needs 8 host devices, there are {len(devices)}; set XLA_FLAGS"
    one = train(MeshConfig(), OPTIMIZER, devices[:1])
    runs = {
        "data 2 x fsdp 2 x tensor 2": distance(one, train(MeshConfig(data=2, fsdp=2, tensor=2), OPTIMIZER, devices)),
        "fsdp 8": distance(one, train(MeshConfig(fsdp=8), OPTIMIZER, devices)),
        # Draws are made anew in each micro-batch: none are made here.
        "accumulation of 2": distance(
            train(MeshConfig(), OPTIMIZER, devices[:1], tiny.CONFIG.objective),
            train(
                *(MeshConfig(data=2, tensor=2), dataclasses.replace(OPTIMIZER, accumulation_steps=2), devices),
                tiny.CONFIG.objective,
            ),
        ),
        "two rows at a time": distance(
            train(MeshConfig(), OPTIMIZER, devices[:1], tiny.CONFIG.objective),
            train(
                *(MeshConfig(data=2, fsdp=2, tensor=2), dataclasses.replace(OPTIMIZER, micro_batch_rows=2), devices),
                tiny.CONFIG.objective,
            ),
        ),
    }
    moved = jax.tree.map(
        lambda before, after: float(np.abs(before - after).max()), tiny.random_parameters(tiny.task().init), one.params
    )
    initial = (initial_params(MeshConfig(), devices[:1]), initial_params(MeshConfig(fsdp=4, tensor=2), devices))
    drawn_apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *initial)
    prints, embeddings = zip(
        *(encode(MeshConfig(), devices[:1]), encode(MeshConfig(data=2, fsdp=2, tensor=2), devices)), strict=True
    )
    report = {
        "fingerprints": prints,
        "kernel": {"rows": kernel_distance(8), "one image": kernel_distance(1)},
        "embeddings": float(np.abs(embeddings[0] - embeddings[1]).max() / np.abs(embeddings[0]).max()),
        "heads_apart": heads_apart(devices),
        "initial_params": max(jax.tree.leaves(drawn_apart)),
        "losses": one.losses.tolist(),
        "smallest_move": min(jax.tree.leaves(moved)),
        "moment_share": {
            "fsdp 8": moment_share(MeshConfig(fsdp=8)),
            "data 8": moment_share(MeshConfig(data=8, fsdp=1)),
        },
        "runs": runs,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
