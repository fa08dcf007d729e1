"""The record of a run in W&B, offline: read back from the file on disk with W&B's own reader."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.tracking import METRICS, Csv, NoLogger, RunInfo, Wandb
from qexp.tracking.metrics import CURVES

KEY = "0123456789abcdef" * 3
ID = "0123456789ab"
CONFIG = {"seed": 3, "quantizer": {"weight": {"bits": 4}}, "machine": {"commit": "abc", "versions": {"torch": "2"}}}
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """A user without a W&B account, in a home and a folder of their own."""
    # Those that Wandb sets are named, so that they are gone afterwards.
    ours = ["WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_SILENT", "WANDB_MODE"]
    for name in {"NETRC", *ours, *(name for name in os.environ if name.startswith("WANDB_"))}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in "home", "cwd":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # as qexp.jobs does
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def info(tmp_path) -> RunInfo:
    return RunInfo("0123456789ab", "resnet8 W4A8", "ptq", CONFIG, tmp_path / "outputs")


@pytest.fixture
def float_network(info) -> Path:
    """The folder of a float network in the cache."""
    folder = info.outputs / "cache" / "float" / "feedbeef0123"
    folder.mkdir(parents=True)
    (folder / "tensors.pt").write_bytes(b"weights")
    (folder / "cache.json").write_text("{}")
    return folder


def records(outputs: Path, run_id: str = "0123456789ab") -> dict[str, list[dict]]:
    """Kind of record -> the records of the newest run of this id."""
    *_, folder = sorted((outputs / "wandb").glob(f"offline-run-*-{run_id}"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, list[dict]] = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def summary(found: dict[str, list[dict]]) -> dict:
    return {name: value for record in found["summary"] for name, value in record.get("update", {}).items()}


def test_the_whole_record_is_on_disk(info, float_network, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    onnx = tmp_path / "model_int8.onnx"
    onnx.write_bytes(b"graph")
    with Wandb(mode="offline", group="sweep-1", tags=["a"], artifacts=True).open(info) as logger:
        logger.metrics({"acc/fp32": 0.5, "sqnr/output_db": float("inf"), "status": "finished"})
        logger.table("layers", ["site", "sqnr_db"], [["stem.weight", float("inf")], ["head.weight", float("nan")]])
        logger.models([onnx], float_network)
    found = records(info.outputs)
    (run,) = found["run"]
    config = run["config"]["update"]
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert (run["run_id"], run["display_name"], run["run_group"]) == ("0123456789ab", "resnet8 W4A8", "sweep-1")
    assert (run["job_type"], run["project"], run["tags"]) == ("ptq", "qexp", ["a"])
    assert not run.get("host")
    assert summary(found)["acc/fp32"] == 0.5
    assert summary(found)["status"] == "finished"
    assert {record.get("name") or record["glob_name"] for record in found["metric"]} == {*METRICS, *CURVES}
    assert found["exit"][-1].get("exit_code", 0) == 0
    files = [entry["path"] for record in found["artifact"] for entry in record["manifest"]["contents"]]
    assert files == ["layers.table.json", "cache.json", "tensors.pt", "model_int8.onnx"]
    (table,) = info.outputs.rglob("layers*.table.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == ["stem.weight", "head.weight"]
    assert "stats" not in found
    assert "output_raw" not in found
    for path in info.outputs.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    for folder in "home", "cwd":
        assert not list((tmp_path / folder).iterdir())


def test_onnx_files_stay_out_of_the_record_unless_asked_for(info, float_network, tmp_path):
    (tmp_path / "model_int8.onnx").write_bytes(b"graph")
    with Wandb().open(info) as logger:
        logger.models([tmp_path / "model_int8.onnx"], float_network)
    assert "artifact" not in records(info.outputs)


def test_one_record_on_disk_is_left_of_all_attempts_at_a_run(info):
    folder = info.outputs / "wandb"
    old, uploaded, other = (f"offline-run-20200101_00000{i}-{name}" for i, name in enumerate([ID, ID, f"sweep-{ID}"]))
    for name in old, uploaded, other:
        (folder / name).mkdir(parents=True)
    (folder / uploaded / f"run-{ID}.wandb.synced").touch()
    staged = folder / "data" / ID / "model" / "model_int8.onnx"
    staged.parent.mkdir(parents=True)
    staged.touch()
    for _ in range(2):
        with Wandb().open(info):
            pass
    assert not staged.exists()
    names = {path.name for path in folder.glob("offline-run-*")}
    assert {uploaded, other} < names
    assert old not in names
    assert len(names) == 3


def test_the_group_is_the_settings_without_their_seed_unless_named(info, monkeypatch):
    with Wandb().open(replace(info, group="resnet8 W4A8 ba98")):
        pass
    assert records(info.outputs)["run"][0]["run_group"] == "resnet8 W4A8 ba98"
    with Wandb(group="mine").open(replace(info, group="resnet8 W4A8 ba98")):
        pass
    assert records(info.outputs)["run"][0]["run_group"] == "mine"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_is_finished_as_failed_and_leaks_into_no_other(info, error):
    with pytest.raises(error), Wandb().open(info):
        raise error
    other = RunInfo("ba9876543210", "other", "ptq", {"seed": 4}, info.outputs)
    with Wandb().open(other) as logger:
        logger.metrics({"acc/fp32": 1.0})
    assert records(info.outputs)["exit"][-1]["exit_code"] == 1
    found = records(info.outputs, "ba9876543210")
    assert found["exit"][-1].get("exit_code", 0) == 0
    assert found["run"][0]["config"]["update"]["seed"] == 4
    assert summary(found)["acc/fp32"] == 1.0


def test_a_killed_run_leaves_its_record(info, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from qexp.tracking import RunInfo, Wandb\n"
        "info = RunInfo('0123456789ab', 'name', 'ptq', {'seed': 3}, Path(sys.argv[1]))\n"
        "with Wandb().open(info) as logger:\n"
        "    logger.metrics({'acc/fp32': 0.25}); time.sleep(1.5); print('now', flush=True); time.sleep(60)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(info.outputs)], env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = records(info.outputs)
    assert found["run"][0]["config"]["update"]["seed"] == 3
    assert "acc/fp32" in json.dumps(found["history"])


def test_online_needs_a_key(info, monkeypatch):
    with (
        pytest.raises(ValueError, match="logger.mode=online: no W&B key is configured"),
        Wandb(mode="online").open(info),
    ):
        pass
    assert not list(info.outputs.rglob("*.wandb"))


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_key_is_found_where_wandb_login_leaves_it(tmp_path, machine):
    import wandb

    logger = Wandb()
    assert not logger._online(wandb)
    (tmp_path / "home" / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    assert logger._online(wandb)
    assert not Wandb(mode="offline")._online(wandb)


def test_auto_stays_offline_where_wandb_does_not_answer(info, monkeypatch, capsys):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    real, modes = wandb.init, []

    def unreachable(**options):
        modes.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route\nto host")
        return real(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    cannot = pytest.raises(ValueError, match=r"logger.mode=online: W&B cannot be reached \(no route to host\)")
    with cannot, Wandb(mode="online").open(info):
        pass
    with Wandb(mode="auto").open(info):
        pass
    assert modes == ["online", "online", "offline"]
    assert "the record stays offline (no route to host)" in capsys.readouterr().err
    assert records(info.outputs)["run"]


@pytest.mark.parametrize(
    "wrong", [{"mode": "x"}, {"project": ""}, {"project": 3}, {"group": 3}, {"tags": "a"}, {"tags": [1]}]
)
def test_wrong_options_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError) as refusal:
        Wandb(**wrong)
    assert str(refusal.value).startswith(f"{name}={value!r}: ")


def test_csv_holds_the_numbers(info):
    for value in 0.25, 0.5:  # a repeated run replaces its file
        with Csv().open(info) as logger:
            logger.metrics({"acc/fp32": value, "sqnr/output_db": float("inf"), "status": "finished"})
            logger.table("layers", [], [])
            logger.curve("finetune/history", [{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}])
            logger.models([Path("model_int8.onnx")], Path())
    with (info.outputs / "csv" / info.run_id / "metrics.csv").open() as file:
        row, *curve = csv.DictReader(file)
    assert float(row["acc/fp32"]) == 0.5
    assert [float(point["finetune/history/loss"]) for point in curve] == [2.0, 1.0]
    assert logger.where.endswith("metrics.csv")


def test_no_logger_leaves_nothing(info):
    with NoLogger().open(info) as logger:
        logger.metrics({"acc/fp32": 0.5})
    assert not info.outputs.exists()
