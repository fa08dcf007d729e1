"""Jobs of a Ray cluster, by hydra-ray-launcher: each a task, and each waited for."""

from __future__ import annotations

import dataclasses
import os
import socket
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from qexp.attempt import Attempt, sentence
from qexp.jobs import Job
from qexp.launch.plugin import attempted, lost
from qexp.report import terminal
from qexp.report.board import Board
from qexp.sections import ConfigError

LOOK_S = 0.5
ANSWER_S = 10.0
# What is said where the user says nothing: what workers write is in the log of each run, and the same command tries
# again what was lost.
INIT = {"log_to_driver": False, "logging_level": "warning"}
REMOTE = {"max_retries": 0}


@dataclass(frozen=True)
class Ray:
    """Hands jobs to Ray; `init` goes to ray.init, with the address of a cluster to join, and `remote` to ray.remote."""

    init: dict[str, Any]
    remote: dict[str, Any]

    def at_once(self, jobs: list[Job]) -> int:
        """How many run at the same time: unknown before Ray is there."""
        return 1

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt all jobs on the cluster, and tell the board; what is left when this is stopped is cancelled.

        Errors: ConfigError where there is no cluster to join.
        """
        if not jobs:
            return
        import ray
        from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

        _require_answer(str(self.init.get("address")))
        try:
            start_ray(OmegaConf.create(INIT | self.init))
            task = ray.remote(**REMOTE | self.remote)(attempted)
        except Exception as error:  # whatever Ray may answer
            raise ConfigError(f"hydra.launcher.ray={dataclasses.asdict(self)}: {sentence(error)}") from None
        resources = ray.cluster_resources()
        board.workers = self._fitting(resources)
        where = ray.get_runtime_context().gcs_address
        terminal.console.print(f"{len(jobs)} jobs are with Ray at {where}; Ctrl-C cancels them", soft_wrap=True)
        waiting = {task.remote(job.settings, patient, os.getcwd()): job for job in jobs}
        try:
            self._follow(waiting, board)
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def _fitting(self, resources: dict[str, float]) -> int:
        """Tasks that run at the same time."""
        asked = {"CPU": self.remote.get("num_cpus") or 1, "GPU": self.remote.get("num_gpus")}
        return max(1, int(min(resources.get(name, 0) // count for name, count in asked.items() if count)))

    def _follow(self, waiting: dict[Any, Job], board: Board) -> None:
        import ray

        running: list[Any] = []
        while waiting:
            for reference in list(waiting)[: board.workers]:  # Ray starts them in order, as far as there is room
                if reference not in running:
                    board.started(waiting[reference])
                    running.append(reference)
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            for reference in ended:
                job = waiting.pop(reference)
                if reference not in running:
                    board.started(job)
                board.ended(job, _came_of(job, reference))
            board.refresh()


def _require_answer(address: str) -> None:
    """Ray itself knocks at a closed door for minutes. Errors: ConfigError."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"hydra.launcher.ray.init.address={address}: no Ray answers there ({why})") from None


def _came_of(job: Job, reference: Any) -> Attempt:
    import ray

    try:
        return ray.get(reference)
    except Exception as error:  # the worker died, or the cluster
        return lost(job, f"Ray: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
