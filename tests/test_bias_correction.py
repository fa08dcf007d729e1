"""bias_correction=N as a run has it: what it leaves, what engines make of it, and what is refused in a sentence."""

import copy
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from qexp import passes
from qexp.jobs import compose_jobs
from qexp.quant.bias_correction import correct_biases_
from qexp.run import run
from qexp.sections import ConfigError
from qexp.settings import settings

FAST = ["trainer.epochs=1", "logger=none", "data.calibration_size=64", "quantizer=int4", "engine.seconds=0.05"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


def start(outputs, *overrides):
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
    return run(job.settings)


def test_a_run_is_corrected_and_each_engine_runs_what_was_corrected(outputs):
    plain, corrected = start(outputs, "engine=none"), start(outputs, "bias_correction=64")
    assert not any(name.startswith("bias_correction") for name in plain.metrics)
    assert corrected.metrics["bias_correction/layers"] == 10  # nine convolutions and the classifier
    assert corrected.metrics["bias_correction/skipped"] == 0
    assert corrected.settings.label == "resnet8 W4A4 per_channel minmax bias_correction=64 s0"
    assert corrected.metrics["acc/fp32"] == plain.metrics["acc/fp32"]
    assert corrected.metrics["sqnr/output_db"] > plain.metrics["sqnr/output_db"]
    for engine in "onnxruntime", "openvino":
        assert corrected.metrics[f"{engine}/parity/local_identical"] > 0.9999
        assert corrected.metrics[f"{engine}/int8/mac_coverage"] == 1
    assert len(list((outputs / "cache" / "float").iterdir())) == 1
    again = passes.calibrated(
        corrected.net, corrected.settings, corrected.data, corrected.flow, corrected.sketches
    ).state_dict()
    assert all(torch.equal(again[name], value) for name, value in corrected.quantized.state_dict().items())


def test_ranges_of_each_call_are_corrected_too(outputs):
    plain = start(outputs, "engine=none", "method=dynamic")
    job = start(outputs, "engine=none", "method=dynamic", "bias_correction=64")
    assert job.metrics["bias_correction/layers"] == 10
    assert job.metrics["sqnr/output_db"] > plain.metrics["sqnr/output_db"]


ROWS = '''
"""Rows of an image as tokens, of which the upper half is read."""

import torch
from torch import nn


class Rows(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, num_classes)

    def words(self, x):
        return (torch.arange(8) < 4).expand(len(x), 8)

    def forward(self, x):
        return self.head(self.embed(x.squeeze(1))[:, :4].mean(1))
'''


def test_a_network_that_says_which_positions_are_read_is_asked(outputs, tmp_path, monkeypatch):
    (tmp_path / "rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    ours = ["model=custom", "model._target_=rows.Rows", "engine=none"]
    plain, job = start(outputs, *ours), start(outputs, *ours, "bias_correction=32")
    x = torch.cat([images for images, _ in job.data.calibration_dataloader()])[:32]
    read, everything = copy.deepcopy(plain.quantized), plain.quantized
    correct_biases_(read, x, torch.arange(8).lt(4).expand(32, 8))
    correct_biases_(everything, x)
    assert torch.equal(job.quantized.embed.bias, read.embed.bias)
    assert not torch.equal(read.embed.bias, everything.embed.bias)


def test_a_config_of_before_corrects_no_bias(outputs):
    (job,) = compose_jobs([], multirun=False)
    older = {key: value for key, value in job.settings.config.items() if key != "bias_correction"}
    assert settings(OmegaConf.create(older)).config == job.settings.config


def test_data_with_fewer_samples_say_so(outputs):
    job = start(outputs, "engine=none")
    chosen = replace(job.settings, config=job.settings.config | {"bias_correction": 65})
    with pytest.raises(ConfigError, match="^bias_correction=65: there are 64 calibration samples$"):
        passes.correct_biases_(job.quantized, chosen, job.data)


REFUSED = {
    "bias_correction=-1": "bias_correction=-1: must be an integer of at least 0",
    "bias_correction=true": "bias_correction=True: must be an integer of at least 0",
    "bias_correction=65": "bias_correction=65: must be at most data.calibration_size=64",
    "bias_correction=8 method=fp32": "bias_correction=8: method=fp32 quantizes nothing; choose 0",
    "bias_correction=8 finetune=ste": "bias_correction=8: method=qat trains biases",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused_before_any_compute(words, outputs):
    with pytest.raises(ConfigError) as refused:
        compose_jobs([*FAST, f"paths.outputs={outputs}", *words.split()], multirun=False)
    assert str(refused.value).startswith(REFUSED[words])
