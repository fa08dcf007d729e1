"""What feeds what, multiply-accumulates by hand, and residual additions that become modules."""

import pytest
import torch
from torch import nn

from qexp.models import resnet8
from qexp.quant.convert import refuse_unquantizable
from qexp.quant.dataflow import Dataflow, NotExportable, additions_to_modules
from qexp.quant.grid import IntegerGrid
from qexp.quant.layers import Add
from qexp.quant.recipe import Recipe, Scheme


class Small(nn.Module):
    """Depthwise separable convolutions, a residual connection and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.norm, self.relu, self.add = nn.BatchNorm2d(8), nn.ReLU(), Add()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.stem_norm(self.stem(x)))
        x = self.add(x, self.norm(self.point(self.depth(x))))
        return self.fc(x.mean((2, 3)))


def flow_of(model, *shape):
    return Dataflow(model.eval(), torch.rand(shape))


def test_multiply_accumulates_are_those_counted_by_hand():
    assert flow_of(Small(), 2, 3, 10, 10).macs() == {
        "stem": 5 * 5 * 8 * 3 * 3 * 3,
        "depth": 5 * 5 * 8 * 3 * 3,
        "point": 5 * 5 * 8 * 8,
        "fc": 8 * 5,
    }


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_multiply_accumulates_are_those_of_one_sample(batch):
    assert flow_of(nn.Sequential(nn.Linear(6, 4)), batch, 6).macs() == {"0": 24}
    assert flow_of(nn.Sequential(nn.Linear(6, 4)), batch, 7, 6).macs() == {"0": 7 * 24}
    grouped = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2, bias=False, padding="same"))
    assert flow_of(grouped, batch, 4, 5, 5).macs() == {"0": 5 * 5 * 6 * 2 * 3 * 2}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
        (nn.Conv3d(2, 3, 3, stride=2), (2, 5, 7, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 9)),
        (nn.ConvTranspose2d(3, 5, (3, 2), stride=2), (3, 4, 5)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 4, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_multiply_accumulates_of_other_convolutions_are_those_of_their_ones(layer, shape):
    # With ones in place of all numbers and no bias, the sum of the outputs is the number of products.
    counted = flow_of(nn.Sequential(layer), 2, *shape).macs()["0"]
    layer.bias = None
    with torch.no_grad():
        layer.weight.fill_(1)
        assert counted == int(layer(torch.ones(1, *shape)).sum())


def test_a_layer_that_runs_twice_counts_twice():
    conv = nn.Conv2d(1, 1, 1)
    assert sum(flow_of(nn.Sequential(conv, nn.ReLU(), conv), 2, 1, 3, 3).macs().values()) == 18


def test_batchnorms_pair_with_what_they_alone_read():
    assert flow_of(Small(), 2, 3, 10, 10).batchnorms() == {"stem": "stem_norm", "point": "norm"}
    alone = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    assert flow_of(alone, 2, 3, 4, 4).batchnorms() == {}


def test_every_batchnorm_of_a_residual_network_has_its_convolution():
    model = resnet8(in_channels=1)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(flow_of(model, 2, 1, 16, 16).batchnorms().values()) == sorted(norms)


def test_branches_of_an_addition_are_convolutions_that_nothing_else_reads():
    assert flow_of(Small(), 2, 3, 10, 10).convolution_branches() == {"add": ["b"]}


def test_an_open_layer_has_a_reader_without_a_quantized_input():
    flow = flow_of(Small(), 2, 3, 10, 10)
    # The mean that reads the addition is a function and quantizes nothing.
    assert flow.open_layers({"stem", "depth", "point", "add", "fc"}) == ["add"]
    assert flow.open_layers({"stem", "depth", "point", "fc"}) == ["stem", "point"]
    assert flow_of(resnet8(), 2, 1, 8, 8).open_layers({name for name, _ in resnet8().named_modules()}) == []
    assert flow_of(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), 2, 3, 4, 4).open_layers({"0"}) == ["0"]


class Residual(nn.Module):
    """`join(first, second)` between convolutions; positive weights, so that no ReLU hides a difference."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.1, 1)

    def forward(self, x):
        first = self.a(x)
        return self.c(self.join(first, self.b(torch.relu(first))))


def plus(a, b):
    return a + b


def in_place(a, b):
    a += b
    return a


def in_place_under_another_name(a, b):
    c = a
    c += b
    return a * c


def statement(a, b):
    a.add_(b)
    return a


def by_keyword(a, b):
    return torch.add(input=a, other=b)


def twice(a, b):
    return (a + b) + a


def summed(a, b):
    return sum([a, b])


TOTALS = [
    plus, torch.add, in_place, lambda a, b: a.add(b), lambda a, b: a.add_(b), statement,
    in_place_under_another_name, by_keyword, summed,
]  # fmt: skip
NAMES = ["plus", "torch.add", "+=", ".add", ".add_", "statement", "alias", "keyword", "sum"]


def converted(model, x):
    with torch.no_grad():
        before = model.eval()(x)
        made, warning = additions_to_modules(model, Dataflow(model, x))
        assert torch.equal(made(x), before)
    return [m for m in made.modules() if isinstance(m, Add)], warning, made


@pytest.mark.parametrize("join", TOTALS, ids=NAMES)
def test_additions_of_tensors_become_modules_with_the_same_output_or_are_reported(join):
    adds, warning, _ = converted(Residual(join), torch.rand(2, 2, 4, 4))
    assert len(adds) == 1 or (not adds and warning)


@pytest.mark.parametrize("join", TOTALS[:5], ids=NAMES[:5])
def test_the_common_forms_of_an_addition_become_modules(join):
    adds, warning, made = converted(Residual(join), torch.rand(2, 2, 4, 4))
    assert len(adds) == 1 and warning is None
    # The names that quantization needs survive, and the new graph can be read again.
    flow = Dataflow(made, torch.rand(2, 2, 4, 4))
    assert flow.macs() == dict.fromkeys("abc", 64)
    assert flow.functional_additions() == []
    assert list(flow.convolution_branches().values()) == [["b"]]


def test_every_addition_becomes_a_module_of_its_own():
    assert len(converted(Residual(twice), torch.rand(2, 2, 4, 4))[0]) == 2


@pytest.mark.parametrize("join", [lambda a, b: a + 1, lambda a, b: 0.5 + a, lambda a, b: torch.add(a, 2)])
def test_adding_a_number_is_no_addition_of_tensors(join):
    model = Residual(join)
    made, warning = additions_to_modules(model, Dataflow(model.eval(), torch.rand(2, 2, 4, 4)))
    assert made is model and warning is None


def test_a_scaled_addition_keeps_its_factor_and_is_reported():
    adds, warning, _ = converted(Residual(lambda a, b: torch.add(a, b, alpha=2)), torch.rand(2, 2, 4, 4))
    assert not adds and "stay in float" in warning


def test_adding_a_parameter_is_no_residual_connection():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(2, 2, 1), nn.Parameter(torch.ones(1, 2, 1, 1))

        def forward(self, x):
            return self.conv(x) + self.shift

    assert converted(Shifted(), torch.rand(2, 2, 4, 4))[:2] == ([], None)


def test_a_module_that_owns_a_parameter_beside_its_layers_can_still_be_quantized():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(2, 2, 1), nn.Parameter(torch.ones(1, 2, 4, 4))

        def forward(self, x):
            return x + self.conv(x) * self.table

    adds, warning, made = converted(nn.Sequential(Biased(), nn.Conv2d(2, 2, 1)), torch.rand(2, 2, 4, 4))
    assert len(adds) == 1 and warning is None
    refuse_unquantizable(made, Recipe(Scheme(IntegerGrid(8)), Scheme(IntegerGrid(8, "affine"))))


def test_a_residual_connection_from_the_input_becomes_a_module():
    class Input(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return x + self.conv(x)

    adds, warning, _ = converted(Input(), torch.rand(2, 2, 4, 4))
    assert len(adds) == 1 or warning


class NamedLikeOurs(Residual):
    """Has a layer of its own under the name of a new addition."""

    def __init__(self):
        super().__init__(plus)
        self.add_0 = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.add_0(super().forward(x))


def test_a_layer_named_like_a_new_addition_keeps_its_place():
    adds, _, made = converted(NamedLikeOurs(), torch.rand(2, 2, 4, 4))
    assert len(adds) == 1 and isinstance(made.add_0, nn.Conv2d)


class Branching(Residual):
    """Python control flow over a shape: an export knows the answer, fx does not."""

    def forward(self, x):
        y = self.a(x)
        if x.shape[1] == 2:
            y = y + self.b(x)
        return y


def test_a_model_that_fx_cannot_trace_comes_back_with_a_warning_that_names_the_place():
    model = Branching(plus).eval()
    made, warning = additions_to_modules(model, Dataflow(model, torch.rand(2, 2, 4, 4)))
    assert made is model
    assert "stay in float" in warning and "y = y + self.b(x)" in warning


def test_models_with_add_modules_are_returned_as_they_are():
    model = resnet8(in_channels=1).eval()
    assert additions_to_modules(model, Dataflow(model, torch.rand(2, 1, 16, 16))) == (model, None)


@pytest.mark.parametrize("count", [len, lambda x: int(x.shape[0]), lambda x: 2])
def test_a_model_that_fixes_the_number_of_samples_is_told_what_to_write(count):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(count(x), -1) * torch.ones(count(x), 1)

    with pytest.raises(NotExportable, match=r"^Fixed cannot be exported: .* write x.shape\[0\]$"):
        Dataflow(Fixed(), torch.rand(2, 3, 4))


def test_a_model_that_depends_on_its_data_is_refused_in_one_sentence():
    class Dependent(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NotExportable, match="^Dependent cannot be exported: [^\n]*$"):
        Dataflow(Dependent(), torch.ones(2, 2))


def test_a_graph_that_holds_the_tensors_of_a_model_computes_with_their_new_values():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4)
    flow = Dataflow(net.eval(), x[:2])
    net.train()(100 * x)
    with torch.no_grad():
        net[0].weight.mul_(3)
    assert flow.holds(net.eval())
    torch.testing.assert_close(flow.program.module()(x), net(x), rtol=0, atol=0)
    assert not flow.holds(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net[0].weight = nn.Parameter(net[0].weight.detach() + 1)
    assert not flow.holds(net)
