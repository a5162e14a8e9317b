"""The sharding table: what lies where, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from emu2_jax import optimizer, sharding
from emu2_jax.config import DecoderConfig, MeshConfig, OptimizerConfig, TrainConfig, UNetConfig
from emu2_jax.diffusion.decoder import DecoderTask
from emu2_jax.errors import ConfigError
from emu2_jax.train import build_program

#: 16 devices that need not be there.
MESH = cast(Mesh, AbstractMesh((2, 4, 2), sharding.AXES))


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return jax.eval_shape(tiny.task().init, jax.random.key(0))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("language_model/token_embedding", (48, 32), P("tensor", "fsdp")),
        ("language_model/head", (32, 48), P("fsdp", "tensor")),
        ("language_model/blocks/layers/attention/q", (2, 32, 4, 8), P(None, "fsdp", "tensor", None)),
        ("language_model/blocks/layers/attention/out", (2, 4, 8, 32), P(None, "tensor", None, "fsdp")),
        ("language_model/blocks/layers/attention/k_bias", (2, 4, 8), P(None, "tensor", None)),
        ("language_model/blocks/layers/mlp/gate", (2, 32, 56), P(None, "fsdp", "tensor")),
        ("language_model/blocks/layers/mlp/down", (2, 56, 32), P(None, "tensor", "fsdp")),
        ("language_model/blocks/layers/mlp_norm/scale", (2, 32), P(None, None)),
        ("language_model/final_norm/scale", (32,), P(None)),
        ("visual_encoder/blocks/layers/attention/qkv", (2, 16, 3, 2, 8), P(None, "fsdp", None, "tensor", None)),
        ("visual_encoder/blocks/layers/attention/v_bias", (2, 2, 8), P(None, "tensor", None)),
        ("visual_encoder/blocks/layers/attention/k_bias", (2, 2, 8), P(None, "tensor", None)),
        ("visual_encoder/input_norm/bias", (16,), P(None)),
        ("visual_encoder/final_norm/scale", (16,), P(None)),
        ("visual_encoder/blocks/layers/mlp/up_bias", (2, 40), P(None, "tensor")),
        ("visual_encoder/patch_kernel", (12, 16), P(None, "fsdp")),
        ("project_up/kernel", (16, 32), P(None, "fsdp")),
        ("project_down/kernel", (32, 16), P("fsdp", None)),
        ("unet/down_blocks/0/resnets/0/conv1/kernel", (3, 3, 8, 16), P(None, None, None, "fsdp")),
        ("unet/conv_out/kernel", (3, 3, 320, 4), P(None, None, "fsdp", None)),
        (
            "unet/mid_block/attentions/0/transformer_blocks/layers/attn1/to_q/kernel",
            (10, 1280, 1280),
            P(None, None, "fsdp"),
        ),
        ("temporal/down_blocks/0/resnets/0/conv1/kernel", (3, 16, 16), P(None, None, "fsdp")),
        ("temporal/conv_out/kernel", (3, 4, 4), P(None, None, None)),
        ("temporal/conv_in/bias", (16,), P(None)),
        ("temporal/mid_block/attentions/0/layers/attention/to_q/kernel", (10, 16, 16), P(None, None, "fsdp")),
        ("temporal/mid_block/attentions/0/layers/attention/to_out/bias", (10, 16), P(None, None)),
        ("vae/encoder/down_blocks/0/resnets/0/conv1/kernel", (3, 3, 8, 16), P(None, None, None, "fsdp")),
        ("vae/encoder/conv_out/kernel", (3, 3, 512, 8), P(None, None, "fsdp", None)),
        ("vae/quant_conv/kernel", (1, 1, 8, 8), P(None, None, None, None)),
        ("vae/post_quant_conv/bias", (4,), P(None)),
        ("vae/decoder/mid_block/attentions/0/to_out/kernel", (512, 512), P(None, "fsdp")),
    ],
)
def test_where_a_parameter_lies(path: str, shape: tuple[int, ...], expected: P) -> None:
    assert sharding.spec(path, shape, MESH.shape) == expected


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("vae/encoder/scale_shift", (8,), "vae/encoder/scale_shift: no sharding rule matches"),
        ("language_model/rotary", (8,), "language_model/rotary: no sharding rule matches"),
        (
            "language_model/blocks/layers/attention/query",
            (2, 32, 4, 8),
            "language_model/blocks/layers/attention/query:",
        ),
        ("project_up/bias", (32,), "project_up/bias: no sharding rule"),
        ("project_up/kernel", (16, 30), "project_up/kernel: a dimension of 30 does not divide over mesh.fsdp = 4"),
        (
            "language_model/head",
            (32, 47),
            "language_model/head: a dimension of 47 does not divide over mesh.tensor = 2",
        ),
        ("project_up/kernel", (2, 16, 32), "project_up/kernel: rule"),
    ],
)
def test_what_does_not_fit_is_an_error_that_starts_with_the_path(
    path: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        sharding.spec(path, shape, MESH.shape)


def test_one_unknown_leaf_in_a_tree_is_an_error(shapes: dict[str, Any]) -> None:
    tree = shapes | {"adapter": {"kernel": jax.ShapeDtypeStruct((4, 4), np.float32)}}
    with pytest.raises(ConfigError, match=r"^adapter/kernel: no sharding rule"):
        sharding.parameter_shardings(tree, MESH)


def test_every_leaf_of_the_model_has_a_sharding(shapes: dict[str, Any]) -> None:
    shardings = sharding.parameter_shardings(shapes, MESH)
    assert tiny.leaf_paths(shardings) == tiny.leaf_paths(shapes)
    assert all(leaf.mesh == MESH for leaf in jax.tree.leaves(shardings))


def test_moments_lie_as_their_parameters_do_and_counters_everywhere(shapes: dict[str, Any]) -> None:
    config = OptimizerConfig(frozen=("visual_encoder",), weight_decay=0.1)
    trained, _ = optimizer.split_frozen(config, shapes)
    tx = optimizer.build(config, num_steps=10)
    state = jax.eval_shape(tx.init, trained)
    shardings = sharding.optimizer_shardings(tx, state, trained, MESH)
    assert tiny.leaf_paths(shardings) == tiny.leaf_paths(state)
    expected = sharding.parameter_shardings(trained, MESH)
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(shardings, name)
        assert jax.tree.leaves(moments) == jax.tree.leaves(expected)
        assert set(moments) == {"language_model", "project_down", "project_up"}
    shapes_and_shardings = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    counters = [where for leaf, where in shapes_and_shardings if leaf.shape == ()]
    assert counters
    assert all(where.spec == P() for where in counters)


def test_bytes_per_device() -> None:
    """64 float32 over fsdp 4, 6 bfloat16 everywhere: 16 * 4 + 6 * 2 bytes."""
    tree = {"a": jax.ShapeDtypeStruct((2, 32), np.float32), "b": jax.ShapeDtypeStruct((6,), jax.numpy.bfloat16)}
    shardings = {
        "a": jax.sharding.NamedSharding(MESH, P(None, "fsdp")),
        "b": jax.sharding.NamedSharding(MESH, P()),
    }
    assert sharding.bytes_per_device(tree, shardings) == 16 * 4 + 6 * 2


def test_rows_lie_over_data_and_fsdp_together() -> None:
    assert sharding.batch_sharding(MESH).shard_shape((16, 24)) == (2, 24)
    assert sharding.replicated(MESH).shard_shape((16, 24)) == (16, 24)


def test_the_mesh_takes_the_devices_that_are_left() -> None:
    mesh = sharding.make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": 1, "fsdp": len(jax.devices()), "tensor": 1}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (MeshConfig(data=2), "mesh: data 2 x fsdp rest x tensor 1 does not give the 1 devices there are"),
        (MeshConfig(fsdp=3), "mesh: data 1 x fsdp 3 x tensor 1 does not give the 1 devices there are"),
        (MeshConfig(fsdp=1, tensor=8), "mesh: data 1 x fsdp 1 x tensor 8 does not give"),
    ],
)
def test_a_mesh_that_does_not_use_all_devices_is_an_error(config: MeshConfig, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"^{wanted}"):
        sharding.make_mesh(config, jax.devices()[:1])


def test_batches_must_divide_over_micro_batches_and_devices() -> None:
    three = OptimizerConfig(accumulation_steps=3)
    sharding.check_batch(48, three, MESH, "data.global_batch_rows")
    with pytest.raises(ConfigError, match=r"^data\.global_batch_rows: 40 rows .* take a multiple of 24$"):
        sharding.check_batch(40, three, MESH, "data.global_batch_rows")


def test_a_device_works_on_no_more_rows_at_once_than_it_is_told() -> None:
    at_most = OptimizerConfig(micro_batch_rows=4)
    assert {rows: sharding.micro_batches(at_most, rows) for rows in (1, 4, 5, 6, 8, 12, 50)} == {
        1: 1, 4: 1, 5: 5, 6: 2, 8: 2, 12: 3, 50: 25,
    }  # fmt: skip
    assert sharding.micro_batches(OptimizerConfig(accumulation_steps=3), 12) == 3


def test_a_frozen_vae_stays_in_float32_and_has_no_moments() -> None:
    """Where the other frozen parts are stored in half precision; nothing is allocated."""
    unet = UNetConfig(block_out_channels=(32, 64), transformer_layers_per_block=(0, 1), num_attention_heads=(1, 2))
    decoder = DecoderConfig(unet=dataclasses.replace(unet, cross_attention_width=16), image_size=64)
    model = dataclasses.replace(tiny.CONFIG.model, frozen_dtype="bfloat16")
    config = dataclasses.replace(
        tiny.CONFIG,
        model=model,
        decoder=decoder,
        optimizer=OptimizerConfig(frozen=("visual_encoder", "vae")),
        train=TrainConfig(task="decoder"),
    )
    state = build_program(DecoderTask(config), config, jax.devices()[:1]).abstract_state
    dtypes = {part: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for part, tree in state["params"].items()}
    assert dtypes == {"unet": {"float32"}, "vae": {"float32"}, "visual_encoder": {"bfloat16"}}
    assert "vae" not in str(tiny.leaf_paths(state["opt_state"]))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of some host, as far as a mesh looks at it."""

    id: int
    process_index: int
    platform: str = "cpu"


def shares_of(hosts: list[int], **mesh: int) -> list[tuple[int, tuple[int, ...], bool]]:
    """Of each host, where device number i of the mesh belongs to host `hosts[i]`."""
    chips = [cast(jax.Device, Chip(i, host)) for i, host in enumerate(hosts)]
    made = sharding.make_mesh(MeshConfig(**mesh), chips)
    found = [sharding.row_shares(made, host) for host in sorted(set(hosts))]
    return [(shares.count, shares.mine, shares.counted) for shares in found]


@pytest.mark.parametrize(
    ("hosts", "mesh", "expected"),
    [
        ([0, 0], {}, [(1, (0,), True)]),
        ([0, 0, 1, 1], {}, [(2, (0,), True), (2, (1,), True)]),
        ([0, 0, 1, 1], {"data": 2}, [(2, (0,), True), (2, (1,), True)]),
        ([0, 0, 1, 1], {"tensor": 2}, [(2, (0,), True), (2, (1,), True)]),
        # Both hosts hold all rows: one of them counts.
        ([0, 0, 1, 1], {"tensor": 4}, [(1, (0,), True), (1, (0,), False)]),
        # Neighbours in the mesh on different hosts.
        ([0, 1, 0, 1], {}, [(4, (0, 2), True), (4, (1, 3), True)]),
    ],
)
def test_a_host_holds_the_rows_of_its_devices(hosts: list[int], mesh: dict[str, int], expected: Any) -> None:
    assert shares_of(hosts, **mesh) == expected


def test_hosts_that_share_rows_in_part_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hosts \[0, 1\] share rows of the batch in part only"):
        shares_of([0, 0, 1, 1, 2, 2], tensor=3)
