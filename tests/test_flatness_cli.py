"""flatness=true and qexp flatness: what they leave, that it is what the functions say, and what is refused."""

import copy
import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats

from qexp import cli, flat, flatness_cli
from qexp.jobs import compose_jobs
from qexp.metrics.curvature import trace
from qexp.metrics.flatness import half_steps, half_width, worst_in_cell
from qexp.metrics.surface import Loss, random_direction
from qexp.quant.convert import fold_batchnorm_, layers, quantizers
from qexp.quant.quantizer import Mode
from qexp.report.flatness_table import half_interval, t_quantile
from qexp.run import run
from qexp.sections import ConfigError
from qexp.settings import settings

FAST = [
    "model.width=4", "trainer.epochs=1", "quantizer=int4", "data.calibration_size=32", "logger=none", "engine=none",
]  # fmt: skip
TUNED = ["finetune.epochs=1", "finetune.observe=0"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Enough to see that all are there."""
    monkeypatch.setattr(flat, "SAMPLES", 6)
    monkeypatch.setattr(flat, "IMAGES", 64)
    monkeypatch.setattr(flat, "LINE", [-0.3, 0.0, 0.3])
    monkeypatch.setattr(flat, "PLANE", [-0.2, 0.0, 0.2])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder for all, so that the float network is trained once."""
    return tmp_path_factory.mktemp("outputs")


def composed(outputs, *overrides):
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", "flatness=true", *overrides], multirun=False)
    return job


def start(outputs, *overrides):
    return run(composed(outputs, *overrides).settings)


def table(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def fake_quantized(job) -> dict[str, torch.Tensor]:
    """The values that the weights of a quantized network have, by hand."""
    found = {}
    for name, layer in layers(job.quantized):
        if hasattr(layer, "weight_quantizer"):
            quantizer, shape = layer.weight_quantizer, layer.weight.shape
            scale = quantizer.scale.view(-1, *[1] * (len(shape) - 1))
            codes = (layer.weight / scale).round().clamp(quantizer.grid.quant_min, quantizer.grid.quant_max)
            found[f"{name}.weight"] = (codes * scale).detach()
    return found


def float_network(job):
    """The float network with BatchNorm folded."""
    net = copy.deepcopy(job.net)
    fold_batchnorm_(net, job.flow)
    return net.eval()


@pytest.mark.parametrize("chosen", [["method=fp32"], [], ["finetune=ste", *TUNED]], ids=["fp32", "ptq", "qat"])
def test_what_a_run_leaves_is_what_the_functions_say_at_the_weights_that_it_evaluates(outputs, chosen):
    job = start(outputs, *chosen)
    net = float_network(job)
    if job.quantized is not None:
        weights = fake_quantized(job)
        biases = {f"{name}.bias": layer.bias for name, layer in layers(job.quantized) if hasattr(layer, "bias")}
        net.load_state_dict({**weights, **{k: v for k, v in biases.items() if v is not None}}, strict=False)
        cell = half_steps(job.quantized)
        assert all(q.mode is Mode.QUANTIZE for q in quantizers(job.quantized))  # it is left as it was
    else:
        cell = half_steps(start(outputs).quantized)
    train = job.data.splits[0]
    assert sum(len(labels) for _, labels in flat.images(job.data, 0)) == 64  # whatever the calibration size
    x, labels = (torch.cat(part) for part in zip(*flat.images(job.data, 0), strict=True))
    assert all(any(torch.equal(image, other) for other in train.sources) for image in x[:3])
    loss, metrics = Loss(net, [(x, labels)]), json.loads((job.folder / "metrics.json").read_text())
    assert metrics["flat/loss"] == pytest.approx(loss(), rel=1e-4)
    assert metrics["flat/worst_in_cell"] == pytest.approx(worst_in_cell(loss, cell, seed=0), rel=0.02)
    assert metrics["flat/trace"] == pytest.approx(trace(loss, 6, seed=0).value, rel=0.02)
    assert {"flat/top_eigenvalue", "flat/trace_error", "flat/sam_sharpness"} <= metrics.keys()
    first, second = random_direction(loss, 0), random_direction(loss, 1)
    rows, plane = table(job.folder / "flatness.csv"), table(job.folder / "flatness_plane.csv")
    assert [row["distance"] for row in rows] == flat.LINE
    for row in rows:
        point = loss.measure({name: row["distance"] * d for name, d in first.items()})
        assert row["loss"] == pytest.approx(point.loss, rel=1e-3)
        assert row["accuracy"] == pytest.approx(point.accuracy, abs=0.02)
        assert row["half_width"] == pytest.approx(half_width(first, cell), rel=1e-5)
    assert [(row["x"], row["y"]) for row in plane] == [(a, b) for a in flat.PLANE for b in flat.PLANE]
    corner = loss({name: flat.PLANE[0] * first[name] + flat.PLANE[2] * second[name] for name in first})
    assert plane[2]["loss"] == pytest.approx(corner, rel=1e-3)


def test_a_run_without_it_measures_nothing_and_gives_the_same_result(outputs, tmp_path):
    job, plain = start(outputs), start(tmp_path, "flatness=false")
    assert not [name for name in plain.metrics if name.startswith("flat/")]
    assert not list(plain.folder.glob("flatness*"))
    same = [name for name in plain.metrics if not name.startswith("time/")]
    assert {name: job.metrics[name] for name in same} == {name: plain.metrics[name] for name in same}


@pytest.fixture
def qexp(capsys, monkeypatch, tmp_path):
    """Gives a command; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "unwind_on_signals", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def give(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["flatness", *words])
        return end.value.code, *capsys.readouterr()

    return give


def test_four_minima_as_a_table_and_figures(qexp, outputs, tmp_path):
    pytest.importorskip("matplotlib")
    words = [*FAST, *TUNED, f"paths.outputs={outputs}", "--output", "new/my.png"]
    code, out, _ = qexp(*words)
    assert code == 0
    lines = {line.strip().split("  ")[0]: line.split()[-6:] for line in out.splitlines() if line.startswith(" ")}
    assert lines.keys() >= set(flatness_cli.MINIMA)
    job = start(outputs)
    assert float(lines["PTQ"][0]) == pytest.approx(100 * job.metrics["acc/sim"], abs=0.005)
    assert float(lines["PTQ"][1]) == pytest.approx(job.metrics["flat/loss"], rel=0.005)
    assert float(lines["PTQ"][-1]) == pytest.approx(job.metrics["flat/worst_in_cell"], rel=0.005)
    for name in "my.png", "my-plane.png":
        picture = Image.open(tmp_path / "new" / name).convert("L")
        assert min(picture.size) > 400
        assert len(picture.getcolors()) > 9
    code, again, err = qexp(*words)
    assert (code, again[again.index(" minimum") :]) == (0, out[out.index(" minimum") :])
    assert "run 1" not in err  # all are there


def test_over_seeds_it_shows_means_and_intervals(qexp, outputs, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(flat, "SAMPLES", 2)  # of eight runs
    code, out, err = qexp(*FAST, *TUNED, f"paths.outputs={outputs}", "seed=3", "--seeds", "2")
    assert code == 0
    assert "run 8 of 8" in err
    assert "seeds 3 to 4" in out
    (row,) = [line for line in out.splitlines() if line.startswith(" float")]
    runs = [composed(outputs, "method=fp32", f"seed={seed}").finished() for seed in (3, 4)]
    accuracies = [100 * metrics["acc/fp32"] for metrics in runs]
    assert f"{sum(accuracies) / 2:.2f} ± " in row
    assert list((outputs / "flatness").glob("*.png"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=ptq"], "qexp: method=ptq: qexp flatness chooses method itself"),
        (["finetune=lsq"], "qexp: finetune=lsq: qexp flatness chooses finetune itself"),
        (["quantizer=nf4"], "qexp: flatness=true: needs weights on an integer grid"),
        (["seed=0,1"], "qexp: seed=0,1: several values, but qexp flatness looks at one choice (--seeds N"),
        (["experiment=granularity_w4"], "qexp: a sweep of 8 choices, but qexp flatness looks at one"),
        (["--seeds", "0"], "qexp: --seeds=0: must be a whole number from 1 to 100"),
        (["--seeds", "many"], "qexp: --seeds=many: must be a whole number"),
        (["--output", "a.pdf"], "qexp: --output=a.pdf: must end in .png or .svg"),
        (["finetune.nope=1"], "qexp: finetune.nope: no such key"),
        (["-m"], "qexp: unrecognized arguments: -m; qexp flatness --help shows"),
        (["model=nope"], "qexp: model=nope: no such option"),
    ],
)
def test_what_is_refused_is_one_sentence_on_stderr_and_code_2(qexp, tmp_path, words, sentence):
    code, out, err = qexp(*words)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_flatness_is_true_or_false_and_may_be_left_out():
    (job,) = compose_jobs(FAST, multirun=False)
    config = OmegaConf.create({key: value for key, value in job.settings.config.items() if key != "flatness"})
    assert settings(config).flatness is False
    with pytest.raises(ConfigError, match="flatness='yes'"):
        compose_jobs([*FAST, "flatness='yes'"], multirun=False)


def test_help_says_what_can_be_said(qexp):
    code, out, _ = qexp("--help")
    assert code == 0
    assert all(word in out for word in ("--seeds", "--output", "--config-dir"))


@pytest.mark.parametrize("freedom", range(1, 31))
def test_quantiles_are_those_of_scipy(freedom):
    for share in 0.5, 0.95, 0.99:
        assert t_quantile(freedom, share) == pytest.approx(stats.t.ppf((1 + share) / 2, freedom), rel=1e-9)


def test_the_interval_is_that_of_scipy():
    values = [1.0, 4.0, 2.5, 9.0]
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    assert 2 * half_interval(values) == pytest.approx(high - low)
