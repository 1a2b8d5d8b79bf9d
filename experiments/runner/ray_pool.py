"""Runs as Ray tasks: over the GPUs of this machine or of a cluster, also several runs on one GPU.

Without an address a Ray of our own is started for as long as the comparison runs, without dashboard or usage report. It
listens on the loopback interface alone and answers only those who have its token, which is made anew and never leaves
this process and those it starts. With an address (``auto`` or ``ray://host:port``) the runs go to that cluster: every
machine needs this checkout and the data at the same path, and the output folder must be one that they share. What a
cluster listens to is up to those who start it (RAY_AUTH_MODE=token there); Ray finds its token in RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError, UnreachableError
from experiments.runner.jobs import Job, Outcome, prepared_attempt
from experiments.runner.worker import WorkerOptions, import_backend

_OBJECT_STORE_BYTES = 80 * 2**20  # only settings and metrics travel; Ray asks for 75 MB at least
_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 10.0


class RayPool:
    """Ray tasks that have a share of a GPU and some CPU cores each.

    Args:
        options: For the processes.
        workers: Most runs at the same time; None for as many as the cluster has room for.
        gpus_per_run: GPUs for each run, such as 0.5; None for one where there is any.
        cpus_per_run: CPU cores for each run.
        address: Of a running cluster; None starts Ray on this machine.

    Raises:
        InputError: Ray is not installed, or the cluster has no room for a run, or `address` is not one.
        UnreachableError: No cluster answers at `address`, or it asks for another token.
    """

    def __init__(
        self,
        options: WorkerOptions,
        workers: int | None,
        gpus_per_run: float | None = None,
        cpus_per_run: float = 1.0,
        address: str | None = None,
    ) -> None:
        self._ray = import_ray(address)
        self._limit = workers
        self._cpus = cpus_per_run
        self._tasks: dict[Any, str] = {}
        self._start(options, address)
        try:
            resources = self._ray.cluster_resources()
            self._gpus = (1.0 if resources.get("GPU") else 0.0) if gpus_per_run is None else gpus_per_run
            if self.slots < 1:
                raise InputError(
                    f"no machine of the Ray cluster has room for a run: it asks for {self._gpus:g} GPUs and "
                    f"{self._cpus:g} CPUs, and all machines together have {resources.get('GPU', 0):g} and "
                    f"{resources.get('CPU', 0):g}"
                )
        except BaseException:
            self.close()
            raise
        # Without max_calls=0, Ray ends a process after each run that has a GPU, and with it the model in its memory.
        # A task that dies is for the schedule to repeat, which counts.
        self._remote = self._ray.remote(
            num_gpus=self._gpus, num_cpus=self._cpus, max_retries=0, max_calls=0, retry_exceptions=False
        )(prepared_attempt)
        self._options = options

    def _start(self, options: WorkerOptions, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        checkout = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(
            dict.fromkeys([checkout, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        )
        threads = str(options.threads)
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        arguments: dict[str, Any] = {
            "runtime_env": {"env_vars": environment},
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        }
        if is_own(address):
            if self._limit is not None:
                # slots, not cores: as many as asked for, also on a smaller machine
                arguments["num_cpus"] = max(math.ceil(self._limit * self._cpus), os.cpu_count() or 1)
            arguments |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_node_ip_address": _LOOPBACK,
            }
        else:
            assert address is not None
            _check_address(address)
            arguments["address"] = address
        try:
            self._ray.init(**arguments)
        except (ConnectionError, self._ray.exceptions.AuthenticationError) as error:
            raise UnreachableError(f"no Ray cluster answers at {address}: {_in_one_line(error)}") from error
        if is_own(address):
            self._check_that_nobody_else_can_reach_it()

    def _check_that_nobody_else_can_reach_it(self) -> None:
        found = {node["NodeManagerAddress"] for node in self._ray.nodes()}
        if found != {_LOOPBACK}:
            self._ray.shutdown()
            raise InputError(
                f"Ray {self._ray.__version__} listens on {', '.join(sorted(found))} although it was told {_LOOPBACK}: "
                "start a cluster and give its --ray-address, or use --backend local"
            )

    @property
    def slots(self) -> int:
        """Runs the cluster has room for now; machines may come and go."""
        room = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                by_cpu = has.get("CPU", 0) / self._cpus if self._cpus else math.inf
                by_gpu = has.get("GPU", 0) / self._gpus if self._gpus else math.inf
                most = min(by_cpu, by_gpu)
                room += 0 if most == math.inf else math.floor(most + 1e-9)
        return room if self._limit is None else min(room, self._limit)

    def describe(self) -> str:
        machines = sum(node["Alive"] for node in self._ray.nodes())
        plural = "" if machines == 1 else "s"
        return (
            f"Ray, {self.slots} runs at a time on {machines} machine{plural}, "
            f"{self._gpus:g} GPUs and {self._cpus:g} CPUs each"
        )

    def submit(self, job: Job) -> None:
        self._tasks[self._remote.remote(job, self._options)] = job.id

    def poll(self, seconds: float) -> list[Outcome]:
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [self._outcome(task, self._tasks.pop(task)) for task in {*ready, *more}]

    def close(self) -> None:
        """Cancel what runs; a Ray of our own ends with all its processes."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._tasks.clear()
        self._ray.shutdown()

    def _outcome(self, task: Any, id_: str) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(task)
            return outcome
        except self._ray.exceptions.RayTaskError as error:
            return Outcome(id_, "failed", error=str(error))
        except self._ray.exceptions.RayError as error:
            # the process, its machine, or its memory
            return Outcome(id_, "died", error=f"{type(error).__name__}: {_in_one_line(error)}")


def is_own(address: str | None) -> bool:
    """Whether a pool with this address starts a Ray of its own, for this machine."""
    return address in (None, "local")


def import_ray(address: str | None) -> Any:
    """The package, set up for a pool with this address.

    Raises:
        InputError: It is not installed.
    """
    if is_own(address):
        if sys.modules.get("ray") is not None and os.environ.get("RAY_AUTH_TOKEN") != _token():
            raise InputError(
                "this process had imported ray before, for which all networks are its own: start the command in a "
                "process of its own, or a cluster and give its --ray-address"
            )
        # Ray reads these when it is imported. Without the first it takes the machine's address in the network for its
        # own even when given 127.0.0.1, and only where the address is 127.0.0.1 it does not listen on all of them.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = _token()
        os.environ.pop("RAY_ADDRESS", None)  # of a cluster that Ray would join
    return import_backend("ray", "ray", "sweep", "exceptions")


@cache
def _token() -> str:
    """One for all pools of this process, since Ray reads it once."""
    return secrets.token_hex(32)


def _check_address(address: str) -> None:
    """Make sure that something answers at `address`, for which Ray itself would wait for many minutes.

    Raises:
        InputError: It is no address.
        UnreachableError: Nothing does.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"ray_address must be auto, HOST:PORT or ray://HOST:PORT, got {address!r}", setting="ray_address"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UnreachableError(f"no Ray cluster answers at {address}: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
