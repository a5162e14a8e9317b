"""The hosts of a run: how they find each other, what they tell each other, and how all of them end when one does.

Every host runs the same command on its own devices; host 0 speaks for the run. What hosts say to each other here goes
over the coordinator's key-value store, beside the devices: it needs no compiled program, works before there is one,
and never waits for a step. In a run of one process all of this does nothing.

    with hosts.connected(launch):
        values = hosts.gather("start", mine)     # of every host, on every host
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

# The key-value store has no public name; Orbax reaches it the same way.
from jax._src.distributed import global_state

from emu2_jax.errors import HostsError, UserError, first_line

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
#: A host was lost through no fault of the run: start the same command again. (EX_TEMPFAIL of sysexits.h.)
EXIT_HOST_LOST = 75

#: How long a host waits for another that is alive: for as long as it takes. One that died is noticed by its heartbeat.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
#: Seconds in which another host's reason arrives, before "connection closed" is taken for the whole story.
_GRACE_S = 3.0
_FAILURE = "emu2/failure"

#: What XLA says when a peer of a collective, or the coordinator, is gone. It has no error class for it; of a collective
#: it raises one of several, so the transport's name must do.
_LOST = re.compile(r"closed by peer|socket closed|unavailable|deadline.exceeded|heartbeat", re.IGNORECASE)
_LOST_IN_COLLECTIVE = re.compile(r"\bgloo\b|\bnccl\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process becomes one host of a run. Without an address, what the cluster's environment says counts."""

    coordinator: str | None = None  #: HOST:PORT of host 0
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout_s: int = 300  #: how long all hosts may take to come together
    heartbeat_timeout_s: int = 100  #: after how long without a sign of life a host counts as lost


def _client() -> Any:
    return global_state.client


def count() -> int:
    """Number of hosts. Unlike `jax.process_count`, touches no device."""
    return global_state.num_processes if _client() is not None else 1


def index() -> int:
    """Which of the hosts this one is."""
    return global_state.process_id if _client() is not None else 0


@contextlib.contextmanager
def connected(launch: Launch | None) -> Iterator[None]:
    """Join the other hosts, and end together with them. None: this process is the whole run.

    An error that all hosts raise alike (`UserError.on_all_hosts`, or an orderly stop) leaves in good order. One that
    is this host's alone is told to the others, which would otherwise wait for it in the next step; then this process,
    and they, exit at once. Raises `HostsError` where the hosts do not come together.
    """
    if launch is None:
        yield
        return
    _join(launch)
    watch = _Watch()
    try:
        yield
    except Exception as error:
        if not is_alike(error):
            watch.end_all(error)
        watch.leave()
        raise
    watch.leave()


def is_alike(error: BaseException) -> bool:
    """Whether every host raises this, or there are no others: then it is safe to wait for them."""
    return count() == 1 or bool(getattr(error, "on_all_hosts", False))


def _join(launch: Launch) -> None:
    explicit = launch.coordinator is not None
    if explicit and launch.process_id == 0:
        _check_port_is_free(str(launch.coordinator))
    elif explicit:
        _wait_for_coordinator(str(launch.coordinator), launch.start_timeout_s)
    # jax aborts the process, with a stack trace, when not all hosts have come in time: give up just before.
    giving_up = threading.Timer(launch.start_timeout_s, _give_up, [launch])
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=launch.start_timeout_s + 30,
            heartbeat_timeout_seconds=launch.heartbeat_timeout_s,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise HostsError(f"hosts: cannot start: {first_line(error)}; --coordinator says where host 0 is") from error
    finally:
        giving_up.cancel()


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _check_port_is_free(coordinator: str) -> None:
    port = _address(coordinator)[1]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise HostsError(
                f"--coordinator: host 0 cannot listen on port {port}: {error.strerror}; give all hosts another one"
            ) from error


def _wait_for_coordinator(coordinator: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(_address(coordinator), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"--coordinator: nothing answers at {coordinator} after {timeout_s:g} s "
                    f"({error.strerror or error}); is host 0 (--process_id 0) running, and its port open? "
                    "--start_timeout_s waits longer"
                ) from error
            time.sleep(0.2)


def _give_up(launch: Launch) -> None:
    wanted = f"{launch.num_processes} hosts" if launch.num_processes else "all hosts"
    where = launch.coordinator or "the coordinator that the cluster names"
    _say(
        f"{wanted} did not come together at {where} within {launch.start_timeout_s} s; does the same command run on "
        "each, every --process_id once? --start_timeout_s waits longer"
    )
    os._exit(EXIT_BAD_INPUT)


class _Watch:
    """Waits for word that another host has failed, and ends this process when it comes."""

    def __init__(self) -> None:
        self._ending = False
        self._thread = threading.Thread(target=self._wait, name="hosts", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            told = json.loads(_client().blocking_key_value_get(_FAILURE, _PATIENCE_MS))
        except jax.errors.JaxRuntimeError:
            return  # The coordinator is gone, or we are leaving; jax ends this process in the first case.
        if not self._ending and told is not None:
            self._ending = True
            _exit(told["code"], f"host {told['host']} failed, so this one ends too: {told['text']}")

    def leave(self) -> None:
        """In good order: when all hosts have come this far, nobody needs to be watched, and all disconnect."""
        _client().wait_at_barrier("emu2/leave", timeout_in_ms=_PATIENCE_MS)
        self._ending = True
        _tell(None)  # frees the thread, which must not outlive the interpreter
        self._thread.join()
        jax.distributed.shutdown()

    def end_all(self, error: Exception) -> NoReturn:
        """Say why this host ends, to the user and to the other hosts, and exit."""
        lost = _is_loss(error)
        if lost:
            time.sleep(_GRACE_S)  # when the other host could still say why, its words count, not ours
        if self._ending:
            self._thread.join()  # it ends this process
        self._ending = True
        code = EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_HOST_LOST if lost else EXIT_FAILED
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        if lost:
            text = f"another host is gone ({first_line(error)}); the same command goes on from the last checkpoint"
        elif not isinstance(error, UserError):
            traceback.print_exception(error)
        _tell({"host": index(), "code": code, "text": text})
        _exit(code, text)


def _is_loss(error: Exception) -> bool:
    """Whether this host fails because another one is gone."""
    if isinstance(error, UserError):
        return False
    told = isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error))
    return bool(told or _LOST_IN_COLLECTIVE.search(str(error)))


def _tell(failure: Mapping[str, Any] | None) -> None:
    """The first word counts."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one, or nobody is left to tell
        _client().key_value_set(_FAILURE, json.dumps(failure))


def _say(text: str) -> None:
    sys.stdout.flush()
    # Host 0 may be in the middle of a progress bar.
    print(f"{'' if index() else chr(10)}emu2: {name()}: {text}", file=sys.stderr, flush=True)


def _exit(code: int, text: str) -> NoReturn:
    """Out: nothing that would wait for the other hosts is run. Host 0 carries all words, and goes last.

    What it says comes last, too, after the progress bar that the training thread may still close meanwhile.
    """
    if index() == 0:
        time.sleep(_GRACE_S)
    _say(text)
    os._exit(code)


def name() -> str:
    """`host 1 of 4`."""
    return f"host {index()} of {count()}"


_turns: collections.Counter[str] = collections.Counter()


def gather(what: str, value: Any) -> list[Any]:
    """A small JSON value of every host, on every host. All hosts call it, in the same order for each `what`."""
    if count() == 1:
        return [value]
    client, turn = _client(), _turns[what]
    _turns[what] += 1
    client.key_value_set(f"{_key(what, turn)}/{index():06d}", json.dumps(value))
    client.wait_at_barrier(_key(what, turn), timeout_in_ms=_PATIENCE_MS)
    if turn:  # everyone is here, so everyone has read what was said last time
        client.key_value_delete(f"{_key(what, turn - 1)}/{index():06d}")
    return [json.loads(text) for _, text in sorted(client.key_value_dir_get(_key(what, turn)))]


def gather_to_first(what: str, value: Any) -> list[Any] | None:
    """A small JSON value of every host, on host 0; the others go on at once."""
    if count() == 1:
        return [value]
    client, key = _client(), _key(what, _turns[what])
    _turns[what] += 1
    if index():
        client.key_value_set(f"{key}/{index():06d}", json.dumps(value))
        return None
    others = [client.blocking_key_value_get(f"{key}/{host:06d}", _PATIENCE_MS) for host in range(1, count())]
    client.key_value_delete(key)
    return [value, *map(json.loads, others)]


def wait(what: str) -> None:
    """Until all hosts have come here."""
    gather(what, None)


def _key(what: str, turn: int) -> str:
    return f"emu2/{what}/{turn}"


def check_alike(what: str, facts: Mapping[str, str | int | float | None]) -> None:
    """Raise `HostsError`, on all hosts, when they do not agree in every fact; names the fact, the values, the hosts."""
    told = gather(what, dict(facts))
    differing = []
    for fact in dict.fromkeys(fact for one in told for fact in one):
        holders: dict[Any, list[int]] = {}
        for host, one in enumerate(told):
            holders.setdefault(one.get(fact, "not there"), []).append(host)
        if len(holders) > 1:
            values = [f"{value} on {_hosts(held)}" for value, held in holders.items()]
            differing.append(f"{fact} is {', '.join(values)}")
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise HostsError(f"hosts differ: {shown}; all must run the same command on the same installation and data")


def _hosts(numbers: Sequence[int]) -> str:
    """`host 3`, `hosts 0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"host{'s' if len(numbers) > 1 else ''} {text}"
