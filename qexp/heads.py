"""A head that is trained alone: the encoder below it stays as it is, so its embeddings are made once and kept."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from qexp.data.base import Samples
from qexp.report import terminal
from qexp.store import TensorCache

# Of all that determines a float network, what its encoder and the training samples depend on.
DETERMINES = ("model", "data", "samples", "encoder", "versions", "sources")


def encoder_hash(net: nn.Module) -> str | None:
    """Hash of the untrained encoder of a sentence classifier, whose files may change while their path stays.

    None for networks without the attribute `trains_head_alone`: the seed decides their weights.
    """
    if not hasattr(net, "trains_head_alone"):
        return None
    found = hashlib.sha256(repr(net.encoder).encode())
    for name, tensor in sorted(net.encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def embedded(net: nn.Module, loader: DataLoader, float_network: TensorCache) -> DataLoader:
    """The batches of a loader with `net.embed(x)` in place of x, in the order of the loader, computed at most once.

    Errors: ValueError for samples that cannot be numbered, StoreError for a damaged cache.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_sampler:
        raise ValueError("model.trains_head_alone=True: training data must come from a DataLoader that makes batches")
    determined_by = {key: float_network.determined_by[key] for key in DETERMINES}
    cache = TensorCache(float_network.root.parent / "embeddings", determined_by, "embed again")
    with cache.lock():
        state = cache.load()
        if state is None:
            state = _embeddings(net, loader)
            cache.save(state)
        else:
            terminal.console.print("[dim]       -[/dim]  embeddings from the cache")
    samples = Samples(state["embeddings"], state["labels"], _as_it_is)
    return DataLoader(samples, batch_sampler=loader.batch_sampler, generator=loader.generator)


@torch.no_grad()
def _embeddings(net: nn.Module, loader: DataLoader) -> dict[str, Tensor]:
    """Embeddings (N, hidden) and labels (N,) of all samples of the loader's data set, in stored order."""
    size = loader.batch_size or len(next(iter(loader.batch_sampler)))
    batches = DataLoader(
        loader.dataset,
        size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=torch.Generator(),  # or a head would depend on whether embeddings were in the cache
    )
    embeddings, labels = [], []
    with terminal.stage("embedding the training samples") as update:
        for number, (x, y) in enumerate(batches, 1):
            embeddings.append(net.embed(x))
            labels.append(y)
            update(number, len(batches))
    return {"embeddings": torch.cat(embeddings), "labels": torch.cat(labels)}


def _as_it_is(embedding: Tensor, generator: torch.Generator | None) -> Tensor:
    return embedding
