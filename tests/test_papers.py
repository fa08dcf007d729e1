"""The papers' tables: what they need of a run, and what they found, in rows that our grids can be joined with."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from qexp.composing import conf_dir
from qexp.jobs import compose_jobs
from qexp.papers import FOLDER, load
from qexp.run import run
from qexp.sections import ConfigError
from qexp.store import run_id

FAST = ["trainer.epochs=1", "engine=none", "logger=none", "model.width=4"]
REFUSED = {
    "data.calibration_outlier=0.5": "data.calibration_outlier=0.5: must be a number of at least 1",
    "data.calibration_outlier=8 finetune=batchnorm_batch finetune.reestimate=true": (
        "data.calibration_outlier=8: is for calibration alone, but finetune.reestimate=true trains on it"
    ),
    "channel_spread=-1": "channel_spread=-1: must be an integer of at least 0",
    "channel_spread=0.5": "channel_spread=0.5: must be an integer of at least 0",
    "channel_spread=17": "channel_spread=17: must be at most 16",
    "fold_batchnorm=maybe": "fold_batchnorm='maybe': allowed are True, False",
    "fold_batchnorm=false finetune=ste": "fold_batchnorm=false: is for method=ptq; finetune.batchnorm says how",
    "fold_batchnorm=false engine=onnxruntime": "engine=onnxruntime: cannot run it, because BatchNorm is not folded",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def start(outputs):
    def start(*overrides: str):
        (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
        return run(job.settings)

    return start


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_refused_by_its_key(asked):
    with pytest.raises(ConfigError) as error:
        compose_jobs(asked.split(), multirun=False)
    assert str(error.value).startswith(REFUSED[asked])


def test_all_three_are_choices_of_a_run_and_none_trains_the_float_network_again(start, outputs):
    runs = [
        start("model=mobilenet_relu", "quantizer.activation.bits=16", *more)
        for more in ((), ("data.calibration_outlier=8",), ("channel_spread=3",), ("fold_batchnorm=false",))
    ]
    assert len(list((outputs / "cache" / "float").iterdir())) == 1
    assert len({run_id(job.settings.config) for job in runs}) == 4
    usual, outlier, spread, unfolded = runs
    for job in runs:
        assert torch.equal(job.reference, usual.reference)  # the float network's logits, to the bit
    sqnr = [job.metrics["sqnr/output_db"] for job in runs]
    assert len(set(sqnr)) == 4
    ranges = [job.quantized.stem.conv.input_quantizer.scale for job in runs]
    assert ranges[1] > 4 * ranges[0] and ranges[0] == ranges[2] == ranges[3]


def test_unfolded_batchnorm_stays_beside_its_layer_and_no_engine_runs_it(start):
    folded = start("granularity=per_channel", "quantizer.activation.bits=16")
    job = start("granularity=per_channel", "quantizer.activation.bits=16", "fold_batchnorm=false", "engine=all")
    assert job.metrics["engine/refused"].startswith("BatchNorm is not folded into the layers before it")
    weight, factor = job.quantized.stem.conv.weight, job.quantized.stem.bn
    assert torch.equal(weight, job.net.stem.conv.weight)
    with (job.folder / "unquantized.csv").open() as file:
        rows = {row["layer"]: row["reason"] for row in csv.DictReader(file)}
    assert rows["stem.bn"] == "left beside its layer by fold_batchnorm=false"
    # One scale a channel absorbs what folding multiplies it with: the function is the same.
    scale = (factor.weight / (factor.running_var + factor.eps).sqrt()).abs().view(-1, 1, 1, 1)
    of_folded, of_unfolded = (j.quantized.stem.conv.weight_quantizer.scale for j in (folded, job))
    assert torch.allclose(of_folded, of_unfolded * scale, rtol=1e-5)
    assert job.metrics["sqnr/output_db"] == pytest.approx(folded.metrics["sqnr/output_db"], abs=0.5)


def test_a_network_without_channels_to_spread_is_refused_before_it_trains(start, outputs):
    before = len(list((outputs / "cache" / "float").iterdir()))
    with pytest.raises(
        ConfigError, match="^channel_spread=2: MobileNet has no two layers that nothing but a BatchNorm"
    ):
        start("model=mobilenet", "channel_spread=2", "model.width=5")
    assert len(list((outputs / "cache" / "float").iterdir())) == before


def test_a_spread_network_runs_on_the_engines(start):
    job = start("channel_spread=2", "engine=all", "engine.seconds=0.05")
    assert job.metrics["acc/engine"] == pytest.approx(job.metrics["acc/sim"], abs=0.01)
    assert "engine/refused" not in job.metrics


EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("**/*.yaml"))
# Of each table: how many figures it has, and some of them, read from the paper a second time.
FIGURES = {
    "wu2020/table3": (5 * 4, [
        ("MobileNet v1", {"granularity": "per_tensor", "fold_batchnorm": True}, 66.88, 71.88),
        ("MobileNet v2", {"granularity": "per_channel", "fold_batchnorm": False}, 71.61, 71.88),
        ("ResNet50 v1.5", {"granularity": "per_tensor", "fold_batchnorm": False}, 75.83, 76.16),
        ("EfficientNet b0", {"granularity": "per_tensor", "fold_batchnorm": True}, 12.93, 76.85),
    ]),
    "wu2020/table5": (19 * 6, [
        ("ResNet50 v1.5", {"calibration": "entropy"}, 76.05, 76.16),
        ("Inception v4", {"calibration": "minmax"}, 0.12, 79.71),
        ("EfficientNet b0", {"calibration": "percentile_99.9999"}, 42.49, 76.85),
        ("Transformer", {"calibration": "percentile"}, 27.71, 28.27),
        ("BERT Large", {"calibration": "percentile_99.9"}, 26.18, 91.01),
        ("Retinanet", {"calibration": "percentile_99.999"}, 39.19, 39.3),
    ]),
    "wu2020/bert": (6, [
        ("BERT Large", {"calibration": "minmax"}, 85.92, 91.01),
        ("BERT Large", {"calibration": "entropy"}, 37.4, 91.01),
    ]),
    "wu2020/table7": (19 * 2, [
        ("EfficientNet b0", {"finetune": "none"}, 72.06, 76.85),
        ("EfficientNet b0", {"finetune": "ste"}, 76.95, 76.85),
        ("ResNeXt101", {"finetune": "ste"}, 79.01, 79.3),
        ("Jasper", {"finetune": "none"}, 96.11, 96.09),
    ]),
    "krishnamoorthi2018/table5": (9 * 3, [
        ("Mobilenet v1 1 224", {"granularity": "per_channel", "finetune": "ste"}, 0.65, 0.709),
        ("Inception-v3", {"granularity": "per_tensor", "finetune": "none"}, 0.5, 0.78),
        ("Resnet v2 152", {"granularity": "per_channel", "finetune": "none"}, 0.74, 0.778),
    ]),
    "krishnamoorthi2018/figure12": (2, [("not named", {"finetune": "stochastic"}, 0.67, None)]),
    "gupta2015/figure1": (1 + 3 + 3 + 2 * 3, [
        ("MNIST DNN", {"finetune": "low_precision_nearest", "quantizer.weight.bits": 8}, 3.02, 1.42),
        ("MNIST DNN", {"finetune": "low_precision", "quantizer.weight.bits": 8}, 1.52, 1.42),
        ("CIFAR10 CNN", {"finetune": "low_precision", "quantizer.weight.bits": 12}, 28.8, 24.6),
    ]),
}  # fmt: skip
COMPARED = ("acc/sim", "acc/engine", "acc/drop")


def grid(experiment: str) -> dict[str, list[str]]:
    """The keys that an experiment varies, with their words."""
    content = yaml.safe_load((Path(conf_dir()) / "experiment" / f"{experiment}.yaml").read_text())
    return {key: str(words).split(",") for key, words in content["hydra"]["sweeper"]["params"].items()}


def values(experiment: str, **choice) -> dict[str, float]:
    """The figures of a choice, by network."""
    return {row.network: row.value for row in load(experiment).rows if choice.items() <= row.choice.items()}


@pytest.mark.parametrize("experiment", FIGURES)
def test_a_papers_rows_are_those_of_the_grid_and_of_the_paper(experiment):
    paper, ours = load(experiment), grid(experiment)
    assert "arXiv" in paper.source and paper.metric in COMPARED
    for row in paper.rows:
        for key, word in row.choice.items():
            assert str(word).lower() in [text.lower() for text in ours[key]], (key, word)
    count, known = FIGURES[experiment]
    assert len(paper.rows) == count
    assert len({(row.network, str(row.choice)) for row in paper.rows}) == count
    for network, choice, value, fp32 in known:
        (found,) = [r for r in paper.rows if r.network == network and choice.items() <= r.choice.items()]
        assert (found.value, found.fp32) == (value, fp32)


def test_every_table_has_its_experiment_and_seeds():
    assert sorted(FIGURES) == EXPERIMENTS
    for experiment in EXPERIMENTS:  # three of an encoder, which is large and whose weights are given
        assert grid(experiment)["seed"] == ["0", "1", "2", "3", "4"][: 3 if experiment == "wu2020/bert" else 5]


def test_the_encoder_is_a_row_of_the_table_of_calibrations():
    rows = [row for row in load("wu2020/table5").rows if row.network == "BERT Large"]
    assert sorted(map(repr, load("wu2020/bert").rows)) == sorted(map(repr, rows))


def test_the_rows_say_what_the_papers_found():
    best = {}
    for network in values("wu2020/table5"):
        figures = {r.choice["calibration"]: r.value for r in load("wu2020/table5").rows if r.network == network}
        best[network] = max(figures, key=figures.get)
        assert figures["minmax"] < max(figures.values())
    assert sum(word in ("entropy", "percentile", "percentile_99.999") for word in best.values()) == 17
    before, after = values("wu2020/table7", finetune="none"), values("wu2020/table7", finetune="ste")
    assert sum(after[network] < before[network] for network in before) == 5
    fp32 = {row.network: row.fp32 for row in load("wu2020/table7").rows}
    assert all(after[network] > 0.99 * fp32[network] for network in after)
    unfolded, folded = (
        values("wu2020/table3", granularity="per_channel", fold_batchnorm=fold) for fold in (False, True)
    )
    assert folded == unfolded
    table5 = "krishnamoorthi2018/table5"
    trained, float_ = values(table5, finetune="ste"), {row.network: row.fp32 for row in load(table5).rows}
    assert all(0.02 <= round(float_[network] - trained[network], 3) <= 0.1 for network in trained)


def test_an_experiment_without_a_paper_has_none():
    assert load("granularity_w4") is None and load("../../pyproject") is None and load("nowhere/table1") is None


GOOD = {"source": "s", "trend": "t", "metric": "acc/sim", "unit": "%"}
ROW = {"choice": {"seed": 0}, "network": "net", "value": 1.5}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rows: [", "while parsing"),
        ("- 1", "must hold source, trend, metric, unit and a list of rows"),
        (GOOD, "must hold source, trend, metric, unit and a list of rows"),
        (GOOD | {"rows": []}, "rows: there must be at least one"),
        (GOOD | {"rows": [ROW], "unit": ""}, "unit='': must be a text"),
        (GOOD | {"rows": [ROW], "year": 2020}, "unexpected keyword argument 'year'"),
        (GOOD | {"rows": [ROW, ROW | {"value": float("nan")}]}, r"rows\[1\]: value=nan: must be a finite number"),
        (GOOD | {"rows": [ROW | {"value": "fails"}]}, r"rows\[0\]: value='fails': must be a finite number"),
        (GOOD | {"rows": [ROW | {"fp32": True}]}, r"rows\[0\]: fp32=True: must be a finite number"),
        (GOOD | {"rows": [ROW | {"choice": {}}]}, r"rows\[0\]: choice={}: must hold at least one key of ours"),
        (GOOD | {"rows": [ROW | {"network": 5}]}, r"rows\[0\]: network=5: must be a name"),
        (GOOD | {"rows": [1]}, r"rows\[0\]: "),
    ],
)
def test_a_damaged_table_is_refused_in_one_sentence(tmp_path, content, told):
    path = tmp_path / "table.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"^{path}: .*{told}") as error:
        load("table", tmp_path)
    assert "\n" not in str(error.value)
