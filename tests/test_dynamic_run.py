"""Whole runs of a small encoder on texts: ranges of each call, fine-tuning, what is said, and what is refused."""

import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from qexp import prepare
from qexp.cli import main
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.jobs import compose_jobs
from qexp.report import terminal
from qexp.run import run
from qexp.sections import ConfigError
from qexp.tracking import METRICS

WORDS = {"plant": "rose leaf tree stem root", "tool": "gear bolt nut axle wheel", "food": "soup bread salt rice oil"}
ENGINES = ("onnxruntime", "openvino")
SMALL = ["model=bert_tiny_random", "model.layers=1", "data=text_csv", "data.length=12"]
FAST = ["data.calibration_size=16", "trainer.epochs=1", "engine.seconds=0.02", "logger=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """90 texts of three classes in a file, and the outputs of all runs beside it."""
    folder, generator = tmp_path_factory.mktemp("texts"), random.Random(0)
    rows = ["text,label"]
    for number in range(90):
        label = list(WORDS)[number % 3]
        words = (*WORDS[label].split(), "the", "of", "and", "one")
        rows.append(f"{' '.join(generator.choices(words, k=generator.randint(2, 15)))},{label}")
    (folder / "texts.csv").write_text("\n".join(rows) + "\n")
    return folder


def overrides(folder, *asked: str) -> list[str]:
    return [*SMALL, *FAST, f"data.path={folder / 'texts.csv'}", f"paths.outputs={folder / 'outputs'}", *asked]


def told(capsys, words: list[str]) -> tuple[dict, str]:
    """The metrics of a run that the command line was asked for, and what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    place = next(line for line in printed.splitlines() if line.startswith("results in ")).removeprefix("results in ")
    with open(f"{place.split(';')[0]}/metrics.json") as file:
        return json.load(file), printed


def test_a_dynamic_run_leaves_its_figures_and_says_who_depends_on_the_batch(folder, capsys):
    metrics, printed = told(capsys, overrides(folder, "method=dynamic"))
    bare = {name.partition("/")[2] if name.startswith(ENGINES) else name for name in metrics}
    assert bare <= METRICS.keys() and metrics["status"] == "finished"
    one, groups = ({k: metrics[f"{name}/{k}"] for k in METRICS if f"{name}/{k}" in metrics} for name in ENGINES)
    assert (one["dynamic/within_sample"], groups["dynamic/within_sample"]) == (False, True)
    assert one["dynamic/batch_samples"] == groups["dynamic/batch_samples"] == 16
    assert 10 < one["dynamic/batch_sqnr_db"] < 90
    assert groups["dynamic/batch_sqnr_db"] is None or groups["dynamic/batch_sqnr_db"] > one["dynamic/batch_sqnr_db"]
    assert (one["int8/formats"], groups["int8/formats"]) == ("uint8 affine", "int8 restricted")
    assert one["parity/local_identical"] >= 0.999 and one["parity/local_max_step"] <= 1
    assert groups["parity/codes"] == 0 and "parity/identical" not in groups
    for figures in one, groups:
        products = "encoder.layers.0.attention.scores, encoder.layers.0.attention.context"
        assert figures["int8/island_names"] == products and 0.8 < figures["int8/mac_coverage"] < 1
        assert figures["parity/output_sqnr_db"] > 40 and figures["parity/argmax_flips"] == 0
        assert figures["parity/timed_sqnr_db"] is None or figures["parity/timed_sqnr_db"] > 40
    lines = printed.splitlines()
    cut = f"data: {metrics['data/truncated']} of 90 texts have more than 12 tokens and were truncated (data.length)"
    assert metrics["data/truncated"] > 1 and cut in lines
    beware = f"of 16 samples {one['dynamic/batch_flips']} are decided differently alone (SQNR"
    assert any(
        line.startswith(f"beware: onnxruntime: the range of each call is one for the whole batch: {beware}")
        for line in lines
    )
    assert any(line.startswith("openvino: the result of a sample does not depend on its batch") for line in lines)
    assert "dynamic" in next(line for line in lines if line.startswith("activations "))
    assert "bert_tiny_random W8A8 per_channel dynamic per_tensor s0" in printed


def test_ranges_of_tokens_are_run_by_one_engine_and_refused_by_the_other_in_a_sentence(folder, capsys):
    asked = ["granularity=per_token", "quantizer.activation.convention=restricted"]
    metrics, printed = told(capsys, overrides(folder, "method=dynamic", *asked))
    assert metrics["engine/winner"] == "onnxruntime"
    why = "openvino refuses the graph: it computes ranges of each call for groups (per_group), not for tokens"
    assert metrics["engine/refused"] == why and f"without openvino: {why}" in printed.splitlines()
    assert metrics["dynamic/within_sample"] and metrics["parity/local_identical"] >= 0.999
    assert metrics["parity/output_sqnr_db"] > 40
    assert "beware" not in printed


def test_what_no_engine_computes_in_each_call_is_simulated_and_says_why(folder, capsys):
    metrics, printed = told(capsys, overrides(folder, "method=dynamic", "calibration=percentile"))
    assert "acc/engine" not in metrics and 0 <= metrics["acc/sim"] <= 1
    assert metrics["dynamic/within_sample"] is False
    assert "beware: the range of each call is one for the whole batch: of 16 samples" in printed
    assert metrics["engine/refused"].startswith("activations are uint8 affine, per_tensor, percentile(99.99), dynamic,")


def test_a_network_of_convolutions_is_simulated_and_each_engine_says_why(folder, capsys):
    words = ["method=dynamic", "trainer.epochs=1", "logger=none", f"paths.outputs={folder / 'outputs'}"]
    metrics, printed = told(capsys, words)
    assert metrics["engine/refused"] == (
        "onnxruntime refuses the graph: stem.conv.input has ranges of each call, which engines compute for linear "
        "layers with int8 weights; openvino refuses the graph: it computes ranges of each call for linear layers, "
        "and stem.conv is none"
    )
    assert abs(metrics["acc/drop"]) < 0.05 and "acc/engine" not in metrics
    assert "beware: the range of each call is one for the whole batch: of 16 samples" in printed


def test_training_through_quantizers_ends_in_a_network_that_both_engines_run(folder):
    asked = overrides(folder, "finetune=ste", "finetune.epochs=1", "finetune.optimizer.lr=0.001")
    (job,) = compose_jobs(asked, multirun=False)
    done = run(job.settings)
    assert done.metrics["status"] == "finished" and done.metrics["finetune/weight_change"] > 0
    for name in ENGINES:
        assert done.metrics[f"{name}/int8/mac_coverage"] == 1 and done.metrics[f"{name}/int8/islands"] == 0
        assert done.metrics[f"{name}/parity/local_identical"] >= 0.999
        assert done.metrics[f"{name}/parity/local_max_step"] <= 1
        assert done.metrics[f"{name}/parity/argmax_flips"] == 0
    # One network for both, in formats that both multiply.
    assert done.metrics["onnxruntime/int8/formats"] == done.metrics["openvino/int8/formats"]


METRIC = {"within_sample": True, "batch_sqnr_db": None, "batch_samples": 16, "batch_flips": 0}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "the result of a sample does not depend on its batch"),
        (
            {"batch_sqnr_db": 137.04},
            "the result of a sample does not depend on its batch, but for the rounding of sums (SQNR 137.0 dB)",
        ),
        (
            {"within_sample": False, "batch_sqnr_db": 31.26, "batch_flips": 2},
            "beware: the range of each call is one for the whole batch: of 16 samples 2 are decided differently alone "
            "(SQNR 31.3 dB)",
        ),
    ],
)
def test_what_ranges_of_each_call_mean_for_a_sample_is_one_line(change, line):
    metrics = {f"dynamic/{name}": value for name, value in (METRIC | change).items()}
    assert terminal._of_batch("", metrics) == line
    assert terminal._of_batch("", {}) is None


class WrongAlone(OnnxRuntime):
    """Right in every batch but that of one sample."""

    def session(self, model, shape, threads, traced=False):
        inner = super().session(model, shape, threads, traced)
        run = inner.run
        integers = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        inner.run = lambda batch: [-x if integers and shape[0] == 1 else x for x in run(batch)]
        return inner


def test_an_engine_that_is_wrong_on_the_batch_that_is_timed_is_told(folder, capsys, monkeypatch):
    monkeypatch.setattr("qexp.engines.onnxruntime.OnnxRuntime", WrongAlone)
    words = ["engine=onnxruntime", "trainer.epochs=1", "engine.seconds=0.02", "logger=none", "store=rerun"]
    metrics, printed = told(capsys, [*words, f"paths.outputs={folder / 'outputs'}"])
    assert metrics["parity/output_sqnr_db"] is None or metrics["parity/output_sqnr_db"] > 40
    assert metrics["parity/timed_sqnr_db"] == pytest.approx(10 * np.log10(1 / 4), abs=0.1)
    line = "beware: onnxruntime at engine.batch_size=1 computes something else than the simulation (SQNR -6.0 dB)"
    assert line in printed


ATTENTION = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.attention = nn.Embedding(2048, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(self.attention(h, h, h)[0].mean(1))
"""


def refused(folder, *asked: str) -> str:
    """The sentence with which a run ends before anything is trained."""
    with pytest.raises(ConfigError) as refusal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "train_", lambda *_: pytest.fail("trained"))
        (job,) = compose_jobs(overrides(folder, *asked), multirun=False)
        run(job.settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


FORMS = {
    "engine=openvino granularity=per_token": "openvino: openvino refuses the graph: it computes ",
    "engine=onnxruntime granularity=per_token_group granularity.activation.size=16": "onnxruntime: onnxruntime refuses",
    "engine=openvino granularity=per_token_group granularity.activation.size=24 granularity.activation.pad=true": (
        "openvino: openvino refuses the graph: groups of 24 do not divide the 32 features of "
    ),
}


@pytest.mark.parametrize("words", FORMS)
def test_a_form_that_the_engine_of_ones_choice_lacks_is_refused(folder, words):
    symmetric = "quantizer.activation.convention=restricted"
    sentence = refused(folder, "method=dynamic", symmetric, "seed=77", *words.split())
    assert sentence.startswith(f"engine={FORMS[words]}") and sentence.endswith("; engine=none simulates it")


def test_attention_that_computes_past_its_layers_is_refused_with_a_way_out(folder, monkeypatch):
    (folder / "attending.py").write_text(ATTENTION)
    monkeypatch.syspath_prepend(folder)
    small = [word for word in SMALL if not word.startswith("model")]
    (job,) = compose_jobs(
        [*small, *FAST, f"data.path={folder / 'texts.csv'}", "model=custom", "model._target_=attending.Net"],
        multirun=False,
    )
    with pytest.raises(ConfigError, match="^quantizer: layer 'attention' is nn.MultiheadAttention, .* or exclude the"):
        prepare.ready(job.settings)


def test_a_file_without_labels_is_refused_by_line_and_column(folder):
    path = folder / "unlabelled.csv"
    path.write_text("text,label\none,a\ntwo,\nthree,b\n")
    assert refused(folder, f"data.path={path}") == f"data.path={path}: 1 row has no text or no label (line 3)"
    path.write_text("text\none\ntwo\n")
    assert refused(folder, f"data.path={path}").startswith(f"data.label=label: {path} has no such column; there are")
    path.write_text("text,label\none,a\ntwo,a\n")
    assert refused(folder, f"data.path={path}").endswith("holds only the class 'a', but at least 2 classes are needed")


def test_texts_and_sequences_over_the_limit_are_refused_with_both_numbers(folder):
    sentence = refused(folder, "data.too_long=refuse")
    assert sentence.startswith("data.too_long=refuse: ") and "have more than data.length=12 tokens" in sentence
    assert refused(folder, "model.length=8").endswith("(12 tokens are more than the 8 positions)")
    assert refused(folder, "model.vocabulary=16").endswith("but the vocabulary has 0 to 15)")


def test_folders_without_weights_or_with_those_of_another_network_are_refused(folder):
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    words = [word for word in overrides(folder) if not word.startswith("model")]

    def ends(weights) -> str:
        with pytest.raises(ConfigError) as refusal:
            asked = [*words, "model=minilm", f"model.weights={weights}", "data.vocabulary=null"]
            (job,) = compose_jobs(asked, multirun=False)
            prepare.ready(job.settings)
        return str(refusal.value)

    assert ends(empty).startswith(f"model.weights={empty}: ")
    assert ends(empty).endswith("model.safetensors")
    (empty / "model.safetensors").write_bytes(b"")
    (empty / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert ends(empty) == f"model.weights={empty}: config.json says model_type=gpt2, but must say bert"
    shutil.rmtree(empty)
    assert ends(empty).startswith(f"model.weights={empty}: must be package, a folder that exists, or owner/name")


def test_a_missing_extra_is_named_with_the_command_that_installs_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    sentence = refused(folder, "data.vocabulary=package")
    assert "tokenizers" in sentence and "pip install 'qexp[" in sentence


def test_the_batch_changes_nothing_where_ranges_lie_within_a_sample():
    """Said of the simulation; here of its parts, to the bit."""
    from qexp import passes
    from qexp.quant.granularity import PerToken
    from qexp.quant.grid import IntegerGrid
    from qexp.quant.quantizer import Mode, Quantizer
    from qexp.quant.recipe import Scheme

    class Data:
        def test_dataloader(self):
            return [(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), None)]

    for granularity, within in (PerToken(), True), (Scheme().granularity, False):
        site = Quantizer(Scheme(IntegerGrid(8, "restricted"), granularity, dynamic=True))
        site.mode = Mode.QUANTIZE
        figures = passes.batch_dependence(nn.Sequential(site), Data())
        assert (figures["dynamic/within_sample"], figures["dynamic/batch_samples"]) == (within, 16)
        if within:
            assert (figures["dynamic/batch_sqnr_db"], figures["dynamic/batch_flips"]) == (np.inf, 0)
        else:
            assert 10 < figures["dynamic/batch_sqnr_db"] < 90
