"""Launchers that are plugins of Hydra's, as for Slurm and Ray: each job goes there as its overrides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.attempt import Attempt, Outcome, attempt, sentence
from qexp.jobs import Call, Job, silence_libraries
from qexp.report import terminal
from qexp.report.board import Board
from qexp.settings import settings
from qexp.store import record_failure


@dataclass(frozen=True)
class Plugin:
    """Hands jobs to Hydra's launcher of a call."""

    call: Call

    @property
    def name(self) -> str:
        """What the user chose."""
        return str(self.call.hydra.runtime.choices["hydra/launcher"])

    def at_once(self, jobs: list[Job]) -> int:
        """How many run at the same time, as far as the launcher promises it."""
        section = self.call.hydra.launcher
        return int(section.get("array_parallelism") or 1)

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt all jobs where the plugin runs them, and tell the board when they have come back."""
        if not jobs:
            return
        for job in jobs:
            board.started(job)
        terminal.console.print(f"{len(jobs)} jobs handed to hydra/launcher={self.name}")
        lines = [[*job.overrides, *_absolute(job)] for job in jobs]
        try:
            returned: list[Any] = list(self._plugin(jobs[0], patient).launch(lines, initial_job_idx=0))
        except Exception as error:  # whatever a cluster may answer
            returned = [error] * len(jobs)
        for job, each in zip(jobs, returned, strict=True):
            board.ended(job, _came_of(job, each))

    def _plugin(self, first: Job, patient: bool) -> Any:
        config = OmegaConf.create(OmegaConf.to_container(self.call.master, resolve=False))
        with open_dict(config):
            config.hydra.sweep.dir = str(first.outputs.resolve() / "hydra")  # where others look, "." is another folder
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        return Plugins.instance().instantiate_launcher(context, _patient_task if patient else task, config)


def _absolute(job: Job) -> list[str]:
    tags = job.settings.config["logger"].get("tags")
    marked = [f"++logger.tags={list(tags)}".replace("'", "")] if tags else []
    return [f"paths.outputs={job.outputs.resolve()}", *marked]


def task(config: DictConfig, patient: bool = False) -> dict[str, Any]:
    """What the plugin runs, wherever that is."""
    silence_libraries()
    ended = attempt(settings(config), patient)
    return {"outcome": ended.outcome.value, "sentence": ended.sentence, "refused": ended.refused}


def _patient_task(config: DictConfig) -> dict[str, Any]:
    return task(config, patient=True)


def _came_of(job: Job, returned: Any) -> Attempt:
    if isinstance(returned, JobReturn) and returned.status is JobStatus.COMPLETED:
        told = returned.return_value
        return Attempt(Outcome(told["outcome"]), told["sentence"], told["refused"])
    if job.finished() is not None:  # it ended well, though its launcher did not
        return Attempt(Outcome.FINISHED)
    error = returned if isinstance(returned, Exception) else getattr(returned, "_return_value", None)
    why = sentence(error) if isinstance(error, Exception) else "left no result"
    record_failure(job.outputs, job.run_id, job.settings.label, why)
    return Attempt(Outcome.FAILED, why)
