"""smoothing=... as a run has it: what it leaves, what is kept, and what is refused in a sentence."""

import csv
import sys

import pytest
import torch
from omegaconf import OmegaConf

from qexp import passes, prepare, smoothing
from qexp.compare.differences import differences
from qexp.jobs import compose_jobs
from qexp.run import run
from qexp.sections import ConfigError
from qexp.settings import settings

NETWORK = '''
"""Rows of an image as tokens, one of whose features is far larger than the others."""

import torch
from torch import nn

from qexp.quant.layers import Add


class Net(nn.Module):
    def __init__(self, num_classes, post=True):
        super().__init__()
        self.post = post
        self.embed, self.norm, self.up, self.gelu, self.down, self.add, self.head = (
            nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), Add(),
            nn.Linear(16, num_classes),
        )
        with torch.no_grad():
            self.norm.weight[3] = 50.0

    def forward(self, x):
        h = self.embed(x.squeeze(1))
        y = self.down(self.gelu(self.up(self.norm(h))))
        return self.head((self.add(y, self.norm(h)) if self.post == "twice" else self.add(y, h)).mean(1))
'''
OURS = ["model=custom", "model._target_=smoothed.Net"]
FAST = [*OURS, "trainer.epochs=1", "logger=none", "engine=none", "data.calibration_size=64"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder for all, so that the float network is trained once."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "smoothed.py").write_text(NETWORK)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("smoothed", None)


def start(outputs, *overrides):
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
    return run(job.settings)


def rows(job):
    with (job.folder / "smoothing.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_smoothed_tells_how_and_loses_less(outputs):
    plain, smooth = start(outputs), start(outputs, "smoothing=smoothquant")
    assert not (plain.folder / "smoothing.csv").exists()
    assert not [name for name in plain.metrics if name.startswith("smoothing/")]
    told = {name: value for name, value in smooth.metrics.items() if name.startswith("smoothing/")}
    assert told == {"smoothing/groups": 1, "smoothing/skipped": 3, "smoothing/alpha": 0.5}
    assert smooth.metrics["acc/fp32"] == plain.metrics["acc/fp32"]
    assert smooth.metrics["sqnr/output_db"] > plain.metrics["sqnr/output_db"] + 1
    group, *others = rows(smooth)
    assert (group["norm"], group["layers"], group["how"]) == ("norm", "up", "folded into norm")
    assert (group["alpha"], group["reason"]) == ("0.5", "")
    assert float(group["outliers_before"]) > 2 * float(group["outliers_after"]) > 0
    assert [(row["layers"], row["reason"]) for row in others] == [
        ("embed", "fed by the input of the model, and not by a LayerNorm"),
        ("down", "fed by gelu, which a scale cannot pass"),
        ("head", "fed by mean, and not by a LayerNorm"),
    ]
    assert smooth.settings.label == "Net W8A8 per_channel minmax alpha=0.5 s0"


def test_a_search_tells_every_candidate_and_looks_once(outputs, monkeypatch):
    chosen = ["smoothing=smoothquant_search", "smoothing.candidates=[0.1,0.6,0.9]"]
    job = start(outputs, *chosen)
    for group in rows(job):
        sqnr = {alpha: float(group[f"sqnr_db_alpha_{alpha}"]) for alpha in ("0.1", "0.6", "0.9")}
        assert group["alpha"] == max(sqnr, key=sqnr.get)
        assert float(group["sqnr_db"]) == max(sqnr.values())
    assert job.metrics["smoothing/alpha"] == pytest.approx(sum(float(row["alpha"]) for row in rows(job)) / 4)

    def never(*_):
        raise AssertionError("a pass over the calibration data")

    monkeypatch.setattr(passes, "calibration_pass", never)
    monkeypatch.setattr(prepare, "calibration_loader", never)
    again = passes.calibrated(job.net, job.settings, job.data, job.flow, job.sketches)
    assert again.smoothed == job.quantized.smoothed
    state, before = again.state_dict(), job.quantized.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_all_linear_layers_are_smoothed_where_that_is_asked_for(outputs):
    paper, every = start(outputs, "smoothing=smoothquant"), start(outputs, "smoothing=smoothquant_all")
    assert (every.metrics["smoothing/groups"], every.metrics["smoothing/skipped"]) == (4, 0)
    told = [(row["layers"], row["how"], row["alpha"]) for row in rows(every)]
    assert told[0] == ("up", "folded into norm", "0.8")
    assert told[1:] == [(name, "multiplied in front", "0.8") for name in ("embed", "down", "head")]
    assert every.settings.label == "Net W8A8 per_channel minmax alpha=0.8 explicit s0"
    assert [name for name in every.quantized.state_dict() if name.endswith("factor")] == [
        "embed.factor", "down.factor", "head.factor",
    ]  # fmt: skip
    assert paper.metrics["acc/fp32"] == every.metrics["acc/fp32"]


def test_sketches_of_other_alphas_are_others(outputs):
    first, second = (start(outputs, "smoothing=smoothquant", f"smoothing.alpha={alpha}") for alpha in (0.2, 0.8))
    places = {
        smoothing.sketches_of(job.sketches, job.quantized.smoothed, job.settings).folder for job in (first, second)
    }
    assert len(places) == 2 and first.sketches.folder == second.sketches.folder
    assert all(place.exists() for place in places)
    scales = [job.quantized.up.input_quantizer.scale for job in (first, second)]
    assert scales[0] != scales[1]


@torch.no_grad()
def test_training_through_quantizers_goes_on_from_the_smoothed_network(outputs):
    job = start(outputs, "smoothing=smoothquant", "finetune=ste", "finetune.epochs=1")
    assert job.metrics["status"] == "finished" and job.metrics["smoothing/groups"] == 1
    assert job.quantized.norm.weight.norm() < 0.5 * job.net.norm.weight.norm()


REFUSED = {
    "smoothing=foo": "no such option; allowed are none, smoothquant, smoothquant_all, smoothquant_search",
    "smoothing.alpha=0.5": "smoothing.alpha=0.5: smoothing=none has none; choose smoothing=smoothquant",
    "smoothing=smoothquant smoothing.alpha=1.5": "smoothing.alpha=1.5: must be a number from 0 to 1, search",
    "smoothing=smoothquant smoothing.alpha=much": "smoothing.alpha='much': must be a number from 0 to 1, search",
    "smoothing=smoothquant +smoothing.beta=1": "smoothing.beta: no such key; allowed are name, alpha, explicit, ",
    "smoothing=smoothquant smoothing.explicit=1": "smoothing.explicit=1: allowed are True, False",
    "smoothing=smoothquant +smoothing.candidates=[0.1]": "smoothing.candidates=[0.1]: are for smoothing.alpha=search",
    "smoothing=smoothquant_search smoothing.candidates=[0.1]": "must be a list of at least two different numbers",
    "smoothing=smoothquant_search smoothing.candidates=[0.1,2]": "must be a list of at least two different numbers",
    "smoothing=smoothquant method=fp32": "smoothing=smoothquant: method=fp32 quantizes nothing; choose smoothing=none",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_refused_before_anything_starts(asked):
    with pytest.raises(ConfigError) as error:
        compose_jobs(asked.split(), multirun=False)
    assert REFUSED[asked] in str(error.value)


def test_a_network_in_which_nothing_can_be_smoothed_is_refused_before_training(outputs, monkeypatch):
    (job,) = compose_jobs(["smoothing=smoothquant", f"paths.outputs={outputs}"], multirun=False)
    with pytest.raises(
        ConfigError, match="^smoothing=smoothquant: ResNet has no LayerNorm to smooth behind; choose none"
    ):
        prepare.ready(job.settings)
    monkeypatch.setattr(prepare, "train_", lambda *_: pytest.fail("trained"))
    why = r"^smoothing=smoothquant: Net has no LayerNorm that feeds linear layers and nothing else \(norm: its norm is "
    with pytest.raises(ConfigError, match=why + "used more than once"):
        start(outputs, "smoothing=smoothquant", "+model.post=twice")


def test_a_config_of_before_has_no_smoothing():
    (job,) = compose_jobs([], multirun=False)
    older = {key: value for key, value in job.settings.config.items() if key != "smoothing"}
    assert settings(OmegaConf.create(older)).config == job.settings.config
    assert job.settings.alphas == ()


def test_a_sweep_goes_through_none_fixed_and_searched():
    words = ["smoothing=none,smoothquant,smoothquant", "smoothing.alpha=null,0.5,search"]
    together = "hydra.sweeper.together=[[smoothing,smoothing.alpha]]"
    jobs = compose_jobs([*words, together], multirun=True)
    assert [len(job.settings.alphas) for job in jobs] == [0, 1, 11]


def test_older_runs_stand_beside_newer_ones():
    newer = {"seed": 0, "smoothing": {"name": "smoothquant", "alpha": 0.5}}
    assert differences([{"seed": 0}, newer]) == {"smoothing": ["—", "smoothquant"]}
    other = {"seed": 0, "smoothing": {"name": "smoothquant", "alpha": "search"}}
    assert differences([newer, other]) == {"smoothing.alpha": ["0.5", "search"]}


def test_the_oracle_has_a_scale_for_each_feature_of_all_tokens():
    (job,) = compose_jobs(["granularity=per_feature_oracle"], multirun=False)
    assert job.settings.recipe.activation.granularity.param_shape((1, 128, 384)) == (1, 1, 384)
    assert "activations are" in job.settings.simulation_only
