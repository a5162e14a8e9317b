"""TPU slices by the names that users call them, and what the compiler has to be told about each.

Nothing here imports jax: `compile_only` sets what libtpu reads from the environment, which must happen before.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu2_jax.errors import ConfigError, UserError


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One kind of chip. Source: Google Cloud's TPU pages, unless a comment says otherwise."""

    name: str  #: as in slice names
    compiler_name: str  #: as in the compiler's topology names
    cores_per_chip: int  #: TensorCores that a slice name counts; 1 where names count chips
    chip_config: str  #: "megacore": both cores of a chip are one device
    clock_hz: float
    peak_flops: float  #: bfloat16, per chip and second
    hbm_bytes: int  #: that programs can use, as the compiler states it when one needs more
    ici_bytes_per_s: float  #: assumed: what a chip sends in a ring over all its links, 90 % of the nominal rate
    dcn_bytes_per_s: float  #: assumed: a host's 200 Gbit/s, shared by its four chips


def _gib(value: float) -> int:
    return int(value * 2**30)


_DCN = 200e9 / 8 / 4

GENERATIONS: Mapping[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4",
            compiler_name="v4",
            cores_per_chip=2,
            chip_config="megacore",
            clock_hz=1.05e9,
            peak_flops=275e12,
            hbm_bytes=_gib(30.75),
            ici_bytes_per_s=270e9,
            dcn_bytes_per_s=_DCN,
        ),
        Generation(
            name="v5p",
            compiler_name="v5",
            cores_per_chip=2,
            chip_config="megacore",
            clock_hz=1.75e9,
            peak_flops=459e12,
            hbm_bytes=_gib(95.74),
            ici_bytes_per_s=540e9,
            dcn_bytes_per_s=_DCN,
        ),
        Generation(
            name="v5e",
            compiler_name="v5e",
            cores_per_chip=1,
            chip_config="default",
            clock_hz=1.5e9,
            peak_flops=197e12,
            hbm_bytes=_gib(15.75),
            ici_bytes_per_s=180e9,
            dcn_bytes_per_s=_DCN,
        ),
        Generation(
            name="v6e",
            compiler_name="v6e",
            cores_per_chip=1,
            chip_config="default",
            clock_hz=1.75e9,
            peak_flops=918e12,
            hbm_bytes=_gib(31.25),
            ici_bytes_per_s=360e9,
            dcn_bytes_per_s=_DCN,
        ),
    )
}

#: Chips along each axis of a slice.
_CUBES = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8),
    (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16),
)  # fmt: skip
_SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SIZES: Mapping[str, tuple[tuple[int, ...], ...]] = {"v4": _CUBES, "v5p": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES}

#: Other names in use for the same slices.
_ALIASES = {"v5litepod": "v5e", "v6litepod": "v6e", "v5": "v5p", "v6": "v6e"}


@dataclass(frozen=True)
class Topology:
    """A slice, or several equal slices joined by the data centre's network."""

    generation: Generation
    shape: tuple[int, ...]  #: chips along each axis of one slice
    slices: int = 1

    @property
    def name(self) -> str:
        """As users call one slice: v5p-128."""
        return f"{self.generation.name}-{math.prod(self.shape) * self.generation.cores_per_chip}"

    @property
    def chips(self) -> int:
        """Chips of all slices: the devices of the program."""
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        """Hosts of all slices, four chips each."""
        return self.chips // 4

    def __str__(self) -> str:
        slices = "" if self.slices == 1 else f"{self.slices} x "
        return f"{slices}{self.name} ({'x'.join(map(str, self.shape))}, {self.chips} chips)"

    def arguments(self) -> dict[str, Any]:
        """What `get_topology_desc` needs to compile for the slice as it is wired.

        Left out, libtpu assumes chips without megacore and links that do not close to rings, and every gather turns
        into an all-reduce: the figures would describe no machine.
        """
        flat = len(self.shape) == 2
        # A v4 or v5p slice is a torus when it is made of whole cubes of 4 x 4 x 4; of v5e and v6e, only an axis of 16.
        closed = tuple(size == 16 for size in self.shape) if flat else (all(size % 4 == 0 for size in self.shape),) * 3
        return {
            "platform": "tpu",
            "topology_name": f"{self.generation.compiler_name}:{'x'.join(map(str, self.shape))}",
            "chip_config_name": self.generation.chip_config,
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": self.slices,
            "wrap": (*closed, False) if flat else closed,
        }

    def devices(self) -> list[Any]:
        """The slice's devices, which compile and never run. Raises `UserError` where libtpu cannot make them."""
        from jax.experimental import topologies

        try:
            return list(topologies.get_topology_desc(**self.arguments()).devices)
        except Exception as error:  # libtpu's errors have no type of their own
            raise UserError(
                f"--topology {self.name}: libtpu cannot describe it: {str(error).splitlines()[0]}"
            ) from error


def names() -> list[str]:
    """Every name that `find` knows."""
    return [Topology(GENERATIONS[kind], shape).name for kind, shapes in _SIZES.items() for shape in shapes]


def find(name: str, slices: int = 1) -> Topology:
    """The slice that users call `name`: TensorCores are counted for v4 and v5p, chips for v5e and v6e.

    Raises `ConfigError` with the nearest name when there is none.
    """
    if slices < 1:
        raise ConfigError(f"--slices: must be at least 1, not {slices}")
    known = {
        topology.name: topology
        for kind, shapes in _SIZES.items()
        for topology in (Topology(GENERATIONS[kind], shape, slices) for shape in shapes)
    }
    kind, _, size = name.strip().lower().partition("-")
    own = f"{_ALIASES.get(kind, kind)}-{size}"
    if own in known:
        return known[own]
    raise ConfigError(f"--topology: no slice is called {name!r}; nearest: {_nearest(own, list(known))}; {_described()}")


def _nearest(name: str, known: list[str]) -> str:
    kind, _, size = name.partition("-")
    same_kind = [other for other in known if other.startswith(f"{kind}-")]
    if same_kind and re.fullmatch(r"[1-9]\d*", size):
        # By ratio, so that 100 is nearer to 128 than to 64.
        return min(same_kind, key=lambda other: abs(math.log(int(other.partition("-")[2]) / int(size))))
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _described() -> str:
    def span(kind: str) -> str:
        sizes = [math.prod(shape) * GENERATIONS[kind].cores_per_chip for shape in _SIZES[kind]]
        return f"{kind}-{sizes[0]} to {kind}-{sizes[-1]}"

    return ", ".join(span(kind) for kind in _SIZES)


def find_compiler() -> bool:
    """Whether libtpu can be imported: as a package, or from where `make libtpu` puts it, out of the way of jax."""
    if importlib.util.find_spec("libtpu") is not None:
        return True
    beside = Path(sys.prefix) / "libtpu"
    if not (beside / "libtpu").is_dir():
        return False
    sys.path.append(str(beside))
    importlib.invalidate_caches()
    return True


def compile_only() -> None:
    """Make this process one that compiles for TPUs and touches none. Before jax is imported.

    Raises `UserError` when libtpu is not installed.
    """
    if not find_compiler():
        raise UserError(
            "plan: the TPU compiler, libtpu, is not installed; `make libtpu` or `pip install 'jax[tpu]'` brings it "
            "(213 MB, no TPU needed)"
        )
    if "jax" in sys.modules:
        raise RuntimeError("jax is imported already, and has read the environment")
    os.environ.update(
        JAX_PLATFORMS="cpu",  # on a TPU machine too: its chips are left to whoever trains on them
        TPU_SKIP_MDS_QUERY="1",  # ask no metadata server what this machine is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no lock file: several compile at once, beside one that trains
    )
    # Off a TPU machine libtpu complains of each of these at its start, and reads none of them to compile.
    unread = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    for name, value in (unread | {"TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)


def larger(topology: Topology) -> Topology | None:
    """The next size of slice of the same chips; None for the largest."""
    shapes = _SIZES[topology.generation.name]
    place = shapes.index(topology.shape)
    return Topology(topology.generation, shapes[place + 1], topology.slices) if place + 1 < len(shapes) else None
