"""`emu2 plan`: what a recipe's step needs and costs on a TPU slice, from the TPU compiler alone."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from emu2_jax import optimizer as optimizer_lib
from emu2_jax import sharding
from emu2_jax.config import ExperimentConfig, ModelConfig, validate
from emu2_jax.errors import ConfigError, UserError, first_line
from emu2_jax.pods import advice, compiling, hlo, saved_steps
from emu2_jax.pods import cost as cost_lib
from emu2_jax.pods.compiling import Buffer, CompiledStep, DoesNotFit, Memory, Shapes
from emu2_jax.pods.cost import Cost
from emu2_jax.pods.estimate import Estimate, assumptions, attention_flops, estimate
from emu2_jax.pods.topologies import Topology
from emu2_jax.task import Task
from emu2_jax.train import Program, build_program
from experiments.inputs import batch_rows, make_task, source_shapes

GIB = 2**30


#: Overrides with which a recipe fits a slice: `stage2_v5p_128.gin`, `stage2_v5e_256_x2.gin` for two slices.
SLICES = Path(__file__).with_name("meshes")


def slice_settings(recipe: str, topology: Topology) -> Path | None:
    """The override file that lays the recipe on the slice, or that of its family (`decoder` for `decoder_512`)."""
    slices = f"_x{topology.slices}" if topology.slices > 1 else ""
    own = recipe.removeprefix("emu2_37b_")
    for name in (own, own.rpartition("_")[0]):
        file = SLICES / f"{name}_{topology.name.replace('-', '_')}{slices}.gin"
        if file.exists():
            return file
    return None


class PlanDoesNotFit(UserError):
    """The step needs more memory than a chip has; the message ends with settings that should make it fit."""


@dataclass(frozen=True)
class Plan:
    """One step of one recipe on one slice. All figures are per chip."""

    recipe: str
    topology: Topology
    source: str  #: whose batch
    mesh: Mapping[str, int]
    rows: int  #: of the global batch
    units: float  #: tokens (positions) of a step on a chip; of a decoder, images
    unit: str
    remat: str
    accumulation_steps: int
    model_flops: float
    memory: Memory
    cost: Cost
    estimate: Estimate
    state: list[Buffer]
    results: list[Buffer]
    host_input: int  #: bytes of batches that a host keeps ready
    lower_s: float
    compile_s: float
    compile_cpu_s: float

    @property
    def us_per_unit(self) -> float:
        """Estimated step time over the tokens (or images) of a chip."""
        return self.estimate.step_s / self.units * 1e6


def plan(
    config: ExperimentConfig,
    topology: Topology,
    *,
    source: str | None = None,
    save: Path | None = None,
    hlo_dir: Path | None = None,
    devices: list[Any] | None = None,
) -> Plan:
    """Compile the step that `emu2 train` would run on the slice. Raises `PlanDoesNotFit`, `ConfigError`."""
    program, task, name, shapes = _prepare(config, topology, source, devices)
    try:
        step = compiling.compile_step(program, shapes)
    except DoesNotFit as error:
        raise PlanDoesNotFit(refusal(config, topology, program, shapes, error)) from error
    if hlo_dir is not None:
        hlo_dir.mkdir(parents=True, exist_ok=True)
        (hlo_dir / f"{config.name}-{topology.name}-{name}.hlo.txt").write_text(step.text, encoding="utf-8")
    if save is not None:
        saved_steps.save(step, program, shapes, save)
    return _read(config, topology, program, task, name, shapes, step)


def _prepare(
    config: ExperimentConfig, topology: Topology, source: str | None, devices: list[Any] | None
) -> tuple[Program, Task, str, Shapes]:
    """The run's program on the slice's devices, and the batch shape to compile for; all that can be wrong, first."""
    task = make_task(config, None)
    batches = source_shapes(config)
    if source is not None and source not in batches:
        raise ConfigError(f"--source: {source!r} is none of this recipe's: {', '.join(batches)}")
    if config.mesh.data % topology.slices:
        raise ConfigError(
            f"mesh.data: is {config.mesh.data}, but parameters must not be sharded across {topology.slices} slices; "
            f"--gin.mesh.data={topology.slices} puts a copy on each"
        )
    devices = topology.devices() if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, devices)
    for path, rows in batch_rows(config).items():
        sharding.check_batch(rows, config.optimizer, mesh, path)
    name = source or max(batches, key=lambda key: _model_flops(task, batches[key]))
    return build_program(task, config, devices), task, name, batches[name]


def _model_flops(task: Task, shapes: Shapes) -> int:
    return task.model_flops({name: dims for name, (dims, _) in shapes.items()})


def _read(
    config: ExperimentConfig,
    topology: Topology,
    program: Program,
    task: Task,
    source: str,
    shapes: Shapes,
    step: CompiledStep,
) -> Plan:
    module = hlo.parse(step.text)
    causal = {config.data.row_length + -config.data.row_length % 128} if config.train.task == "pretrain" else set()
    cost = cost_lib.count(module, attention_flops(causal))
    model_flops = _model_flops(task, shapes) / topology.chips
    rows = next(iter(shapes.values()))[0][0]
    tokens = "tokens" in shapes
    bytes_of_batch = sum(math.prod(dims) * dtype.itemsize for dims, dtype in shapes.values())
    return Plan(
        recipe=config.name,
        topology=topology,
        source=source,
        mesh=dict(program.mesh.shape),
        rows=rows,
        units=(math.prod(shapes["tokens"][0]) if tokens else rows) / topology.chips,
        unit="token" if tokens else "image",
        remat=config.model.remat,
        accumulation_steps=sharding.micro_batches(
            config.optimizer, rows // (program.mesh.shape["data"] * program.mesh.shape["fsdp"])
        ),
        model_flops=model_flops,
        memory=step.memory,
        cost=cost,
        estimate=estimate(cost, topology, model_flops),
        state=compiling.state_buffers(program),
        results=compiling.result_buffers(module),
        host_input=bytes_of_batch // max(1, topology.hosts) * (config.data.prefetch_batches + 1),
        lower_s=step.lower_s,
        compile_s=step.compile_s,
        compile_cpu_s=step.compile_cpu_s,
    )


def refusal(config: ExperimentConfig, topology: Topology, program: Program, shapes: Shapes, error: DoesNotFit) -> str:
    """One line: how much is missing, and the settings that should make it fit."""
    room = topology.generation.hbm_bytes
    if error.used_bytes is None:
        return f"{config.name} on {topology}: the compiler needs more than {room / GIB:.2f} GiB: {first_line(error)}"
    trained = optimizer_lib.split_frozen(config.optimizer, program.abstract_state["params"])[0]
    needs = advice.Needs(
        used=error.used_bytes,
        state=sum(buffer.bytes for buffer in compiling.state_buffers(program)),
        gradients=sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(trained)),
        rows=next(iter(shapes.values()))[0][0],
        common_rows=math.gcd(*batch_rows(config).values()),
    )
    devices = list(program.mesh.devices.flat)

    def state_bytes(other: ExperimentConfig) -> int:
        again = build_program(make_task(other, None), other, devices)
        return sum(buffer.bytes for buffer in compiling.state_buffers(again))

    found = advice.changes(config, topology, needs, state_bytes)
    changes = "; ".join(f"{change.flags} (about {change.bytes / GIB:.1f} GiB)" for change in found)
    return (
        f"{config.name} on {topology}: does not fit: {needs.used / GIB:.1f} GiB of HBM needed, "
        f"{room / GIB:.2f} there are, of which the state takes {needs.state / GIB:.1f}; "
        + (f"should fit with one of: {changes}" if found else "no one setting makes it fit: take a larger slice")
    )


def as_text(plan: Plan, num_buffers: int = 6) -> str:
    """The report, to be read."""
    memory, chip, e = plan.memory, plan.topology.generation, plan.estimate
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.recipe} on {plan.topology}, mesh {mesh}, remat {plan.remat}",
        f"batch of {plan.source}: {plan.rows} rows, {plan.units:,.0f} {plan.unit}s per chip and step"
        + (f", in {plan.accumulation_steps} micro-batches" if plan.accumulation_steps > 1 else ""),
        "",
        f"fits: {memory.peak / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB HBM, "
        f"{(chip.hbm_bytes - memory.peak - memory.code) / GIB:.2f} left",
        f"  arguments {memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}, "
        f"new outputs {memory.outputs / GIB:.2f}, code {memory.code / GIB:.2f}",
        f"  host: {memory.host / GIB:.2f} GiB per chip offloaded, {plan.host_input / GIB:.2f} GiB per host of input",
        "",
        f"{'estimated step':<22} {e.step_s:8.3f} s  {plan.us_per_unit:9.1f} us per {plan.unit} and chip   "
        f"MFU {e.mfu:.1%}",
    ]
    for name, seconds in (
        ("compute", e.compute_s),
        ("attention kernels", e.kernel_s),
        ("blocking collectives", e.blocking_s),
        ("between slices", e.slices_s),
    ):
        if seconds or name == "compute":
            lines.append(f"  {name:<20} {seconds:8.3f} s  {seconds / plan.units * 1e6:9.1f} us")
    lines += [
        f"  {'ideal':<20} {e.ideal_s:8.3f} s  {e.ideal_s / plan.units * 1e6:9.1f} us   model FLOPs at peak",
        f"compiled over model FLOPs {e.compiled_over_model_flops:.3f}, products at {e.matmul_efficiency:.1%} of peak",
        "estimated cycles: " + ", ".join(f"{kind} {n:,}" for kind, n in plan.cost.cycles.most_common() if n),
        "",
        f"  {'collective':<20} {'mode':<12} {'group':>5} {'calls':>7} {'payload GB':>11} {'wire GB':>9}",
    ]
    for (kind, mode, group), traffic in sorted(plan.cost.collectives.items()):
        lines.append(
            f"  {kind:<20} {mode:<12} {group:>5} {traffic.calls:>7} {traffic.payload / 1e9:>11.3f} "
            f"{traffic.wire / 1e9:>9.3f}"
        )
    if plan.cost.slice_bytes:
        lines.append(f"  to other slices: {plan.cost.slice_bytes / 1e9:.3f} GB")
    for direction, size in sorted(plan.cost.host_bytes.items()):
        lines.append(f"  {direction}: {size / 1e9:.3f} GB")
    lines += _unknown(plan.cost)
    lines += ["", "largest arrays of the state"]
    lines += [f"  {_size(buffer.bytes):>10}  {buffer.name}" for buffer in plan.state[:num_buffers]]
    lines += ["largest results (not all live at once)"]
    lines += [f"  {_size(buffer.bytes):>10}  {buffer.name}" for buffer in plan.results[:num_buffers]]
    lines += [
        "",
        f"traced in {plan.lower_s:.0f} s, compiled in {plan.compile_s:.0f} s ({plan.compile_cpu_s:.0f} s of CPU)",
    ]
    return "\n".join([*lines, "assumed:", *(f"  {line}" for line in assumptions(plan.topology))])


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def _unknown(cost: Cost) -> list[str]:
    """What the figures leave out because the text does not say it."""
    lines = [f"  loop {loop.name}: trips not found, counted once" for loop in cost.loops if loop.trips is None]
    return lines + [f"  kernel {name}: operations unknown" for name, use in cost.kernels.items() if not use.known]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The report, to be read by programs."""
    estimated = plan.estimate
    return {
        "recipe": plan.recipe,
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "source": plan.source,
        "mesh": dict(plan.mesh),
        "rows": plan.rows,
        "accumulation_steps": plan.accumulation_steps,
        "remat": plan.remat,
        "unit": plan.unit,
        "units_per_chip": plan.units,
        "fits": True,
        f"us_per_{plan.unit}_chip": plan.us_per_unit,
        "hbm_gib": plan.topology.generation.hbm_bytes / GIB,
        "peak_hbm_gib": plan.memory.peak / GIB,
        "memory_bytes": dataclasses.asdict(plan.memory),
        "host_input_bytes": plan.host_input,
        "estimate": {**dataclasses.asdict(estimated), "step_s": estimated.step_s, "mfu": estimated.mfu},
        "compiled_over_model_flops": estimated.compiled_over_model_flops,
        "matmul_efficiency": estimated.matmul_efficiency,
        "model_flops_per_chip": plan.model_flops,
        "sync_wire_gb": plan.cost.wire("sync", "sync-fused") / 1e9,
        "async_wire_gb": plan.cost.wire("async", "async-fused") / 1e9,
        "cost": cost_lib.as_dict(plan.cost),
        "largest_state": [dataclasses.asdict(buffer) for buffer in plan.state[:20]],
        "largest_results": [dataclasses.asdict(buffer) for buffer in plan.results[:20]],
        "lower_s": plan.lower_s,
        "compile_s": plan.compile_s,
        "compile_cpu_s": plan.compile_cpu_s,
        "assumptions": assumptions(plan.topology),
        "jax": jax.__version__,
        "libtpu": _libtpu_version(),
    }


def _libtpu_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "unknown"


def write_json(path: Path, value: Any) -> None:
    """Write a report for programs."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Candidate:
    """One point of a search."""

    remat: str
    accumulation_steps: int
    data: int
    tensor: int

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config at this point."""
        return validate(
            dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, remat=self.remat),  # type: ignore[arg-type]
                optimizer=dataclasses.replace(
                    config.optimizer, accumulation_steps=self.accumulation_steps, micro_batch_rows=None
                ),
                mesh=dataclasses.replace(config.mesh, data=self.data, fsdp=None, tensor=self.tensor),
            )
        )

    @property
    def flags(self) -> str:
        """As on the command line."""
        return (
            f"--gin.model.remat={self.remat} --gin.optimizer.accumulation_steps={self.accumulation_steps} "
            f"--gin.mesh.data={self.data} --gin.mesh.tensor={self.tensor}"
        )


def candidates(config: ExperimentConfig, topology: Topology) -> list[Candidate]:
    """Remat policies x micro-batches x meshes that divide the batch, those that need least memory first."""
    policies = [p for p in typing.get_args(typing.get_type_hints(ModelConfig)["remat"]) if p != "none"]
    # Least kept first, so that what does not fit is met late; policies that are not in the list keep their order.
    order = {name: place for place, name in enumerate(("full", "offload", "context", "dots", "dots_with_context"))}
    policies.sort(key=lambda policy: order.get(policy, len(order)))
    found = []
    for data, tensor in itertools.product((topology.slices, 2 * topology.slices, 4 * topology.slices), (1, 2)):
        if topology.chips % (data * tensor):
            continue
        shards = topology.chips // tensor
        rows = [count // shards for count in batch_rows(config).values() if count % shards == 0]
        if len(rows) < len(batch_rows(config)):
            continue
        per_chip = math.gcd(*rows)
        steps = sorted((n for n in range(1, per_chip + 1) if per_chip % n == 0), reverse=True)
        found += [Candidate(policy, n, data, tensor) for policy in policies for n in steps]
    return found


def search(
    config: ExperimentConfig, topology: Topology, say: Callable[[str], None], *, source: str | None = None
) -> Iterator[tuple[Candidate, Plan | None]]:
    """Plan every candidate; None for one that does not fit, or cannot because one that needs less did not."""
    points = candidates(config, topology)
    if not points:
        raise ConfigError(f"--search: no mesh of {topology} divides the rows of this recipe's batches")
    refused: set[Candidate] = set()
    times: list[float] = []
    for number, point in enumerate(points):
        # A larger micro-batch with the same policy and mesh needs more.
        if any(dataclasses.replace(point, accumulation_steps=r.accumulation_steps) == r and
               r.accumulation_steps >= point.accumulation_steps for r in refused):  # fmt: skip
            yield point, None
            continue
        left = f", about {sum(times) / len(times) * (len(points) - number) / 60:.0f} minutes left" if times else ""
        say(f"[{number + 1}/{len(points)}{left}] {point.flags}")
        started = time.perf_counter()
        try:
            result: Plan | None = plan(point.apply(config), topology, source=source)
        except PlanDoesNotFit as error:
            say(f"  {error}")
            refused.add(point)
            result = None
        times.append(time.perf_counter() - started)
        yield point, result
        jax.clear_caches()
        gc.collect()


def frontier(found: list[tuple[Candidate, Plan]]) -> list[tuple[Candidate, Plan]]:
    """Those that no other beats in both time and memory, quickest first."""
    best: list[tuple[Candidate, Plan]] = []
    for point, result in sorted(found, key=lambda pair: (pair[1].us_per_unit, pair[1].memory.peak)):
        if all(result.memory.peak < other.memory.peak for _, other in best):
            best.append((point, result))
    return best


def frontier_text(found: list[tuple[Candidate, Plan]]) -> str:
    """The frontier as a table."""
    lines = [f"{'us':>9} {'MFU':>6} {'HBM GiB':>8}  settings (quickest first; each takes less memory than those above)"]
    for point, result in frontier(found):
        lines.append(
            f"{result.us_per_unit:>9.1f} {result.estimate.mfu:>6.1%} {result.memory.peak / GIB:>8.1f}  {point.flags}"
        )
    return "\n".join(lines)


def run(
    config: ExperimentConfig,
    topology: Topology,
    *,
    source: str | None,
    json_file: Path | None,
    save: Path | None,
    hlo_dir: Path | None,
) -> None:
    """Plan one batch shape, or with source "all" each that differs, and print the reports."""
    names: list[str | None] = [source]
    if source == "all" and "all" not in source_shapes(config):
        distinct = {str(sorted(shapes.items())): name for name, shapes in source_shapes(config).items()}
        names = list(distinct.values())
    found = []
    for name in names:
        result = plan(config, topology, source=name, save=save, hlo_dir=hlo_dir)
        print(as_text(result), end="\n\n" if len(names) > 1 else "\n", flush=True)
        found.append(as_dict(result))
    if save is not None:
        print(f"kept for `emu2 train {config.name} --compiled {save}`")
    if json_file is not None:
        write_json(json_file, found if source == "all" else found[0])


def run_search(config: ExperimentConfig, topology: Topology, *, source: str | None, json_file: Path | None) -> None:
    """Search, and print the frontier; what was found is written as it is found."""
    found: list[tuple[Candidate, Plan]] = []
    for point, result in search(config, topology, lambda line: print(line, flush=True), source=source):
        if result is None:
            continue
        found.append((point, result))
        print(f"  {result.us_per_unit:.1f} us per {result.unit}, {result.memory.peak / GIB:.1f} GiB", flush=True)
        if json_file is not None:
            write_json(json_file, [{"flags": p.flags, **as_dict(r)} for p, r in found])
    if not found:
        raise PlanDoesNotFit(f"{config.name} on {topology}: none of the settings that were tried fits")
    print(frontier_text(found))
