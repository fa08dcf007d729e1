"""Which launcher a call asked for."""

from __future__ import annotations

from typing import Any, Protocol

from omegaconf import OmegaConf

from qexp.jobs import Call, Job
from qexp.launch.in_process import InProcess
from qexp.launch.local import Local
from qexp.launch.ray import Ray
from qexp.launch.slurm import Submitit
from qexp.report.board import Board
from qexp.sections import ConfigError, build

HYDRAS_OWN = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


class Launcher(Protocol):
    """Has jobs attempted somewhere."""

    def at_once(self, jobs: list[Job]) -> int:
        """How many of these run at the same time."""

    def launch(self, jobs: list[Job], board: Board, patient: bool) -> None:
        """Attempt each job and tell the board; `patient` waits for other processes that are at the same runs."""


def launcher_of(call: Call) -> Launcher:
    """The launcher that hydra/launcher chose. Errors: ConfigError."""
    section = OmegaConf.to_container(call.hydra.launcher, resolve=True)
    target = section.get("_target_", "")
    if target == HYDRAS_OWN:
        return InProcess()
    if target.startswith("hydra_plugins."):
        return _of_a_plugin(str(call.hydra.runtime.choices["hydra/launcher"]), target, section)
    made = build(section, "hydra.launcher")
    if not isinstance(made, (InProcess, Local)):
        raise ConfigError(f"hydra.launcher._target_={target}: is no launcher")
    return made


def _of_a_plugin(name: str, target: str, section: dict[str, Any]) -> Launcher:
    module, _, kind = target.rpartition(".")
    if kind == "RayLauncher":
        return Ray(**section["ray"])
    if module != SUBMITIT:
        raise ConfigError(f"hydra/launcher={name}: there are local, in_process, slurm, ray, submitit_local")
    options = {key: value for key, value in section.items() if key != "_target_"}
    return Submitit(name, "slurm" if kind == "SlurmLauncher" else "local", options)
