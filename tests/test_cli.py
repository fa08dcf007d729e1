"""The command line, as it is typed: in this process where that is enough, in one of its own where it must be."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qexp import cli
from qexp.tasks.fp32 import Float32Task

ROOT = Path(__file__).parents[1]
HERE = "hydra/launcher=in_process"
FAST = ["trainer.epochs=1", "engine.seconds=0.05", "engine=none", "logger=none"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def qexp(capsys):
    """Gives a command; returns its exit code, stdout and stderr."""

    def give(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        return end.value.code, *capsys.readouterr()

    return give


def own_process(*words: str, **options) -> subprocess.Popen:
    environment = {"PYTHONPATH": str(ROOT), **{k: v for k, v in os.environ.items() if not k.startswith("WANDB")}}
    return subprocess.Popen(
        [sys.executable, "-m", "qexp", *words], env=environment | options.pop("env", {}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=foo"], "qexp: model=foo: no such option; allowed are bert_tiny_random, custom"),
        (["--cfg", "job", "model=foo"], "qexp: model=foo: no such option"),
        (["--cfg", "job", "foo=1"], "qexp: foo: no such key"),
        (["--cfg", "foo"], "qexp: argument --cfg/-c: invalid choice: 'foo'"),
        (["--foo"], "qexp: unrecognized arguments: --foo"),
        (["--config-dir", "/nowhere"], "qexp: --config-dir=/nowhere: no such folder"),
        (["--config-name", "foo"], "qexp: --config-name: is not for qexp"),
        (["seed=0,1"], "qexp: seed=0,1: several values are a sweep, which needs -m"),
        (["seed=0", "model.width=8,0", "-m", *FAST], "qexp: model.width=0: must be a whole number of at least 1"),
        (["-m", "data=custom", "data._target_=nope.A,nope.B", *FAST], "qexp: data._target_=nope.A: cannot be imported"),
    ],
)
def test_what_is_refused_is_one_sentence_on_stderr_and_code_2(qexp, folder, words, sentence):
    code, out, err = qexp(*words)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert not list(folder.iterdir()) or not list(folder.glob("outputs/*"))


@pytest.mark.parametrize("words", [["paths.outputs=file/below"], ["-m", "seed=0,1", "paths.outputs=/proc/qexp"]])
def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(qexp, folder, words):
    (folder / "file").touch()
    code, out, err = qexp(*FAST, *words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "qexp: paths.outputs: cannot write to" in err


def test_help_version_and_the_composed_config(qexp, folder):
    code, out, _ = qexp("--help")
    assert code == 0
    options = "minmax, aciq, aciq_normal, cross_entropy", "after_qat, dynamic_or_trained, estimators"
    for told in "usage: qexp", *options, "seed=0":
        assert told in out
    assert qexp("--version")[:2] == (0, "qexp 0.1.0\n")
    code, out, _ = qexp("--cfg", "job", "seed=7", "model=custom")
    assert (code, "seed: 7" in out, "_target_: ???" in out) == (0, True, True)
    assert not list(folder.iterdir())


def test_the_reader_of_a_pipe_may_leave():
    process = own_process("--help")
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")


def test_a_users_network_from_the_current_folder_by_a_config_of_their_own(qexp, folder):
    (folder / "my_net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(4 * 36, num_classes))\n"
    )
    (folder / "mine" / "model").mkdir(parents=True)
    (folder / "mine" / "model" / "small.yaml").write_text("_target_: my_net.net\n")
    code, out, err = qexp("--config-dir", "mine", "model=small", *FAST)
    assert code == 0, err
    assert "net W8A8 per_channel minmax s0" in out
    code, out, err = qexp("-m", "--config-dir=mine", "model=small", "seed=0,1", *FAST, HERE)
    assert code == 0, err
    assert "2 runs" in out


def test_a_sweep_goes_on_after_a_failure_and_says_so(qexp, folder):
    words = ["seed=0,0,1", "trainer.lr=0.03,1e30", *FAST, HERE, "-m"]
    code, out, err = qexp(*words)
    assert code == 1
    assert "6 runs" in out
    assert "formats of weights and activations: int8 restricted, uint8 affine\n" in out
    assert err.count("training diverged: the loss is nan") == 4  # the doubled seed ran once; each is told again below
    assert err.strip().endswith("qexp: 2 of 4 runs failed; the same command tries them again")
    assert len(list(folder.glob("outputs/runs/*/metrics.json"))) == 2
    assert "Traceback" not in err


def test_what_is_finished_is_found_and_made_again_where_that_is_asked(qexp, folder, monkeypatch):
    assert qexp(*FAST, HERE, "-m", "seed=0,1")[0] == 0

    def fail(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("qexp.run._quantize", fail)
    code, out, err = qexp(*FAST, HERE, "-m", "seed=0,1")
    assert (code, "2 runs" in out, "2 of 2 runs were finished before" in err) == (0, True, True)
    code, out, err = qexp(*FAST, "seed=1")
    assert (code, "finished before; store=rerun makes it again" in err) == (0, True)
    assert "resnet8 W8A8 per_channel minmax s1" in out
    code, out, err = qexp(*FAST, HERE, "-m", "seed=0,1", "store=rerun")
    assert code == 1
    assert "ZeroDivisionError: a defect (its log: outputs/logs/" in err
    assert "qexp: 2 of 2 runs failed" in err
    assert out.count("failed") == 2  # results from before do not hide it
    for log in folder.glob("outputs/logs/*.txt"):
        assert "raise ZeroDivisionError" in log.read_text()


@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_missing_key_is_refused_before_anything_runs(qexp, folder, monkeypatch, words):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    code, out, err = qexp(*[word for word in FAST if word != "logger=none"], *words, "logger=wandb_online")
    assert (code, out) == (2, "")
    assert err == "qexp: logger.mode=online: no W&B key is configured; run `wandb login` or set WANDB_API_KEY\n"
    assert not list(folder.rglob("wandb"))


def test_the_runs_of_a_sweep_carry_its_tag(qexp, folder, monkeypatch):
    opened = []

    class Spy:
        lightning, where = False, ""

        def open(self, info):
            opened.append((info.run_id, info.config["logger"]["tags"]))
            raise RuntimeError("enough")

    from qexp import settings

    build = settings.build
    monkeypatch.setattr("qexp.run.build", lambda section, key: Spy() if key == "logger" else build(section, key))
    wandb = [word for word in FAST if word != "logger=none"]
    qexp("-m", *wandb, HERE, "seed=0,1", "quantizer=int8,int4", "calibration=minmax,mse", "logger.tags=[mine]")
    assert len({identity for identity, _ in opened}) == 8
    ((mine, tag),) = {tuple(tags) for _, tags in opened}
    (sweep,) = folder.glob("outputs/sweeps/*/sweep.json")
    assert (mine, tag) == ("mine", f"sweep-{sweep.parent.name}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["data and network", "calibration pass", "evaluating the simulation", "latency"])
def test_a_signal_in_any_stage_unwinds_the_run(qexp, folder, monkeypatch, number, moment):
    from qexp.report import terminal

    stage = terminal.stage

    def interrupted(what, **options):
        if what.startswith(moment):
            os.kill(os.getpid(), number)
        return stage(what, **options)

    monkeypatch.setattr(terminal, "stage", interrupted)
    engine = ["engine=onnxruntime", "method=fp32"] if moment == "latency" else []
    code, out, err = qexp(*FAST, *engine)
    assert (code, out) == (128 + number, "")
    assert err.splitlines()[-1] == f"qexp: stopped by {number.name}"
    assert "Traceback" not in err
    assert not list(folder.glob("outputs/runs/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_leaves_no_network(qexp, folder, monkeypatch, number):
    step = Float32Task.training_step

    def interrupted(self, batch, index):
        if index == 3:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    monkeypatch.setattr(Float32Task, "training_step", interrupted)
    code, _, err = qexp(*FAST)
    assert code == 128 + number
    assert err.splitlines()[-1] == f"qexp: stopped by {number.name}"
    assert not list(folder.rglob("tensors.pt"))


def test_a_signal_that_python_drops_in_a_destructor_is_raised_again(qexp, monkeypatch):
    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))

    def drop(*_):
        Slow()
        for _ in range(10**9):  # goes on, unless it is stopped
            pass

    monkeypatch.setattr("qexp.run._float_network", drop)
    code, _, err = qexp(*FAST)
    assert code == 130
    assert err.splitlines()[-1] == "qexp: stopped by SIGINT"


def test_a_signal_is_told_while_stderr_is_redirected(qexp, monkeypatch):
    def trace(*_):
        with contextlib.redirect_stderr(io.StringIO()):
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))

    monkeypatch.setattr("qexp.run._float_network", trace)
    code, _, err = qexp(*FAST)
    assert code == 130
    assert err.splitlines()[-1] == "qexp: stopped by SIGINT"


def test_everything_a_run_leaves_is_below_its_outputs(folder):
    """No account, no terminal, no input, and a home to look into; then the same run, killed and repeated."""
    home, cwd, key = folder / "home", folder / "cwd", "0123456789abcdef" * 3
    for path in home, cwd:
        path.mkdir()
    words = ["trainer.epochs=1", "engine.seconds=0.05", "logger.mode=offline", "paths.outputs=../out"]
    options = {"cwd": cwd, "env": {"HOME": str(home), "WANDB_API_KEY": key}, "stdin": subprocess.DEVNULL}
    process = own_process(*words, **options)
    while "evaluating" not in (line := process.stderr.readline()):
        assert line
    process.kill()
    process.communicate()
    assert not list((folder / "out").glob("runs/*/metrics.json"))
    process = own_process(*words, **options)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "float network from the cache" in err
    assert "results in ../out/runs/" in out
    (metrics,) = (folder / "out").glob("runs/*/metrics.json")
    assert json.loads(metrics.read_text())["status"] == "finished"
    assert not list(cwd.iterdir())
    assert not list(home.iterdir())
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes()
