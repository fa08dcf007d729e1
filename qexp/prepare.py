"""Data, network and Lightning trainers from their config sections; the float network comes from the cache or is trained."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp.machine import versions
from qexp.report import terminal
from qexp.settings import ConfigError, Settings, build
from qexp.store import FloatCache
from qexp.tasks.fp32 import Float32Task
from qexp.tasks.progress import TellProgress


def data_module(config: dict[str, Any]) -> pl.LightningDataModule:
    """The data of a run, set up. Errors: ConfigError for what the data set does not offer."""
    data = build(config["data"], "data")
    if not isinstance(data, pl.LightningDataModule):
        raise ConfigError(f"data._target_={config['data']['_target_']}: must be a LightningDataModule")
    try:
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
    except (ValueError, OSError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(getattr(data, "num_classes", None), int):
        raise ConfigError(f"data: {type(data).__name__} must have an attribute num_classes, the number of labels")
    return data


def calibration_loader(data: pl.LightningDataModule, seed: int) -> DataLoader:
    """The module's own calibration loader, or 256 training samples drawn with the seed. Errors: ConfigError if empty."""
    if hasattr(data, "calibration_dataloader"):
        loader = data.calibration_dataloader()
    else:
        train = data.train_dataloader().dataset
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:256]
        loader = DataLoader(torch.utils.data.Subset(train, drawn.tolist()), batch_size=64)
    if len(loader) == 0:
        raise ConfigError(f"data: the calibration set of {type(data).__name__} is empty")
    return loader


def example_images(data: pl.LightningDataModule) -> Tensor:
    """Two images of the test set: what the network is traced with."""
    images = next(iter(data.test_dataloader()))[0][:2]
    return images if len(images) == 2 else images.repeat(2, *[1] * (images.dim() - 1))


def network(config: dict[str, Any], data: pl.LightningDataModule) -> nn.Module:
    """The untrained network; input channels and classes follow the data where its constructor has these names."""
    section = config["model"]
    try:
        known = inspect.signature(get_object(section["_target_"])).parameters
    except Exception as error:  # importing a user's module may raise anything
        raise ConfigError(f"model._target_={section['_target_']}: cannot be imported ({error})".splitlines()[0]) from None
    offered = {"num_classes": data.num_classes}
    if hasattr(data, "input_shape"):
        offered["in_channels"] = data.input_shape[0]
    net = build(section, "model", **{k: v for k, v in offered.items() if k in known and k not in section})
    if not isinstance(net, nn.Module):
        raise ConfigError(f"model._target_={section['_target_']}: must return an nn.Module, not {type(net).__name__}")
    return net


def trainer(
    config: dict[str, Any], update: terminal.Update, fit: bool = False, logger: Any = False
) -> pl.Trainer:
    """A Lightning trainer for one pass, or with fit=True for training; the passes are on the CPU, as the engines are."""
    return pl.Trainer(
        max_epochs=config["trainer"]["epochs"],
        accelerator=config["trainer"]["accelerator"] if fit else "cpu",
        devices=1,
        logger=logger,
        deterministic=True,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[TellProgress(update)],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )


def float_cache(settings: Settings, net: nn.Module, data: pl.LightningDataModule, outputs: Path) -> FloatCache:
    """The place of this float network in the cache: the hash of all that determines its weights."""
    config = settings.config
    determined_by = {
        "model": config["model"],
        # The calibration draw does not touch training.
        "data": {key: value for key, value in config["data"].items() if key != "calibration_size"},
        "trainer": config["trainer"],
        "seed": settings.seed,
        "versions": versions(),
        "sources": [_source_hash(thing) for thing in (type(net), type(data), Float32Task)],
    }
    return FloatCache(outputs / "cache" / "float", determined_by)


def _source_hash(kind: type) -> str | None:
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def train_(net: nn.Module, settings: Settings, data: pl.LightningDataModule, cache: FloatCache, logger: Any) -> None:
    """Give the network its trained weights. Errors: ValueError when training diverges, StoreError for a damaged cache."""
    with cache.lock():
        state = cache.load()
        if state is None:
            section = settings.config["trainer"]
            pl.seed_everything(settings.seed, workers=True, verbose=False)
            task = Float32Task(net, data.num_classes, section["lr"], section["weight_decay"])
            with terminal.stage(f"training the float network, {section['epochs']} epochs") as update:
                trainer(settings.config, update, fit=True, logger=logger).fit(task, data.train_dataloader())
            state = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
            _require_finite(state)
            cache.save(state)
        else:
            terminal.console.print("[dim]       -[/dim]  float network from the cache")
    net.load_state_dict(state)
    net.cpu().eval()
    _require_finite(state)


def _require_finite(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: the float network holds NaN or infinite values")
