"""Every format, granularity, calibration and rounding of conf/ composes with every other."""

import copy
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from qexp.composing import conf_dir
from qexp.jobs import compose_jobs
from qexp.quant.convert import calibrating, quantize_
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Recipe, Scheme
from qexp.quant.sites import site_shapes

FIELDS = {"quantizer": "grid", "granularity": "granularity", "calibration": "calibration", "rounding": "rounding"}
NAMES = {axis: sorted(path.stem for path in Path(conf_dir(), axis).glob("*.yaml")) for axis in FIELDS}
USUAL = {"quantizer": "int4", "granularity": "per_channel", "calibration": "minmax", "rounding": "half_even"}
LEVELS = Path(__file__).parent / "quant" / "levels.txt"
MORE = {"levels": [f"quantizer.weight.file={LEVELS}"], "per_group": ["granularity.weight.size=3"]}
GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = {
    "weight": torch.randn(4, 6, 2, 2, generator=GENERATOR),
    "activation": torch.randn(2, 6, 3, 3, generator=GENERATOR).relu(),
}


@cache
def parts(axis: str, name: str) -> dict[str, object]:
    """What one option of one axis says of weights and of activations."""
    (job,) = compose_jobs([f"{axis}={name}", *MORE.get(name, [])], multirun=False)
    recipe = job.settings.recipe
    return {tensor: getattr(getattr(recipe, tensor), FIELDS[axis]) for tensor in SAMPLES}


def quantizer_of(scheme: Scheme, x: torch.Tensor, is_weight: bool) -> Quantizer:
    quantizer = Quantizer(scheme, tuple(x.shape), "site", is_weight)
    if is_weight:
        quantizer.calibrate(x)
    else:
        quantizer.start_observing()
        for batch in x.split(1):
            quantizer(batch)
        quantizer.calibrate()
    quantizer.mode = Mode.QUANTIZE
    return quantizer.eval()


def holds(scheme: Scheme, x: torch.Tensor, is_weight: bool) -> None:
    """What is true of any quantizer."""
    quantizer = quantizer_of(scheme, x, is_weight)
    y, codes = quantizer(x), quantizer.codes(x)
    assert y.shape == x.shape and bool(y.isfinite().all())
    assert scheme.grid.quant_min <= codes.min() and codes.max() <= scheme.grid.quant_max
    assert torch.equal(codes, codes.round())
    assert torch.equal(y, quantizer(x))  # the same draws, too
    if not quantizer.dynamic:
        levels = quantizer.grid.levels(quantizer.qparams)
        assert y.unique().numel() <= levels.numel()
        if str(scheme.rounding) in ("half_even", "half_away"):
            assert torch.equal(quantizer(y), y)  # what lies on the grid stays


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis in FIELDS for name in NAMES[axis]])
def test_a_network_with_biases_takes_every_choice(axis, name):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    chosen = USUAL | {axis: name, "quantizer": name if axis == "quantizer" else "int8"}
    schemes = {
        tensor: Scheme(**{FIELDS[a]: parts(a, option)[tensor] for a, option in chosen.items()}) for tensor in SAMPLES
    }
    images = torch.randn(4, 3, 8, 8)
    model = copy.deepcopy(net)
    if name == "per_group":
        with pytest.raises(ValueError, match=r"2.weight: per_group\(3\): blocks of 3 do not divide dimension 1 .*pad"):
            quantize_(model, Recipe(**schemes))
        return
    quantize_(model, Recipe(**schemes), shapes=site_shapes(model, images[:1]))
    with torch.no_grad(), calibrating(model):
        model(images)
    with torch.no_grad():
        quantized, expected = model(images), net(images)
    assert quantized.shape == expected.shape and bool(quantized.isfinite().all())
    if axis == "granularity":  # at 8 bits every one of them is close
        assert (quantized - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FIELDS, 2)))
def test_every_choice_composes_with_every_other(first, second):
    for name, other in itertools.product(NAMES[first], NAMES[second]):
        chosen = USUAL | {first: name, second: other}
        found = {
            tensor: Scheme(**{FIELDS[axis]: parts(axis, option)[tensor] for axis, option in chosen.items()})
            for tensor in SAMPLES
        }
        if "int16" in chosen.values() and chosen["calibration"] in ("mse", "entropy", "hqo", "cross_entropy"):
            with pytest.raises(ValueError, match="statistics resolve at most 11 bits, but uint16 affine has 16"):
                Recipe(**found)
            continue
        Recipe(**found)
        for tensor, scheme in found.items():
            holds(scheme, SAMPLES[tensor], tensor == "weight")
