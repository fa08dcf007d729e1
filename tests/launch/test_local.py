"""Workers of their own: what happens to one job happens to no other. Real processes, real deaths.

Where the sweep itself is not to die it runs in this process, whose workers are forked from what it has imported once.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qexp import cli
from qexp.launch.local import Local, cores
from qexp.sections import ConfigError, build

ROOT = Path(__file__).parents[2]
FAST = ["trainer.epochs=1", "engine=none", "logger=none", "hydra.launcher.workers=2"]
# A network that is well where a sweep is checked, and does what `fault` says in a worker.
FAULTY = """
import multiprocessing, os, signal, sys, time
from torch import nn
class Faulty(nn.Module):
    def __init__(self, num_classes, fault="none"):
        super().__init__()
        self.fault, self.head = fault, nn.Linear(64, num_classes)
    def forward(self, x):
        if multiprocessing.parent_process() is not None:
            if self.fault == "raises": raise RuntimeError("it is broken <b>")
            if self.fault == "killed": os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "crashes": os.kill(os.getpid(), signal.SIGSEGV)
            if self.fault == "exits": os._exit(7)
            if self.fault == "hangs": time.sleep(1000)
            if self.fault == "stubborn":
                signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)
        return self.head(x.flatten(1))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    return tmp_path


@pytest.fixture
def sweep(folder, monkeypatch, capsys):
    """Gives the command in the folder; returns its exit code and what stands on stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "unwind_on_signals", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def give(*words):
        with pytest.raises(SystemExit) as end:
            cli.main(["-m", *FAST, *words])
        return SimpleNamespace(returncode=end.value.code, stderr=capsys.readouterr().err)

    yield give
    sys.modules.pop("faulty", None)  # another folder has its own


def command(*words):
    return [sys.executable, "-m", "qexp", "-m", *FAST, *words]


def environment():
    return {"PYTHONPATH": str(ROOT), **{k: v for k, v in os.environ.items() if not k.startswith("WANDB")}}


def faulty(*faults):
    return ["model=custom", "model._target_=faulty.Faulty", f"+model.fault={','.join(faults)}"]


def finished(folder):
    return {path.parent.name for path in folder.glob("outputs/runs/*/metrics.json")}


def test_a_job_that_raises_crashes_is_killed_or_hangs_ends_alone(folder, sweep):
    words = faulty("raises", "killed", "crashes", "exits", "hangs", "none")
    done = sweep(*words, "hydra.launcher.limit_s=10")
    assert done.returncode == 1
    for sentence in (
        "qexp: model.fault=raises: model: Faulty cannot be called on batches of Digits, float32 of shape (2, 1, 8, 8) "
        "(it is broken <b>)",
        "qexp: model.fault=killed: its process was ended by SIGKILL",
        "qexp: model.fault=crashes: its process was ended by SIGSEGV",
        "qexp: model.fault=exits: its process ended with exit code 7 (its log: outputs/logs/",
        "qexp: model.fault=hangs: stopped after hydra.launcher.limit_s=10 seconds",
        "qexp: 5 of 6 runs failed; the same command tries them again",
    ):  # fmt: skip
        assert sentence in done.stderr
    assert len(finished(folder)) == 1
    logs = {path.stem: path.read_text() for path in folder.glob("outputs/logs/*.txt")}
    assert len(logs) == 6
    assert any("Traceback" in text and "it is broken" in text for text in logs.values())
    assert any("Segmentation fault" in text and "faulty.py" in text for text in logs.values())
    failures = [json.loads(path.read_text()) for path in folder.glob("outputs/failed/*.json")]
    assert {Path(failed["log"]).stem for failed in failures} == logs.keys() - finished(folder)
    (results,) = folder.glob("outputs/sweeps/*/results.json")
    assert [("metrics" in row, "failed" in row) for row in json.loads(results.read_text())] == 5 * [(False, True)] + [
        (True, False)
    ]
    # What is mended is tried again, and what was finished is not.
    (folder / "faulty.py").write_text(FAULTY.replace("is not None", "is 7"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("outputs/runs/*/metrics.json")}
    again = sweep(*words)
    assert (again.returncode, len(finished(folder))) == (0, 6), again.stderr
    assert "1 of 6 runs were finished before" in again.stderr
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert not list(folder.glob("outputs/failed/*"))


def test_fail_fast_ends_the_sweep_at_the_first_failure(folder, sweep):
    words = [*faulty("raises", "none"), "seed=0,1,2,3", "hydra.launcher.keep_going=false", "hydra.launcher.workers=1"]
    done = sweep(*words)
    assert done.returncode == 1
    assert "was not run" in done.stderr
    assert len(finished(folder)) < 4


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_done(folder):
    process = subprocess.Popen(
        command(*faulty("hangs", "stubborn")), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(list(folder.glob("outputs/logs/*.txt"))) == 2)
    assert len(alive(process.pid)) > 2  # the sweep and its workers
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "stopped by SIGINT" in err, "Traceback" in err) == (130, True, False)
    assert not finished(folder)
    wait_for(lambda: not alive(process.pid))


def test_workers_of_a_sweep_that_is_killed_end_too(folder):
    process = subprocess.Popen(
        command(*faulty("hangs"), "seed=0,1"), cwd=folder, env=environment(), stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(list(folder.glob("outputs/logs/*.txt"))) == 2)
    assert len(alive(process.pid)) > 2  # the sweep and its workers
    process.kill()
    process.wait()
    wait_for(lambda: not alive(process.pid))


def sweep_into(file, words):
    """In a process that has imported what a sweep needs: the command, with stderr into a file."""
    with file.open("w") as sys.stderr:
        cli.main(["-m", *FAST, *words])


def test_two_sweeps_at_once_share_the_work(folder, monkeypatch):
    words = [*faulty("none"), "seed=range(0,8)"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qexp.launch.preload"])
    both = [context.Process(target=sweep_into, args=(folder / f"{n}.txt", words)) for n in range(2)]
    monkeypatch.chdir(folder)
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    errors = [(folder / f"{n}.txt").read_text() for n in range(2)]
    assert [process.exitcode for process in both] == [0, 0], errors
    assert len(finished(folder)) == 8
    assert sum(len(re.findall(r"finished  seed=", text)) for text in errors) == 8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "hydra.launcher.workers=0: must be auto or a whole number of at least 1"),
        ({"threads": "many"}, "hydra.launcher.threads='many': must be auto"),
        ({"limit_s": 0}, "hydra.launcher.limit_s=0: must be a number of seconds above 0, or null"),
        ({"devices": [-1]}, "hydra.launcher.devices=[-1]: must be a list of numbers of GPUs"),
        ({"keep_going": 1}, "hydra.launcher.keep_going=1: must be true or false"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build({"_target_": "qexp.launch.local.Local"} | options, "hydra.launcher")


def test_workers_have_cores_of_their_own_where_there_are_enough():
    there = cores()
    slots = Local(workers="auto", threads=1).slots([])
    assert sorted(core for slot in slots for core in slot.cores) == there
    crowded = Local(workers=len(there) + 1, threads=1, devices=[3, 5]).slots([])
    assert all(slot.cores == there for slot in crowded)
    assert [slot.device for slot in crowded] == [(3, 5)[n % 2] for n in range(len(there) + 1)]


def wait_for(condition, seconds=90):
    """Machines are slow at times; what never comes fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def alive(session):
    """Processes of a session that have not ended."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(session) and not line.split()[1].startswith("Z")]
