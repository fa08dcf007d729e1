"""Sweeps on a Ray of this machine, where Ray is installed."""

import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from qexp.jobs import compose_call
from qexp.launch.launcher import launcher_of
from qexp.sections import ConfigError

ROOT = Path(__file__).parents[2]
SWEEP = ["-m", "hydra/launcher=ray", "trainer.epochs=1", "engine=none", "logger=none", "model=mine"]
ray = pytest.mark.skipif(not find_spec("ray"), reason="needs Ray and hydra-ray-launcher: pip install 'qexp[ray]'")

# A network of the user's that does as it is told in a worker.
NET = """
import os, sys
from pathlib import Path
from torch import nn

def net(num_classes, what="well"):
    ill = "ray" in sys.modules and "RAY_RAYLET_PID" in os.environ and not Path("mended").exists()
    if ill and what == "raises":
        raise ZeroDivisionError("by intent")
    if ill and what == "dies":
        os.kill(os.getpid(), 9)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "my_net.py").write_text(NET)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text("_target_: my_net.net\nwhat: well\n")
    return tmp_path


@pytest.fixture
def environment(folder) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "RAY_", "PYTEST"))}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster(monkeypatch, environment) -> str:
    """The address of a Ray with room for two jobs."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # names of sockets go below
        head = {"num_cpus": 2, "include_dashboard": False, "temp_dir": short}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster.address
        cluster.shutdown()


def start(environment, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "qexp", "--config-dir=mine", *words], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def give(environment, *words: str) -> tuple[int, str, str]:
    """Give a command; its exit code, stdout and stderr."""
    process = start(environment, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@ray
def test_what_is_lost_stops_nothing_else_and_is_all_that_the_same_command_does(environment, folder):
    words = [*SWEEP, "model.what=raises,dies,well"]
    code, out, err = give(environment, *words)
    assert (code, "3 jobs are with Ray at" in err, out.count("failed")) == (1, True, 2), err
    assert "(ZeroDivisionError: by intent) (its log: outputs/logs/" in err
    assert "Ray: WorkerCrashedError: The worker died unexpectedly while executing this task" in err
    assert err.strip().endswith("2 of 3 runs failed; the same command tries them again")
    assert len(list(folder.glob("outputs/failed/*.json"))) == 2
    (done,) = folder.glob("outputs/runs/*/metrics.json")
    assert "evaluating the simulation" in (folder / "outputs" / "logs" / f"{done.parent.name}.txt").read_text()
    assert {path.name for path in folder.iterdir()} <= {"home", "mine", "my_net.py", "outputs"}

    (folder / "mended").touch()
    before = done.stat().st_mtime
    code, _, err = give(environment, *words)
    assert (code, "2 jobs are with Ray" in err, "1 of 3 runs were finished before" in err) == (0, True, True), err
    assert (len(list(folder.glob("outputs/runs/*/metrics.json"))), done.stat().st_mtime) == (3, before)


@ray
def test_a_sweep_joins_a_cluster_that_is_there_and_leaves_it(cluster, environment, folder):
    address = f"hydra.launcher.ray.init.address={cluster}"
    code, out, err = give(environment, *SWEEP, address, "seed=0,1")
    assert (code, f"{cluster}; Ctrl-C cancels them" in err, "2 runs" in out) == (0, True, True), err
    for number, code in (signal.SIGINT, 130), (signal.SIGKILL, -9):
        process = start(environment, *SWEEP, address, "seed=2,3,4", "trainer.epochs=500")
        while "jobs are with Ray" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in err) == (code, False)
    code, out, err = give(environment, *SWEEP, address, "seed=5,6")  # they find room: the jobs of the others have ended
    assert code == 0, err


@ray
@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("hydra.launcher.ray.init.address=127.0.0.1:1", "127.0.0.1:1: no Ray answers there (Connection refused)"),
        ("hydra.launcher.ray.init.address=auto", "Could not find any running Ray instance"),
        ("+hydra.launcher.ray.remote.num_cups=1", "num_cups"),
    ],
)
def test_what_ray_refuses_is_one_sentence(environment, folder, key, told):
    code, out, err = give(environment, *SWEEP, key, "seed=0,1")
    assert (code, out, err.startswith("qexp: hydra.launcher.ray"), told in err) == (2, "", True, True), err


@pytest.mark.skipif(bool(find_spec("ray")), reason="Ray is installed")
def test_a_missing_plugin_is_one_sentence():
    with pytest.raises(ConfigError) as error:
        launcher_of(compose_call(["hydra/launcher=ray"], multirun=True))
    assert str(error.value) == "hydra/launcher=ray: needs hydra-ray-launcher; install it with: pip install 'qexp[ray]'"
