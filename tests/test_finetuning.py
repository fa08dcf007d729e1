"""Fine-tuning from end to end: where it starts, what it leaves, how it goes on after a kill, what it refuses."""

import csv
import shutil
import subprocess
import sys
import time

import pytest
import torch

from qexp import finetuning
from qexp.finetune.execute import ExecuteFineTune
from qexp.jobs import compose_jobs
from qexp.quant.convert import layers, quantizers
from qexp.run import run
from qexp.sections import ConfigError
from qexp.store import StoreError, run_id

FAST = [
    "model.width=4", "trainer.epochs=4", "data.batch_size=128", "data.calibration_size=64", "quantizer=int4",
    "engine=none", "logger=none",
]  # fmt: skip
EPOCHS = ["finetune.epochs=3", "finetune.optimizer.lr=0.003"]
KINDS = ["ste", "lsq", "stochastic", "low_precision", "batchnorm_corrected", "lsq_plus", "pact", "dorefa", "noise"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder for all, so that the float network is trained once."""
    return tmp_path_factory.mktemp("outputs")


def settings_of(outputs, *overrides):
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
    return job.settings


def start(outputs, *overrides):
    return run(settings_of(outputs, *overrides))


def state(job):
    return {name: tensor.clone() for name, tensor in job.quantized.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_starts_from_the_result_of_ptq_and_changes_it(outputs):
    ptq, qat = start(outputs), start(outputs, "finetune=ste", *EPOCHS)
    assert qat.metrics["acc/ptq"] == ptq.metrics["acc/sim"]
    assert qat.metrics["sqnr/ptq_db"] == ptq.metrics["sqnr/output_db"]
    assert qat.metrics["finetune/weight_change"] > 0
    with (qat.folder / "finetune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["weight_change"]) == qat.metrics["finetune/weight_change"]


@pytest.fixture(scope="module")
def whole(outputs):
    """Undisturbed trainings by kind, with logits right before and after they were settled; each is made once."""
    images, made = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    settle_ = finetuning._settle_

    def whole(kind):
        seen = {}

        def looking(model):
            for quantizer in quantizers(model):
                quantizer.mode = finetuning.Mode.QUANTIZE
            with torch.no_grad():
                seen["before"] = model.eval()(images)
            settle_(model)
            with torch.no_grad():
                seen["after"] = model.eval()(images)

        if kind not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finetuning, "_settle_", looking)
                made[kind] = start(outputs, *in_full(kind)), seen
        return made[kind]

    return whole


def in_full(kind):
    return [f"finetune={kind}", *EPOCHS, "finetune.distill=0.5", "finetune.gradual=[8]"]


@pytest.fixture
def beside(outputs, whole, tmp_path):
    """A folder for outputs with the float network of all others in it."""
    whole(KINDS[0])
    shutil.copytree(outputs / "cache", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_settled_is_what_was_evaluated(whole, kind):
    job, seen = whole(kind)
    assert torch.equal(seen["before"], seen["after"])
    assert not [name for name, _ in job.quantized.named_parameters() if "learned" in name]
    assert all(quantizer.estimator is None for quantizer in quantizers(job.quantized))


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_and_ends_as_an_undisturbed_one(whole, beside, kind, monkeypatch):
    undisturbed, _ = whole(kind)
    begin = ExecuteFineTune.on_train_epoch_start

    def killed(self, trainer, task):
        if trainer.current_epoch == 2:
            raise SystemExit(143)
        begin(self, trainer, task)

    monkeypatch.setattr(ExecuteFineTune, "on_train_epoch_start", killed)
    with pytest.raises(SystemExit):
        start(beside, *in_full(kind))
    assert not list(beside.glob("runs/*"))
    epochs = []

    def counted(self, trainer, task):
        epochs.append(trainer.current_epoch)
        begin(self, trainer, task)

    monkeypatch.setattr(ExecuteFineTune, "on_train_epoch_start", counted)
    resumed = start(beside, *in_full(kind))
    assert epochs == [2]
    assert equal(state(undisturbed), state(resumed))
    assert undisturbed.history == resumed.history
    assert not list(beside.glob(".unfinished/*.finetune"))


def test_a_kill_at_any_moment_leaves_what_the_same_command_finishes(outputs, beside):
    chosen = ["finetune=lsq", "finetune.epochs=8"]
    whole = start(outputs, *chosen)
    command = [sys.executable, "-m", "qexp", *FAST, *chosen, f"paths.outputs={beside}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waited = time.monotonic()
    while not list(beside.glob(".unfinished/*.finetune/last.ckpt")) and time.monotonic() - waited < 60:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(beside.glob("runs/*/metrics.json")), "the run ended before it could be killed"
    assert equal(state(whole), state(start(beside, *chosen)))


def test_a_damaged_checkpoint_is_told_and_not_read(outputs, monkeypatch):
    chosen = settings_of(outputs, "finetune=ste", *EPOCHS, "seed=5")
    folder = outputs / ".unfinished" / f"{run_id(chosen.config)}.finetune"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(StoreError, match="last.ckpt is damaged.*; delete .* to fine-tune from the start"):
        run(chosen)


def test_the_gradient_of_a_staircase_moves_no_weight(outputs):
    job = start(outputs, "finetune=no_gradient", *EPOCHS)
    assert job.metrics["finetune/weight_change"] == 0


def test_the_control_trains_the_float_network(outputs):
    job = start(outputs, "finetune=float", *EPOCHS)
    assert job.metrics["finetune/weight_change"] > 0
    assert {"acc/control", "acc/ptq", "acc/sim"} <= job.metrics.keys()
    assert job.history[-1]["loss"] < job.history[0]["loss"]


def test_sites_that_read_one_tensor_learn_one_scale(outputs):
    job = start(outputs, "finetune=lsq", *EPOCHS)
    scales = {q.site: float(q.scale) for q in quantizers(job.quantized) if not q.is_weight}
    assert scales["stage1.0.conv1.input"] == scales["stage1.0.add.b"]
    assert scales["stage1.0.conv1.input"] != scales["stage1.0.conv2.input"]


@pytest.mark.parametrize(("kind", "stuck"), [("low_precision_nearest", True), ("low_precision", False)])
def test_small_updates_are_lost_to_the_nearest_code_and_kept_by_stochastic_rounding(outputs, kind, stuck):
    sgd = ["finetune.optimizer._target_=torch.optim.SGD", "finetune.optimizer.lr=0.01", "finetune.epochs=2"]
    job = start(outputs, f"finetune={kind}", *sgd)
    changed = [row["changed_codes"] for row in job.history]
    assert changed == [0, 0] if stuck else min(changed) > 0
    for _, layer in layers(job.quantized):
        if hasattr(layer, "weight_quantizer"):
            quantizer = layer.weight_quantizer
            assert torch.equal(quantizer(layer.weight), layer.weight)  # stored on the grid


def test_ranges_follow_until_they_freeze(outputs, monkeypatch):
    ranges = []
    end = ExecuteFineTune.on_train_epoch_end

    def looking(self, trainer, task):
        ranges.append({q.site: q.scale.clone() for q in quantizers(task.net)})
        end(self, trainer, task)

    monkeypatch.setattr(ExecuteFineTune, "on_train_epoch_end", looking)
    start(outputs, "finetune=ste", *EPOCHS, "finetune.observe=2")
    first, second, third = ranges
    assert not equal(first, second)
    assert equal(second, third)


def test_widths_fall_to_the_final_one(outputs, monkeypatch):
    widths = []
    end = ExecuteFineTune.on_train_epoch_end

    def looking(self, trainer, task):
        widths.append({q.grid.bits for q in quantizers(task.net)})
        end(self, trainer, task)

    monkeypatch.setattr(ExecuteFineTune, "on_train_epoch_end", looking)
    start(outputs, "finetune=lsq", *EPOCHS, "finetune.gradual=[8,6]")
    assert widths == [{8}, {6}, {4}]


@pytest.mark.parametrize("kind", ["recalibrated", "weights_then_dynamic", "dynamic"])
def test_other_ways_to_run_what_was_trained(outputs, kind):
    job = start(outputs, f"finetune={kind}", *EPOCHS)
    activations = [q for q in quantizers(job.quantized) if not q.is_weight]
    assert all(q.dynamic == ("dynamic" in kind) for q in activations)
    assert job.metrics["acc/sim"] > 0.5


def test_a_trained_network_runs_in_the_engine_code_for_code(outputs):
    job = start(outputs, "finetune=lsq", *EPOCHS, "engine=onnxruntime", "engine.seconds=0.05")
    codes = {name: job.metrics[f"parity/{name}"] for name in ("identical", "max_step", "argmax_flips")}
    assert codes["argmax_flips"] == 0 and codes["max_step"] <= 1 and codes["identical"] > 0.999
    assert job.metrics["int8/mac_coverage"] == 1


def test_a_training_that_diverges_says_where_and_keeps_the_last_good_epoch(outputs):
    chosen = ["finetune=float", "finetune.epochs=3", "finetune.scheduler=null"]
    with pytest.raises(ValueError, match=r"training diverged: the loss is \w+ in epoch \d, step \d+") as caught:
        start(outputs, *chosen, "finetune.optimizer._target_=torch.optim.SGD", "finetune.optimizer.lr=1e30")
    assert "lower finetune.optimizer.lr" in str(caught.value)


def test_a_learned_scale_that_becomes_impossible_names_its_site(outputs):
    sgd = ["finetune.optimizer._target_=torch.optim.SGD", "finetune.optimizer.lr=10", "finetune.range_lr=absolute"]
    chosen = ["finetune=lsq", *sgd]
    with pytest.raises(ValueError, match=r"(weight|input|a|b|output): its learned scale became"):
        start(outputs, *chosen)


REFUSED = {
    "method=qat": "finetune=none: method=qat needs one that trains",
    "method=ptq finetune=ste": "finetune=ste: method=ptq does not train",
    "finetune=ste finetune.epochs=0": "finetune.epochs=0: must be an integer of at least 1",
    "finetune=ste finetune.observe=4": "finetune.observe=4: must be between 0 and finetune.epochs=3",
    "finetune=ste finetune.start=3": "finetune.start=3: must be between 0 and 2",
    "finetune=batchnorm_frozen finetune.batchnorm_freeze=5": "finetune.batchnorm_freeze=5: must be between 0 and",
    "finetune=ste finetune.batchnorm_freeze=1": "finetune.batchnorm_freeze=1: needs batchnorm=batch",
    "finetune=ste finetune.batchnorm=soft": "finetune.batchnorm='soft': allowed are folded, batch, corrected",
    "finetune=ste finetune.distill=1.5": "finetune.distill=1.5: must be between 0 and 1",
    "finetune=lsq finetune.observe=1": "finetune.observe=1: ranges that are learned do not follow the data",
    "finetune=lsq quantizer=nf4": "finetune.weight=lsq: a scale that is learned needs an integer grid",
    "finetune=ste finetune.gradual=[8,6,5]": "needs more than 3 epochs",
    "finetune=ste finetune.gradual=[99]": "must be a list of widths from 1 to 16",
    "finetune=ste finetune.weight.gradient=soft": "finetune.weight.gradient='soft': allowed are clipped, identity",
    "finetune=ste +finetune.speed=3": "finetune.speed: no such key",
    "finetune=ste finetune.epoch=3": "finetune.epoch: no such key; allowed are epochs,",
    "finetune=ste finetune.optimizer=null": "finetune.optimizer=null: must hold a _target_",
    "finetune=low_precision finetune.batchnorm=batch": "needs batchnorm=folded",
    "finetune=dorefa finetune.batchnorm=batch": "finetune.batchnorm=batch: weight=dorefa needs batchnorm=folded",
    "finetune=dorefa finetune.start=1": "finetune.start=1: weight=dorefa is trained in its own form",
    "finetune=ste finetune.range_lr=slow": "finetune.range_lr='slow': allowed are absolute, relative",
    "finetune=ste finetune.after=later": "finetune.after='later': allowed are convert, recalibrate",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_refused_before_any_compute(asked):
    with pytest.raises(ConfigError) as caught:
        compose_jobs(asked.split(), multirun=False)
    assert REFUSED[asked] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("finetune.optimizer.lr=-1", "finetune.optimizer"),
        ("finetune.optimizer._target_=torch.optim.Nadamax", "finetune.optimizer._target_=torch.optim.Nadamax"),
        ("finetune.optimizer._target_=torch.nn.Linear", "finetune.optimizer"),
        ("finetune.frozen=[nothing.*]", "finetune.frozen='nothing.*': matches no parameter"),
    ],
)
def test_optimizers_that_cannot_be_made_are_refused_before_training(tmp_path, asked, told):
    chosen = settings_of(tmp_path, "finetune=ste", asked)
    with pytest.raises((ConfigError, ValueError)) as caught:
        run(chosen)
    assert told in str(caught.value)
    assert "frozen" in asked or not list(tmp_path.glob("cache/float/*"))  # refused before the float network trained
