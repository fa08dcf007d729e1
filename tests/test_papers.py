"""What the papers' tables need: an outlier, a spread of channels, BatchNorm beside its layer."""

import csv

import pytest
import torch

from qexp.jobs import compose_jobs
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
