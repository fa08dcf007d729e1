"""Every choice of every axis composes, and every experiment file runs."""

from pathlib import Path

import pytest
import yaml

from qexp.composing import conf_dir
from qexp.jobs import compose_jobs
from qexp.run import run

CONF = Path(conf_dir())
EXPERIMENTS = sorted(
    path.relative_to(CONF / "experiment").with_suffix("").as_posix() for path in CONF.glob("experiment/**/*.yaml")
)
CHOICES = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"
)
# What an option needs that only the user knows.
NEEDED = {
    "model=custom": ["model._target_=mine.Net"],
    "data=custom": ["data._target_=mine.Data"],
    "data=cifar10": [f"data.root={Path(__file__).parent}"],
    "data=image_folder": [f"data.root={Path(__file__).parent}"],
    "data=text_csv": [f"data.path={__file__}"],
    "model=hugging_face": ["model.weights=any/encoder"],
    "method=qat": ["finetune=ste"],
    "quantizer=levels": [f"quantizer.weight.file={Path(__file__).parent / 'quant' / 'levels.txt'}"],
}


# What something happens in after the first epoch; so many show it.
LATER = {"krishnamoorthi2018/batchnorm": 2}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice):
    (job,) = compose_jobs([choice, *NEEDED.get(choice, [])], multirun=False)
    group, _, name = choice.partition("=")
    said = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    # A format that chooses another group, too, is written from the root.
    assert set(said.get(group, said)) - {"defaults"} <= set(job.settings.config[group])


def test_percentiles_of_the_paper_are_what_their_names_say():
    for name, value in ("percentile", 99.99), ("percentile_99.9", 99.9), ("percentile_99.9999", 99.9999):
        (job,) = compose_jobs([f"calibration={name}"], multirun=False)
        assert job.settings.recipe.activation.calibration.percentile == value
        assert str(job.settings.recipe.weight.calibration) == "minmax"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_names_its_source_and_runs(name, tmp_path_factory):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert "# Source: " in text.split("\n\n")[0]
    outputs = tmp_path_factory.getbasetemp() / "experiments"
    fast = ["trainer.epochs=1", "engine.seconds=0.05", "logger=none", f"paths.outputs={outputs}"]
    if "      seed: " in text:
        fast.append("seed=0")
    if "/model: minilm" in text:  # as far as the experiment goes, a small one is like it
        fast += ["model=bert_tiny_random", "model.layers=1", "data.length=16", "data.most_per_class=6"]
        fast += ["data.calibration_size=64", "trainer.threads=1"]
    first, *_ = compose_jobs([f"experiment={name}", *fast], multirun=False)
    plan = first.settings.finetune
    if plan is not None and plan.epochs > 2:
        epochs = f"finetune.epochs={LATER.get(name, 1)}"
        first, *_ = compose_jobs([f"experiment={name}", *fast, epochs], multirun=False)
    assert run(first.settings).metrics["status"] == "finished"


def test_granularity_at_4_bits_is_the_table_of_the_readme():
    jobs = compose_jobs(["experiment=granularity_w4"], multirun=False)
    told = [(job.settings.label, job.settings.config["engine"]["batch_size"]) for job in jobs]
    nets, bits, granularities = ("resnet8", "mobilenet"), ("W8A8", "W4A8"), ("per_tensor", "per_channel")
    assert told == [(f"{n} {b} {g} minmax s0", 64) for n in nets for b in bits for g in granularities]


def test_a_sweep_in_a_file_gives_way_to_the_command_line():
    jobs = compose_jobs(["experiment=granularity_w4", "model=resnet8", "granularity=per_channel"], multirun=False)
    assert [job.choice for job in jobs] == [{"quantizer": "int8"}, {"quantizer": "w4a8"}]


def test_table_5_has_its_six_calibrations():
    fixed = ["model=resnet8", "quantizer.activation.bits=8", "data.calibration_outlier=1", "seed=0"]
    jobs = compose_jobs(["experiment=wu2020/table5", *fixed], multirun=False)
    calibrations = [str(job.settings.recipe.activation.calibration) for job in jobs]
    assert len(set(calibrations)) == len(calibrations) == 6
    assert {f"percentile({value})" for value in ("99.9", "99.99", "99.999", "99.9999")} < set(calibrations)
    assert {str(job.settings.recipe.weight) for job in jobs} == {"int8 restricted, per_channel, minmax"}
