"""A search asks Optuna and answers with runs; it goes on after a kill, to the number of trials that was asked for."""

import json
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from qexp import search
from qexp.attempt import Attempt, Outcome
from qexp.jobs import compose_call
from qexp.sections import ConfigError

ROOT = Path(__file__).parents[1]
BITS = "quantizer.weight.bits=range(2,9)"


class Launcher:
    """Answers at once with made-up figures: more bits cost more and err less; 3 bits fail. May be cut off."""

    def __init__(self, most=10**6):
        self.ran, self.most = [], most

    def at_once(self, jobs):
        return 3

    def launch(self, jobs, board, patient):
        for job in jobs:
            if len(self.ran) == self.most:
                raise KeyboardInterrupt
            self.ran.append(job.run_id)
            board.started(job, live=False)
            bits = job.settings.recipe.weight.grid.bits
            if bits == 3:
                board.ended(job, Attempt(Outcome.FAILED, "it broke"))
                continue
            folder = job.outputs / "runs" / job.run_id
            folder.mkdir(parents=True)
            worse = 0.01 * (str(job.settings.recipe.weight.granularity) == "per_tensor")
            metrics = {"status": "finished", "acc/drop": 2.0**-bits + worse, "size/packed_bytes": 1000 * bits}
            (folder / "metrics.json").write_text(json.dumps(metrics))
            board.ended(job, Attempt(Outcome.FINISHED))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "require_ready", lambda jobs: None)

    def ask(*words, launcher=None, trials=12):
        used = launcher or Launcher()
        monkeypatch.setattr(search, "launcher_of", lambda call: used)
        given = ["hydra/sweeper=optuna", BITS, "granularity=per_tensor,per_channel", f"hydra.sweeper.trials={trials}"]
        return search.run_search(compose_call([*given, "logger=none", f"paths.outputs={tmp_path}", *words], True))

    return ask


def trials_of(folder):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name=folder.name, storage=storage).get_trials()


def test_the_front_is_what_no_other_trial_beats(asked):
    call, _, folder = asked(trials=20)
    told = json.loads((folder / "sweep.json").read_text())
    points = {job.run_id: job.finished() for job in call.jobs if job.finished()}
    pairs = {run: (metrics["acc/drop"], metrics["size/packed_bytes"]) for run, metrics in points.items()}
    beaten = {
        run for run, (a, b) in pairs.items() if any(x <= a and y <= b and (x, y) != (a, b) for x, y in pairs.values())
    }
    front = pairs.keys() - beaten
    assert set(told["front"]) == front and len(front) > 1
    assert told["objectives"] == {"acc/drop": "minimize", "size/packed_bytes": "minimize"}
    assert len(call.jobs) == 20


def test_what_failed_is_a_failed_trial_and_no_run_is_made_twice(asked):
    used = Launcher()
    _, _, folder = asked("granularity=per_channel", launcher=used, trials=25)
    finished = [run for run in used.ran if (folder.parents[1] / "runs" / run).exists()]
    assert len(finished) == len(set(finished)) <= 6
    states = {(trial.params["quantizer.weight.bits"] == 3, trial.state) for trial in trials_of(folder)}
    assert states == {(True, TrialState.FAIL), (False, TrialState.COMPLETE)}


@pytest.mark.parametrize("moment", [0, 1, 4, 8])
def test_a_search_that_is_cut_off_goes_on_to_the_same_number(asked, moment):
    with pytest.raises(KeyboardInterrupt):
        asked(launcher=Launcher(most=moment), trials=40)
    call, _, folder = asked(trials=40)
    trials = trials_of(folder)
    assert len(call.jobs) == len(trials) == 40
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}  # none is left open


def test_the_same_search_again_makes_nothing_and_a_longer_one_adds(asked):
    first, _, folder = asked(trials=9)
    used = Launcher()
    again, _, same = asked(launcher=used, trials=9)
    assert (same, used.ran) == (folder, [])
    assert [job.run_id for job in again.jobs] == [job.run_id for job in first.jobs]
    more, _, same = asked(trials=12)
    assert same == folder and [job.run_id for job in more.jobs[:9]] == [job.run_id for job in first.jobs]
    assert len(more.jobs) == 12


def test_what_varies_becomes_the_distribution_that_it_is():
    given = ["hydra/sweeper=optuna", BITS, "calibration=minmax,mse", "trainer.lr=tag(log,interval(0.001,0.1))"]
    space = compose_call([*given, "seed=range(0,10,4)"], True).space
    found = {key: search._distribution(space, key) for key in space.varied}
    assert found == {
        "quantizer.weight.bits": IntDistribution(2, 8),
        "calibration": CategoricalDistribution(["minmax", "mse"]),
        "trainer.lr": FloatDistribution(0.001, 0.1, log=True),
        "seed": IntDistribution(0, 8, step=4),
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hydra.sweeper.minimize=[acc/nope]"], "hydra.sweeper.minimize=acc/nope: no such metric"),
        (["hydra.sweeper.minimize=[]"], "hydra.sweeper.minimize=[]: with maximize=[] too there is nothing"),
        (["hydra.sweeper.trials=0"], "hydra.sweeper.trials=0: must be a whole number of at least 1"),
        (["hydra.sweeper.sampler=magic"], "hydra.sweeper.sampler='magic': allowed are tpe, nsga2, random"),
    ],
)
def test_what_cannot_be_searched_is_refused(asked, words, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        asked(*words)


def test_a_wrong_value_and_a_space_without_choices_are_refused_before_anything_runs(tmp_path):
    for words, sentence in {
        ("calibration=minmax,nope",): "qexp: calibration=nope: no such option",
        (): "qexp: hydra/sweeper=optuna: no key has several values",
    }.items():
        command = [sys.executable, "-m", "qexp", "-m", "hydra/sweeper=optuna", "logger=none", *words]
        done = subprocess.run(
            [*command, f"paths.outputs={tmp_path}/out"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(sentence)
