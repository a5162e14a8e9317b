"""What to change when a step does not fit: settings whose effect on memory can be reckoned, and is enough.

Reckoned, not compiled: the state is known to the byte, what is left of the compiler's figure is taken to grow with the
rows that a device works on at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from emu2_jax import sharding
from emu2_jax.config import ExperimentConfig
from emu2_jax.pods.topologies import Topology, larger


@dataclass(frozen=True)
class Change:
    """Settings, as on the command line, and the HBM that a chip would need with them."""

    flags: str
    bytes: int


@dataclass(frozen=True)
class Needs:
    """What a step that does not fit takes on one chip."""

    used: int  #: bytes, as the compiler states them
    state: int  #: parameters and moments
    gradients: int  #: in the parameters' precision
    rows: int  #: of the global batch
    common_rows: int  #: greatest common divisor of the rows of all batches of the run: what must stay divisible


def changes(
    config: ExperimentConfig, topology: Topology, needs: Needs, state_bytes: Callable[[ExperimentConfig], int]
) -> list[Change]:
    """Up to three changes with which the step should fit, the least costly first.

    `state_bytes` gives the bytes of the state on one chip under another config, without compiling.
    """
    room = topology.generation.hbm_bytes
    found = [change for change in _single(config, topology, needs, state_bytes) if change.bytes <= room]
    return found[:3]


def _single(
    config: ExperimentConfig, topology: Topology, needs: Needs, state_bytes: Callable[[ExperimentConfig], int]
) -> Iterator[Change]:
    work = max(0, needs.used - needs.state - needs.gradients)  # grows with the rows of a micro-batch
    mesh = config.mesh
    shards = mesh.data * (mesh.fsdp or topology.chips // (mesh.data * mesh.tensor))
    by_rows = config.optimizer.micro_batch_rows is not None
    steps = sharding.micro_batches(config.optimizer, needs.rows // shards)
    rows = needs.rows // (shards * steps)
    # A number of micro-batches must divide the rows of every batch; rows at once are as many as divide each.
    common = rows if by_rows else needs.common_rows // (shards * steps)

    def with_state(other: ExperimentConfig, flags: str, work: float) -> Change:
        state = state_bytes(other)
        return Change(flags, int(state + needs.gradients * state / max(1, needs.state) + work))

    # Gradients of micro-batches are summed in an array of their own.
    extra = 0 if steps > 1 else needs.gradients
    for parts in (factor for factor in range(2, rows + 1) if common % factor == 0):
        smaller = needs.state + needs.gradients + extra + work / parts
        if smaller <= topology.generation.hbm_bytes:
            setting = f"micro_batch_rows={rows // parts}" if by_rows else f"accumulation_steps={steps * parts}"
            yield Change(f"--gin.optimizer.{setting}", int(smaller))
            break
    if config.model.remat != "full":
        language = config.model.language
        kept = 2 * rows * config.data.row_length * language.width * language.num_layers  # a carry per layer, bfloat16
        # Beside the carries, one layer's activations: not more than the share of a layer in what is kept now.
        yield Change(
            "--gin.model.remat=full",
            int(needs.state + needs.gradients + min(work, kept + work / max(1, language.num_layers))),
        )
    if mesh.data > topology.slices:
        wider = dataclasses.replace(mesh, data=topology.slices, fsdp=None)
        flags = f"--gin.mesh.data={topology.slices}" + (" --gin.mesh.fsdp=None" if mesh.fsdp is not None else "")
        yield with_state(dataclasses.replace(config, mesh=wider), flags, work)
    if config.optimizer.moment_dtype != "bfloat16":
        optimizer = dataclasses.replace(config.optimizer, moment_dtype="bfloat16")
        yield with_state(
            dataclasses.replace(config, optimizer=optimizer), "--gin.optimizer.moment_dtype=bfloat16", work
        )
    other = larger(topology)
    while other is not None:
        factor = other.chips / topology.chips
        if needs.common_rows % (shards * other.chips // topology.chips * (1 if by_rows else steps)) == 0:
            size = int((needs.state + needs.gradients) / factor + work / min(factor, max(1, rows)))
            if size <= other.generation.hbm_bytes:
                yield Change(f"--topology {other.name}", size)
                break
        other = larger(other)
    if config.data.mixing == "one_source_per_step" or config.train.task == "decoder":
        return
    for parts in (factor for factor in (2, 4, 8) if rows % factor == 0):
        size = int(needs.state + needs.gradients + work / parts)
        yield Change(f"--gin.data.global_batch_rows={needs.rows // parts}", size)
