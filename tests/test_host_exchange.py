"""What hosts of a run say to each other; `tests/experiments/test_hosts.py` runs several."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import pytest

from emu2_jax import hosts
from emu2_jax.errors import ConfigError, DataError, HostsError
from experiments import launch


def settings(
    *flags: str, environment: dict[str, str] | None = None, devices: Path = Path("/nowhere")
) -> dict[str, object] | None:
    parser = argparse.ArgumentParser()
    launch.add_flags(parser)
    return launch.launch_settings(parser.parse_args(flags), environment or {}, devices)


def test_a_process_without_flags_outside_a_cluster_is_alone() -> None:
    assert settings() is None
    assert settings(environment={"SLURM_NTASKS": "8"}) is None  # a shell in an allocation, not a task of it


def test_flags_say_where_host_0_is() -> None:
    flags = ("--coordinator", "10.0.0.1:1234", "--num_processes", "4", "--process_id", "3")
    assert settings(*flags, "--heartbeat_timeout_s", "20") == {
        "coordinator": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "start_timeout_s": 300,
        "heartbeat_timeout_s": 20,
    }


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "t0,t1"},
        {"MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_a_cluster_names_the_hosts_unless_told_not_to(environment: dict[str, str]) -> None:
    assert settings(environment=environment) == {"start_timeout_s": 300, "heartbeat_timeout_s": 100}
    assert settings("--coordinator", "none", environment=environment) is None


def test_a_tpu_vm_is_known_by_its_chips(tmp_path: Path) -> None:
    assert settings(devices=tmp_path) is None
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    assert settings(devices=tmp_path) is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num_processes", "2"), "need --coordinator"),
        (("--coordinator", "a:1"), "needs --num_processes and --process_id"),
        (("--coordinator", "a", "--num_processes", "2", "--process_id", "0"), "wanted HOST:PORT"),
        (("--coordinator", "a:1", "--num_processes", "2", "--process_id", "2"), "wanted 0 to 1"),
        (("--start_timeout_s", "0"), "at least 1 second"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(*flags)


def test_one_process_talks_to_itself() -> None:
    assert (hosts.count(), hosts.index()) == (1, 0)
    assert hosts.gather("x", {"a": 1}) == [{"a": 1}] == hosts.gather_to_first("x", {"a": 1})
    hosts.check_alike("x", {"a": 1})


def test_hosts_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{"jax": "1", "python": "3"}, {"jax": "2", "python": "3"}, {"jax": "2", "python": "3"}, {"jax": "1"}]
    monkeypatch.setattr(hosts, "gather", lambda what, value: told)
    with pytest.raises(HostsError) as raised:
        hosts.check_alike("packages", told[0])
    assert "jax is 1 on hosts 0, 3, 2 on hosts 1-2; python is 3 on hosts 0-2, not there on host 3;" in str(raised.value)


def test_an_error_of_one_host_is_not_alike_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hosts.is_alike(DataError("a shard"))  # nobody else is there
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert not hosts.is_alike(DataError("a shard"))
    assert hosts.is_alike(HostsError("jax"))


def test_a_lost_host_is_told_from_a_mistake() -> None:
    gloo = "Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:224"
    assert hosts._is_loss(ValueError(f"UNKNOWN: {gloo}"))  # as XLA's CPU client raises it
    assert hosts._is_loss(jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service"))
    assert not hosts._is_loss(ValueError("the attribute is unavailable"))
    assert not hosts._is_loss(DataError("shard gloo.tar: is damaged"))
