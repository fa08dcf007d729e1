"""Where and how a network trains: several processes, half the precision, a GPU; and that it resumes in order."""

import multiprocessing
import pickle
import signal
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from qexp import cli
from qexp.data import Digits
from qexp.data.base import SeededOrder, shared_loader
from qexp.models import resnet8
from qexp.quant.affine import QParams
from qexp.quant.estimators import LSQ
from qexp.quant.grid import IntegerGrid
from qexp.quant.quantizer import Mode, Quantizer
from qexp.quant.recipe import Scheme
from qexp.quant.rounding import HalfEven, Stochastic
from qexp.run import Run, run
from qexp.schema import SECTIONS
from qexp.tasks.fp32 import Float32Task
from qexp.tasks.progress import TellProgress
from qexp.tasks.ranks import Trainer, require_shareable

FAST = ["trainer.epochs=1", "finetune.epochs=1", "engine=none", "logger=none", "progress=false", "method=qat"]
SGD = ["finetune.optimizer._target_=torch.optim.SGD", "finetune.optimizer.lr=0.002"]
WHY_NO_CUDA = "torch sees no CUDA device"


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Shared, so that each trainer trains its float network once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def command(monkeypatch, outputs):
    """Runs the command line in this process; gives the run itself."""

    def give(*words: str) -> Run:
        found = []
        monkeypatch.setattr("qexp.run.run", lambda settings: found.append(run(settings)) or found[-1])
        with pytest.raises(SystemExit) as end:
            cli.main([*words, f"paths.outputs={outputs}", "store=rerun"])
        assert end.value.code == 0
        return found[0]

    return give


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Without momentum a moved code is not carried from step to step.
LEARNED = ["finetune=lsq", "finetune.optimizer.momentum=0", "finetune.range_lr=relative"]


@pytest.mark.parametrize("finetune", [["finetune=ste", "finetune.observe=1"], LEARNED], ids=["ste", "lsq"])
def test_two_processes_train_as_one_does(command, finetune):
    one = command(*FAST, *SGD, *finetune)
    two = command(*FAST, *SGD, *finetune, "trainer=ddp", "trainer.epochs=1")
    assert two.settings.config["trainer"]["devices"] == 2
    assert two.folder != one.folder
    # 14 steps of AdamW, then 14 of SGD through staircases, where a last bit may move a code: a single process whose
    # weights were moved by half of their last bit before fine-tuning ends 1e-6 to 4e-5 away.
    assert 0 < distance(weights(two.net), weights(one.net)) < 1e-4
    assert distance(weights(two.quantized), weights(one.quantized)) < 1e-4
    for name in "acc/fp32", "acc/ptq", "acc/sim":
        assert abs(two.metrics[name] - one.metrics[name]) * len(one.reference) < 1.5, name
    (mine,), (theirs,) = two.history, one.history
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name
    state, other = two.quantized.state_dict(), one.quantized.state_dict()
    assert list(state) == list(other)
    start = dict(command("method=ptq", *FAST[:1], *FAST[2:5]).quantized.state_dict())
    moved = 0
    for name in state:
        if name.endswith((".lo", ".hi", "quantizer.scale")) and name in start:
            assert torch.allclose(state[name], other[name], rtol=0.02, atol=1e-6), name
            moved += not torch.equal(state[name], start[name])
    assert moved > 10  # what ranks have learned of ranges is here
    assert not multiprocessing.active_children()


def test_in_float64_nothing_is_left_of_the_order_of_sums():
    found = []
    for devices in 1, 2:
        data = Digits(batch_size=64, train_share=0.2)
        data.setup()
        for split in data.splits:
            split.sources = split.sources.double()
        torch.manual_seed(0)
        net = resnet8(width=4).double()
        train = Trainer(
            devices=devices, max_epochs=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        train.fit(Float32Task(net, 10), data.train_dataloader())
        found.append(torch.cat([t.flatten() for name, t in net.state_dict().items() if "tracked" not in name]))
    assert distance(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("words", [["trainer.precision=bf16-mixed"]], ids=str)
def test_quantizers_keep_their_float32_codes_under_autocast(command, words):
    job = command(*FAST, "finetune=ste", "finetune.observe=1", *words)
    assert job.metrics["acc/sim"] > 0.5
    assert all(p.dtype == torch.float32 for p in job.quantized.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_quantizer_computes_in_float32(dtype):
    quantizer = Quantizer(Scheme(IntegerGrid(8, "affine")), site="a.input")
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(3.0))
    quantizer.mode = Mode.QUANTIZE
    x = torch.randn(1000).to(dtype).requires_grad_()
    y = quantizer(x)
    assert y.dtype == torch.float32 and torch.equal(y, quantizer(x.float()))
    y.sum().backward()
    assert x.grad.dtype == dtype


REFUSED = {
    "trainer.devices=0": "trainer.devices=0: must be an integer of at least 1",
    "trainer.devices=two": "trainer.devices='two': must be an integer",
    "trainer.devices=5": "trainer.devices=5: does not divide data.batch_size=64 into equal parts",
    "trainer=ddp data.batch_size=7": "trainer.devices=2: does not divide data.batch_size=7",
    "trainer=ddp data.batch_size=1800": "trainer.devices=2: a batch of 449 images cannot be divided into equal parts",
    "trainer.precision=foo": "trainer.precision='foo': allowed are 32-true, bf16-mixed, 16-mixed",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed: needs a GPU",
}
if not torch.cuda.is_available():
    REFUSED["trainer=gpu"] = "trainer.accelerator=gpu: "
    REFUSED["trainer=gpu trainer.devices=2"] = "trainer.accelerator=gpu: "


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_one_sentence_and_code_2_before_any_compute(words, capsys, tmp_path):
    share = ["data.train_share=0.25"] if "1800" in words else []
    with pytest.raises(SystemExit) as end:
        cli.main(["engine=none", "logger=none", "progress=false", *share, *words.split()])
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("qexp: ")]
    assert (end.value.code, out, len(told)) == (2, "", 1)
    assert told[0].startswith(f"qexp: {REFUSED[words]}")
    assert not (tmp_path / "outputs" / "cache" / "float").exists()


def test_what_diverges_in_a_rank_is_told_as_in_one_process(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli.main([*FAST[2:5], "method=fp32", "trainer=ddp", "trainer.epochs=1", "trainer.lr=1e30"])
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert "qexp: training diverged: the loss is nan in epoch 0, step " in err and "Traceback" not in err
    assert not multiprocessing.active_children()


def test_a_config_from_before_there_were_devices_still_runs():
    assert {"devices", "precision"} < set(SECTIONS["trainer"])


def as_it_was_drawn(size: int, seed: int, epochs: int) -> list[list[tuple[int, int]]]:
    """Epoch after epoch from one generator."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(epochs):
        order = torch.randperm(size, generator=generator)
        seeds = torch.randint(2**62, (size,), generator=generator)
        drawn.append(list(zip(order.tolist(), seeds.tolist(), strict=True)))
    return drawn


def test_each_epoch_has_the_order_it_always_had_whoever_asks_for_it_and_when():
    drawn = as_it_was_drawn(50, 3, 5)
    order = SeededOrder(50, torch.Generator().manual_seed(3))
    assert [list(order) for _ in range(5)] == drawn
    for epoch in 2, 2, 0, 4, 1:
        order.set_epoch(epoch)
        assert list(order) == drawn[epoch]
    assert list(order) == drawn[2]
    assert list(pickle.loads(pickle.dumps(order))) == drawn[3]


class Seen(pl.LightningModule):
    """Notes which samples came in which epoch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch, index):
        self.seen.setdefault(self.current_epoch, []).extend(batch[0].tolist())
        return self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(TensorDataset):
    def __getitem__(self, key):
        return super().__getitem__(key[0])


def numbers(workers: int = 0) -> DataLoader:
    order = SeededOrder(12, torch.Generator().manual_seed(3))
    return DataLoader(Numbers(torch.arange(12)), 4, sampler=order, num_workers=workers)


def quiet(epochs: int, folder: Path, **options) -> Trainer:
    keep = pl.callbacks.ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keep, TellProgress(lambda *_: None)], **options,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_that_order_and_goes_on_in_it_when_resumed(tmp_path, workers):
    drawn = {epoch: [index for index, _ in order] for epoch, order in enumerate(as_it_was_drawn(12, 3, 5))}
    whole, killed, resumed = Seen(), Seen(), Seen()
    quiet(5, tmp_path / "a").fit(whole, numbers(workers))
    assert whole.seen == drawn
    quiet(2, tmp_path / "b").fit(killed, numbers(workers))
    quiet(5, tmp_path / "c").fit(resumed, numbers(workers), ckpt_path=tmp_path / "b" / "last.ckpt", weights_only=True)
    assert killed.seen | resumed.seen == drawn and min(resumed.seen) == 2


def test_each_rank_loads_its_part_of_every_batch(monkeypatch):
    batches = [batch.tolist() for (batch,) in numbers()]
    parts = []
    for rank in range(2):
        monkeypatch.setattr("qexp.data.base.rank", lambda rank=rank: rank)
        monkeypatch.setattr("qexp.data.base.ranks", lambda: 2)
        parts.append([batch.tolist() for (batch,) in shared_loader(numbers(), 2)])
    assert [first + second for first, second in zip(*parts, strict=True)] == batches
    assert {len(batch) for batch in parts[0]} == {2}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    ("loader", "sentence"),
    [
        (DataLoader(Stream(), 2), "must come from a DataLoader that makes batches"),
        ([1, 2], "must come from a DataLoader"),
        (DataLoader(TensorDataset(torch.arange(8)), batch_size=None), "must come from a DataLoader"),
        (DataLoader(TensorDataset(torch.arange(9)), 4), "a batch of 1 images cannot be divided into equal parts"),
        (DataLoader(TensorDataset(torch.arange(3)), 4), "a batch of 3 images"),
        (DataLoader(TensorDataset(torch.arange(9)), 3, drop_last=True), "a batch of 3 images"),
    ],
)
def test_data_that_ranks_cannot_share_are_refused(loader, sentence):
    with pytest.raises(ValueError, match=f"^trainer.devices=2: .*{sentence}"):
        shared_loader(loader, 2)


def test_a_network_that_cannot_be_sent_is_refused():
    net = nn.Linear(1, 1)
    require_shareable(net, numbers(), 2)
    net.call = lambda x: x
    with pytest.raises(ValueError, match="^trainer.devices=2: model cannot be sent to other processes"):
        require_shareable(net, numbers(), 2)


def test_a_shared_batch_keeps_a_short_last_one_that_divides():
    loader = shared_loader(DataLoader(TensorDataset(torch.arange(10)), 4), 2)
    assert isinstance(loader.batch_sampler.batches, BatchSampler) and len(loader) == 3


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=WHY_NO_CUDA)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("rounding", [HalfEven(), Stochastic(3)], ids=str)
@pytest.mark.parametrize("scale", [[0.013], [0.01, 0.3, 7.0]], ids=["per_tensor", "per_channel"])
def test_cuda_gives_the_values_and_gradients_of_the_cpu_to_the_bit(rounding, scale):
    grid, x = IntegerGrid(8, "affine"), torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(scale).view(1, -1, 1, 1)
    found = []
    for device in "cpu", "cuda":
        there = x.to(device, copy=True).requires_grad_()
        qparams = QParams(scale.to(device), torch.full_like(scale, 100.0).to(device))
        y = grid.fake_quantize(there, qparams, rounding)
        y.backward(torch.ones_like(y) * 0.3)
        found.append((y.detach().cpu(), there.grad.cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "finetune", [["ste", "finetune.observe=1"], ["lsq", "finetune.distill=0.5"]], ids=lambda f: f[0]
)
def test_one_epoch_on_a_gpu(command, precision, finetune):
    name, *more = finetune
    words = [f"finetune={name}", *more, "trainer=gpu", "trainer.epochs=1", f"trainer.precision={precision}"]
    job = command(*FAST, *words)
    assert job.metrics["acc/sim"] > 0.5
    assert all(p.device.type == "cpu" for p in job.quantized.parameters())


@pytest.mark.cuda
@needs_cuda
def test_a_learned_scale_has_the_same_gradient_on_cuda():
    found = []
    for device in "cpu", "cuda":
        quantizer = Quantizer(Scheme(IntegerGrid(4, "restricted")), site="a.input")
        quantizer.set_range(torch.tensor(-2.0), torch.tensor(2.0))
        quantizer.mode = Mode.QUANTIZE
        quantizer.train_with_(LSQ())
        quantizer.to(device)
        quantizer(torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)).square().sum().backward()
        found.append(float(quantizer.learned_scale.grad))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
