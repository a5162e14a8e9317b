"""How `emu2 train` becomes one host of several: what the flags and the cluster's environment say, and who is left to
speak when the training process is ended from outside.

Imports no jax: the process is split in two before that.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emu2_jax.errors import ConfigError

#: As `emu2_jax.hosts.EXIT_HOST_LOST`.
EXIT_HOST_LOST = 75

_PR_SET_PDEATHSIG = 1

HOSTS_EPILOG = """\
Several hosts: the same command on each. On Slurm, Open MPI and TPU pods (also GKE's) they find each other; elsewhere
say where, and which one this is: --coordinator HOST:PORT --num_processes N --process_id I (docs/training.md).
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `emu2 train` that say where the other hosts are."""
    group = parser.add_argument_group("several hosts")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of host 0; none: this host alone, whatever the cluster says"
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="with --coordinator: number of hosts")
    group.add_argument("--process_id", type=int, metavar="I", help="with --coordinator: which one this is, from 0")
    group.add_argument(
        "--start_timeout_s", type=int, default=300, metavar="S", help="how long hosts wait for each other (300)"
    )
    group.add_argument(
        "--heartbeat_timeout_s", type=int, default=100, metavar="S", help="when a silent host counts as lost (100)"
    )


def launch_settings(
    arguments: argparse.Namespace, environment: Mapping[str, str], devices: Path = Path("/dev")
) -> dict[str, Any] | None:
    """Settings of `emu2_jax.hosts.Launch`, or None where this host is alone. Raises `ConfigError`."""
    timeouts = {name: getattr(arguments, name) for name in ("start_timeout_s", "heartbeat_timeout_s")}
    for name, value in timeouts.items():
        if value < 1:
            raise ConfigError(f"--{name}: got {value}; wanted at least 1 second")
    coordinator, processes, process = arguments.coordinator, arguments.num_processes, arguments.process_id
    if coordinator in (None, "none"):
        if processes is not None or process is not None:
            raise ConfigError("--num_processes, --process_id: need --coordinator HOST:PORT, where host 0 is found")
        return timeouts if coordinator is None and _in_cluster(environment, devices) else None
    if processes is None or process is None:
        raise ConfigError("--coordinator: needs --num_processes and --process_id, too")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", coordinator):
        raise ConfigError(f"--coordinator: got {coordinator}; wanted HOST:PORT")
    if not 0 <= process < processes:
        raise ConfigError(f"--process_id: got {process}; wanted 0 to {processes - 1}, each on one of the hosts")
    return {"coordinator": coordinator, "num_processes": processes, "process_id": process, **timeouts}


def _in_cluster(environment: Mapping[str, str], devices: Path) -> bool:
    """Whether jax may find other hosts by itself; it is asked only then, for it may ask a server."""
    several = any(environment.get(name, "1") != "1" for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    started = "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_RANK" in environment
    gke = any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    slices = environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    # A TPU VM says nothing of its neighbours in its environment, but has the chips.
    chips = any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
    return (several and started) or gke or slices or (chips and "TPU_SKIP_MDS_QUERY" not in environment)


def split(process: str) -> None:
    """Go on in a child, so that a line and an exit code are left whatever ends it. `process` says which one it is.

    jax aborts a process whose coordinator or peer is lost, the system may kill one for its memory; neither can be
    caught in the process itself. Signals are passed on, and the child ends with its parent.
    """
    parent, child = os.getpid(), os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_HOST_LOST)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to both
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        killed = signal.Signals(-code)
        causes = {
            signal.SIGABRT: "another host, or host 0, was lost: the lines above name it",
            signal.SIGKILL: "killed from outside: out of memory?",
        }
        print(
            f"emu2: {process}: ended by {killed.name} ({causes.get(killed, 'a crash')}); the job ends on all hosts, "
            "and the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        code = EXIT_HOST_LOST
    sys.stdout.flush()
    os._exit(code)
