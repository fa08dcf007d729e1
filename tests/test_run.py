"""Whole runs, in this process: what they leave, that they repeat to the bit, and how they end on bad data."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image

from qexp import prepare
from qexp.jobs import compose_jobs
from qexp.run import Run, _winner, run
from qexp.sections import ConfigError
from qexp.store import StoreError, run_id
from qexp.tracking import METRICS

FAST = ["trainer.epochs=1", "engine.seconds=0.05", "logger=none"]
ENGINES = ("onnxruntime", "openvino")
PROMISED = [
    "acc/fp32", "acc/sim", "acc/engine", "acc/drop", "agree/argmax", "sqnr/output_db", "parity/identical",
    "parity/off_by_one", "parity/max_step", "parity/argmax_flips", "int8/mac_coverage", "int8/islands",
    "latency/fp32_ms", "latency/int8_ms", "latency/speedup", "latency/speedup_lo", "latency/speedup_hi",
    "size/fp32_bytes", "size/int8_bytes", "time/calibrate_s", "time/total_s", "engine/winner", "status",
]  # fmt: skip
OF_THE_WHOLE_RUN = {"acc/fp32", "time/calibrate_s", "time/total_s", "engine/winner", "status"}
MEASURED = ("time/", "latency/", "engine/winner")


def start(outputs: Path, *overrides: str) -> Run:
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
    return run(job.settings)


def written(outputs: Path) -> dict:
    (path,) = outputs.glob("runs/*/metrics.json")
    return json.loads(path.read_text())


def table(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def usual(outputs) -> Run:
    return start(outputs)


def test_metrics_json_holds_what_is_promised_under_known_names_alone(usual, outputs):
    metrics = written(outputs)
    per_engine = {f"{engine}/{name}" for engine in ENGINES for name in set(PROMISED) - OF_THE_WHOLE_RUN}
    assert {*PROMISED, *per_engine} <= metrics.keys()
    bare = {name.partition("/")[2] if name.startswith(ENGINES) else name for name in metrics}
    assert bare <= METRICS.keys()
    assert metrics["status"] == "finished"
    winner = metrics["engine/winner"]
    for name in set(PROMISED) - OF_THE_WHOLE_RUN:
        assert metrics[name] == metrics[f"{winner}/{name}"]
    assert metrics["acc/drop"] == pytest.approx(metrics["acc/fp32"] - metrics["acc/engine"])
    assert metrics["latency/speedup_lo"] <= metrics["latency/speedup"] <= metrics["latency/speedup_hi"]
    assert metrics["size/int8_bytes"] == (usual.folder / "model_int8.onnx").stat().st_size
    assert metrics["size/fp32_bytes"] == (usual.folder / "model_fp32.onnx").stat().st_size


def test_the_folder_of_a_run_is_whole(usual, outputs):
    loser = next(engine for engine in ENGINES if engine != usual.metrics["engine/winner"])
    assert {path.name for path in usual.folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.json", "layers.csv", "unquantized.csv",
        "model_fp32.onnx", "model_int8.onnx", f"model_int8_{loser}.onnx",
    }  # fmt: skip
    config = yaml.safe_load((usual.folder / "config.yaml").read_text())
    assert config == usual.settings.config
    assert usual.folder == outputs / "runs" / run_id(config)


def test_layers_csv_has_a_row_for_each_site(usual):
    rows = table(usual.folder / "layers.csv")
    assert list(rows[0]) == [
        "site", "kind", "layer", "bits", "format", "convention", "granularity", "calibration",
        "sqnr_db", "mse", "clipped_share", "macs", "engine_int8", "rounding", "scale", "scales", "bytes",
    ]  # fmt: skip
    assert len({row["site"] for row in rows}) == len(rows)
    stem = {row["site"]: row for row in rows}["stem.conv.weight"]
    assert [stem[name] for name in ("kind", "layer", "bits", "format", "granularity", "engine_int8")] == [
        "weight", "stem.conv", "8", "int8", "per_channel", "True",
    ]  # fmt: skip
    assert int(stem["macs"]) == 8 * 8 * 16 * 9
    assert (stem["rounding"], stem["scale"], stem["scales"]) == ("half_even", "float32", "16")
    assert int(stem["bytes"]) == 16 * 9 + 16 * 4  # a code of one byte each, and a float32 for each channel
    assert all(math.isfinite(float(row["sqnr_db"])) for row in rows)


def test_the_float_graph_is_that_of_the_trained_network(usual):
    images = next(iter(usual.data.test_dataloader()))[0]
    session = onnxruntime.InferenceSession(usual.folder / "model_fp32.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(logits, usual.reference[: len(images)].numpy(), rtol=1e-4, atol=1e-4)


def test_the_same_config_gives_the_same_result_to_the_bit(usual, tmp_path):
    again = start(tmp_path)
    assert again.folder.name == usual.folder.name

    def certain(metrics: dict) -> dict:
        # The plain names are those of the faster engine, which is measured.
        named = {name: metrics[name] for name in metrics if name.startswith(ENGINES) or name == "acc/fp32"}
        # "time/" is in the name of ONNX Runtime, too.
        told = {name: name.removeprefix("onnxruntime/") for name in named}
        return {name: value for name, value in named.items() if not any(word in told[name] for word in MEASURED)}

    assert certain(again.metrics) == certain(usual.metrics)
    assert len(certain(again.metrics)) > 15
    for name in "fp32", *ENGINES:
        assert again.graphs[name].SerializeToString() == usual.graphs[name].SerializeToString()
    assert (again.folder / "model_fp32.onnx").read_bytes() == (usual.folder / "model_fp32.onnx").read_bytes()
    if again.metrics["engine/winner"] == usual.metrics["engine/winner"]:
        assert table(again.folder / "layers.csv") == table(usual.folder / "layers.csv")


@pytest.fixture
def trainings(monkeypatch) -> list[bool]:
    """One entry for each training from now on."""
    real, found = prepare.TensorCache.save, []

    def save(cache, state):
        found.extend([True] * (cache.remedy == "train again"))
        real(cache, state)

    monkeypatch.setattr(prepare.TensorCache, "save", save)
    return found


def test_only_what_changes_the_float_network_trains_it_again(outputs, trainings):
    small = ["engine=none", "model.width=4", "data.calibration_size=32"]
    accuracy = start(outputs, *small).metrics["acc/fp32"]
    for same in "calibration=percentile", "quantizer=int4", "data.calibration_size=16", "engine.threads=2":
        assert start(outputs, *small, same).metrics["acc/fp32"] == accuracy
        assert len(trainings) == 1, same
    for number, other in enumerate(["seed=1", "model.width=5", "trainer.lr=0.01", "data.train_share=0.4"], 2):
        start(outputs, *small, other)
        assert len(trainings) == number, other


def test_a_run_without_an_engine_and_one_of_the_float_network(usual, outputs):
    simulated = start(outputs, "engine=none").metrics
    assert simulated["acc/drop"] == simulated["acc/fp32"] - simulated["acc/sim"]
    assert not {"acc/engine", "engine/winner", "latency/int8_ms"} & simulated.keys()
    float_only = start(outputs, "method=fp32", "engine=onnxruntime").metrics
    assert float_only["acc/fp32"] == usual.metrics["acc/fp32"]
    assert float_only["latency/fp32_ms"] > 0
    assert not {"acc/sim", "acc/engine", "latency/int8_ms"} & float_only.keys()


MINE = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, num_classes, in_channels, dead=False, kind=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)
        if dead:
            self.conv.requires_grad_(False)
            self.conv.weight[1] = 0
            self.conv.bias[1] = 0
        self.odd = getattr(nn, kind)(4, 4, 1) if kind else nn.Identity()
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.relu(self.odd(self.conv(x))).mean((2, 3)))


class Idle(Net):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.pooler = nn.Sequential(nn.Linear(4, 4), nn.Tanh())


class Odd(Net):
    def __init__(self, num_classes, in_channels, way):
        super().__init__(num_classes, in_channels)
        self.way = way

    def forward(self, x):
        if self.way == "raises":
            raise RuntimeError("no\\nidea")
        y = super().forward(x)
        if self.way == "branches" and y.sum() > 0:
            y = -y
        return {"tuple": (y, y), "short": y[:, :2]}.get(self.way, y)


class Data(pl.LightningDataModule):
    num_classes, input_shape = 3, (1, 6, 6)

    def __init__(
        self, constant=None, train=0.0, calibration=0.0, test=0.0, empty=False, untested=False, labels=3, first=0
    ):
        super().__init__()
        self.constant, self.spoils, self.empty, self.untested = constant, (train, calibration, test), empty, untested
        self.labels, self.first = labels, first

    def loader(self, spoil, size=32):
        torch.manual_seed(0)
        images = torch.randn(size, 1, 6, 6) if self.constant is None else torch.full((size, 1, 6, 6), self.constant)
        images[size // 2 :, 0, 0, 0] += spoil
        return DataLoader(TensorDataset(images, torch.arange(size) % self.labels + self.first), batch_size=16)

    def train_dataloader(self):
        return self.loader(self.spoils[0])

    def calibration_dataloader(self):
        return self.loader(self.spoils[1], 0 if self.empty else 32)

    def test_dataloader(self):
        return self.loader(self.spoils[2], 0 if self.untested else 32)


class Untrained(pl.LightningDataModule):
    num_classes = 3


class Spoiled(Net):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.head.weight.data[0, 0] = float("nan")


class Wrong(nn.Module):
    def __init__(self):
        raise RuntimeError("no weights\\nfound")


class NoClasses(Data):
    num_classes = None


number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Runs a network and data of the user's own."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    net = ["model=custom", "model._target_=mine.Net"]
    data = ["data=custom", "data._target_=mine.Data"]

    def start_mine(*overrides: str) -> Run:
        own = net if any(text.startswith("data=") for text in overrides) else net + data
        return start(tmp_path, "engine=none", *own, *overrides)

    return start_mine


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("odd", ["+model.dead=true", "+data.constant=0.5", "+data.constant=0.0", "+data.constant=-2.0"])
def test_dead_channels_and_constant_inputs_work(mine, odd, granularity):
    job = mine(odd, f"granularity={granularity}")
    assert job.metrics["status"] == "finished"
    assert job.metrics["acc/sim"] == job.metrics["acc/fp32"]
    assert all(math.isfinite(row["mse"]) for row in job.rows)


def test_a_dead_channel_runs_in_the_engine(mine):
    metrics = mine("+model.dead=true", "engine=onnxruntime").metrics
    assert metrics["acc/engine"] == metrics["acc/sim"]
    assert metrics["parity/max_step"] <= 1


@pytest.mark.parametrize("method", [[], ["method=dynamic"]], ids=["ptq", "dynamic"])
def test_a_layer_that_is_never_called_stays_in_float_and_is_listed(mine, method):
    job = mine("model._target_=mine.Idle", "quantizer.exclude=[conv]", "engine=onnxruntime", *method)
    assert job.metrics["int8/mac_coverage"] == pytest.approx(12 / (12 + 36 * 16))
    with (job.folder / "unquantized.csv").open() as file:
        rows = {row["layer"]: row["reason"] for row in csv.DictReader(file)}
    assert rows["pooler.0"] == "is never called" and "pooler.1" not in rows


REFUSED = {
    "+data.train=nan": (ValueError, "training diverged: the loss is nan in epoch 0, step 1"),
    "+data.train=inf": (ValueError, "training diverged: the loss is"),
    "+data.test=nan": (ValueError, "test batch 1: the network returns NaN or infinite logits"),
    "+data.calibration=nan": (ValueError, r"conv\.input.* NaN"),
    "+data.calibration=inf": (ValueError, r"conv\.input.* infinit"),
    "+data.empty=true": (ConfigError, "data: the calibration set of Data is empty"),
    "+data.untested=true": (ConfigError, "data: the test set of Data is empty"),
    "+data.labels=4": (ValueError, "data: a label is 3, but with num_classes=3 labels are 0 to 2"),
    "+data.first=-1": (ValueError, "data: a label is -1, but with num_classes=3 labels are 0 to 2"),
    "data._target_=mine.Untrained": (ConfigError, "data: Untrained must define train_dataloader"),
    "model._target_=mine.Spoiled": (ValueError, "head.weight: the float network holds NaN or infinite values"),
    "+model.kind=ConvTranspose2d": (ConfigError, "quantizer: layer 'odd' is a ConvTranspose2d, which has weights"),
    "quantizer.exclude=[nope]": (ConfigError, "quantizer.exclude='nope': matches no layer of Net"),
    "+model.depth=3": (ConfigError, "model.depth=3: mine.Net has no such option"),
    "model._target_=mine.Missing": (ConfigError, "model._target_=mine.Missing: cannot be imported"),
    "model._target_=broken.Net": (ConfigError, "model._target_=broken.Net: cannot be imported .*division by zero"),
    "model._target_=mine.Wrong": (ConfigError, r"model._target_=mine.Wrong: cannot be made \(RuntimeError: no weights"),
    "model._target_=mine.Data": (ConfigError, "model._target_=mine.Data: must return an nn.Module, not Data"),
    "model._target_=mine.Odd +model.way=tuple": (ConfigError, "model: Odd returns a tuple, but must return logits"),
    "model._target_=mine.Odd +model.way=short": (ConfigError, r"model: Odd returns a tensor of shape \(2, 2\), but"),
    "model._target_=mine.Odd +model.way=raises": (
        ConfigError,
        r"Odd .* on batches of Data, float32 .* \(no idea\)",
    ),
    "model._target_=mine.Odd +model.way=branches": (ConfigError, "model: Odd cannot be exported: "),
    "model._target_=mine.number": (ConfigError, "model._target_=mine.number: must be a class or function"),
    "data._target_=mine.Net": (ConfigError, "data._target_=mine.Net: "),
    "data._target_=mine.NoClasses": (ConfigError, "data: NoClasses must have an attribute num_classes"),
    "data=digits data.batch_size=1": (ConfigError, "data.batch_size=1: must be a whole number of at least 2"),
    "data=digits data.calibration_size=0": (ConfigError, "data.calibration_size=0: must be"),
    "data=image_folder data.root=/nowhere": (ConfigError, "data.root=/nowhere: no such folder"),
    "data=image_folder data.root=/": (ConfigError, "^data.root=/: train must hold one folder"),
    "logger=wandb_online": (ValueError, "logger.mode=online: no W&B key is configured"),
    "engine=openvino engine.engines.openvino._target_=mine.No": (
        ConfigError,
        "engine.engines.openvino._target_=mine.No",
    ),
    "engine=openvino engine.engines.openvino.precision=f8": (
        ConfigError,
        "engine.engines.openvino.precision='f8': allowed are f32, bf16, f16",
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_work_is_one_sentence_and_no_result(mine, tmp_path, monkeypatch, asked):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    kind, sentence = REFUSED[asked]
    with pytest.raises(kind, match=sentence) as refusal:
        mine(*asked.split(" "))
    assert "\n" not in str(refusal.value).strip()
    assert not list(tmp_path.glob("runs/*"))
    if kind is ConfigError:
        assert not list(tmp_path.glob("cache/float/*"))


def test_a_damaged_float_network_is_refused(mine, tmp_path):
    mine()
    (weights,) = tmp_path.glob("cache/float/*/tensors.pt")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is damaged .its checksum differs."):
        mine("calibration=mse")
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 1


def test_an_edited_source_trains_again(mine, tmp_path, trainings, monkeypatch):
    mine()
    assert len(trainings) == 1
    (tmp_path / "mine.py").write_text(MINE + "# edited\n")
    mine()
    assert len(trainings) == 2


def test_a_changed_file_of_training_images_trains_again(tmp_path, trainings):
    for index in range(8):
        for split in "train", "val":
            folder = tmp_path / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (30 * index, 200, 60)).save(folder / f"{index}.png")
    data = ["data=image_folder", f"data.root={tmp_path}", "data.image_size=8", "data.num_workers=0"]
    options = [*data, "data.batch_size=4", "data.calibration_size=4", "engine=none"]
    start(tmp_path / "out", *options)
    start(tmp_path / "out", *options, "calibration=mse")
    assert len(trainings) == 1
    Image.new("RGB", (9, 9), (5, 5, 5)).save(tmp_path / "train" / "class0" / "0.png")
    start(tmp_path / "out", *options)
    assert len(trainings) == 2


MOODY = """
from qexp.engines.onnxruntime import OnnxRuntime


class Moody(OnnxRuntime):
    name = "moody"

    def __init__(self, batch=None):
        self.batch = batch

    def session(self, model, shape, threads, traced=False):
        if self.batch in (None, shape[0]):
            raise RuntimeError("Exception from core.cpp:1\\nnot in the mood\\n")
        return super().session(model, shape, threads, traced)
"""


@pytest.mark.parametrize(("batch", "method"), [("null", "ptq"), ("7", "ptq"), ("7", "fp32")])
def test_an_engine_that_refuses_is_named_and_the_other_goes_on(outputs, tmp_path, monkeypatch, capsys, batch, method):
    (tmp_path / "moody.py").write_text(MOODY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "moody", raising=False)
    engines = ["+engine.engines.moody._target_=moody.Moody", f"+engine.engines.moody.batch={batch}"]
    job = start(
        outputs, "engine=onnxruntime", "engine.batch_size=7", f"method={method}", *engines, "engine.required=false"
    )
    assert job.metrics["engine/refused"] == "moody refuses the graph: not in the mood"
    assert "without moody: moody refuses the graph: not in the mood" in capsys.readouterr().out
    assert job.metrics["engine/winner"] == "onnxruntime"
    assert not [name for name in job.metrics if name.startswith("moody/")]
    assert not [path.name for path in job.folder.iterdir() if "moody" in path.name]


def test_an_engine_that_computes_something_else_wins_only_where_all_do():
    figures = {name: {"latency/int8_ms": ms} for name, ms in (("slow", 3.0), ("fast", 1.0))}
    assert _winner({}, "latency/int8_ms") is None
    assert _winner(figures, "latency/int8_ms") == "fast"
    figures["fast"]["parity/output_sqnr_db"], figures["slow"]["parity/output_sqnr_db"] = 3.0, 70.0
    assert _winner(figures, "latency/int8_ms") == "slow"
    figures["slow"]["parity/output_sqnr_db"] = 10.0
    assert _winner(figures, "latency/int8_ms") == "fast"
    figures = {"slow": {"latency/int8_ms": 3.0}, "fast": {"latency/int8_ms": 1.0, "parity/output_sqnr_db": 70.0}}
    for timed_db, winner in ((18.0, "slow"), (30.0, "fast")):
        figures["fast"]["parity/timed_sqnr_db"] = timed_db
        assert _winner(figures, "latency/int8_ms") == winner
    figures["fast"] |= {"parity/output_sqnr_db": 27.0, "parity/timed_sqnr_db": 18.0}  # as much as samples differ
    assert _winner(figures, "latency/int8_ms") == "fast"


def test_an_engine_that_was_asked_for_by_name_and_refuses_ends_the_run(outputs, tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(MOODY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "moody", raising=False)
    engines = ["+engine.engines.moody._target_=moody.Moody", "+engine.engines.moody.batch=null"]
    why = "^engine=moody: moody refuses the graph: not in the mood; engine=none simulates it$"
    before = set(outputs.glob("runs/*"))
    with pytest.raises(ConfigError, match=why):
        start(outputs, "engine=onnxruntime", *engines)
    assert set(outputs.glob("runs/*")) == before


def test_an_engine_that_would_run_in_float_is_not_timed_as_int8(outputs):
    # Weights with a zero point: OpenVINO has no int8 kernel for them, ONNX Runtime has.
    job = start(outputs, "quantizer.weight.convention=affine")
    refusal = "openvino refuses the graph: it would run every layer in float, which is not timed as int8"
    assert job.metrics["engine/refused"] == refusal
    assert job.metrics["onnxruntime/int8/mac_coverage"] == 1
    assert not [name for name in job.metrics if name.startswith("openvino/")]


def test_a_network_that_no_engine_runs_is_simulated_and_never_timed(outputs, tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(MOODY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "moody", raising=False)
    job = start(outputs, "engine=none", "+engine.engines.moody._target_=moody.Moody")
    assert job.metrics["acc/drop"] == job.metrics["acc/fp32"] - job.metrics["acc/sim"]
    assert not {"acc/engine", "engine/winner", "latency/int8_ms", "latency/fp32_ms"} & job.metrics.keys()
    assert {row["engine_int8"] for row in job.rows} == {False}
    assert job.metrics["status"] == "finished"
