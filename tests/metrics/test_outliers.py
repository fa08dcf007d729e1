"""Outlier statistics against NumPy and SciPy over the activations themselves."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from qexp.metrics.outliers import SIGMAS, outliers
from qexp.models import resnet8
from qexp.models.encoder import bert_tiny_random
from qexp.quant.layers import Add, MatMul

TEXTS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def lively(net: nn.Module) -> nn.Module:
    """With one feature behind each norm that lies far out."""
    for module in net.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.weight.data[2] *= 15
    return net.eval()


def arriving(net: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Site -> its tokens (R, C), by hooks of its own."""
    found = {}

    def hook(name, kind):
        def look(module, inputs):
            for side, tensor in zip(("a", "b") if kind in (Add, MatMul) else ("input",), inputs, strict=True):
                values = tensor.numpy().astype(np.float64)
                if kind is MatMul:
                    values = values if side == "a" else np.swapaxes(values, -1, -2)
                elif values.ndim == 4:
                    values = np.moveaxis(values, 1, -1)
                found[f"{name}.{side}"] = values.reshape(-1, values.shape[-1])

        return look

    kinds = nn.Linear, nn.Conv2d, nn.AdaptiveAvgPool2d, Add, MatMul
    hooks = [m.register_forward_pre_hook(hook(n, type(m))) for n, m in net.named_modules() if type(m) in kinds]
    with torch.no_grad():
        net(x)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("kind", ["text", "images"])
def test_every_figure_is_that_of_numpy_and_scipy(kind):
    torch.manual_seed(0)
    net, x = (bert_tiny_random(3, vocabulary=64), TEXTS) if kind == "text" else (resnet8(), IMAGES)
    expected = arriving(lively(net), x)
    found = outliers(net, x[:2], lambda: x.split(4))
    assert sorted(name for site in found for name in (site.site, *site.also)) == sorted(expected)
    assert any(site.outlying for site in found)
    for site in found:
        rows = expected[site.site]
        sigma, largest = rows.std(), np.abs(rows).max(0)
        assert site.tokens == len(rows)
        assert site.largest == pytest.approx(largest.max(), rel=1e-6)
        assert site.sigma == pytest.approx(sigma, rel=1e-6)
        assert site.kurtosis == pytest.approx(stats.kurtosis(rows, None, fisher=False), rel=1e-6)
        assert site.peaks.numpy() == pytest.approx(largest / sigma, rel=1e-6)
        assert site.sigmas == pytest.approx(largest.max() / sigma, rel=1e-6)
        assert list(site.outlying) == np.flatnonzero(largest > SIGMAS * sigma).tolist()
        far = np.abs(rows) > SIGMAS * sigma
        assert site.share_of_tokens == pytest.approx(far.any(1).mean())
        assert site.large == (largest >= 6).sum()
        order = np.argsort(-largest, kind="stable")[:5]
        order = [c for c in order if largest[c] > 0]
        assert [channel.index for channel in site.top] == list(order)
        squares = (rows**2).sum(0)
        assert [c.share_of_squares for c in site.top] == pytest.approx(squares[order] / squares.sum())
        assert [c.share_of_tokens for c in site.top] == pytest.approx(far[:, order].mean(0))


def test_sites_that_read_one_tensor_are_told_once():
    found = outliers(bert_tiny_random(3, vocabulary=64).eval(), TEXTS[:1], lambda: [TEXTS])
    block = "encoder.layers.0.attention"
    (first,) = [site for site in found if site.site == f"{block}.query.input"]
    assert first.also == (f"{block}.key.input", f"{block}.value.input", f"{block}_add.b")


def test_layers_that_are_not_asked_for_have_no_site():
    net, key = bert_tiny_random(3, vocabulary=64).eval(), "encoder.layers.0.attention.key"
    found = outliers(net, TEXTS[:1], lambda: [TEXTS], {"head", key})
    assert [(site.site, site.also) for site in found] == [(f"{key}.input", ()), ("head.input", ())]


def test_a_constant_site_has_no_outliers_and_what_is_not_finite_is_refused_by_its_name():
    net, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.full((3, 4), 0.1)
    (site,) = outliers(net, x, lambda: [x])
    assert (site.sigma, site.sigmas, site.outlying, site.top) == (0.0, 0.0, (), ())
    assert math.isnan(site.kurtosis)
    for bad in math.nan, math.inf:
        x[0, 0] = bad
        with pytest.raises(ValueError, match=r"^0\.input: holds NaN or infinite values$"):
            outliers(net, x, lambda: [x])
    with pytest.raises(ValueError, match=r"^0\.input: no value to take statistics from$"):
        outliers(net, x, lambda: [])
