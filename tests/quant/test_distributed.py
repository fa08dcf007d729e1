"""Several processes see what one would: two of them, on this machine, that meet in a file."""

from dataclasses import replace

import pytest
import torch
from torch import distributed, multiprocessing, nn

from qexp.quant import affine, compiled
from qexp.quant.affine import QParams
from qexp.quant.batchnorm import QuantConvNorm2d
from qexp.quant.distributed import across_ranks, gather_, is_shared, mean_across_ranks, share_batchnorm_
from qexp.quant.estimators import LSQ
from qexp.quant.granularity import PerChannel, PerTensor
from qexp.quant.grid import IntegerGrid
from qexp.quant.observers import Observer
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import Stochastic
from qexp.quant.sketch import Sketch

GRANULARITIES = {"per_tensor": PerTensor(), "per_channel": PerChannel(axis=1)}
BATCH = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def of_both_ranks(tmp_path, work) -> list:
    """What `work(rank)` returns in each of two processes."""
    multiprocessing.spawn(_rank, (tmp_path, work), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank, tmp_path, work) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=rank, world_size=2)
    torch.save(work(rank), tmp_path / f"{rank}.pt")
    distributed.destroy_process_group()


def observed(granularity, batches) -> Observer:
    observer = Observer(granularity, (1, 6), constant=0.1, row_length=6)
    for batch in batches:
        observer.update(batch)
    return observer


def shards() -> list[list[torch.Tensor]]:
    """The batches of each rank: exact zeros, outliers, and a largest exponent that comes late, or only once."""
    random = torch.Generator().manual_seed(3)
    batches = [torch.randn(50, 6, generator=random).relu() for _ in range(7)]
    batches[2] = -10 * batches[2]
    batches[5][3, 2] = 1e6
    return [batches[:4], batches[4:]]


def all_of_it(rank):
    seen = {name: observed(granularity, shards()[rank]) for name, granularity in GRANULARITIES.items()}
    late = Sketch()  # one rank may have seen nothing
    if rank == 1:
        late.update(BATCH)
    for thing in [*seen.values(), late]:
        gather_(thing)
    lo, hi = across_ranks(torch.tensor([-1.0 - rank, 0.0]), torch.tensor([1.0, 2.0 - rank]))
    mean = mean_across_ranks(torch.tensor(float(rank)))
    buffers = [dict(thing.named_buffers()) for thing in [*seen.values(), late]]
    return {"seen": buffers, "extrema": (lo, hi), "mean": mean, **training(rank)}


def norms() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = QuantConvNorm2d.__new__(QuantConvNorm2d)
    nn.Conv2d.__init__(conv, 3, 4, 3, bias=False)
    conv.norm, conv.arm = nn.BatchNorm2d(4), "corrected"
    conv.input_quantizer = conv.output_quantizer = nn.Identity()
    conv.weight_quantizer = nn.Identity()
    conv.register_buffer("frozen", torch.tensor(False))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return [conv, plain]


def quantizers() -> list[Quantizer]:
    """Rounded at random, an activation and a weight; trained through by LSQ."""
    made = []
    for rounding, is_weight in (Stochastic(4), False), (Stochastic(4), True), (None, False):
        scheme = Scheme(IntegerGrid(4, "restricted"), **({} if rounding is None else {"rounding": rounding}))
        quantizer = Quantizer(scheme, (1,), "a.weight" if is_weight else "a.input", is_weight)
        quantizer.set_range(torch.tensor([-2.0]), torch.tensor([2.0]))
        quantizer.mode = Mode.QUANTIZE
        if rounding is None:
            quantizer.train_with_(LSQ())
        made.append(quantizer)
    return made


def training(rank: int, world: int = 2) -> dict:
    """One pass forward and backward of this rank's part of the batch."""
    part = BATCH.chunk(world)[rank]
    random, weight, lsq = quantizers()
    found = {"random": random(part), "weight": weight(BATCH)}
    lsq(part).square().sum(dim=(1, 2, 3)).mean().backward()
    found["lsq"] = lsq.learned_scale.grad
    for number, net in enumerate(norms()):
        share_batchnorm_(net)
        x = part.clone().requires_grad_()
        y = net.train()(x)
        (y**3).flatten(1).sum(1).mean().backward()
        found[f"y{number}"], found[f"x{number}"] = y, x.grad
        found[f"grads{number}"] = [p.grad for p in net.parameters()]
        found[f"buffers{number}"] = [b for b in net.buffers() if b.is_floating_point()]
        share_batchnorm_(net, False)
        found[f"kinds{number}"] = {type(module) for module in net.modules()}
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return of_both_ranks(tmp_path_factory.mktemp("ranks"), all_of_it)


@pytest.mark.parametrize("number", range(2), ids=GRANULARITIES)
def test_gathered_sketches_are_those_of_one_process_that_saw_everything(found, number):
    granularity = list(GRANULARITIES.values())[number]
    whole = observed(granularity, sum(shards(), []))
    for rank in range(2):
        seen = found[rank]["seen"][number]
        for name, buffer in whole.named_buffers():
            if name == "sketch.faded":  # float64: a power instead of products
                assert torch.allclose(seen[name], buffer, rtol=1e-14, atol=0)
            else:
                assert torch.equal(seen[name], buffer), name
    assert torch.equal(*(found[rank]["seen"][number]["sketch.faded"] for rank in range(2)))


def test_a_rank_that_has_seen_nothing_gets_what_the_others_saw(found):
    whole = Sketch()
    whole.update(BATCH)
    for rank in range(2):
        assert all(torch.equal(found[rank]["seen"][2][name], buffer) for name, buffer in whole.named_buffers())


def test_extrema_and_means_are_those_of_all_ranks(found):
    for rank in range(2):
        lo, hi = found[rank]["extrema"]
        assert (lo.tolist(), hi.tolist()) == ([-2.0, 0.0], [1.0, 2.0])
        assert float(found[rank]["mean"]) == 0.5


def test_ranks_draw_for_their_parts_what_one_process_draws_and_round_weights_alike(found):
    alone = training(0, world=1)
    together = torch.cat([found[rank]["random"] for rank in range(2)])
    assert torch.equal(together, alone["random"])
    assert not torch.equal(found[0]["random"], quantizers()[0](BATCH[4:]))  # as a rank without a number would draw
    for rank in range(2):
        assert torch.equal(found[rank]["weight"], alone["weight"])


def test_the_compiled_kernel_draws_for_a_part_as_for_the_whole():
    grid, qparams = IntegerGrid(4, "restricted"), QParams(torch.tensor([0.3]), torch.tensor([0.0]))
    draw = Stochastic(4).at("a.input", 7)
    whole, part = (affine.fake_quantize(BATCH, qparams, grid, draw), replace(draw, part=1))
    for form in affine, compiled:
        assert torch.equal(form.fake_quantize(BATCH[4:], qparams, grid, part), whole[4:])


@pytest.mark.parametrize("number", range(2), ids=["folded in training", "BatchNorm2d"])
def test_batchnorm_trains_by_the_whole_batch(found, number):
    alone = training(0, world=1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(torch.cat([found[rank][f"y{number}"] for rank in range(2)]), alone[f"y{number}"], **close)
    # each rank's loss is the mean of its part: the mean over ranks is the loss of the batch
    x = torch.cat([found[rank][f"x{number}"] for rank in range(2)]) / 2
    assert torch.allclose(x, alone[f"x{number}"], **close)
    grads = (found[rank][f"grads{number}"] for rank in range(2))
    for first, second, one in zip(*grads, alone[f"grads{number}"], strict=True):
        assert torch.allclose((first + second) / 2, one, **close)
    for rank in range(2):
        for buffer, one in zip(found[rank][f"buffers{number}"], alone[f"buffers{number}"], strict=True):
            assert torch.allclose(buffer, one, rtol=1e-6, atol=1e-7)
        assert found[rank][f"kinds{number}"] == alone[f"kinds{number}"]
    assert all(map(torch.equal, *(found[rank][f"buffers{number}"] for rank in range(2))))


def test_a_learned_scale_has_the_gradient_of_the_whole_batch(found):
    both = sum(found[rank]["lsq"] for rank in range(2)) / 2
    assert torch.allclose(both, training(0, world=1)["lsq"], rtol=1e-5)


def test_alone_nothing_happens():
    sketch = Sketch()
    sketch.update(BATCH)
    before = [buffer.clone() for buffer in sketch.buffers()]
    gather_(sketch)
    assert not is_shared() and all(map(torch.equal, before, sketch.buffers()))
    assert torch.equal(*(net(BATCH) for net in (norms()[1], share(norms()[1]))))


def share(net: nn.Module) -> nn.Module:
    share_batchnorm_(net)
    return net
