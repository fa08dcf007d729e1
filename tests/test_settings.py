"""What the user asks for is checked before any compute, and what cannot be is refused in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qexp.composing import composed
from qexp.jobs import compose_jobs
from qexp.prepare import blamed
from qexp.quant.granularity import PerBlock, PerChannel, PerGroup
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.rounding import Floor
from qexp.sections import ConfigError
from qexp.settings import settings
from qexp.store import run_id

ROOT = Path(__file__).parents[1]
# What is asked for, and what the sentence must hold: the key, the value, what is allowed.
REFUSED = {
    "model=foo": "model=foo: no such option; allowed are bert_tiny_random, custom, hugging_face, minilm, mobilenet",
    "model=": "model=: no such option; allowed are bert_tiny_random, custom",
    "quantizer=null": "quantizer=null: no such option; allowed are apot4, binary, fp4_e2m1",
    "quantizer=3": "quantizer=3: no such option; allowed are apot4, binary, fp4_e2m1",
    "experiment=foo": "experiment=foo: no such option",
    "experiment=wu2020/foo": "experiment=wu2020/foo: no such option",
    "foo=1": "foo: no such key; allowed are seed",
    "quantizer.foo=1": "quantizer.foo: no such key; allowed are weight, activation, exclude",
    "+foo=1": "foo=1: no such key; allowed are method",
    "+new.key=1": "new={'key': 1}: no such key",
    "+quantizer.foo=1": "quantizer.foo: no such key; allowed are weight",
    "+quantizer.weight.foo=1": "quantizer.weight.foo=1: qexp.quant.grid.IntegerGrid has no such option",
    "+logger.foo=1": "logger.foo=1: qexp.tracking.Wandb has no such option",
    "~seed": "~seed: a key cannot be deleted",
    "~quantizer.weight": "~quantizer.weight: a key cannot be deleted",
    "run": "run: must be KEY=VALUE",
    "=3": "=3: must be KEY=VALUE",
    "seed=[1": "seed=[1: cannot be read",
    "seed=abc": "seed='abc': must be an integer of at least 0",
    "seed=": "seed='': must be an integer",
    "seed=null": "seed=None: must be an integer",
    "seed=1.5": "seed=1.5: must be an integer",
    "seed=-1": "seed=-1: must be an integer of at least 0",
    "seed=4294967296": "seed=4294967296: must be at most 4294967295",
    "seed=${nope}": "seed: Interpolation key 'nope' not found",
    "seed=0,1": "seed=0,1: several values are a sweep, which needs -m",
    "trainer.epochs=0": "trainer.epochs=0: must be an integer of at least 1",
    "trainer.lr=nan": "trainer.lr=nan: must be a number above 0",
    "trainer.accelerator=tpu": "trainer.accelerator='tpu': allowed are cpu, gpu, auto",
    "engine.seconds=0": "engine.seconds=0: must be a number above 0",
    "engine.engines=foo": "engine.engines='foo': must hold one section for each engine",
    "engine.engines=null": "engine.engines=None: must hold",
    "engine.engines=[a]": "engine.engines",
    "engine.engines.openvino=foo": "engine.engines.openvino: must hold a _target_",
    "quantizer.weight=foo": "quantizer.weight: must hold a _target_, the import path of a class or function, but",
    "quantizer.weight.bits=17": "quantizer.weight.bits=17: allowed are the integers 2 to 16",
    "quantizer.weight.bits=1": "quantizer.weight.bits=1: allowed are the integers 2 to 16, because one symmetric bit",
    "quantizer.weight.bits=0 quantizer.weight.convention=affine": "bits=0: allowed are the integers 1 to 16",
    "quantizer.weight.scale=e8m1": "quantizer.weight.scale='e8m1': allowed are float32, power_of_two, e8m0, e4m3",
    "quantizer.activation.scale=e8m0": "quantizer.activation.scale='e8m0': allowed are float32, power_of_two for",
    "quantizer=levels": "quantizer.weight.file: a value must be given",
    "quantizer=levels quantizer.weight.file=/nowhere": "quantizer.weight.file=/nowhere: cannot be read (No such file",
    "quantizer=nf4 quantizer.weight.bits=9": "quantizer.weight.bits=9: allowed are the integers 2 to 8",
    "quantizer=fp8_e4m3 quantizer.weight.specials=x": "quantizer.weight.specials='x': allowed are ieee, fn, none",
    "quantizer=nf4 engine=onnxruntime": "engine=onnxruntime: cannot run it, because weights are nf4",
    "quantizer=int16 engine=openvino": "engine=openvino: cannot run it, because weights are int16",
    "granularity=per_token engine=openvino": (
        "engine=openvino: cannot run it, because activations are uint8 affine, per_token, minmax, which no engine "
        "computes in each call; of 8 bits and by minmax, ONNX Runtime computes affine per_tensor and restricted"
    ),
    "granularity=per_group granularity.weight.size=0": "granularity.weight.size=0: must be an integer of at least 1",
    "granularity=per_group granularity.weight.pad=1": "granularity.weight.pad=1: allowed are true and false",
    "quantizer=int16 calibration=mse": "calibration.activation=mse(100): its statistics resolve at most 11 bits",
    "calibration=entropy quantizer.activation.bits=12": "calibration.activation=entropy: its statistics resolve",
    "calibration=aciq calibration.weight.distribution=x": "calibration.weight.distribution='x': allowed are laplace",
    "calibration=hqo calibration.weight.p=2": "calibration.weight.p=2: must be at most 1",
    "calibration=moving_average calibration.activation.constant=0": "calibration.activation.constant=0: allowed are",
    "method=dynamic calibration=moving_average": (
        "calibration.activation=moving_average(0.01): averages over batches, but ranges of per_tensor are of each call"
    ),
    "method=dynamic calibration=cross_entropy": "calibration.logits=cross_entropy(100): nothing is calibrated where",
    "method=dynamic data.calibration_outlier=9": "data.calibration_outlier=9: is for calibration alone, but method=dyn",
    "method=dynamic finetune=ste": "finetune=ste: method=dynamic does not train after quantization; choose method=qat",
    "method=dynamic fold_batchnorm=false finetune=lsq": "finetune=lsq: method=dynamic does not train",
    "method=dynamic engine=onnxruntime calibration=percentile": (
        "engine=onnxruntime: cannot run it, because activations are uint8 affine, per_tensor, percentile(99.99), "
        "dynamic, which no engine computes in each call"
    ),
    "method=dynamic engine=openvino quantizer=int4": (
        "engine=openvino: cannot run it, because activations are uint4 affine, per_tensor, minmax, dynamic, which no"
    ),
    "rounding=stochastic rounding.weight.seed=-1": "rounding.weight.seed=-1: must be an integer of at least 0",
    "rounding=up": "rounding=up: no such option; allowed are ceil, floor, half_away, half_even, stochastic",
    "rounding.weight._target_=qexp.quant.grid.IntegerGrid": "must be a Rounding, not IntegerGrid",
    "quantizer.weight.convention=x": "quantizer.weight.convention='x': allowed are affine, full_range",
    "quantizer.exclude=stem": "quantizer.exclude='stem': must be a list",
    "calibration=percentile calibration.activation.percentile=50": "calibration.activation.percentile=50: allowed are",
    "calibration=percentile calibration.activation.percentile=100.1": "percentile=100.1: allowed are numbers above 50",
    "model=custom": "model._target_: a value must be given",
    "model=custom model._target_=": "model: must hold a _target_",
    "data=custom": "data._target_: a value must be given",
    "data=cifar10": "data.root: a value must be given",
    "data=image_folder": "data.root: a value must be given",
    "data=image_folder data.root=/nope": "data.root=/nope: no such folder; expected the folders train and val",
    "data.calibration_size=0": "data.calibration_size=0: must be a whole number of at least 1",
    "data.train_share=1": "data.train_share=1: must be between 0.01 and 0.99",
    "model.width=0": "model.width=0: must be a whole number of at least 1",
    "quantizer.weight.convention=[a]": "quantizer.weight.convention=['a']: allowed are affine",
    "quantizer.weight.bits=true": "quantizer.weight.bits=True: allowed are the integers 2 to 16",
    "engine=none experiment=null": "experiment=null: no such option; allowed are after_qat, dynamic_or_trained,",
    "experiment=wu2020/table6": "experiment=wu2020/table6: no such option; allowed are after_qat,",
    "engine.threads=2000": "engine.threads=2000: must be at most 1024",
    "paths.outputs=": "paths.outputs='': must be the path of a folder",
    "paths=null": "paths=None: must be a section of keys",
    "progress=maybe": "progress='maybe': allowed are auto, True, False",
    "logger.mode=x": "logger.mode='x': allowed are auto, online, offline",
    "logger.tags=3": "logger.tags=3: must be a list of words",
    "logger.group=3": "logger.group=3: must be a name",
    "hydra.mode=foo": "hydra.mode=foo (Invalid value 'foo', expected one of [RUN, MULTIRUN])",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(asked):
    with pytest.raises(ConfigError) as refusal:
        compose_jobs(asked.split(" "), multirun=False)
    assert REFUSED[asked] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "search path" not in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["seed=0,abc"], "seed='abc': must be an integer"),
        (["model=resnet8,foo"], "model=foo: no such option"),
        (["quantizer.weight.bits=4,17", "seed=0,1"], "quantizer.weight.bits=17"),
        (["trainer.lr=interval(0,1)"], "trainer.lr=interval.0,1.: has no list of values"),
        (["seed=0,1", "calibration=mse", "hydra.sweeper.together=[[seed,calibration]]"], "calibration has no list"),
        (["seed=0,1", "trainer.lr=1,2,3", "hydra.sweeper.together=[[seed,trainer.lr]]"], "2, trainer.lr has 3"),
        (["seed=0,1", "hydra.sweeper.together=[[seed],[seed]]"], "a key can vary together with one group only"),
    ],
)
def test_one_wrong_job_refuses_the_whole_sweep(asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose_jobs(asked, multirun=True)


def test_keys_that_vary_together_are_one_axis():
    together = "hydra.sweeper.together=[[quantizer,model.width]]"
    jobs = compose_jobs(["seed=0,1", "model.width=4,8,16", "quantizer=int8,w4a8,int4", together], multirun=True)
    chosen = [tuple(job.choice[key] for key in ("seed", "model.width", "quantizer")) for job in jobs]
    pairs = list(zip(("4", "8", "16"), ("int8", "w4a8", "int4"), strict=True))
    assert chosen == [(seed, *pair) for seed in "01" for pair in pairs]
    for job, (seed, width, _) in zip(jobs, chosen, strict=True):
        assert (job.settings.seed, job.settings.config["model"]["width"]) == (int(seed), int(width))


def test_several_experiments_bring_their_own_grids():
    names = ["granularity_w4", "granularity_ladder"]
    alone = [compose_jobs([f"experiment={name}", "seed=3,4"], multirun=True) for name in names]
    both = compose_jobs([f"experiment={','.join(names)}", "seed=3,4"], multirun=True)
    assert [job.run_id for job in both] == [job.run_id for jobs in alone for job in jobs]
    assert [job.choice["experiment"] for job in both] == [n for n, j in zip(names, alone, strict=True) for _ in j]


def test_a_shared_composition_gives_what_hydra_gives():
    given = ["model=resnet8,mobilenet", "quantizer.weight.bits=2,3", "seed=5,6", "trainer.epochs=7", "+model.width=8,4"]
    jobs = compose_jobs([text.lstrip("+") for text in given], multirun=True)
    assert len(jobs) == 16
    for job in jobs:
        assert job.settings.config == settings(composed(list(job.overrides))).config


def test_keys_of_hydra_that_do_nothing_here_are_refused():
    for text in "hydra.run.dir=here", "hydra.job.chdir=true", "hydra/output=x":
        with pytest.raises(ConfigError, match="has no effect here"):
            compose_jobs([text], multirun=False)


def test_configs_of_a_user_are_options_like_others(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: mine.Net\nwidth: 3\n")
    (job,) = compose_jobs(["model=mine"], multirun=False, config_dir=str(tmp_path))
    assert job.settings.config["model"] == {"_target_": "mine.Net", "width": 3}
    jobs = compose_jobs(["model=resnet8,mine"], multirun=True, config_dir=str(tmp_path))
    assert [job.settings.label.split()[0] for job in jobs] == ["resnet8", "Net"]
    ours = [path.stem for path in (ROOT / "conf" / "model").glob("m*.yaml")]
    jobs = compose_jobs(["model=glob(m*)"], multirun=True, config_dir=str(tmp_path))
    assert sorted(job.choice["model"] for job in jobs) == sorted([*ours, "mine"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("_target_: [", "mine.yaml"), ("just words", "model: must hold a _target_"), ("", "model: must hold a _target_")],
)
def test_a_broken_config_of_a_user_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as refusal:
        compose_jobs(["model=mine"], multirun=False, config_dir=str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_config_dir_must_exist():
    for wrong in "/nowhere", "":
        with pytest.raises(ConfigError, match="--config-dir=.*: no such folder"):
            compose_jobs([], multirun=False, config_dir=wrong)


def identity(*overrides: str) -> str:
    (job,) = compose_jobs(list(overrides), multirun=False)
    return run_id(job.settings.config)


def test_the_identity_of_a_run_is_what_can_change_its_result():
    usual = identity()
    same = ["paths.outputs=/elsewhere", "logger=none", "logger.project=other", "progress=true", "model=resnet8"]
    assert {identity(override) for override in same} == {usual}
    others = ["seed=1", "quantizer.weight.bits=7", "trainer.epochs=29", "engine.threads=2", "model.width=8"]
    assert len({usual, *(identity(override) for override in others)}) == 6


def test_the_levels_of_a_file_are_part_of_the_identity(tmp_path):
    file = tmp_path / "mine.txt"
    asked = ["quantizer=levels", f"quantizer.weight.file={file}"]
    file.write_text("-1 -0.25\n0 0.5  # a threshold of its own\n2\n")
    (job,) = compose_jobs(asked, multirun=False)
    weight = job.settings.config["quantizer"]["weight"]
    assert (weight["values"], weight["thresholds"]) == ([-1.0, 0.0, 2.0], [-0.25, 0.5])
    before = identity(*asked)
    file.write_text("-1\n0\n3\n")
    assert identity(*asked) != before


def test_a_format_may_choose_the_granularity_that_it_is_made_of_and_the_user_another():
    (job,) = compose_jobs(["quantizer=mxfp4"], multirun=False)
    assert str(job.settings.recipe.weight.granularity) == "per_group(32, pad)"
    (job,) = compose_jobs(["quantizer=mxfp4", "granularity=per_channel"], multirun=False)
    assert str(job.settings.recipe.weight.granularity) == "per_channel"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("quantizer.weight.bits=17", "quantizer.weight.bits=17: allowed are the integers 2 to 16"),
        ("data.calibration_size=0", "data.calibration_size=0: must be a whole number of at least 1"),
        ("model._target_=nope.Net", "model._target_=nope.Net: cannot be imported (No module named 'nope')"),
    ],
)
def test_a_refusal_needs_no_torch(tmp_path, asked, sentence):
    code = (
        "import sys; from qexp.cli import main\n"
        f"try: main(['{asked}'])\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"qexp: {sentence}"]


@pytest.mark.parametrize("granularity", [PerChannel(9), PerBlock(2, 2), PerGroup(5)], ids=str)
def test_blocks_that_do_not_fit_are_blamed_on_the_granularity(granularity):
    with pytest.raises(ValueError) as error:
        granularity.param_shape((7,))
    assert blamed(error.value).startswith("granularity: ")


def test_the_sentence_about_a_rounding_that_no_engine_has_is_one():
    recipe = Recipe(activation=Scheme(rounding=Floor()))
    assert recipe.simulation_only == "activations are rounded by floor, while engines round half to even"


def test_weights_of_single_layers_have_formats_of_their_own():
    given = ["+quantizer.layers.stem.conv.bits=4", "+quantizer.layers.stage1.0.conv1.convention=full_range"]
    (job,) = compose_jobs(given, multirun=False)
    recipe = job.settings.recipe
    grids = [recipe.weight_of(name).grid for name in ("stem.conv", "stage1.0.conv1", "head")]
    assert [(grid.bits, grid.convention) for grid in grids] == [(4, "restricted"), (8, "full_range"), (8, "restricted")]
    assert job.settings.label.startswith("resnet8 W8A8* ")
    for wrong, sentence in {
        "+quantizer.layers.stem=4": "quantizer.layers.stem=4: must name a layer and an option",
        "+quantizer.layers.stem.conv.foo=4": "quantizer.layers.stem.conv.foo=4: qexp.quant.grid.IntegerGrid has no",
        "+quantizer.layers.stem.conv.bits=99": "quantizer.layers.stem.conv.bits=99: allowed are the integers",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            compose_jobs([wrong], multirun=False)


def test_many_jobs_are_composed_in_several_processes_with_the_same_result():
    given = ["seed=range(0,70)", "calibration=minmax,mse", "model.width=4,8"]
    code = f"from qexp.jobs import compose_jobs; print(*(job.run_id for job in compose_jobs({given!r}, True)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    serial = [job.run_id for job in compose_jobs(given, multirun=True)]  # here torch is loaded
    assert "torch" in sys.modules
    assert done.stdout.split() == serial
    wrong = [*given, "calibration=minmax,nope"]
    refused = subprocess.run([sys.executable, "-m", "qexp", "-m", *wrong], capture_output=True, text=True, cwd=ROOT)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("qexp: calibration=nope: no such option; allowed are")
