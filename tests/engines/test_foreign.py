"""Networks that were not written for quantization: what people bring runs in both engines as the simulation says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qexp.quant.dataflow import Dataflow, additions_to_modules


def block(inputs: int, outputs: int, **options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = block(3, 8), block(8, 8)
        self.squeeze, self.excite, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = self.body(x * gate) + x
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenselyConnected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 4), block(4, 4), block(8, 4)
        self.pool, self.drop, self.head = nn.AvgPool2d(2), nn.Dropout(0.1), nn.Linear(12 * 16, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.gelu(self.b(a))
        c = F.hardswish(self.c(torch.cat([a, b], 1)))
        return self.head(self.drop(self.pool(torch.cat([a, b, c], 1)).flatten(1)))


class Shuffled(nn.Module):
    """BatchNorm that nothing can be folded into, channels that move, a convolution as the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.stem, self.group = nn.BatchNorm2d(3), block(3, 8), block(8, 8, groups=4)
        self.gain, self.up, self.head = (
            nn.Parameter(torch.rand(8, 1, 1)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 5, 1),
        )

    def forward(self, x):
        x = F.relu(self.stem(self.norm(x)))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = self.group(x).chunk(2, 1)
        x = torch.cat([left, F.leaky_relu(right)], 1) * self.gain
        return self.head(self.up(F.max_pool2d(x, 2))).amax((2, 3))


def normed_perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize("make", [SqueezeExcite, DenselyConnected, Shuffled, normed_perceptron])
def test_networks_from_elsewhere_run_on_integers_as_simulated(made, engine, make):
    net, images = made.settled(make, (3, 8, 8))
    net, warning = additions_to_modules(net, Dataflow(net, images[:2]))
    assert warning is None
    job = made.quantized(net, images)
    done = made.deployed(job, engine)
    figures = done.certificate.metrics()
    # Functions such as sigmoid differ between torch and an engine in their last bits, which decides a tie now and then.
    assert figures["parity/identical"] >= 0.998
    assert figures["parity/max_step"] <= 2
    assert figures["parity/argmax_flips"] == 0
    assert done.mac_coverage == 1
    assert done.islands(job.flow) == []


def test_products_written_as_functions_are_counted_and_named(made, engine):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.positions = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            x = x * self.positions
            x = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ x
            x = x.unsqueeze(1)
            return self.head(F.scaled_dot_product_attention(x, x, x).flatten(1)[:, :8])

    net, images = made.settled(Attention, (4, 8))
    job = made.quantized(net, images)
    macs = job.flow.macs()
    assert macs == {
        "q": 4 * 64, "k": 4 * 64, "matmul": 2 * 4 * 4 * 8, "scaled_dot_product_attention": 4 * 4 * 16, "head": 40,
    }  # fmt: skip
    assert job.flow.functional_products() == ["matmul", "scaled_dot_product_attention"]
    done = made.deployed(job, engine)
    assert {"matmul", "scaled_dot_product_attention"} <= set(done.islands(job.flow))
    assert done.mac_coverage <= (2 * 4 * 64 + 40) / sum(macs.values())
