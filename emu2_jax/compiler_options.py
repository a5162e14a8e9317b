"""What the compiler is told, per chip generation: one table, passed with each compile, never through the environment.

Options change how the step is scheduled, not what it computes. docs/performance.md has what each group is worth, and
what was tried and left out. An option that a release of libtpu no longer knows is an error at compile time that names
it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

Options = dict[str, bool | int | str]

#: Gathers of parameters run beside products: a collective is cut into steps that the products around it carry.
_ASYNC_COLLECTIVES: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}

#: Gradients are reduced and scattered in one collective, also where a shard is not a whole number of tiles.
_REDUCE_SCATTER: Options = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
}


#: The SparseCores reduce and scatter gradients while products go on; without it every such collective blocks.
_ASYNC_REDUCE_SCATTER: Options = {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True}


#: The same for gathers: on a v6e none of them runs beside a product otherwise.
_ASYNC_ALL_GATHER: Options = {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True}


def _vmem(kib: int) -> Options:
    """On-chip memory that one fused product may use; the default leaves half of the products short of operands."""
    return {"xla_tpu_scoped_vmem_limit_kib": kib}


#: `device_kind` -> options. A v4 core has 16 MiB of the VMEM that the others have 128 MiB of: the default is kept.
TPU: Mapping[str, Options] = {
    "TPU v4": _ASYNC_COLLECTIVES | _REDUCE_SCATTER,
    "TPU v5": _ASYNC_COLLECTIVES | _REDUCE_SCATTER | _ASYNC_REDUCE_SCATTER | _vmem(65536),  # v5p
    "TPU v5 lite": _ASYNC_COLLECTIVES | _REDUCE_SCATTER | _vmem(65536),  # v5e
    "TPU v6 lite": _REDUCE_SCATTER | _ASYNC_REDUCE_SCATTER | _ASYNC_ALL_GATHER | _vmem(98304),  # v6e
}

#: For programs without a gradient whose products are small, as a U-Net's or a VAE's are: on a CPU, products and
#: convolutions by Eigen in place of YNNPACK (docs/decoder.md has what that is worth). Other devices read past it.
DRAWING: Options = {"xla_cpu_experimental_ynn_fusion_type": ""}


def for_device(device: jax.Device) -> Options:
    """Compiler options for programs that run on `device`; none for a CPU, a GPU or a chip that is not in the table."""
    return dict(TPU.get(device.device_kind, {})) if device.platform == "tpu" else {}
