"""What runs and sweeps left on disk, each record whole or named as damaged."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qexp.sections import ConfigError
from qexp.store import group_id

KINDS = "an outputs folder, its runs, a run or a sweep"
# libyaml reads 1,000 configs in seconds, Python in half a minute.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run: its folder's name is its identity."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, str]] = field(default_factory=list)
    curve: list[dict[str, str]] = field(default_factory=list)
    choice: dict[str, str] = field(default_factory=dict)  # what its sweep varied, in the words of the command

    @property
    def run_id(self) -> str:
        return self.folder.name

    @cached_property
    def group_id(self) -> str:
        """The same for runs that differ in nothing but their seeds."""
        return group_id(self.config)


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says: the experiment, what varies, and the runs in their order."""

    sweep_id: str
    experiment: str | None
    varied: list[str]
    runs: list[dict[str, Any]]


@dataclass
class Records:
    """All that folders hold; `damaged`, `missing` and `repeated` are sentences about what `runs` lacks."""

    runs: list[Run] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


class _Damaged(Exception):
    """A record that cannot be read; the message says why."""


def read(folders: Iterable[Path]) -> Records:
    """Read all runs of these folders, a run that several hold once. Errors: ConfigError for what holds no runs."""
    records = Records()
    known: dict[str, Run] = {}
    seen: set[Path] = set()
    for folder in folders:
        for path, entry in _listed(Path(folder), records):
            if path.resolve() in seen:  # in an outputs folder and in a sweep, say
                if path.name in known and entry:
                    known[path.name].choice.update(entry.get("choice", {}))
                continue
            seen.add(path.resolve())
            try:
                run = read_run(path, entry or {})
            except _Damaged as error:
                records.damaged.append(f"{path}: {error}")
                continue
            if run.run_id in known:
                records.repeated.append(f"{path}: the same run as {known[run.run_id].folder}, which is the one shown")
                continue
            known[run.run_id] = run
            records.runs.append(run)
    return records


def outputs_of(folder: Path) -> Path:
    """The outputs folder that one of the kinds belongs to."""
    folder = Path(folder)
    if _is_run(folder) or _is_sweep(folder):
        return folder.absolute().parent.parent
    return folder.absolute().parent if folder.absolute().name == "runs" else folder


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.json", "config.yaml"))


def _is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def _listed(folder: Path, records: Records) -> list[tuple[Path, dict[str, Any] | None]]:
    """Folders of runs, each with what its sweep says of it. Errors: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give {KINDS}")
    if _is_sweep(folder):
        return _of_sweep(folder, records)
    if _is_run(folder):
        return [(folder, None)]
    runs = folder / "runs" if (folder / "runs").is_dir() else folder
    found = sorted(path for path in runs.iterdir() if path.is_dir() and not path.name.startswith("."))
    if runs == folder and folder.absolute().name != "runs" and not any(map(_is_run, found)):
        raise ConfigError(f"{folder}: holds no runs; give {KINDS}")
    return [(path, None) for path in found]


def _of_sweep(folder: Path, records: Records) -> list[tuple[Path, dict[str, Any] | None]]:
    try:
        content = _json(folder / "sweep.json")
        entries = content["runs"]
        varied = [str(key) for key in content.get("varied", [])]
        sweep = Sweep(str(content["sweep_id"]), content.get("experiment"), varied, entries)
        listed = [(outputs_of(folder) / "runs" / Path(str(entry["run_id"])).name, entry) for entry in entries]
        for entry in entries:
            entry["choice"] = {str(key): _word(value) for key, value in dict(entry.get("choice") or {}).items()}
    except (_Damaged, KeyError, TypeError, AttributeError, ValueError) as error:
        why = str(error) if isinstance(error, _Damaged) else f"it is no record of a sweep ({error})"
        raise ConfigError(f"{folder / 'sweep.json'}: {why}") from None
    records.sweeps.append(sweep)
    failed = _failed(folder / "results.json")
    for path, entry in listed:
        if not path.is_dir():
            label = f" ({entry['label']})" if entry.get("label") else ""
            why = failed.get(path.name, f"{path} is not there")
            records.missing.append(f"{path.name}{label}: sweep {sweep.sweep_id} lists it, {why}")
    return [(path, entry) for path, entry in listed if path.is_dir()]


def _failed(path: Path) -> dict[str, str]:
    """Why runs of a sweep have no result, where it says so."""
    try:
        return {row["run_id"]: row["failed"] for row in json.loads(path.read_text()) if "failed" in row}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_run(folder: Path, entry: dict[str, Any]) -> Run:
    """The record of one run. Errors: _Damaged."""
    metrics = _json(folder / "metrics.json")
    if metrics.get("status") != "finished":
        raise _Damaged(f"its status is {metrics.get('status')!r}, not finished")
    path = folder / "environment.json"
    environment = _json(path) if path.exists() else {}
    if not isinstance(environment.get("versions", {}), dict):
        raise _Damaged("environment.json is damaged (its versions are no mapping)")
    return Run(
        folder, _yaml(folder / "config.yaml"), metrics, environment,
        _csv(folder / "layers.csv", {"site", "kind", "sqnr_db"}), _csv(folder / "finetune.csv", {"epoch"}),
        dict(entry.get("choice", {})),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    return _mapping(path, _parsed(path, json.loads))


def _yaml(path: Path) -> dict[str, Any]:
    def parse(text: str) -> Any:
        content = yaml.load(text, _Loader)
        try:
            json.dumps(content, sort_keys=True)
        except TypeError as error:  # a date, say, which no config holds
            raise ValueError(str(error)) from None
        return content

    return _mapping(path, _parsed(path, parse))


def _csv(path: Path, needed: set[str]) -> list[dict[str, str]]:
    """Rows of a table that may not be there, but where it is has these columns."""
    if not path.exists():
        return []
    rows = _parsed(path, lambda text: list(csv.DictReader(text.splitlines())))
    if any(None in row or None in row.values() for row in rows) or (rows and not needed <= rows[0].keys()):
        raise _Damaged(f"{path.name} is damaged (its rows and its heading do not fit)")
    return rows


def _parsed(path: Path, parse) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is not there") from None
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise _Damaged(f"{path.name} is damaged ({' '.join(str(error).split())[:120]})") from None


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _Damaged(f"{path.name} is damaged (it holds no mapping)")
    return content
