"""What a machine and an installation are like, and what is to be done about it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from qexp.attempt import sentence
from qexp.machine import processor
from qexp.probes import MARK
from qexp.store import StoreError, finished, writable

OK, NOTE, PROBLEM = "ok", "note", "problem"
PATIENCE_S = 120  # for one library, on a machine that is busy
GIB = 2**30
LITTLE, TOO_LITTLE, MUCH = GIB, GIB // 10, 10 * GIB  # free space, free space, the cache

# Those of a row share a process, so that torch is imported twice and no more.
PROCESSES = (
    ("torch", "training"),
    ("onnx", "onnxruntime", "openvino"),
    ("wandb", "data", "page", "matplotlib", "optuna", "slurm", "ray"),
)
# probe -> its row, the packages that it needs, what for
REQUIRED = {
    "training": ("training", ("pytorch-lightning", "torchmetrics")),
    "data": ("data sets", ("scikit-learn", "pillow")),
    "onnx": ("onnx", ("onnx", "onnxscript")),
    "page": ("qexp compare", ("plotly", "jinja2")),
}
OPTIONAL = {
    "matplotlib": ("figures", ("matplotlib",), "for qexp levels and qexp flatness"),
    "optuna": ("search", ("optuna",), "for hydra/sweeper=optuna"),
    "slurm": ("Slurm", ("hydra-submitit-launcher",), "for hydra/launcher=slurm"),
    "ray": ("Ray", ("ray", "hydra-ray-launcher"), "for hydra/launcher=ray"),
}
SPEED = {  # the best instruction set for int8 -> what it means
    "amx_int8": "AMX: exact int8 sums, at many times the rate of float32",
    "avx512_vnni": "VNNI: exact int8 sums, at up to four times the rate of float32",
    "avx_vnni": "VNNI: exact int8 sums, at up to four times the rate of float32",
    "avx512f": "no VNNI: int8 gains little, and its sums may saturate in 16 bits",
    "avx2": "no VNNI: int8 gains little, and its sums may saturate in 16 bits",
}
WITHOUT_TORCH = "because torch does not"
LOCAL_LOCKS = ("nolock", "local_lock=flock", "local_lock=all", "localflock")


class Finding(NamedTuple):
    """One row: what was looked at, how it is, and what to do, where anything is."""

    check: str
    state: str
    what: str
    todo: str = ""


def findings(outputs: Path) -> list[Finding]:
    """All of them; a check that goes wrong is a finding, too."""
    with ThreadPoolExecutor(len(PROCESSES)) as pool:
        asked = [pool.submit(probed, names) for names in PROCESSES]
        here = {
            "Python": _python, "processor": _processor, "C++ compiler": _compiler, "versions": _versions,
            "outputs": lambda: _outputs(outputs), "file locks": lambda: _locks(outputs),
            "cache": lambda: _cache(outputs), "runs": lambda: _runs(outputs),
        }  # fmt: skip
        found = {check: _safe(check, look) for check, look in here.items()}
        told = {name: answer for one in asked for name, answer in one.result().items()}
    for name, answer in told.items():  # whose fault it is
        if name != "torch" and "error" in answer and answer["error"] == told["torch"].get("error"):
            answer["error"] = WITHOUT_TORCH
    return [
        *found["Python"], *found["versions"], *found["processor"],
        *_safe("torch", lambda: _torch(told["torch"])),
        *(row for name in ("training", "data", "onnx") for row in _required(name, told[name])),
        *_safe("ONNX Runtime", lambda: _engine("ONNX Runtime", "onnxruntime", told["onnxruntime"])),
        *_safe("OpenVINO", lambda: _engine("OpenVINO", "openvino", told["openvino"])),
        *found["C++ compiler"],
        *_safe("W&B", lambda: _wandb(told["wandb"])),
        *_required("page", told["page"]),
        *(row for name in OPTIONAL for row in _safe(name, lambda name=name: _optional(name, told[name]))),
        *found["outputs"], *found["file locks"], *found["cache"], *found["runs"],
    ]  # fmt: skip


def _safe(check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(look())
    except Exception as error:
        return [Finding(check, PROBLEM, f"could not be checked ({sentence(error)})")]


def probed(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The answers of qexp.probes; what ends its process is the answer of the library that was asked."""
    found: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in found]:
        out, why = _answers(left)
        for line in out.decode(errors="replace").splitlines():
            if line.startswith(MARK):
                name, answer = json.loads(line.removeprefix(MARK))
                found[name] = answer
        if still := [name for name in left if name not in found]:
            found[still[0]] = {"error": why}
    return found


def _answers(names: list[str]) -> tuple[bytes, str]:
    """What a process with these probes prints, and how it ended."""
    place = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), place]))
    with tempfile.TemporaryDirectory() as folder:  # matplotlib writes where it is imported
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "qexp.probes", *names], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, timeout=PATIENCE_S,
                env=os.environ | {"PYTHONPATH": path, "MPLCONFIGDIR": folder},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return error.stdout or b"", f"does not answer within {PATIENCE_S} s"
    return done.stdout, _ended(done.returncode)


def _ended(code: int) -> str:
    return (
        f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
    )


def install(*packages: str) -> str:
    """The command that installs these in the ranges that qexp declares."""
    declared = {_name(text): text.partition(";")[0].strip() for text in _requirements()}
    wanted = [declared.get(package.lower(), package) for package in packages]
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, "-m", "pip", "install", *wanted])


def _repair(told: dict[str, Any], *packages: str) -> str:
    """The command that makes these anew, which pip does not do with what is installed unless it is told to."""
    if told["error"] == WITHOUT_TORCH:
        return ""
    command = install(*packages)
    return (
        command.replace(" install ", " install --force-reinstall --no-deps ")
        if all(map(_installed, packages))
        else command
    )


def _requirements() -> list[str]:
    try:
        return requires("qexp") or []
    except PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    what = f"{platform.python_version()} ({sys.executable})"
    try:
        needs = metadata("qexp")["Requires-Python"] or ""
    except PackageNotFoundError:
        needs = ""
    least = tuple(map(int, needs.removeprefix(">=").split("."))) if re.fullmatch(r">=[\d.]+", needs) else ()
    if sys.version_info[: len(least)] < least:
        yield Finding("Python", PROBLEM, what, f"make a new environment with Python {needs}")
    else:
        yield Finding("Python", OK, what)


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wanted, fits, odd = [Requirement(text) for text in _requirements()], 0, False
    if not wanted:
        todo = "install the checkout: scripts/qexp --version"
        yield Finding("versions", NOTE, "qexp is not installed here, so that no ranges are known", todo)
        return
    for one in wanted:
        of_extra = bool(one.marker) and "extra" in str(one.marker)
        if one.marker and not of_extra and not one.marker.evaluate():
            continue
        there = _installed(one.name)
        if there is not None and one.specifier.contains(there, prereleases=True):
            fits += 1
        elif there is not None or not of_extra:
            odd = True
            what = f"{one.name} {there or 'is missing'}; qexp is made for {one.specifier or 'any version'}"
            yield Finding("versions", NOTE if of_extra else PROBLEM, what, install(one.name))
    if not odd:
        yield Finding("versions", OK, f"the {fits} packages that are installed are in the ranges that qexp is made for")


def _processor() -> Iterator[Finding]:
    told = processor()
    best = told["isa"].split()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    means = SPEED.get(best, "what int8 gains here is for qexp to measure")
    state = NOTE if means.startswith("no ") else OK
    yield Finding("processor", state, f"{told['cpu']}, {cores} cores, {told['isa']}; {means}")


def _torch(told: dict[str, Any]) -> Iterator[Finding]:
    if "error" in told:
        yield Finding("torch", PROBLEM, f"does not work ({told['error']})", _repair(told, "torch"))
        return
    build, gpus = told["build"], told["gpus"]
    what = f"{told['version']} ({build or 'CPU build'}), {told['threads']} threads"
    if gpus:
        names = ", ".join(dict.fromkeys(gpus))
        yield Finding("torch", OK, f"{what}; {len(gpus)} GPU{'s' * (len(gpus) > 1)}: {names}, for trainer=gpu")
    elif build:
        yield Finding("torch", NOTE, f"{what}; no GPU is visible, trainer=gpu cannot be chosen",
                      "if there is one: nvidia-smi (or rocm-smi) tells whether its driver works")  # fmt: skip
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        todo = "to train on it, install the CUDA build of this version: https://pytorch.org/get-started/locally"
        yield Finding("torch", NOTE, f"{what}; this machine has an NVIDIA GPU, which this build cannot use", todo)
    else:
        yield Finding("torch", OK, f"{what}; no GPU, which nothing here needs")


def _required(name: str, told: dict[str, Any]) -> Iterator[Finding]:
    check, packages = REQUIRED[name]
    if "error" in told:
        yield Finding(check, PROBLEM, f"does not work ({told['error']})", _repair(told, *packages))
    else:
        yield Finding(check, OK, ", ".join(f"{package} {_installed(package) or ''}".strip() for package in packages))


def _optional(name: str, told: dict[str, Any]) -> Iterator[Finding]:
    check, packages, purpose = OPTIONAL[name]
    missing = [package for package in packages if _installed(package) is None]
    submits = shutil.which("sbatch") if name == "slurm" else None
    if missing:
        beside = ", though sbatch is here" if submits else ""
        yield Finding(check, NOTE, f"{', '.join(missing)} not installed ({purpose}){beside}", install(*missing))
    elif "error" in told:
        yield Finding(check, PROBLEM, f"does not work, {purpose} ({told['error']})", _repair(told, *packages))
    else:
        what = ", ".join(f"{package} {_installed(package)}" for package in packages)
        if name == "slurm" and not submits:
            yield Finding(check, NOTE, f"{what}; no sbatch on PATH, so that jobs cannot be submitted from here",
                          "give the command on a login node of the cluster")  # fmt: skip
        else:
            yield Finding(check, OK, f"{what}{f'; {submits}' if submits else ''}")


def _engine(check: str, package: str, told: dict[str, Any]) -> Iterator[Finding]:
    if "error" in told:
        yield Finding(check, PROBLEM, f"does not run int8 ({told['error']})", _repair(told, package))
    elif told["saturates"]:
        what = f"{told['version']} runs int8, but sums saturate in 16 bits on this CPU: engine and simulation differ"
        yield Finding(check, NOTE, what, "quantizer.weight.bits=7 keeps every sum in range")
    else:
        yield Finding(check, OK, f"{told['version']} runs int8, with exact sums")


def _compiler() -> Iterator[Finding]:
    """Whether it makes a library with OpenMP, as torch asks of it."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    todo = "apt install g++, or name one in CXX; nothing else needs it"
    if shutil.which(name) is None:
        yield Finding("C++ compiler", NOTE, f"no {name} on PATH (for compiled=true)", todo)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "a.cpp", Path(folder) / "a.so"
        source.write_text('#include <cmath>\n#include <omp.h>\nextern "C" int n() { return omp_get_max_threads(); }\n')
        command = [name, "-fopenmp", "-shared", "-fPIC", "-o", made, source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if "error" in line), f"code {done.returncode}")
        yield Finding("C++ compiler", NOTE, f"{name} cannot compile with OpenMP (for compiled=true): {why}", todo)
    else:
        told = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=PATIENCE_S).stdout
        yield Finding("C++ compiler", OK, f"{told.splitlines()[0]}, for compiled=true")


def _wandb(told: dict[str, Any]) -> Iterator[Finding]:
    if "error" in told:
        yield Finding("W&B", PROBLEM, f"does not work ({told['error']})", f"{_repair(told, 'wandb')}, or logger=none")
        return
    what, mode = f"wandb {told['version']}", told["mode"]
    if "unreadable" in told:
        what += f"; its settings or the netrc file cannot be read ({told['unreadable']})"
        yield Finding("W&B", PROBLEM, what, "see ~/.netrc and WANDB_API_KEY, or choose logger=none")
    elif told["key"]:
        chosen = "online" if told["online"] else f"offline (WANDB_MODE={mode})"
        yield Finding("W&B", OK, f"{what}; a key for {told['host']} is configured, logger=wandb is {chosen}")
    else:
        what += f"; no key for {told['host']} is configured, logger=wandb keeps its record offline"
        yield Finding("W&B", NOTE, what, "wandb login, if there is an account")


def _existing(folder: Path) -> Path:
    """Itself, or the nearest one above that is there."""
    return next(place for place in [folder, *folder.absolute().parents] if place.exists())


def _outputs(outputs: Path) -> Iterator[Finding]:
    place = _existing(outputs)
    try:
        writable(place)
    except StoreError as error:
        why = str(error).removeprefix("paths.outputs: ")
        yield Finding("outputs", PROBLEM, why, "choose another folder: qexp paths.outputs=DIR ...")
        return
    free = shutil.disk_usage(place).free
    beside = "" if place == outputs else f"; it is made by the first run in {place}"
    what = f"{outputs} can be written, {_size(free)} free{beside}"
    state = PROBLEM if free < TOO_LITTLE else NOTE if free < LITTLE else OK
    yield Finding("outputs", state, what, "" if state == OK else "make room, or choose a disk with paths.outputs=DIR")


def _locks(outputs: Path) -> Iterator[Finding]:
    """Whether a lock that this process holds keeps another one out."""
    place = _existing(outputs)
    kind, options = _file_system(place)
    named = f"on this {kind} file system" if kind else "here"
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    todo = "choose a disk of this machine, or one that has locks: paths.outputs=DIR"
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other = subprocess.run([sys.executable, "-S", "-c", code, file.name], stderr=subprocess.DEVNULL, timeout=60)
    except OSError as error:
        yield Finding("file locks", PROBLEM, f"cannot be taken {named}: {error.strerror or error}", todo)
        return
    if other.returncode == 0:
        yield Finding("file locks", PROBLEM, f"keep nobody out {named}: two processes may make the same run", todo)
    elif set(LOCAL_LOCKS) & set(options):
        what = f"work {named}, but are known to this machine alone ({', '.join(set(LOCAL_LOCKS) & set(options))})"
        yield Finding("file locks", NOTE, what, "do not let several machines use this folder at the same time")
    else:
        yield Finding(
            "file locks", OK, f"work {named}: processes that share this folder do not get in each other's way"
        )


def _file_system(place: Path) -> tuple[str, list[str]]:
    """Kind and options of the mount below which a folder is; empty where the system hides it."""
    mounts = Path("/proc/self/mounts")
    rows = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    here = place.resolve()
    above = [row for row in rows if len(row) > 3 and here.is_relative_to(row[1].replace("\\040", " "))]
    row = max(above, key=lambda row: len(row[1]), default=None)
    return (row[2], row[3].split(",")) if row else ("", [])


def _cache(outputs: Path) -> Iterator[Finding]:
    folder = outputs / "cache"
    if folder.is_dir():
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        todo = f"rm -r {shlex.quote(str(folder))}: float networks are then trained again" if used > MUCH else ""
        yield Finding("cache", NOTE if todo else OK, f"{folder} holds {_size(used)}", todo)


def _runs(outputs: Path) -> Iterator[Finding]:
    """Results, and what stands without one."""
    done, damaged = set(), []
    for path in outputs.glob("runs/*/metrics.json"):
        done.add(path.parent.name)
        try:
            finished(outputs, path.parent.name)
        except StoreError:
            damaged.append(path.parent)
    failed = {path.stem for path in outputs.glob("failed/*.json")}
    begun = {path.stem for path in outputs.glob("logs/*.txt")} - done - failed
    busy = {identity for identity in begun if _is_locked(outputs / ".unfinished" / f"{identity}.running")}
    if not outputs.is_dir():
        return
    under_way = f", {len(busy)} under way" if busy else ""
    yield Finding("runs", OK, f"{len(done)} finished in {outputs}{under_way}")
    again = "the command that made them tries again"
    if failed:
        what = f"{_count(len(failed))} failed at the last attempt"
        yield Finding("runs", NOTE, what, f"{again}; why: {outputs / 'logs'}, one file a run")
    if stopped := begun - busy:
        yield Finding("runs", NOTE, f"{_count(len(stopped))} began and never ended: killed, most likely", again)
    if damaged:
        what = f"{_count(len(damaged))} cannot be read, such as {damaged[0]}"
        yield Finding("runs", PROBLEM, what, shlex.join(["rm", "-r", *map(str, damaged[:5])]))
    left = [path for place in (outputs, outputs / "cache") for path in place.glob(".unfinished/*.new")]
    if left and not busy:
        told = f"{_count(len(left), 'folder')} half written, which killed runs have left"
        yield Finding("leftovers", NOTE, told, shlex.join(["rm", "-r", *map(str, left[:5])]))


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _count(number: int, what: str = "run") -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _size(number: float) -> str:
    for unit in "B", "KB", "MB":
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
