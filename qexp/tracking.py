"""Where a run's record goes besides its folder: W&B, a CSV file, nowhere. The names of all metrics stand here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qexp.store import writable

# Every metric a run writes, in metrics.json and in W&B alike; accuracy is a share, latency milliseconds, sizes bytes.
METRICS = {
    "acc/fp32": "accuracy of the float network",
    "acc/sim": "accuracy of the simulation",
    "acc/engine": "accuracy of the engine that runs in int8",
    "acc/drop": "acc/fp32 minus acc/engine, or minus acc/sim where no engine ran",
    "agree/argmax": "share of samples decided as the float network does",
    "sqnr/output_db": "SQNR of the simulated logits against the float ones",
    "parity/identical": "share of activation codes equal in simulation and engine",
    "parity/off_by_one": "share of codes one step apart",
    "parity/larger": "share of codes further apart",
    "parity/max_step": "largest distance of two codes",
    "parity/codes": "number of codes compared",
    "parity/argmax_flips": "samples that engine and simulation decide differently",
    "parity/faithful": "whether the graph that shows its codes equals the timed one to the bit",
    "int8/mac_coverage": "share of multiply-accumulates that the engine runs in int8",
    "int8/islands": "number of layers that the engine runs in float",
    "int8/island_names": "those layers",
    "int8/saturates": "whether the engine's int8 sums saturate in 16 bits on this CPU",
    "latency/fp32_ms": "median time of one call of the same engine in fp32",
    "latency/int8_ms": "median time of one call in int8",
    "latency/speedup": "fp32 over int8",
    "latency/speedup_lo": "lower end of its 95 % bootstrap interval",
    "latency/speedup_hi": "upper end",
    "latency/aa_lo": "the same interval for fp32 against itself: what noise alone does",
    "latency/aa_hi": "upper end",
    "latency/best_fp32_ms": "the fastest fp32 of all engines and torch",
    "latency/best_fp32_engine": "whose it is",
    "latency/speedup_over_best_fp32": "that over int8",
    "latency/speedup_over_best_fp32_lo": "lower end of its 95 % bootstrap interval",
    "latency/speedup_over_best_fp32_hi": "upper end",
    "acc/ptq": "accuracy of the simulation before fine-tuning, which is that of method=ptq",
    "acc/control": "accuracy of the float network after as many steps of fine-tuning (finetune=float)",
    "sqnr/ptq_db": "sqnr/output_db before fine-tuning",
    "finetune/epochs": "epochs of fine-tuning",
    "finetune/loss": "mean training loss of the last one",
    "finetune/weight_change": "distance of the weights to those before, over the norm of those before",
    "finetune/changed_codes": "share of weights whose code changed in a step, where weights are stored on their grid",
    "time/finetune_s": "fine-tuning",
    "flat/loss": "training loss at the weights that are evaluated, activations in float (docs/flatness.md)",
    "flat/top_eigenvalue": "largest eigenvalue of its Hessian",
    "flat/trace": "trace of its Hessian, estimated",
    "flat/trace_error": "standard error of that",
    "flat/sam_sharpness": "how far it rises in a ball of radius 0.05, by a step along the gradient",
    "flat/worst_in_cell": "how far it rises with no weight moved by more than half a step, found by ascent",
    "size/fp32_bytes": "size of model_fp32.onnx",
    "size/int8_bytes": "size of model_int8.onnx",
    "size/packed_bytes": "the formats' own: packed codes, scales and zero points, biases, what stays in float",
    "size/qparams_bytes": "the part of it that scales, zero points and codebooks take",
    "time/calibrate_s": "calibration",
    "time/total_s": "the whole run",
    "engine/winner": "the engine with the lowest int8 latency, whose figures the plain names are",
    "engine/refused": "engines that could not run this model, and why",
    "status": "finished, or there is no file",
}


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told when a run starts."""

    run_id: str
    name: str
    job_type: str
    config: dict[str, Any]
    outputs: Path


class Logger(Protocol):
    """Takes the record of a run."""

    where: str
    lightning: Any  # what pl.Trainer gets as its logger while the float network trains

    def metrics(self, values: dict[str, Any]) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None: ...

    def file(self, path: Path) -> None: ...


class NoLogger:
    """Keeps nothing: the folder of the run is the record."""

    where = ""
    lightning: Any = False

    def __init__(self, group: str | None = None) -> None:
        self.group = group

    def check(self) -> None:
        """Refuse what cannot work before anything runs. Errors: ValueError."""

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[Logger]:
        """Yield the logger for the time of one run."""
        yield self

    def metrics(self, values: dict[str, Any]) -> None:
        """Record the final metrics."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Record a table."""

    def file(self, path: Path) -> None:
        """Record a file."""


class Csv(NoLogger):
    """outputs/csv/<run_id>/metrics.csv, as Lightning's CSVLogger writes it."""

    @contextmanager
    def open(self, info: RunInfo) -> Iterator[Logger]:
        from pytorch_lightning.loggers import CSVLogger

        folder = info.outputs / "csv" / info.run_id
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("metrics.csv"):
            old.unlink()
        self.lightning = CSVLogger(folder.parent, name=None, version=info.run_id)
        self.where = f"{folder / 'metrics.csv'}"
        try:
            yield self
        finally:
            self.lightning.save()

    def metrics(self, values: dict[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        self.lightning.log_metrics(numbers)


@dataclass
class Wandb(NoLogger):
    """One W&B run per experiment, with the id of the run, so that a repeated run stays one run.

    Errors: ValueError for an option out of range, or for online without a key.
    """

    project: str = "qexp"
    mode: str = "auto"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False
    host_stats: bool = False
    console: bool = False

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
        for variable, name in ("WANDB_DATA_DIR", "wandb/data"), ("WANDB_CACHE_DIR", "wandb/cache"):
            os.environ[variable] = str(writable(folder / name))  # otherwise staged files stay in the home directory
        os.environ["WANDB_SILENT"] = "true"  # its setting alone leaves the lines of the login
        from pytorch_lightning.loggers import WandbLogger

        run, online = self._start(info, folder)
        self.lightning = WandbLogger(experiment=run)
        self._artifact_name = f"{info.job_type}-{info.run_id}"
        for name in METRICS:
            run.define_metric(name, summary="last")
        self.where = run.url if online else f"{_command()} leet {info.outputs / 'wandb'}"
        code = 1
        try:
            yield self
            code = 0
        finally:
            run.finish(exit_code=code)

    def _start(self, info: RunInfo, folder: Path) -> tuple[Any, bool]:
        """The W&B run and whether it is online; auto stays offline where W&B does not answer."""
        import wandb

        def init(mode: str) -> Any:
            return wandb.init(
                project=self.project, id=info.run_id, name=info.name, dir=str(folder), resume="allow", mode=mode,
                group=self.group, job_type=info.job_type, tags=self.tags, config=info.config,
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
        self.lightning.experiment.log(values)
        self.lightning.experiment.summary.update(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self.lightning.experiment.log({name: wandb.Table(columns=columns, data=rows)})

    def file(self, path: Path) -> None:
        if self.artifacts:
            import wandb

            artifact = wandb.Artifact(f"{self._artifact_name}-{path.stem}", type="model")
            artifact.add_file(str(path))
            self.lightning.experiment.log_artifact(artifact)


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
