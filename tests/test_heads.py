"""Heads that are trained alone: on embeddings that are made once, as they would be above the frozen encoder."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from qexp import heads, prepare
from qexp.jobs import compose_jobs
from qexp.models import bert_tiny_random
from qexp.run import run
from qexp.store import StoreError, TensorCache

MINE = """
import torch
from qexp.data.base import DataModule, Samples
from qexp.models import bert_tiny_random


def read(ids, generator):
    return ids


class Texts(DataModule):
    num_classes = 2

    def __init__(self, seed=0):
        super().__init__(batch_size=16, calibration_size=16, seed=seed)

    def load(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 30, (120, 8), generator=generator)
        labels = ids[:, 0].lt(15).long()
        ids[torch.arange(8) >= torch.randint(2, 9, (120, 1), generator=generator)] = 0
        return Samples(ids[:70], labels[:70], read), Samples(ids[70:], labels[70:], read)


def net(num_classes, weights, head_alone=True):
    made = bert_tiny_random(num_classes, width=8, layers=1, vocabulary=30, length=8)
    made.encoder.load_state_dict(torch.load(weights))
    made.trains_head_alone = head_alone
    return made
"""


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of encoder weights, beside a module with a network that reads them and texts to train its head on."""
    (tmp_path / "mine_of_heads.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_of_heads", raising=False)
    return stored(tmp_path / "encoder.pt", seed=0)


def stored(path, seed):
    torch.manual_seed(seed)
    encoder = bert_tiny_random(2, width=8, layers=1, vocabulary=30, length=8).encoder
    torch.save({name: torch.randn_like(tensor) for name, tensor in encoder.state_dict().items()}, path)
    return path


def job(weights: Path, *more: str):
    (found,) = compose_jobs(
        [
            "model=custom", "model._target_=mine_of_heads.net", f"+model.weights={weights}", "data=custom",
            "data._target_=mine_of_heads.Texts", "method=fp32", "engine=none", "logger=none", "trainer.epochs=3",
            f"paths.outputs={weights.parent / 'outputs'}", *more,
        ],
        multirun=False,
    )  # fmt: skip
    return found.settings


def entries(weights, kind):
    return sorted((weights.parent / "outputs" / "cache" / kind).glob("*/tensors.pt"))


def test_a_second_head_needs_no_second_pass_over_the_texts(weights, monkeypatch):
    before = torch.load(weights)
    first = run(job(weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.net.encoder.state_dict().items())
    (cached,), (embeddings,) = entries(weights, "float"), entries(weights, "embeddings")
    assert torch.load(cached).keys() == {"weight", "bias"}
    assert torch.load(embeddings)["embeddings"].shape == (70, 8)

    monkeypatch.setattr(heads, "_embeddings", lambda *_: pytest.fail("embedded again"))
    second = run(job(weights, "trainer.lr=0.01"))
    assert len(entries(weights, "float")) == 2 and not torch.equal(first.net.head.weight, second.net.head.weight)
    again = run(job(weights, "store=rerun"))
    assert torch.equal(again.reference, first.reference)


def test_other_weights_at_the_same_place_are_another_network(weights):
    first = run(job(weights))
    stored(weights, seed=1)
    second = run(job(weights, "store=rerun"))
    assert len(entries(weights, "float")) == len(entries(weights, "embeddings")) == 2
    assert not torch.equal(first.reference, second.reference)


def test_a_head_does_not_depend_on_whether_embeddings_were_kept(weights):
    first = run(job(weights))
    (cached,) = entries(weights, "float")
    cached.with_name("cache.json").unlink()
    cached.unlink()
    cached.parent.rmdir()
    second = run(job(weights, "store=rerun"))
    assert torch.equal(first.net.head.weight, second.net.head.weight)


def test_a_head_is_trained_as_above_a_frozen_encoder(weights, tmp_path):
    settings = job(weights)
    data, net, _ = prepare.ready(settings)
    whole = copy.deepcopy(net)
    whole.encoder.requires_grad_(False)
    whole.trains_head_alone = False
    for name, made in ("head", net), ("whole", whole):
        determined_by = dict.fromkeys(heads.DETERMINES) | {"made": name}
        prepare.train_(made, settings, data, TensorCache(tmp_path / "cache" / "float", determined_by, "train"), False)
    torch.testing.assert_close(net.head.weight, whole.head.weight, rtol=0, atol=1e-5)
    assert not net.training


def test_embedded_batches_are_those_of_the_loader_in_every_epoch(weights, tmp_path):
    data, net, _ = prepare.ready(job(weights))
    net.eval()
    cache = TensorCache(tmp_path / "cache" / "float", dict.fromkeys(heads.DETERMINES), "train again")
    ours = heads.embedded(net, data.train_dataloader(), cache)
    theirs = data.train_dataloader()
    for _ in range(2):
        for (found, labels), (ids, expected) in zip(ours, theirs, strict=True):
            assert torch.equal(labels, expected)
            torch.testing.assert_close(found, net.embed(ids), rtol=0, atol=1e-5)


def test_a_damaged_entry_is_named(weights):
    run(job(weights))
    (embeddings,) = entries(weights, "embeddings")
    embeddings.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="embeddings cache .* is damaged .*; delete .* to embed again"):
        run(job(weights, "trainer.lr=0.01"))


def test_samples_without_numbers_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    cache = TensorCache(Path("nowhere"), {}, "train again")
    with pytest.raises(ValueError, match="^model.trains_head_alone=True: training data must come from a DataLoader"):
        heads.embedded(bert_tiny_random(), DataLoader(Endless()), cache)


def test_the_hash_of_an_encoder_tells_weights_and_structure():
    torch.manual_seed(0)
    first = bert_tiny_random(2, width=8, vocabulary=9)
    other = copy.deepcopy(first)
    assert heads.encoder_hash(first) == heads.encoder_hash(other)
    other.encoder.layers[1].output.bias.data[3] += 1e-6
    assert heads.encoder_hash(first) != heads.encoder_hash(other)
    torch.manual_seed(0)  # the same weights, divided otherwise
    assert heads.encoder_hash(first) != heads.encoder_hash(bert_tiny_random(2, width=8, vocabulary=9, heads=4))
    assert heads.encoder_hash(torch.nn.Linear(2, 2)) is None
