"""Where every array lives: one mesh, one table from parameter path to PartitionSpec.

Mesh axes: `data` (replicas of the parameters; across slices on pods), `fsdp` (shards of parameters and batch),
`tensor` (shards of heads, MLP and vocabulary). Rows of a batch are spread over `data` and `fsdp` together.
Adam's moments follow their parameter. A path that no rule matches is an error: a renamed parameter must never end up
replicated on every device in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from emu2_jax.config import MeshConfig, OptimizerConfig
from emu2_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
#: The axes that rows are spread over.
ROWS = ("data", "fsdp")

#: Pattern (full match on the path, without the stack's leading `layers` axis) -> mesh axis of each dimension.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Visual encoder: "D" stays on fsdp, heads and MLP on tensor.
    (r"visual_encoder/patch_kernel", (None, "fsdp")),
    (r"visual_encoder/(patch_bias|class_embedding)", ("fsdp",)),
    (r"visual_encoder/position_embedding", (None, "fsdp")),
    (r"visual_encoder/.*/attention/qkv", ("fsdp", None, "tensor", None)),
    (r"visual_encoder/.*/attention/[qkv]_bias", ("tensor", None)),
    (r"visual_encoder/.*/mlp/up_bias", ("tensor",)),
    (r"visual_encoder/.*/(out|down)_bias", (None,)),
    # Language model.
    (r"language_model/token_embedding", ("tensor", "fsdp")),
    (r"language_model/head", ("fsdp", "tensor")),
    (r"language_model/.*/attention/[qkv]", ("fsdp", "tensor", None)),
    (r"language_model/.*/attention/[qkv]_bias", ("tensor", None)),
    # Both.
    (r"(visual_encoder|language_model)/.*/attention/out", ("tensor", None, "fsdp")),
    (r"(visual_encoder|language_model)/.*/mlp/(gate|up)", ("fsdp", "tensor")),
    (r"(visual_encoder|language_model)/.*/mlp/down", ("tensor", "fsdp")),
    (r"(visual_encoder|language_model)/.*norm/(scale|bias)", (None,)),
    # Connector.
    (r"project_up/kernel", (None, "fsdp")),
    (r"project_down/kernel", ("fsdp", None)),
    # U-Net of the visual decoder: output channels on fsdp, whatever the layer.
    (r"unet/.*/(scale|bias)", (None,)),
    (r"unet/conv_out/kernel", (None, None, "fsdp", None)),  # 4 latent channels out: input channels instead
    (r"unet/.*conv.*/kernel", (None, None, None, "fsdp")),
    (r"unet/.*/kernel", (None, "fsdp")),
    # Layers of time of the video decoder: the same.
    (r"temporal/.*/bias", (None,)),
    (r"temporal/conv_out/kernel", (None, None, None)),  # 4 x 4
    (r"temporal/.*conv.*/kernel", (None, None, "fsdp")),
    (r"temporal/.*/kernel", (None, "fsdp")),
    # VAE: the same; frozen, so that there are no moments to lie anywhere.
    (r"vae/.*/(scale|bias)", (None,)),
    (r"vae/(quant_conv|post_quant_conv)/kernel", (None, None, None, None)),  # 8 x 8 and 4 x 4
    (r"vae/(encoder|decoder)/conv_out/kernel", (None, None, "fsdp", None)),  # 8 moments out, 3 colours out
    (r"vae/.*conv.*/kernel", (None, None, None, "fsdp")),
    (r"vae/.*/attentions/.*/kernel", (None, "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run. Raises `ConfigError` when the sizes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    fixed = config.data * config.tensor
    fsdp = config.fsdp if config.fsdp is not None else len(devices) // fixed
    if fixed * fsdp != len(devices):
        raise ConfigError(
            f"mesh: data {config.data} x fsdp {config.fsdp or 'rest'} x tensor {config.tensor} does not give the "
            f"{len(devices)} devices there are; choose sizes whose product is {len(devices)}"
        )
    shape = (config.data, fsdp, config.tensor)
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    # Neighbours along an axis are neighbours on the torus. In the order of their ids a gather is no ring, and is
    # compiled as an all-reduce of arrays of zeros, at twice the bytes.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if config.data % slices:
            raise ConfigError(
                f"mesh.data: is {config.data}, but must be a multiple of {slices}: parameters are not sharded across "
                "slices"
            )
        inside = (config.data // slices, fsdp, config.tensor)
        laid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES)


def rule(path: str) -> tuple[str, tuple[str | None, ...]]:
    """The pattern that matches `path`, and the mesh axis of each dimension. Raises `ConfigError` when none does."""
    found = next(((pattern, axes) for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
    if found is None:
        raise ConfigError(f"{path}: no sharding rule matches; add one to emu2_jax/sharding.py")
    return found


def spec(path: str, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> P:
    """PartitionSpec of the parameter at `path`.

    Raises `ConfigError` when no rule matches or a dimension is not divisible by its mesh axis.
    """
    pattern, axes = rule(path)
    axes = (None, *axes) if "/layers/" in path else axes
    if len(axes) != len(shape):
        raise ConfigError(f"{path}: rule {pattern!r} is for {len(axes)} dimensions, the parameter has {tuple(shape)}")
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % mesh_shape[axis]:
            raise ConfigError(f"{path}: a dimension of {size} does not divide over mesh.{axis} = {mesh_shape[axis]}")
    return P(*axes)


def path_of(key_path: Sequence[Any]) -> str:
    """`visual_encoder/blocks/layers/mlp/up` for the key path of a nested dict."""
    return "/".join(str(entry.key) for entry in key_path if hasattr(entry, "key"))


def parameter_shardings(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding for every leaf of a parameter tree (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: NamedSharding(mesh, spec(path_of(key_path), leaf.shape, mesh.shape)), params
    )


def optimizer_shardings(
    optimizer: optax.GradientTransformation, opt_state: Any, trained: Mapping[str, Any], mesh: Mesh
) -> Any:
    """Moments lie as their parameter does; counters are replicated. Without this, jit puts moments on one device."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_state,
        parameter_shardings(trained, mesh),
        transform_non_params=lambda _: replicated(mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


@dataclass(frozen=True)
class RowShares:
    """Which rows of a global batch the devices of one host hold: some of `count` equal, contiguous shares."""

    count: int
    mine: tuple[int, ...]  # in ascending order
    counted: bool  # false where a host with a lower number holds the same rows (mesh.tensor reaches over hosts)


#: Of a host that is alone.
ALL_ROWS = RowShares(1, (0,), True)


def row_shares(mesh: Mesh, process: int) -> RowShares:
    """The rows of a host in terms of the mesh, for any order of its devices.

    Two hosts of two devices, fsdp 4: host 0 has share 0 of 2. The same with tensor 4: each has share 0 of 1, and host
    1 does not count. Were the devices of the hosts taken in turn, host 0 would have shares 0 and 2 of 4.
    """
    axes = batch_sharding(mesh).spec[0]
    count = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    held: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = NamedSharding(mesh, P(axes)).devices_indices_map((count,))
    for device, index in places.items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    if process not in held:
        raise ConfigError(f"mesh: holds no device of host {process}; use all devices of all hosts")
    sharing = [host for host in sorted(held) if held[host] & held[process]]
    if any(held[host] != held[process] for host in sharing):
        raise ConfigError(
            f"mesh: hosts {sharing} share rows of the batch in part only; choose mesh.tensor so that it divides the "
            "devices of a host, or is a multiple of them"
        )
    mine, counted = sorted(held[process]), process == sharing[0]
    size = len(mine)
    if mine == list(range(mine[0], mine[0] + size)) and mine[0] % size == 0 and count % size == 0:
        return RowShares(count // size, (mine[0] // size,), counted)
    return RowShares(count, tuple(mine), counted)


def micro_batches(config: OptimizerConfig, rows: int) -> int:
    """Micro-batches that a device makes of its `rows` of a batch: equal ones."""
    most = config.micro_batch_rows
    if most is None:
        return config.accumulation_steps
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)


def check_batch(rows: int, config: OptimizerConfig, mesh: Mesh, path: str) -> None:
    """Raise `ConfigError` unless `rows` divides over micro-batches and devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulation_steps
    if rows % shards:
        raise ConfigError(
            f"{path}: {rows} rows do not divide over mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} x "
            f"optimizer.accumulation_steps {config.accumulation_steps}; take a multiple of {shards}"
        )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that the arrays (or shapes) of `tree` take on one device under `shardings`."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))
