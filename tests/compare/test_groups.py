"""Means and intervals against scipy.stats and a closed form; which runs belong together, and in which words."""

import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from qexp.compare import Mean, groups_of, mean_of, read, value_of
from qexp.compare.differences import brief, differences, same_word, texts
from qexp.compare.groups import metrics_of, origins, where
from qexp.sections import ConfigError

# A busy machine is no fault of these.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
finite = st.floats(-1e6, 1e6)


@patient
@given(st.lists(finite, min_size=2, max_size=40), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_scipy_stats(values, share):
    found = mean_of(values, share)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    error = stats.sem(values)
    if error > 1e-9 * (1 + abs(found.mean)):
        low, high = stats.t.interval(share, len(values) - 1, loc=np.mean(values), scale=error)
        assert found.half == pytest.approx((high - low) / 2, rel=1e-9)
    else:
        assert found.half <= 1e-5 * (1 + abs(found.mean))


def test_the_interval_of_two_is_cauchys():
    # With one degree of freedom Student's t is Cauchy's, whose quantile is a tangent.
    assert mean_of([1.0, 3.0]).half == pytest.approx(math.tan(math.pi * 0.475))


def test_one_value_has_no_interval_and_an_infinite_one_no_mean():
    assert mean_of([0.5]) == Mean(1, 0.5, None)
    assert mean_of([0.5, None]) == Mean(2, None, None)
    assert mean_of([]) == Mean(0, None, None)


def test_the_interval_holds_the_truth_in_95_of_100_cases():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 4))
    found = [mean_of(row) for row in draws]
    assert np.mean([abs(mean.mean - 3.0) <= mean.half for mean in found]) == pytest.approx(0.95, abs=0.011)


def test_groups_differ_in_settings_and_their_runs_in_seeds(make):
    make.grid()
    runs = read([make.outputs]).runs
    random.Random(0).shuffle(runs)
    groups = groups_of(runs)
    assert sorted(run.run_id for group in groups for run in group.runs) == sorted(run.run_id for run in runs)
    assert [group.settings for group in groups] == [
        {"calibration": calibration, "quantizer.bits": bits} for calibration in ("MinMax", "MSE") for bits in "48"
    ]
    for group in groups:
        assert sorted(run.config["seed"] for run in group.runs) == [0, 1, 2]
        assert len({run.group_id for run in group.runs}) == 1
    assert len({group.runs[0].group_id for group in groups}) == len(groups) == 4


def test_named_settings_group_whatever_else_differs(make):
    make.grid()
    runs = read([make.outputs]).runs
    by_calibration = groups_of(runs, ["calibration"])
    assert {group.name: len(group.runs) for group in by_calibration} == {"MinMax": 6, "MSE": 6}
    by_seed = groups_of(runs, ["seed"])
    assert [(group.settings, len(group.runs)) for group in by_seed] == [({"seed": str(seed)}, 4) for seed in range(3)]
    same = groups_of(runs, ["model"])
    assert [(group.name, len(group.runs)) for group in same] == [("resnet8", 12)]
    with pytest.raises(
        ConfigError, match=r"quantizer\.weigth: no run has such a setting; there are quantizer\.weight,"
    ):
        groups_of(runs, ["quantizer.weigth"])


def test_conditions_keep_what_the_table_says_in_any_spelling(make):
    make.grid()
    runs = read([make.outputs]).runs
    assert len(where(runs, [("calibration", "mse")])) == 6
    assert len(where(runs, [("calibration", "MinMax"), ("quantizer.weight.bits", "4")])) == 3
    assert len(where(runs, [("seed", "0,2")])) == 8
    with pytest.raises(
        ConfigError, match=r"--where calibration=entropy: no run has this value; there are MinMax, MSE$"
    ):
        where(runs, [("calibration", "entropy")])


def test_a_sweep_speaks_in_the_words_of_its_command_and_in_its_order(make):
    entries = []
    for word, calibration in ("mse", make.MSE), ("minmax", make.MINMAX):
        for seed in 0, 1:
            folder = make.run(make.config(seed, 8, calibration))
            entries.append({"run_id": folder.name, "choice": {"calibration": word, "seed": str(seed)}})
    records = read([make.sweep(entries)])
    groups = groups_of(records.runs)
    assert [(group.settings, len(group.runs)) for group in groups] == [
        ({"calibration": "mse"}, 2), ({"calibration": "minmax"}, 2),
    ]  # fmt: skip


def test_the_accuracy_is_the_engines_then_the_simulations_then_that_of_float(make):
    figures = {"acc/engine": 0.3, "acc/sim": 0.2, "acc/fp32": 0.1}
    for expected in 0.3, 0.2, 0.1:
        make.run(of_metrics={**figures, "status": "finished"}, name=str(expected))
        figures.pop(next(iter(figures)))
    assert [value_of(run, "acc") for run in read([make.outputs]).runs] == [0.1, 0.2, 0.3]


def test_figures_are_those_asked_for_or_the_usual_ones(make):
    make.run(of_metrics=make.metrics(0.9, **{"acc/ptq": 0.8, "parity/faithful": True}))
    runs = read([make.outputs]).runs
    usual = metrics_of(runs)
    assert usual[:3] == ["acc/fp32", "acc/ptq", "acc"]
    assert "acc/control" not in usual
    assert metrics_of(runs, ["openvino/latency/int8_ms", "parity/faithful"])[1] == "parity/faithful"
    with pytest.raises(ConfigError, match="--metric acc/engin: no run has it; there are acc/engine, "):
        metrics_of(runs, ["acc/engin"])
    with pytest.raises(ConfigError, match="--metric engine/winner: is text"):
        metrics_of(runs, ["engine/winner"])


def test_what_runs_were_made_by_is_said_where_it_differs(make):
    for number in range(2):
        other = {"commit": str(number) * 40, "cpu": f"CPU {number}", "versions": {"torch": f"2.{number}", "numpy": "2"}}
        make.run(make.config(number), of_environment=make.environment(**other))
    said = origins(read([make.outputs]).runs)
    assert said == [
        "made by 2 commits (0000000, 1111111)",
        "with different versions (torch 2.0, 2.1)",
        "on 2 processors (CPU 0, avx2; CPU 1, avx2), so latencies do not compare",
    ]


NAMES = st.sampled_from(["a", "b", "seed", "name", "_target_"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.sampled_from(["x", "a.X", "a.Y"]))
CONFIGS = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=8)


@patient
@given(st.lists(st.dictionaries(NAMES, CONFIGS, max_size=4), min_size=1, max_size=5))
def test_differences_are_there_where_configs_differ_and_have_one_text_each(configs):
    found = differences(configs)
    assert all(len(column) == len(configs) for column in found.values())
    for i, one in enumerate(configs):
        for j, other in enumerate(configs):
            if one == other:
                assert all(column[i] == column[j] for column in found.values())
    if len({repr(one) for one in configs}) == 1:
        assert not found


def test_sections_are_named_by_their_class_with_the_options_that_differ():
    percentile = {"_target_": "a.Percentile", "percentile": 99.9, "other": 1}
    values = [{"_target_": "a.MinMax"}, percentile, {**percentile, "percentile": 99.99}]
    assert texts(values) == ["MinMax", "Percentile 99.9", "Percentile 99.99"]
    assert texts([{"weight": value, "activation": value} for value in values]) == texts(values)
    assert texts([{"weight": values[0], "activation": value} for value in values]) == texts(values)
    one = {"weight": {"_target_": "a.B", "x": 1}, "activation": {"_target_": "a.C"}}
    other = {"weight": {"_target_": "a.B", "x": 2}, "activation": {"_target_": "a.D"}}
    assert texts([one, other]) == ["weight.x 1, activation C", "weight.x 2, activation D"]
    assert brief(one) == "B, C"
    assert differences([{"s": None}, {"s": values[0]}, {}]) == {"s": ["null", "MinMax", "—"]}


def test_the_same_word_in_another_spelling():
    assert same_word("percentile_99.9", "Percentile 99.9")
    assert not same_word("percentile_99.9", "percentile_99.99")
    assert not same_word("-1", "1")
