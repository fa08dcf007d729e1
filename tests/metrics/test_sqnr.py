"""SQNR against closed forms, and the noise of sites as two sums over everything that passed."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from qexp.metrics.sites import measuring_sites
from qexp.metrics.sqnr import QuantizationNoise, sqnr_db
from qexp.quant.affine import QParams, fake_quantize
from qexp.quant.convert import calibrating, layers, quantize_, quantizers, set_mode_
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe


class Network(nn.Module):
    """Two layers, an addition and a pool."""

    def __init__(self):
        super().__init__()
        self.conv, self.add, self.pool = nn.Conv2d(1, 1, 3, padding=1), Add(), nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.pool(self.add(x, self.conv(x))).flatten(1))


def network():
    torch.manual_seed(0)
    model = Network().eval()
    quantize_(model, Recipe())
    with calibrating(model), torch.no_grad():
        model(torch.rand(16, 1, 6, 6))
    return model


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("signal", "noise", "db"), [(100.0, 1.0, 20), (1.0, 1.0, 0), (1.0, 2.0, -3.0103), (1e-30, 1e-33, 30)]
)
def test_sqnr_is_ten_log_ten_of_the_ratio(signal, noise, db):
    assert sqnr_db(signal, noise) == pytest.approx(db, abs=1e-4)
    assert sqnr_db(torch.tensor(signal, dtype=torch.float64), noise) == pytest.approx(db, abs=1e-4)


def test_without_noise_sqnr_is_infinite_and_without_signal_minus_infinite():
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_a_uniform_signal_has_the_closed_form():
    # sum x^2 = N/3 and noise S^2/12 with S = 2/(2^b - 1): SQNR = 20 log10(2^b - 1).
    x = (torch.arange(510_000) * 2 + 1) / 510_000 - 1
    for bits in (4, 8):
        grid, noise = IntegerGrid(bits, "full_range"), QuantizationNoise()
        noise.update(x, fake_quantize(x, grid.qparams(x.min(), x.max()), grid), torch.tensor(0))
        assert noise.compute()["sqnr_db"] == pytest.approx(20 * math.log10(2**bits - 1), abs=0.01)


def test_batches_of_different_power_are_summed_and_not_averaged_in_decibels():
    noise = QuantizationNoise()
    noise.update(torch.tensor([10.0]), torch.tensor([9.0]), torch.tensor(0))  # 20 dB
    noise.update(torch.tensor([0.1, 0.1]), torch.tensor([0.2, 0.0]), torch.tensor(1))  # 0 dB
    expected = {"sqnr_db": 10 * math.log10(100.02 / 1.02), "mse": 1.02 / 3, "clipped_share": 1 / 3}
    assert noise.compute() == pytest.approx(expected, rel=1e-6)


def test_any_split_into_batches_gives_the_same_noise():
    x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    whole, parts = QuantizationNoise(), QuantizationNoise()
    whole.update(x, y, torch.tensor(10))
    for a, b in zip(x.split(170), y.split(170), strict=True):
        parts.update(a, b, torch.tensor(0))
    parts.update(x[:0], y[:0], torch.tensor(10))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)
    signal, error = x.double().numpy(), (x.double() - y.double()).numpy()
    assert whole.compute()["sqnr_db"] == pytest.approx(10 * np.log10((signal**2).sum() / (error**2).sum()), rel=1e-12)


def test_noise_of_two_metrics_merges():
    one, other, both = QuantizationNoise(), QuantizationNoise(), QuantizationNoise()
    for metric, size in (one, 5), (other, 3):
        x = torch.full((size,), float(size))
        metric.update(x, x - 1, torch.tensor(1))
        both.update(x, x - 1, torch.tensor(1))
    one.merge_state(other)
    assert one.compute() == pytest.approx(both.compute())


def test_small_noise_is_not_lost_behind_a_large_sum():
    noise = QuantizationNoise()
    noise.update(torch.full((1000,), 1e4), torch.full((1000,), 2e4), torch.tensor(0))
    before = noise.compute()["mse"] * 1000
    noise.update(torch.tensor([1e-2]), torch.tensor([0.0]), torch.tensor(0))
    assert noise.compute()["mse"] * 1001 - before == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_clipped_counts_what_lies_half_a_step_outside(shift):
    x = torch.tensor([-7.6, -7.5, -7.4, 0.0, 7.0, 7.49, 7.51, 100.0]) - shift
    assert IntegerGrid(4).clipped(x, QParams(torch.tensor(1.0), torch.tensor(shift))).item() == 3


def test_clipped_counts_as_a_loop_does():
    grid, qparams = IntegerGrid(8, "affine"), QParams(torch.tensor(0.02), torch.tensor(100.0))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2
    lowest, highest = (0 - 100 - 0.5) * 0.02, (255 - 100 + 0.5) * 0.02
    assert grid.clipped(x, qparams).item() == sum(not lowest <= v <= highest for v in x.tolist()) > 0


def test_every_site_reports_the_noise_of_all_that_passed():
    model, seen = network(), {}
    batches = torch.rand(3, 8, 1, 6, 6) * 1.5
    for quantizer in quantizers(model):
        quantizer.register_forward_pre_hook(lambda q, args: seen.setdefault(q.site, []).append(args[0]))
    with torch.no_grad(), measuring_sites(model) as found:
        for batch in batches:
            model(batch)
    assert list(found) == [q.site for q in quantizers(model)]
    for quantizer in quantizers(model):
        x = torch.cat(seen[quantizer.site]).detach() if not quantizer.shape else seen[quantizer.site][0].detach()
        scale, zero_point = quantizer.scale.double(), quantizer.zero_point.double()
        codes = (x.double() / scale).round() + zero_point
        inside = codes.clamp(quantizer.grid.quant_min, quantizer.grid.quant_max)
        error = x.double() - scale * (inside - zero_point)
        figures = found[quantizer.site].compute()
        assert figures["mse"] == pytest.approx(error.square().mean().item(), rel=1e-3)
        expected = 10 * math.log10((x.double().square().sum() / error.square().sum()).item())
        assert figures["sqnr_db"] == pytest.approx(expected, abs=0.01)
        assert figures["clipped_share"] == pytest.approx((codes != inside).double().mean().item(), abs=1e-6)
    assert found["conv.input"].compute()["clipped_share"] > 0.1


def test_measuring_changes_no_output_and_leaves_no_hook():
    model, x = network(), torch.rand(4, 1, 6, 6)
    with torch.no_grad():
        expected = model(x)
        with measuring_sites(model):
            assert torch.equal(model(x), expected)
    assert hooks(model) == 0


def test_an_error_leaves_no_hook():
    model = network()
    with pytest.raises(RuntimeError, match="stop"), measuring_sites(model):
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_an_uncalibrated_weight_leaves_no_hook():
    model = network()
    model.fc.weight_quantizer.calibrated.fill_(False)
    with pytest.raises(RuntimeError, match="fc.weight"), measuring_sites(model):
        pass
    assert hooks(model) == 0


def test_sites_that_are_off_are_not_measured():
    model = network()
    model.conv.input_quantizer.mode = model.fc.weight_quantizer.mode = Mode.OFF
    with torch.no_grad(), measuring_sites(model) as found:
        model(torch.rand(4, 1, 6, 6))
    assert set(found) == {q.site for q in quantizers(model)} - {"conv.input", "fc.weight"}
    set_mode_(model, Mode.OFF)
    with measuring_sites(model) as found:
        assert found == {}


def test_weights_are_measured_once_however_many_batches_pass():
    model = network()
    with torch.no_grad(), measuring_sites(model) as found:
        for _ in range(3):
            model(torch.rand(2, 1, 6, 6))
    sizes = {f"{name}.weight": layer.weight.numel() for name, layer in layers(model) if hasattr(layer, "weight")}
    assert {site: int(found[site].count) for site in sizes} == sizes


def test_a_model_inside_another_is_measured_too():
    model = network()
    with torch.no_grad(), measuring_sites(nn.Sequential(model)) as found:
        model(torch.rand(2, 1, 6, 6))
    assert set(found) == {q.site for q in quantizers(model)}
