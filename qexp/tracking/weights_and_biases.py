"""Weights & Biases: one run there for each experiment, online or on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexp.store import writable
from qexp.tracking.loggers import Histogram, Logger, NoLogger, RunInfo, named
from qexp.tracking.metrics import CURVES, METRICS
from qexp.tracking.offline import forget


@dataclass
class Wandb(NoLogger):
    """One W&B run per experiment, with the id of the run, so that a repeated run stays one run.

    `group` null is that of runs which differ in their seeds alone; `artifacts` keeps the ONNX files and the float
    network, `alerts` sends a message when a run fails and when a sweep ends.

    Errors: ValueError for an option out of range, or for online without a key.
    """

    project: str = "qexp"
    mode: str = "auto"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False
    alerts: bool = False
    host_stats: bool = False
    console: bool = False

    summarises = True

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline"):
            raise ValueError(f"mode={self.mode!r}: allowed are auto, online, offline")
        if not isinstance(self.project, str) or not self.project:
            raise ValueError(f"project={self.project!r}: must be a name")
        if self.group is not None and not isinstance(self.group, str):
            raise ValueError(f"group={self.group!r}: must be a name")
        if not isinstance(self.tags, list) or not all(isinstance(tag, str) for tag in self.tags):
            raise ValueError(f"tags={self.tags!r}: must be a list of words")

    def check(self) -> None:
        """Errors: ValueError where this must be online and has no key."""
        if self.mode == "online":
            import wandb

            self._online(wandb)

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[Logger]:
        """Start the W&B run and finish it with the exit code of the block, whatever ends it."""
        folder = info.outputs.resolve()
        self._data = folder / "wandb" / "data"
        forget(folder / "wandb", info.run_id)
        for variable, place in ("WANDB_DATA_DIR", self._data / info.run_id), ("WANDB_CACHE_DIR", "wandb/cache"):
            os.environ[variable] = str(writable(folder / place))  # otherwise staged files stay in the home directory
        os.environ["WANDB_SILENT"] = "true"  # its setting alone leaves the lines of the login
        from pytorch_lightning.loggers import WandbLogger

        self._info = info
        self._run, online = self._start(info, folder)
        self.lightning = WandbLogger(experiment=self._run)
        for name in METRICS:
            self._run.define_metric(name)  # its summary is the last value, under the plain name
        for name, (summary, axis) in CURVES.items():
            self._run.define_metric(name, summary=summary or None, step_metric=axis or None)
        self.where = self._run.url if online else f"{_command()} leet {info.outputs / 'wandb'}"
        code = 1
        try:
            yield self
            code = 0
        except Exception as error:
            self.alert(f"{info.name}: failed", " ".join(str(error).split()) or type(error).__name__, failure=True)
            raise
        finally:
            self._run.finish(exit_code=code)

    def _start(self, info: RunInfo, folder: Path) -> tuple[Any, bool]:
        """The W&B run and whether it is online; auto stays offline where W&B does not answer."""
        import wandb

        def init(mode: str) -> Any:
            return wandb.init(
                project=self.project, id=info.run_id, name=info.name, dir=str(folder), resume="allow", mode=mode,
                group=self.group or info.group, job_type=info.job_type, tags=self.tags, config=info.config,
                settings=self._settings(wandb), reinit="finish_previous",
            )  # fmt: skip

        if not self._online(wandb):
            return init("offline"), False
        try:
            return init("online"), True
        except wandb.errors.Error as error:
            why = " ".join(str(error).split())
            if self.mode == "online":
                raise ValueError(f"logger.mode=online: W&B cannot be reached ({why})") from None
            wandb.teardown()  # its service holds on to the id
            os.environ["WANDB_MODE"] = "offline"  # the other runs of a sweep need not wait as long
            print(f"qexp: W&B cannot be reached, the record stays offline ({why})", file=sys.stderr)
            return init("offline"), False

    def _online(self, wandb) -> bool:
        if self.mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return False
        known = _has_key(wandb)
        if self.mode == "online" and not known:
            raise ValueError("logger.mode=online: no W&B key is configured; run `wandb login` or set WANDB_API_KEY")
        return known

    def _settings(self, wandb):
        # A killed run loses what was not flushed: the default waits 15 seconds, longer than many runs here take.
        return wandb.Settings(
            silent=True,
            console="auto" if self.console else "off",
            x_disable_stats=not self.host_stats,
            x_disable_machine_info=not self.host_stats,
            **({} if self.host_stats else {"host": ""}),
            x_transaction_log_flush_interval=0.5,
            init_timeout=30,
        )

    def metrics(self, values: dict[str, Any]) -> None:
        self._run.log(values)
        self._run.summary.update(values)

    def curve(self, name: str, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self._run.log(named(name, row))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows)})

    def histograms(self, found: Iterable[tuple[str, Histogram]]) -> None:
        import wandb

        if values := {name: wandb.Histogram(np_histogram=tuple(histogram)) for name, histogram in found}:
            self._run.log(values)

    def figure(self, name: str, figure: Any) -> None:
        import wandb

        self._run.log({name: wandb.Image(figure)})

    def models(self, files: list[Path], float_network: Path) -> None:
        if not self.artifacts:
            return
        weights = float_network / "tensors.pt"
        with weights.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"float-{float_network.name}"
        source = self._artifact(name, [weights, float_network / "cache.json"], self._data / name / content[:12])
        if self._info.job_type == "fp32":
            self._run.log_artifact(source)
        else:  # what use_artifact does with an artifact that may be new, but offline too
            self._run._log_artifact(source, is_user_created=True, use_after_commit=True)
        if files:
            name = f"model-{self._info.run_id}"
            self._run.log_artifact(self._artifact(name, files, self._data / self._info.run_id / "model"))

    def _artifact(self, name: str, files: list[Path], folder: Path) -> Any:
        """An artifact of files which stay in `folder`, and so beside the record, until they are uploaded."""
        import wandb

        artifact = wandb.Artifact(name, type="model")
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            staged = folder / path.name
            if not staged.exists():
                _link(path, staged)
            artifact.add_file(str(staged), skip_cache=True, policy="immutable")
        return artifact

    def alert(self, title: str, text: str, failure: bool) -> None:
        if self.alerts:
            self._run.alert(title=title, text=text, level="ERROR" if failure else "INFO")


def _link(path: Path, other: Path) -> None:
    """The same content once more, where the file system can, without a copy; both files are never written again."""
    try:
        os.link(path, other)
    except FileExistsError:  # another run was first
        pass
    except OSError:
        shutil.copy(path, other)


def _command() -> str:
    """How the user gives W&B's command here: its name is known only in an environment that is active."""
    beside = Path(sys.executable).with_name("wandb")
    if shutil.which("wandb") or not beside.exists():
        return "wandb"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _has_key(wandb) -> bool:
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth  # which knows under which names a host is filed

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    known = wandb.Settings()
    return bool(known.api_key or read_netrc_auth(host=known.base_url))
