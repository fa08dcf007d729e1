"""What reaches W&B, online and by an upload later, from this machine or from a copy: held against the run's folder."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import wandb
from wandb_service import serving

from qexp.finetune.execute import ExecuteFineTune
from qexp.jobs import compose_jobs
from qexp.run import run
from qexp.sections import ConfigError
from qexp.store import group_id, run_id
from qexp.tracking import METRICS, RunInfo, Wandb, summarise_sweep, sync
from qexp.tracking.histograms import BINS
from qexp.tracking.metrics import CURVES
from qexp.tracking.offline import HEADER, _framed, _messages

KEY = "fedcba9876543210" * 2 + "fedcba98"
FAST = [
    "model.width=4", "trainer.epochs=1", "engine=onnxruntime", "engine.seconds=0.02", "logger.artifacts=true",
    "logger.tags=[sweep-feed]",
]  # fmt: skip
TUNED = ["finetune=ste", "finetune.epochs=3"]


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A service whose key is configured, for a user in a home of their own."""
    for name in "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_SILENT", "WANDB_MODE":  # Wandb sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in "home", "cwd":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        wandb.teardown()  # what it knew of another service
        yield found
        wandb.teardown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Outputs with the float network that all these runs start from."""
    outputs = tmp_path_factory.mktemp("trained")
    run(settings(outputs, "logger=none"))
    return outputs


@pytest.fixture
def outputs(trained, tmp_path) -> Path:
    shutil.copytree(trained / "cache", tmp_path / "outputs" / "cache")
    return tmp_path / "outputs"


def settings(outputs: Path, *overrides: str):
    chosen = [text for text in FAST if "logger=none" not in overrides or not text.startswith("logger")]
    (job,) = compose_jobs([*chosen, f"paths.outputs={outputs}", *overrides], multirun=False)
    return job.settings


def killed(outputs: Path, *overrides: str) -> None:
    """Start the same fine-tuning and end it before its last epoch."""

    def stop(self, trainer, task):
        if trainer.current_epoch == 2:
            raise SystemExit(143)
        begin(self, trainer, task)

    begin, chosen = ExecuteFineTune.on_train_epoch_start, settings(outputs, *TUNED, *overrides)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ExecuteFineTune, "on_train_epoch_start", stop)
        run(chosen)


def nested(config):
    """A config without its empty sections, which W&B leaves out."""
    if not isinstance(config, dict):
        return config
    return {key: nested(value) for key, value in config.items() if value != {}}


def arrived(service, job, outputs: Path) -> None:
    """Hold all that has arrived of a run against its folder below `outputs`."""
    identity = run_id(job.settings.config)
    folder, there = outputs / "runs" / identity, service.runs[identity]
    assert there.exit_code == 0
    assert there.about["project"] == "qexp"
    assert there.about["jobType"] == job.settings.method
    assert there.about["tags"] == ["sweep-feed"]
    assert there.about["displayName"] == job.settings.label
    label, _, seed = job.settings.label.rpartition(" ")
    assert seed == "s0"
    assert there.about["groupName"] == f"{label} {group_id(job.settings.config)}"
    for key, value in nested(job.settings.config).items():
        assert there.config[key] == value

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() <= there.summary.keys()
    logged = [row for row in there.history if "status" in row]
    for found in there.summary, logged[-1]:
        told = {name: found[name] for name in metrics}
        assert {k: v if v is None or not isinstance(v, float) or math.isfinite(v) else None for k, v in told.items()} \
            == metrics  # fmt: skip

    with (folder / "layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    table = json.loads(service.artifact(f"run-{identity}-layers").files["layers.table.json"])
    assert [row[0] for row in table["data"]] == [row["site"] for row in layers]
    assert table["columns"] == list(layers[0])

    (drawn,) = [row for row in there.history if any(name.startswith("weights/") for name in row)]
    assert not drawn.keys() & {name for name in there.summary if not name.startswith("_")}
    for row in layers:
        if row["kind"] == "weight":
            name = row["layer"].replace(".", "/")
            before, after = (drawn[f"weights/{name}/{what}"] for what in ("float", "quantized"))
            assert sum(before["values"]) == sum(after["values"]) > 0
            assert len(before["values"]) == BINS
            assert before["bins"] == after["bins"]
        else:
            assert sum(drawn["activations/" + row["site"].replace(".", "/")]["values"]) > 0

    (weights,) = outputs.glob("cache/float/*/tensors.pt")
    source = service.artifact(f"float-{weights.parent.name}")
    assert source.committed
    assert identity in source.used_by
    assert identity not in source.logged_by
    assert source.files["tensors.pt"] == weights.read_bytes()
    model = service.artifact(f"model-{identity}")
    assert model.committed
    assert model.logged_by == {identity}
    assert model.files == {path.name: path.read_bytes() for path in folder.glob("*.onnx")}


def history(service, outputs: Path) -> None:
    """Hold the curves of the one fine-tuned run against finetune.csv."""
    (path,) = outputs.glob("runs/*/finetune.csv")
    there = service.runs[path.parent.name]
    with path.open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    curves = [row for row in there.history if "finetune/history/loss" in row]
    assert [{name: row[f"finetune/history/{name}"] for name in one if name != "epoch"} | {"epoch": row["epoch"]}
            for one, row in zip(rows, curves, strict=True)] == rows  # fmt: skip
    losses = [row["loss"] for row in rows]
    assert there.summary["finetune/history/loss"] == {"min": min(losses), "last": losses[-1]}
    assert set(there.summary["train/loss"]) == {"min", "last"}
    defined = there.metrics
    assert set(METRICS) | set(CURVES) <= set(defined)
    steps = [entry.get("1") for entry in there.config["_wandb"]["m"]]
    assert steps[defined["finetune/history/loss"]["5"] - 1] == "epoch"


def nothing_leaked(outputs: Path, tmp_path: Path, printed) -> None:
    for path in outputs.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in printed.out + printed.err
    assert not [*(tmp_path / "home").iterdir(), *(tmp_path / "cwd").iterdir()]


def test_online_a_run_arrives_whole_also_after_a_kill(service, outputs, tmp_path, capfd):
    killed(outputs)
    ((identity, before),) = service.runs.items()
    assert before.exit_code == 1
    job = run(settings(outputs, *TUNED))
    assert list(service.runs) == [identity]
    arrived(service, job, outputs)
    history(service, outputs)
    nothing_leaked(outputs, tmp_path, capfd.readouterr())


def test_an_offline_sweep_is_uploaded_whole_from_a_copy(service, outputs, tmp_path, capfd):
    killed(outputs, "logger.mode=offline")
    jobs = [run(settings(outputs, "logger.mode=offline", *more)) for more in (TUNED, ["calibration=mse"])]
    summarised(outputs, "offline")
    assert not service.runs
    moved = tmp_path / "elsewhere" / "results"
    shutil.copytree(outputs, moved, symlinks=True)
    shutil.rmtree(outputs)
    assert sync.main([str(moved)]) == 0
    assert len(service.runs) == 3
    for job in jobs:
        arrived(service, job, moved)
    history(service, moved)
    sweep(service)
    assert sync.main([str(moved)]) == 0
    assert len([row for row in service.runs["sweep-feed"].history if "runs" in row]) == 1
    nothing_leaked(moved, tmp_path, capfd.readouterr())


def summarised(outputs: Path, mode: str, **options) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], [3, 4])
    section = {"_target_": "qexp.tracking.Wandb", "mode": mode, "tags": ["sweep-feed"], **options}
    columns, rows = ["run", "acc/sim"], [["a", 0.5], ["b", None]]
    told, counts = {"experiment": "wu2020"}, {"finished": 1, "failed": 1}
    return summarise_sweep(section, outputs, "feed", "wu2020", columns, rows, figure, told, **counts)


def sweep(service) -> None:
    there = service.runs["sweep-feed"]
    assert (there.about["jobType"], there.about["displayName"]) == ("sweep", "wu2020")
    assert there.about["tags"] == ["sweep-feed"]
    assert there.config["experiment"] == "wu2020"
    assert (there.summary["sweep/runs_finished"], there.summary["sweep/runs_failed"]) == (1, 1)
    table = json.loads(service.artifact("run-sweep-feed-runs").files["runs.table.json"])
    assert (table["columns"], table["data"]) == (["run", "acc/sim"], [["a", 0.5], ["b", None]])
    assert there.files[there.summary["pareto"]["path"]].startswith(b"\x89PNG")


def test_the_summary_of_a_sweep_stays_one_run(service, tmp_path):
    for _ in range(2):
        assert summarised(tmp_path / "outputs", "online", alerts=True) == f"{service.url}/tester/qexp/runs/sweep-feed"
    sweep(service)
    assert list(service.runs) == ["sweep-feed"]
    alert = service.runs["sweep-feed"].alerts[-1]
    assert (alert["title"], alert["text"]) == ("wu2020: failed", "1 of 2 runs finished")
    for _ in range(2):
        summarised(tmp_path / "offline", "offline")
    assert len(list(tmp_path.glob("offline/wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("kind", ["Csv", "NoLogger"])
def test_other_loggers_keep_nothing_of_a_sweep(tmp_path, kind):
    section = {"_target_": f"qexp.tracking.{kind}", "group": None, "tags": ["sweep-feed"]}
    assert summarise_sweep(section, tmp_path / "outputs", "feed", "wu2020", [], [], finished=0) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [True, False])
def test_a_failure_is_told_where_that_is_asked_for(service, tmp_path, asked):
    info = RunInfo("0123456789ab", "resnet8 W4A8", "ptq", {}, tmp_path / "outputs")
    with pytest.raises(ValueError, match="lower"), Wandb(mode="online", alerts=asked).open(info):
        raise ValueError("training diverged;\n lower trainer.lr")
    (there,) = service.runs.values()
    assert there.exit_code == 1
    told = [(alert["title"], alert["text"], alert["severity"]) for alert in there.alerts]
    assert told == [("resnet8 W4A8: failed", "training diverged; lower trainer.lr", "ERROR")] * asked


def test_a_float_network_that_a_run_is_about_is_its_output(service, outputs):
    run(settings(outputs, "method=fp32", "engine=none"))
    (source,) = [artifact for artifact in service.artifacts.values() if artifact.name.startswith("float-")]
    assert source.logged_by == set(service.runs)
    assert not source.used_by


def test_what_cannot_be_uploaded_is_refused_in_one_sentence(service, tmp_path):
    with pytest.raises(ConfigError, match="is no folder of W&B's records"):
        sync.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="--force: no such option"):
        sync.main(["--force"])
    summarised(tmp_path, "offline")
    shutil.rmtree(tmp_path / "wandb" / "data")
    with pytest.raises(ConfigError, match="1 files of artifacts are missing, such as .*data/sweep-feed/"):
        sync.main([str(tmp_path)])
    assert not service.runs


@pytest.mark.parametrize("length", [0, 1, 32739, 32740, 32747, 32754, 32761, 32762, 70000])
def test_messages_survive_the_format_of_the_record(length):
    messages = [b"first", b"x" * length, b"y" * 40000, b"last"]
    content = bytes(HEADER) + _framed(messages)
    assert list(_messages(content)) == messages
    assert list(_messages(content[:-1])) == messages[:-1]


def test_the_format_is_that_of_wandb(service, tmp_path):
    summarised(tmp_path, "offline")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    assert content == content[:HEADER] + _framed(list(_messages(content)))
