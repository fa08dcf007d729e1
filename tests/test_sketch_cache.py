"""One calibration pass serves all calibrations of a float network, and nobody can tell from the results."""

import json
import shutil
from pathlib import Path

import pytest

import qexp.passes
from qexp.jobs import compose_jobs
from qexp.quant.convert import quantizers
from qexp.quant.quantizer import Mode
from qexp.run import Run, run
from qexp.store import StoreError

FAST = ["trainer.epochs=1", "model.width=4", "engine.seconds=0.05", "logger=none"]
ENGINES = ("onnxruntime", "openvino")
MEASURED = ("time/", "latency/", "size/", "engine/winner")
FROM_ONE_PASS = ["calibration=percentile", "calibration=moving_average", "calibration=entropy"]


def start(outputs: Path, *overrides: str) -> Run:
    (job,) = compose_jobs([*FAST, f"paths.outputs={outputs}", *overrides], multirun=False)
    return run(job.settings)


@pytest.fixture
def passes(monkeypatch) -> list[list[str]]:
    """From now on, for each calibration pass, the sites that look."""
    real, found = qexp.passes.calibration_pass, []

    def counted(model, *others):
        found.append([site.site for site in quantizers(model) if site.mode is Mode.OBSERVE])
        real(model, *others)

    monkeypatch.setattr(qexp.passes, "calibration_pass", counted)
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Run:
    """A run that has made the pass; min-max."""
    return start(tmp_path_factory.mktemp("outputs"), "engine=none")


@pytest.fixture
def outputs(first, tmp_path) -> Path:
    """An outputs folder of one's own, with both caches of the first run."""
    shutil.copytree(first.folder.parents[1] / "cache", tmp_path / "cache")
    return tmp_path


@pytest.fixture
def fresh(outputs, tmp_path_factory) -> Path:
    """An outputs folder that knows the float network and no pass."""
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copytree(outputs / "cache" / "float", folder / "cache" / "float")
    return folder


def certain(job: Run) -> dict:
    """All that repeats to the bit. With engines the plain names are those of the faster one, which is measured."""
    metrics = json.loads((job.folder / "metrics.json").read_text())
    plain = not any(name.startswith(ENGINES) for name in metrics)
    kept = {name: value for name, value in metrics.items() if plain or name.startswith(ENGINES) or name == "acc/fp32"}
    bare = {name: name.partition("/")[2] if name.startswith(ENGINES) else name for name in kept}
    return {name: value for name, value in kept.items() if not bare[name].startswith(MEASURED)}


def layers(job: Run) -> str:
    return (job.folder / "layers.csv").read_text()


def ranges(job: Run) -> dict:
    return {name: tensor.tolist() for name, tensor in job.quantized.state_dict().items() if "quantizer" in name}


@pytest.mark.parametrize("calibration", FROM_ONE_PASS)
def test_another_calibration_makes_no_pass_and_gives_what_a_pass_gives(calibration, outputs, fresh, passes, capfd):
    served = start(outputs, "engine=none", calibration)
    assert not passes
    assert "calibration pass from the cache" in "".join(capfd.readouterr())
    made = start(fresh, "engine=none", calibration)
    assert len(passes) == 1
    assert "calibration pass from the cache" not in "".join(capfd.readouterr())
    assert certain(served) == certain(made)
    assert certain(made).keys() >= {"acc/sim", "sqnr/output_db", "agree/argmax"}
    assert layers(served) == layers(made)
    assert ranges(served) == ranges(made)


def test_the_first_pass_serves_what_quantizes_in_another_way(outputs, passes):
    for same in "quantizer=int4", "granularity=per_token":
        start(outputs, "engine=none", same)
        assert not passes, same


@pytest.mark.parametrize(
    "other",
    [
        ["data.calibration_size=16"],
        ["seed=1"],
        ["granularity=per_channel_both"],
        ["calibration=moving_average", "calibration.activation.constant=0.010000001"],
    ],
    ids=" ".join,
)
def test_what_a_pass_would_see_otherwise_makes_a_new_one(other, outputs, passes):
    made = start(outputs, "engine=none", *other)
    assert len(passes) == 1
    assert len(passes[0]) == sum(name.endswith(".scale") and "weight" not in name for name in ranges(made))
    again = start(outputs, "engine=none", *other)
    assert len(passes) == 1
    assert ranges(again) == ranges(made)


def test_a_new_pass_keeps_what_was_known_before(outputs, passes):
    start(outputs, "engine=none", "calibration=moving_average", "calibration.activation.constant=0.3")
    start(outputs, "engine=none", "calibration=percentile")
    start(outputs, "engine=none", "calibration=moving_average")
    assert len(passes) == 1


def test_cross_entropy_of_the_logits_needs_no_pass_of_its_own_and_runs_in_both_engines(outputs, fresh, passes):
    served = start(outputs, "calibration=cross_entropy")
    assert passes == []
    made = start(fresh, "calibration=cross_entropy")
    assert "head.fc.output" in passes[0] and len(passes[0]) > 10
    assert certain(served) == certain(made)
    assert ranges(served) == ranges(made)
    rows = {row.split(",")[0]: row for row in layers(served).splitlines()}
    assert "cross_entropy(100)" in rows["head.fc.output"]
    metrics = certain(served)
    for engine in ENGINES:
        assert metrics[f"{engine}/parity/identical"] > 0.99
        assert metrics[f"{engine}/acc/engine"] > 0.1
        assert metrics[f"{engine}/int8/mac_coverage"] == 1
        assert served.graphs[engine].SerializeToString() == made.graphs[engine].SerializeToString()


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "note broken": lambda path: path.with_name("cache.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_named_with_the_way_out(damage, outputs, passes):
    (tensors,) = outputs.glob("cache/sketch/*/tensors.pt")
    DAMAGES[damage](tensors)
    message = "sketch cache .*tensors.pt is damaged .*; delete .* to calibrate again"
    with pytest.raises(StoreError, match=message) as error:
        start(outputs, "engine=none", "calibration=mse")
    assert "\n" not in str(error.value) and str(tensors.parent) in str(error.value)
    assert not list(outputs.glob("runs/*")) and not passes


def test_a_pass_that_fails_leaves_nothing_behind(first, outputs, monkeypatch):
    shutil.rmtree(outputs / "cache" / "sketch")

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(qexp.passes, "calibration_pass", fails)
        start(outputs, "engine=none")
    assert not list(outputs.glob("cache/sketch/*"))
    assert ranges(start(outputs, "engine=none")) == ranges(first)
