"""Sweeps that survive: what they leave is the same however often they were interrupted, and no run is made twice."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qexp import cli
from qexp.attempt import Attempt, Outcome
from qexp.jobs import compose_call, compose_jobs
from qexp.report.board import Board, Costs
from qexp.store import StoreError, failure, record_failure, replace_text, running
from qexp.sweep import distinct, lasting, sweep_id, to_run, write_plan, write_results

ROOT = Path(__file__).parents[1]
FAST = ["trainer.epochs=1", "engine=none", "model.width=4"]
GRID = ["calibration=minmax,mse", "quantizer=int8,w4a8"]


HERE, THERE = "hydra/launcher=in_process", "hydra/launcher=local"
LOGS, RUNS = "logs/*.txt", "runs/*/metrics.json"


def sweep(folder, *words):
    """Start the command in a process and a session of its own, forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qexp.launch.preload"])
    process = context.Process(target=_sweep, args=(folder, words))
    process.start()
    return process


def _sweep(folder, words):
    os.setsid()
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    with open(os.devnull, "w") as sys.stdout, open("stderr.txt", "w") as sys.stderr:
        cli.main(["-m", *FAST, *words])


def end(process, folder):
    """Its exit code and what it said on stderr."""
    process.join(500)
    return process.exitcode, (folder / "stderr.txt").read_text()


def results(folder):
    (path,) = folder.glob("outputs/sweeps/*/results.json")
    return path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, err = end(sweep(folder, *GRID, "logger.mode=offline", HERE), folder)
    assert code == 0, err
    return folder


def changes(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"outputs/{pattern}")}


@pytest.mark.slow
def test_a_sweep_that_was_killed_at_random_ends_with_the_same_bytes(undisturbed, tmp_path):
    """kill -9 of everything at once, at moments drawn anew after a job began or ended; then the same command."""
    draw = random.Random(7)
    made = set()
    rounds = [(HERE, LOGS), (THERE, LOGS), (HERE, RUNS), (HERE, LOGS)]
    for launcher, pattern in rounds:
        before = changes(tmp_path, pattern)
        process = sweep(tmp_path, *GRID, "logger.mode=offline", launcher)
        while process.is_alive() and changes(tmp_path, pattern) == before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 2))
        if process.is_alive():
            os.killpg(process.pid, 9)
        process.join()
        now = changes(tmp_path, RUNS)
        assert all(json.loads(path.read_text())["status"] == "finished" for path in now)
        made |= set(now.items())
    code, err = end(sweep(tmp_path, *GRID, "logger.mode=offline"), tmp_path)
    assert code == 0, err
    assert results(tmp_path) == results(undisturbed)
    final = set(changes(tmp_path, RUNS).items())
    assert made and made <= final  # what was finished was never made again
    assert len(final) == 4
    for folder in tmp_path, undisturbed:
        records = [path.name.split("-")[-1] for path in folder.glob("outputs/wandb/offline-run-*")]
        expected = [path.parent.name for path, _ in final]
        assert sorted(name for name in records if name in expected) == sorted(expected)  # one record for each run


def test_the_same_sweep_again_makes_nothing_and_says_so(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("outputs/**/*") if path.is_file()}
    bytes_before = results(undisturbed)
    code, err = end(sweep(undisturbed, *GRID, "seed=0,0", "logger.mode=offline"), undisturbed)
    assert (code, "4 of 4 runs were finished before" in err) == (0, True), err
    assert results(undisturbed) != b"" and len(json.loads(results(undisturbed))) == 8  # a row for each that was asked
    runs = {path: changed for path, changed in before.items() if "runs" in path.parts}
    assert all(path.stat().st_mtime_ns == changed for path, changed in runs.items())
    assert bytes_before != results(undisturbed)


@pytest.fixture
def call(tmp_path):
    return compose_call(["seed=0,1,0", "quantizer=int8,int4", f"paths.outputs={tmp_path}"], multirun=True)


def finish(job, **metrics):
    folder = job.outputs / "runs" / job.run_id
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"status": "finished"} | metrics))


def test_doubled_jobs_are_one_and_finished_ones_are_left_out(call):
    assert (len(call.jobs), len(distinct(call.jobs)), len(to_run(call.jobs))) == (6, 4, 4)
    finish(call.jobs[0])
    assert [job.run_id for job in to_run(call.jobs)] == [job.run_id for job in distinct(call.jobs)[1:]]
    for job in call.jobs:
        job.settings.config["store"] = "rerun"
    assert len(to_run(call.jobs)) == 4


def test_the_identity_of_a_sweep_is_that_of_its_runs(tmp_path):
    asked = [["seed=0,1"], ["seed=1,0"], ["seed=0,1,1", "logger=none"], ["seed=0,2"]]
    first, turned, doubled, other = (sweep_id(compose_jobs(given, multirun=True)) for given in asked)
    assert first == turned == doubled != other


def test_results_hold_no_times_and_nothing_that_depends_on_them():
    deterministic = {"acc/fp32": 0.9, "a/acc/engine": 0.8, "b/acc/engine": 0.7, "size/packed_bytes": 3}
    of_a = {"engine/winner": "a", "acc/engine": 0.8, "a/latency/int8_ms": 1.0, "latency/int8_ms": 1.0, "time/x": 9.0}
    of_b = {"engine/winner": "b", "acc/engine": 0.7, "a/latency/int8_ms": 3.0, "latency/int8_ms": 2.0, "time/x": 1.0}
    assert lasting(deterministic | of_a) == lasting(deterministic | of_b) == deterministic


def test_the_record_names_what_failed_and_what_was_not_run(call):
    jobs = distinct(call.jobs)
    finish(jobs[0], **{"acc/sim": 0.5})
    record_failure(jobs[1].outputs, jobs[1].run_id, "a label", "it broke")
    folder = write_plan(call, "an_id")
    write_results(call, folder)
    rows = json.loads((folder / "results.json").read_text())
    by_run = {row["run_id"]: row for row in rows}
    assert by_run[jobs[0].run_id]["metrics"] == {"acc/sim": 0.5, "status": "finished"}
    assert [by_run[job.run_id].get("failed") for job in jobs] == [None, "it broke", "not run", "not run"]
    told = json.loads((folder / "sweep.json").read_text())
    assert told["varied"] == ["seed", "quantizer"]
    assert [row["choice"] for row in told["runs"]] == [job.choice for job in call.jobs]


def test_a_damaged_result_is_named_and_not_taken_for_none(call):
    job = call.jobs[0]
    finish(job)
    (job.outputs / "runs" / job.run_id / "metrics.json").write_text('{"status": "fin')
    with pytest.raises(StoreError, match=r"metrics.json is damaged .*; delete .* to make the run again"):
        to_run(call.jobs)


def test_one_process_at_a_time_is_at_a_run(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from qexp.store import running\n"
        f"with running(Path({str(tmp_path)!r}), 'abc') as alone: print(alone, flush=True); time.sleep(1000)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "True\n"
    with running(tmp_path, "abc", patient=False) as alone:
        assert not alone
    with running(tmp_path, "another", patient=False) as alone:
        assert alone
    holder.kill()
    with running(tmp_path, "abc", patient=True) as alone:  # the system drops the lock of who was killed
        assert alone
    holder.wait()


def test_failures_are_kept_until_the_next_attempt(tmp_path):
    assert failure(tmp_path, "abc") is None
    record_failure(tmp_path, "abc", "label", 'a "sentence"')
    assert failure(tmp_path, "abc") == 'a "sentence"'


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    replace_text(tmp_path / "a.json", "old")

    def stop(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(StoreError, match=r"cannot write .*a.json: No space left on device"):
        replace_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_the_time_to_go_follows_the_costs_of_each_kind():
    class Job:
        def __init__(self, kind, number):
            self.kind, self.run_id, self.name = kind, str(number), f"job {number}"

    jobs = [Job("ptq", 0), Job("qat", 1), Job("qat", 2), Job("ptq", 3)]
    board = Board(jobs, Costs(), live=False)
    assert board.seconds_to_go() is None
    board.costs.add("ptq", 2.0)
    board.costs.add("qat", 20.0)
    board.workers = 2
    assert board.seconds_to_go() == (2 + 20 + 20 + 2) / 2
    board.started(jobs[1])
    board.ended(jobs[1], Attempt(Outcome.FOUND))
    assert (board.done, board.seconds_to_go()) == (1, (2 + 20 + 2) / 2)
    board.started(jobs[2])
    board.ended(jobs[2], Attempt(Outcome.BUSY))
    assert board.seconds_to_go() == 12
    assert board.later() == [jobs[2]]
    board.started(jobs[0])
    board.ended(jobs[0], Attempt(Outcome.FAILED, "it broke", refused=True))
    assert (board.failed, board.refused) == ({"0": "it broke"}, {"0"})
