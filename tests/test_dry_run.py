"""What --dry-run says before anything runs."""

import pytest

from qexp import cli
from qexp.store import record_failure

FAST = ["trainer.epochs=1", "engine=none", "logger=none"]


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """Gives a command with --dry-run; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def give(*words: str) -> str:
        assert cli._main(["--dry-run", *FAST, *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    return give


def test_a_run_that_was_never_made(dry, tmp_path):
    told = dry()
    assert "resnet8 W8A8 per_channel minmax s0 to run" in told
    assert told.endswith("1 of 1 runs to make, no finished run like these says how long")
    assert not list(tmp_path.glob("outputs/*"))


def test_a_run_that_failed_says_why_and_one_that_is_finished_how_to_make_it_again(dry, tmp_path):
    from qexp.jobs import compose_jobs
    from qexp.store import replace_text, run_folder

    failed, finished = compose_jobs(["seed=0,1", *FAST], multirun=True)
    record_failure(failed.outputs, failed.run_id, "a run", "the loss is [nan]")
    replace_text(run_folder(finished.outputs, finished.run_id) / "metrics.json", '{"time/total_s": 90.0}')
    told = dry("-m", "seed=0,1", "hydra/launcher=in_process")
    assert f"{failed.run_id} seed=0 failed before: the loss is [nan] 90.0 s" in told
    assert f"{finished.run_id} seed=1 finished 1 of 2 runs to make, about 0:01:30" in told
    assert dry("seed=1").endswith("0 of 1 runs to make, store=rerun makes them again")
    assert dry("seed=1", "store=rerun").endswith("1 of 1 runs to make, about 0:01:30")


def test_a_search_says_what_it_searches_for_and_how_long(dry, tmp_path):
    pytest.importorskip("optuna")
    words = ["-m", "hydra/sweeper=optuna", "quantizer.weight.bits=2,4,8", "trainer.lr=interval(0.001,0.1)"]
    told = dry(*words, "hydra.sweeper.at_once=3", "hydra.sweeper.sampler=random")
    assert "quantizer.weight.bits 2,4,8 trainer.lr interval(0.001,0.1)" in told
    assert "by random: acc/drop minimized, size/packed_bytes minimized" in told
    assert told.endswith("40 of 40 trials to make, 3 at once, no finished run like these says how long")
    assert not list(tmp_path.glob("outputs/sweeps"))


def test_a_search_through_nothing_is_refused_as_it_is_without_dry_run(dry):
    pytest.importorskip("optuna")
    with pytest.raises(cli.ConfigError, match="hydra/sweeper=optuna: no key has several values"):
        dry("-m", "hydra/sweeper=optuna")
