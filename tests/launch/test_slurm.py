"""Sweeps on a real Slurm of one node (slurm_node.py says where its programs come from), and on none."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch.slurm_node import Missing, slurm_node

from qexp.attempt import Outcome, attempt
from qexp.jobs import compose_call
from qexp.launch.launcher import launcher_of
from qexp.launch.plugin import lost
from qexp.launch.slurm import GONE, Submitit, Told
from qexp.sections import ConfigError
from qexp.stopping import Stopped
from qexp.store import failure

ROOT = Path(__file__).parents[2]
FAST = ["trainer.epochs=1", "engine.seconds=0.05", "engine=none"]
SWEEP = ["-m", "hydra/launcher=slurm", "hydra.launcher.mem_gb=1", *FAST]
plugin = pytest.mark.skipif(
    not find_spec("submitit"), reason="needs hydra-submitit-launcher: pip install 'qexp[slurm]'"
)

# A network of the user's that does as it is told where it is trained.
NET = """
import os, time
from pathlib import Path
from torch import nn

def net(num_classes, what="well"):
    ill = "SLURM_JOB_ID" in os.environ and not Path("mended").exists()
    if ill and what == "raises":
        raise ZeroDivisionError("by intent")
    if ill and what == "hangs":
        job = os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"]
        (Path("hanging") / job).write_text(str(os.getpid()))
        time.sleep(600)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "hanging").mkdir()
    (tmp_path / "my_net.py").write_text(NET)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text("_target_: my_net.net\nwhat: well\n")
    return tmp_path


@pytest.fixture(scope="module")
def slurm():
    """The environment of a cluster."""
    try:
        with slurm_node() as environment:
            yield environment
    except Missing as why:
        pytest.skip(str(why))


def start(environment, *words: str) -> subprocess.Popen:
    """Give a command."""
    own = {key: value for key, value in environment.items() if not key.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, "-m", "qexp", "--config-dir=mine", *words], env=own | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def give(environment, *words: str) -> tuple[int, str, str]:
    """Give a command; its exit code, stdout and stderr."""
    process = start(environment, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def ask(environment, *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def until(met, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)


def finished(folder: Path) -> dict[str, float]:
    """run_id -> when its result was written."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("outputs/runs/*/metrics.json")}


def hanging(folder: Path) -> list[str]:
    """The jobs that hang."""
    return sorted(path.name for path in folder.glob("hanging/*") if path.read_text())


@plugin
def test_an_array_finishes_and_is_found_again(slurm, folder):
    words = [*SWEEP, "logger=none", "seed=0,1,2,3"]
    code, out, err = give(slurm, *words)
    assert code == 0, err
    assert "4 jobs are with slurm as 1. Ctrl-C cancels them" in err
    assert ("4 runs" in out, len(finished(folder))) == (True, 4)
    assert {path.name for path in folder.iterdir()} <= {"mine", "hanging", "my_net.py", "outputs"}
    for log in folder.glob("outputs/logs/*.txt"):
        assert "evaluating the simulation" in log.read_text()
    before = finished(folder)
    code, _, err = give(slurm, *words)
    assert (code, "4 of 4 runs were finished before" in err, "jobs are with" in err) == (0, True, False)
    assert finished(folder) == before


@plugin
def test_what_is_lost_stops_nothing_else_and_is_all_that_the_same_command_does(slurm, folder):
    words = [*SWEEP, "logger=wandb", "model=mine", "model.what=raises,hangs,well", "seed=0,1"]
    process = start(slurm, *words)
    until(lambda: len(hanging(folder)) == 2 and len(finished(folder)) == 2)
    cancelled, killed = hanging(folder)
    ask(slurm, "scancel", cancelled)
    os.kill(int((folder / "hanging" / killed).read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert err.count("(ZeroDivisionError: by intent) (its log: outputs/logs/") == 2
    for job, why in (cancelled, "CANCELLED"), (killed, "FAILED (srun: error: "):
        assert f"job {job} of the cluster: {why}" in err
        assert f"; what the cluster kept of it is outputs/logs/slurm/{job}/{job}_0_log.err" in err
    assert err.strip().endswith("4 of 6 runs failed; the same command tries them again")
    assert out.count("failed") == 4
    assert len(list(folder.glob("outputs/failed/*.json"))) == 4

    before = finished(folder)
    (folder / "mended").touch()
    code, _, err = give(slurm, *words)
    assert (code, "4 jobs are with slurm" in err, "2 of 6 runs were finished before" in err) == (0, True, True)
    after = finished(folder)
    assert (len(after), after | before) == (6, after)
    assert not list(folder.glob("outputs/failed/*.json"))
    records = [path.name.split("-")[-1] for path in folder.glob("outputs/wandb/offline-run-*")]
    assert [records.count(identity) for identity in after] == [1] * 6


@plugin
def test_ctrl_c_cancels_the_jobs(slurm, folder):
    process = start(slurm, *SWEEP, "logger=none", "model=mine", "model.what=hangs", "seed=0,1")
    until(lambda: len(hanging(folder)) == 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "qexp: stopped by SIGINT" in err
    assert "qexp: cancelled 2 jobs of" in err
    assert "Traceback" not in err
    until(lambda: not ask(slurm, "squeue", "--noheader"))


@plugin
def test_a_killed_sweep_and_a_second_one_share_the_work(slurm, folder):
    words = [*SWEEP, "logger=none", "model=mine", "seed=0,1,2,3"]
    process = start(slurm, *words)
    until(lambda: ask(slurm, "squeue", "--states=R", "--noheader"))
    process.kill()
    process.communicate()
    others = [start(slurm, *words) for _ in range(2)]
    for other in others:
        _, err = other.communicate(timeout=300)
        assert other.returncode == 0, err
    assert len(finished(folder)) == 4
    until(lambda: not ask(slurm, "squeue", "--noheader"))  # the array of the killed one
    results = [pickle.loads(path.read_bytes()) for path in folder.glob("outputs/logs/slurm/*/*_result.pkl")]
    outcomes = Counter(attempt.outcome for _, attempt in results)
    assert outcomes[Outcome.FINISHED] == 4
    assert len(results) > 4 == len(results) - outcomes[Outcome.FOUND] - outcomes[Outcome.BUSY]


@plugin
def test_a_refused_submission_is_one_sentence(slurm, folder):
    words = [*SWEEP, "logger=none", "seed=0,1"]
    code, out, err = give(slurm, *words, "hydra.launcher.partition=nope")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("qexp: hydra/launcher=slurm: the jobs were refused: invalid partition specified: nope")
    code, _, err = give(slurm, *words, "hydra.launcher.array_paralelism=2")
    assert (code, "hydra.launcher.array_paralelism: no such key" in err) == (2, True)


@plugin
def test_without_slurm_nothing_starts(folder):
    code, out, err = give({**os.environ, "PATH": "/nowhere"}, *SWEEP, "logger=none", "seed=0,1")
    assert (code, out) == (2, "")
    assert err == "qexp: hydra/launcher=slurm: there is no sbatch here; give this on a Slurm node\n"


@plugin
def test_the_same_in_processes_of_this_machine(folder):
    words = ["-m", "hydra/launcher=submitit_local", *FAST, "logger=none", "model=mine", "seed=0,1"]
    code, out, err = give(os.environ, *words)
    assert (code, "2 runs" in out) == (0, True), err


@pytest.mark.skipif(bool(find_spec("submitit")), reason="the plugin is installed")
@pytest.mark.parametrize("name", ["slurm", "submitit_slurm", "submitit_local"])
def test_a_missing_plugin_is_one_sentence(name):
    with pytest.raises(ConfigError) as error:
        launcher_of(compose_call([f"hydra/launcher={name}"], multirun=True))
    assert str(error.value) == (
        f"hydra/launcher={name}: needs hydra-submitit-launcher; install it with: pip install 'qexp[slurm]'"
    )


def test_what_slurm_says_of_jobs(tmp_path, monkeypatch):
    handles = [SimpleNamespace(job_id=f"7_{n}") for n in range(3)]
    (tmp_path / "squeue").write_text('#!/bin/sh\ncat answer; cat error >&2; exit "$(cat code)"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answers(code: int, answer: str, error: str = ""):
        for name, text in {"code": str(code), "answer": answer, "error": error}.items():
            (tmp_path / name).write_text(text)
        return Submitit("slurm", "slurm", {})._ask(handles, {"7_0": Told("RUNNING")})

    told = answers(0, "7_0|OUT_OF_MEMORY|OutOfMemory\n7_1|RUNNING|None\n")
    assert told == {"7_0": Told("OUT_OF_MEMORY", "OutOfMemory"), "7_1": Told("RUNNING", "None"), "7_2": Told(GONE)}
    assert set(answers(1, "", "slurm_load_jobs error: Invalid job id specified").values()) == {Told(GONE)}
    busy = "slurm_load_jobs error: Unable to contact slurm controller"
    assert answers(1, "", busy) == {"7_0": Told("RUNNING")}


def test_a_lost_job_is_on_record_unless_its_run_is_finished(folder):
    (job,) = compose_call(["logger=none"], multirun=True).jobs
    assert lost(job, "Slurm: TIMEOUT").outcome is Outcome.FAILED
    assert failure(job.outputs, job.run_id) == "Slurm: TIMEOUT"
    (folder / "outputs" / "runs" / job.run_id).mkdir(parents=True)
    (folder / "outputs" / "runs" / job.run_id / "metrics.json").write_text("{}")
    assert lost(job, "Slurm: TIMEOUT").outcome is Outcome.FINISHED


def test_an_error_while_a_stop_unwinds_is_no_failure_of_the_run(folder, monkeypatch):
    def stop(*_):
        try:
            raise Stopped(143)
        finally:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr("qexp.run.run", stop)
    (job,) = compose_call(["logger=none"], multirun=True).jobs
    with pytest.raises(Stopped):
        attempt(job.settings)
    assert failure(job.outputs, job.run_id) is None
