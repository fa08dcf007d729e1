"""Which launcher a call asked for."""

from __future__ import annotations

from typing import Protocol

from omegaconf import OmegaConf

from qexp.jobs import Call, Job
from qexp.launch.in_process import InProcess
from qexp.launch.local import Local
from qexp.launch.plugin import Plugin
from qexp.report.board import Board
from qexp.sections import ConfigError, build

HYDRAS_OWN = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


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
    if not target.startswith("qexp."):
        return Plugin(call)
    made = build(section, "hydra.launcher")
    if not isinstance(made, (InProcess, Local)):
        raise ConfigError(f"hydra.launcher._target_={target}: is no launcher")
    return made
