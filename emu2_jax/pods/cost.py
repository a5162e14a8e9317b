"""What one run of a compiled step costs a device: cycles, products, collectives, kernels, host traffic.

Cycles are the compiler's own estimates, added up through loops and calls. Collectives, Pallas kernels and copies
between memories carry none: the sum is the computing, not the step (`emu2_jax.pods.estimate` makes one of it).

A fusion is counted by its own estimate; of what it holds, only products, kernels and collectives are looked at. A
collective that is cut into steps over several fusions counts once.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from emu2_jax.pods import collectives
from emu2_jax.pods.collectives import Mode, Transfer
from emu2_jax.pods.hlo import Computation, Instruction, Module
from emu2_jax.pods.products import product_flops
from emu2_jax.pods.trips import trip_count

HOST_SPACE = 5

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "copy-done", "slice-done", "async-done", "async-update", "get-dimension-size", "domain",
    "add-dependency", "send-done", "recv-done",
}  # fmt: skip
_COPIES = {"copy", "transpose", "reshape", "slice", "concatenate", "pad"}
_MEMORY_COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}


@dataclass
class Traffic:
    """Calls of one kind of collective."""

    calls: int = 0
    payload: float = 0.0  #: bytes
    wire: float = 0.0  #: bytes

    def add(self, other: Traffic, times: int = 1) -> None:
        """Add `times` the calls of `other`."""
        self.calls += other.calls * times
        self.payload += other.payload * times
        self.wire += other.wire * times


@dataclass
class KernelUse:
    """Calls of one Pallas kernel."""

    calls: int = 0
    flops: float = 0.0
    known: bool = True  #: whether every call's operations could be told


@dataclass
class ProductUse:
    """Equal products: runs, and the cycles and operations of all of them."""

    runs: int = 0
    cycles: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Loop:
    """One `while` of the program."""

    name: str
    trips: int | None  #: None: could not be told, and is counted as 1
    cycles_per_trip: int


CollectiveKey = tuple[str, Mode, int]  # kind, mode, group


@dataclass
class Cost:
    """Sums over everything that runs."""

    cycles: collections.Counter[str] = field(default_factory=collections.Counter)  #: by class of instruction
    runs: collections.Counter[str] = field(default_factory=collections.Counter)
    product_flops: int = 0
    collectives: dict[CollectiveKey, Traffic] = field(default_factory=lambda: collections.defaultdict(Traffic))
    kernels: dict[str, KernelUse] = field(default_factory=lambda: collections.defaultdict(KernelUse))
    host_bytes: collections.Counter[str] = field(default_factory=collections.Counter)  #: to_host, to_device
    slice_bytes: float = 0.0  #: sent to other slices
    largest: collections.Counter[str] = field(default_factory=collections.Counter)  #: cycles of equal instructions
    products: dict[str, ProductUse] = field(default_factory=lambda: collections.defaultdict(ProductUse))
    loops: list[Loop] = field(default_factory=list)

    @property
    def total_cycles(self) -> int:
        """Of all classes."""
        return sum(self.cycles.values())

    @property
    def kernel_flops(self) -> float:
        """Of all Pallas kernels."""
        return sum(kernel.flops for kernel in self.kernels.values())

    def wire(self, *modes: Mode) -> float:
        """Bytes that leave the device in collectives of these modes."""
        return sum(traffic.wire for (_, mode, _), traffic in self.collectives.items() if mode in modes)

    def add(self, other: Cost, times: int = 1) -> None:
        """Add `times` runs of `other`."""
        for name in ("cycles", "runs", "host_bytes", "largest"):
            own: collections.Counter[str] = getattr(self, name)
            for key, value in getattr(other, name).items():
                own[key] += value * times
        self.product_flops += other.product_flops * times
        self.slice_bytes += other.slice_bytes * times
        for collective, traffic in other.collectives.items():
            self.collectives[collective].add(traffic, times)
        for name, kernel in other.kernels.items():
            use = self.kernels[name]
            use.calls += kernel.calls * times
            use.flops += kernel.flops * times
            use.known &= kernel.known
        for name, product in other.products.items():
            sums = self.products[name]
            sums.runs += product.runs * times
            sums.cycles += product.cycles * times
            sums.flops += product.flops * times
        self.loops += other.loops


@dataclass
class _Fused:
    """What a fusion holds, beside its estimate."""

    product_flops: int = 0
    has_product: bool = False
    transfers: list[Transfer] = field(default_factory=list)
    kernels: list[tuple[Instruction, Computation]] = field(default_factory=list)


class AttentionCall(NamedTuple):
    """One call of what may be an attention kernel."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    blocks: tuple[int, int] | None  #: of the mask, along queries and keys, where it is given by blocks
    results: int  #: arrays of the queries' rank or more: values, or gradients


#: The operations of a call; None where it is no attention.
AttentionFlops = Callable[[AttentionCall], float | None]


class Counter:
    """Counts one module; computations that are called often are looked at once."""

    def __init__(self, module: Module, attention_flops: AttentionFlops | None = None) -> None:
        self._module = module
        self._attention_flops = attention_flops
        self._costs: dict[str, Cost] = {}
        self._fused: dict[tuple[str, bool], _Fused] = {}

    def count(self) -> Cost:
        """One run of the program."""
        return self._run(self._module.entry)

    def _called(self, instruction: Instruction, *kinds: str) -> list[Computation]:
        return [self._module.computations[name] for name in instruction.called(*kinds)]

    def _run(self, computation: Computation) -> Cost:
        if computation.name not in self._costs:
            cost = self._costs[computation.name] = Cost()
            carried: set[str] = set()  # channels whose first step was seen
            steps = self._steps_of_channels(computation)
            for instruction in computation:
                if instruction.opcode == "fusion":
                    self._count_fusion(instruction, cost, carried, steps)
                elif instruction.opcode not in _FREE:
                    self._count(instruction, computation, cost)
        return self._costs[computation.name]

    def _steps_of_channels(self, computation: Computation) -> collections.Counter[str]:
        """Channel -> in how many fusions of the computation it appears."""
        steps: collections.Counter[str] = collections.Counter()
        for instruction in computation:
            if instruction.opcode == "fusion":
                inside = [self._look_inside(called) for called in self._called(instruction, "calls")]
                steps.update({t.channel for fused in inside for t in fused.transfers if t.channel})
        return steps

    def _count(self, instruction: Instruction, computation: Computation, cost: Cost) -> None:
        """Add one instruction other than a fusion."""
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(self._module, instruction, computation)
            body = Cost()
            for called in self._called(instruction, "body", "condition"):
                body.add(self._run(called))
            cost.add(body, 1 if trips is None else trips)
            cost.loops.append(Loop(instruction.name, trips, body.total_cycles))
        elif opcode == "conditional":
            branches = self._called(instruction, "branch_computations", "true_computation", "false_computation")
            costs = [self._run(branch) for branch in branches]
            if costs:
                cost.add(max(costs, key=lambda branch: (branch.total_cycles, branch.product_flops)))
        elif opcode == "call":
            for called in self._called(instruction, "to_apply", "calls", "called_computations"):
                cost.add(self._run(called))
        elif opcode in ("async-start", "call-start"):  # the second on a SparseCore
            for called in self._called(instruction, "calls", "called_computations", "to_apply"):
                cost.add(_made_async(self._run(called)))
            _add_host_traffic(instruction, computation, cost)
        elif collectives.kind_of(opcode):
            sent = collectives.transfer(instruction, computation, self._module.num_partitions)
            _add_transfer(cost, sent, "async" if opcode.endswith("-start") else "sync")
        elif opcode == "custom-call":
            self._add_kernel(instruction, computation, cost)
            if instruction.cycles:
                cost.cycles["custom-call"] += instruction.cycles
        elif opcode == "send" and "_xla_megascale" in instruction.attributes:
            # Between slices, collectives become transfers between hosts. Sent are the data, a context and a token.
            cost.slice_bytes += instruction.arrays[0].bytes
        elif opcode in _MEMORY_COPIES:
            _add_host_traffic(instruction, computation, cost)
        elif not opcode.endswith("-done"):
            flops = product_flops(instruction, computation) if opcode in ("convolution", "dot") else None
            kind = "matmul" if flops is not None else "copy" if opcode in _COPIES else "other"
            if flops is None:
                _add_host_traffic(instruction, computation, cost)
            self._add_estimate(instruction, kind, flops or 0, cost)

    def _count_fusion(
        self, fusion: Instruction, cost: Cost, carried: set[str], steps: collections.Counter[str]
    ) -> None:
        inside = [
            self._look_inside(called, scatters="reduce-scatter" in fusion.name or "all-reduce-scatter" in called.name)
            for called in self._called(fusion, "calls")
        ]
        has_product = any(fused.has_product for fused in inside)
        transfers = [sent for fused in inside for sent in fused.transfers]
        for sent in transfers:
            if sent.channel and sent.channel in carried:
                continue
            if sent.channel:
                carried.add(sent.channel)
            # A collective alone in its fusion blocks, unless other fusions carry further steps of it.
            beside = has_product or steps[sent.channel or ""] > 1 or fusion.name.startswith("async-collective")
            _add_transfer(cost, sent, "async-fused" if beside else "sync-fused")
        for fused in inside:
            for kernel, computation in fused.kernels:
                self._add_kernel(kernel, computation, cost)
        kind = "matmul" if has_product else "collective" if transfers and fusion.cycles is None else "fusion"
        self._add_estimate(fusion, kind, sum(fused.product_flops for fused in inside), cost)

    def _add_estimate(self, instruction: Instruction, kind: str, flops: int, cost: Cost) -> None:
        cycles = instruction.cycles
        cost.runs[kind] += 1
        cost.product_flops += flops
        if cycles is None:
            return
        cost.cycles[kind] += cycles
        label = _label(instruction)
        cost.largest[f"{kind}: {label}"] += cycles
        if kind == "matmul" and cycles:
            use = cost.products[label]
            use.runs += 1
            use.cycles += cycles
            use.flops += flops

    def _look_inside(self, computation: Computation, *, scatters: bool = False) -> _Fused:
        key = (computation.name, scatters)
        if key not in self._fused:
            fused = self._fused[key] = _Fused()
            # An all-reduce of which only a slice is used is how TPUs write a reduce-scatter.
            slices = any(instruction.opcode == "dynamic-slice" for instruction in computation)
            for instruction in computation:
                opcode = instruction.opcode
                if opcode in ("convolution", "dot"):
                    fused.product_flops += product_flops(instruction, computation)
                    fused.has_product = True
                elif collectives.kind_of(opcode):
                    kept = scatters or (opcode == "all-reduce" and slices)
                    partitions = self._module.num_partitions
                    fused.transfers.append(collectives.transfer(instruction, computation, partitions, scatters=kept))
                elif opcode == "custom-call":
                    fused.kernels.append((instruction, computation))
                elif opcode in ("fusion", "async-start", "call"):
                    for called in self._called(instruction):
                        inner = self._look_inside(called, scatters=scatters or "reduce-scatter" in instruction.name)
                        fused.product_flops += inner.product_flops
                        fused.has_product |= inner.has_product
                        fused.transfers += inner.transfers
                        fused.kernels += inner.kernels
        return self._fused[key]

    def _add_kernel(self, call: Instruction, computation: Computation, cost: Cost) -> None:
        if 'custom_call_target="tpu_custom_call"' not in call.attributes:
            return
        config = call.backend_config
        stated = (config.get("custom_call_config") or {}).get("cost_estimate") or config.get("cost_estimate") or {}
        name = re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", call.name)
        flops = stated.get("flops")
        if flops is None and self._attention_flops is not None:
            attention = _attention_call(name, call, computation)
            flops = self._attention_flops(attention) if attention else None
        use = cost.kernels[name]
        use.calls += 1
        use.flops += float(flops or 0)
        use.known &= flops is not None


def count(module: Module, attention_flops: AttentionFlops | None = None) -> Cost:
    """The cost of one run of `module` on one device."""
    return Counter(module, attention_flops).count()


def _attention_call(name: str, call: Instruction, computation: Computation) -> AttentionCall | None:
    operands = [operand.arrays[0] for operand in computation.operands(call) if operand.arrays]
    large = [array.dims for array in operands if array.dtype in ("bf16", "f32") and len(array.dims) >= 3]
    blocks = [array.dims for array in operands if array.dtype == "s8" and len(array.dims) == 3]
    if len(large) < 2:
        return None
    queries, keys = large[:2]
    dtype = next(array.dtype for array in operands if array.dims == queries)
    # The softmax's sums are as long as the queries, and have the width of a register or none.
    results = [a.dims for a in call.arrays if a.dtype == dtype and a.dims[-1] == queries[-1]]
    results = [dims for dims in results if len(dims) >= len(queries)]
    return AttentionCall(name, queries, keys, (blocks[0][1], blocks[0][2]) if blocks else None, len(results))


def _add_transfer(cost: Cost, sent: Transfer, mode: Mode) -> None:
    cost.collectives[sent.kind, mode, sent.group].add(Traffic(1, sent.payload, sent.wire))


def _made_async(cost: Cost) -> Cost:
    """The cost of what is started and waited for later: its plain collectives do not block."""
    result = dataclasses.replace(cost, collectives=collections.defaultdict(Traffic))
    for (kind, mode, group), traffic in cost.collectives.items():
        result.collectives[kind, "async" if mode == "sync" else mode, group].add(traffic)
    return result


def _add_host_traffic(instruction: Instruction, computation: Computation, cost: Cost) -> None:
    """Bytes that `instruction` moves between the device and its host, if it does."""
    out = instruction.arrays
    into = [array for operand in computation.operands(instruction) for array in operand.arrays]
    from_host = any(array.memory_space == HOST_SPACE for array in into)
    to_host = any(array.memory_space == HOST_SPACE for array in out)
    if not from_host and not to_host:
        return
    if instruction.opcode in ("copy-start", "copy"):  # copy-start gives (destination, source, context)
        direction = "to_host" if out[0].memory_space == HOST_SPACE else "to_device"
        cost.host_bytes[direction] += int(out[0].bytes)
        return
    # A slice of something large on the host: what moves is the smallest array on the device.
    moved = min((a.bytes for a in out + into if a.bytes > 4 and a.memory_space != HOST_SPACE), default=0)
    inward = from_host and "dynamic-update-slice" not in instruction.opcode
    cost.host_bytes["to_device" if inward else "to_host"] += int(moved)


def _label(instruction: Instruction) -> str:
    """Pass, operation and shape: `bwd dot_general bf16[6656,17920]`."""
    path = instruction.source.split("/") if instruction.source else [re.sub(r"[.\d]+$", "", instruction.name)]
    if "rematted_computation" in path:
        phase = "remat "
    elif any(step.startswith("transpose") for step in path):
        phase = "bwd "
    else:
        phase = "fwd " if any("jvp" in step for step in path) else ""
    return f"{phase}{path[-1]} {re.sub(r'{[^{}]*}', '', instruction.shape)[:70]}"


def as_dict(cost: Cost) -> dict[str, Any]:
    """For JSON."""
    return {
        "cycles": dict(cost.cycles),
        "product_flops": cost.product_flops,
        "kernels": {name: dataclasses.asdict(kernel) for name, kernel in cost.kernels.items()},
        "collectives": [
            {"kind": kind, "mode": mode, "group": group, **dataclasses.asdict(traffic)}
            for (kind, mode, group), traffic in sorted(cost.collectives.items())
        ],
        "host_bytes": dict(cost.host_bytes),
        "slice_bytes": cost.slice_bytes,
        "loops": [dataclasses.asdict(loop) for loop in cost.loops],
    }
