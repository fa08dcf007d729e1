"""Data, network and Lightning trainers from their config sections; the float network is trained once, then cached."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from hydra._internal.utils import _locate
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qexp.engines.base import Engine
from qexp.heads import embedded
from qexp.models import spread
from qexp.quant.convert import Shapes, refuse_unquantizable
from qexp.quant.dataflow import Dataflow, NotExportable, additions_to_modules
from qexp.quant.granularity import PerTensor
from qexp.quant.layers import Add
from qexp.quant.recipe import Recipe
from qexp.quant.sites import site_shapes
from qexp.report import terminal
from qexp.sections import ConfigError, build
from qexp.settings import Settings
from qexp.store import StoreError, TensorCache
from qexp.tasks.fp32 import Float32Task
from qexp.tasks.progress import TellProgress
from qexp.tasks.ranks import Trainer, require_shareable


def data_module(config: dict[str, Any]) -> pl.LightningDataModule:
    """The data of a run, set up. Errors: ConfigError for what the data set does not offer."""
    data = build(config["data"], "data")
    if not isinstance(data, pl.LightningDataModule):
        raise ConfigError(f"data._target_={config['data']['_target_']}: must be a LightningDataModule")
    for loader in "train_dataloader", "test_dataloader":
        if getattr(type(data), loader) is getattr(pl.LightningDataModule, loader):
            raise ConfigError(f"data: {type(data).__name__} must define {loader}")
    try:
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
    except (ValueError, OSError) as error:
        why, words = str(error).splitlines()[0], config["data"].get("vocabulary")
        if words is not None and words == config["model"].get("weights"):  # it follows the model unless it is set
            why = why.replace(f"data.vocabulary={words}:", f"model.weights={words}:")
        raise ConfigError(why) from error
    if not isinstance(getattr(data, "num_classes", None), int):
        raise ConfigError(f"data: {type(data).__name__} must have an attribute num_classes, the number of labels")
    return data


def calibration_loader(data: pl.LightningDataModule, seed: int) -> DataLoader:
    """The module's own calibration loader, or 256 training samples drawn by the seed. Errors: ConfigError if empty."""
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
    """Two samples of the test set: what the network is traced with. Errors: ConfigError if it is empty."""
    batch = next(iter(data.test_dataloader()), None)
    if batch is None:
        raise ConfigError(f"data: the test set of {type(data).__name__} is empty")
    images = batch[0][:2]
    return images if len(images) == 2 else images.repeat(2, *[1] * (images.dim() - 1))


def network(config: dict[str, Any], data: pl.LightningDataModule) -> nn.Module:
    """The untrained network; input channels and classes follow the data where its constructor has these names."""
    section = config["model"]
    known = inspect.signature(target(section, "model")).parameters
    offered = {"num_classes": data.num_classes}
    if hasattr(data, "input_shape"):
        offered["in_channels"] = data.input_shape[0]
    net = build(section, "model", **{k: v for k, v in offered.items() if k in known and k not in section})
    if not isinstance(net, nn.Module):
        raise ConfigError(f"model._target_={section['_target_']}: must return an nn.Module, not {type(net).__name__}")
    return net


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; Lightning trains each module in the mode that it finds."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def require_logits(net: nn.Module, images: Tensor, data: pl.LightningDataModule) -> None:
    """Refuse a network that cannot be called on these samples, or returns no logits. Errors: ConfigError."""
    kind, num_classes = type(net).__name__, data.num_classes
    try:
        with evaluating(net):
            logits = net(images)
    except Exception as error:  # whatever the network's own code raises
        why = " ".join(str(error).split()) or type(error).__name__
        batch = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        raise ConfigError(
            f"model: {kind} cannot be called on batches of {type(data).__name__}, {batch} ({why})"
        ) from error
    if not isinstance(logits, Tensor):
        raise ConfigError(f"model: {kind} returns a {type(logits).__name__}, but must return logits")
    if logits.shape != (len(images), num_classes):
        expected = (len(images), num_classes)
        raise ConfigError(f"model: {kind} returns a tensor of shape {tuple(logits.shape)}, but must return {expected}")


def target(section: dict[str, Any], key: str) -> Any:
    try:
        target = _locate(section["_target_"])
    except Exception as error:  # importing a user's module may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{key}._target_={section['_target_']}: cannot be imported ({why})") from None
    if not callable(target):
        raise ConfigError(f"{key}._target_={section['_target_']}: must be a class or function")
    return target


def ready(settings: Settings) -> tuple[pl.LightningDataModule, nn.Module, list[Engine]]:
    """The data, the untrained network and the engines of a run, after everything that can be refused before compute.

    Errors: ConfigError.
    """
    config, recipe = settings.config, settings.recipe
    trainer(config, update=lambda *_: None, fit=True)
    engines = [build(section, f"engine.engines.{name}") for name, section in config["engine"]["engines"].items()]
    data = data_module(config)
    net = network(config, data)
    _require_shareable(config, net, data)
    if settings.finetune is not None:
        _require_optimizer(settings)
    kind, lacking = (
        (nn.Linear, "linear layer") if settings.smooths_all else (nn.LayerNorm, "LayerNorm to smooth behind")
    )
    if settings.alphas and not any(isinstance(module, kind) for module in net.modules()):
        raise ConfigError(
            f"smoothing={config['smoothing']['name']}: {type(net).__name__} has no {lacking}; choose none"
        )
    if settings.method != "fp32" or settings.flatness:
        calibration_loader(data, settings.seed)
        shapes, images = None, example_images(data)
        if recipe.activation.granularity != PerTensor():
            require_logits(net, images, data)
            with evaluating(net):
                shapes = site_shapes(net, images)
        try:
            _refuse_unquantizable(_with_additions(net, data, recipe), recipe, shapes, images)
        except ValueError as error:
            raise ConfigError(blamed(error)) from None
    return data, net, engines


def _require_shareable(config: dict[str, Any], net: nn.Module, data: pl.LightningDataModule) -> None:
    devices = config["trainer"]["devices"]
    try:
        if devices > 1:
            require_shareable(net, data.train_dataloader(), devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _require_optimizer(settings: Settings) -> None:
    """Make the optimizer of a parameter that nobody needs. Errors: ConfigError for what it refuses."""
    plan, parameter = settings.finetune, nn.Parameter(torch.zeros(1))
    optimizer = plan.optimizer([{"params": [parameter]}])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"finetune.optimizer: {type(optimizer).__name__} is no torch.optim.Optimizer")
    if plan.scheduler is not None:
        plan.scheduler(optimizer, **plan.scheduler.offered(T_max=1, total_steps=1))


def _refuse_unquantizable(net: nn.Module, recipe: Recipe, shapes: Shapes | None, images: Tensor) -> None:
    """Errors: ValueError for a layer that cannot be quantized, unless it is an addition that stays in float."""
    try:
        refuse_unquantizable(net, recipe, shapes)
    except ValueError:
        if shapes is None or not any(isinstance(module, Add) for module in net.modules()):
            raise
        with evaluating(net):
            in_float = Dataflow(net, images).normalized_additions()
        refuse_unquantizable(net, recipe, shapes, in_float)


def _with_additions(net: nn.Module, data: pl.LightningDataModule, recipe: Recipe) -> nn.Module:
    """The network itself or, where a pattern of `exclude` may mean one, with its functional additions as modules."""
    names = [name for name, _ in net.named_modules()]
    if all(fnmatch.filter(names, pattern) for pattern in recipe.exclude):
        return net
    images = example_images(data)
    require_logits(net, images, data)
    with evaluating(net):
        try:
            return additions_to_modules(net, Dataflow(net, images))[0]
        except NotExportable as error:
            raise ConfigError(f"model: {error}") from None


def blamed(error: ValueError) -> str:
    """What the quantization core says of a layer, after the name of the group that can mend it."""
    text = str(error)
    if text.startswith(("exclude", "layers")):
        return f"quantizer.{text}"
    about_blocks = " blocks " in text or "a tensor of shape" in text
    return f"{'granularity' if about_blocks else 'quantizer'}: {text}"


def trainer(config: dict[str, Any], update: terminal.Update, fit: bool = False, logger: Any = False) -> pl.Trainer:
    """A Lightning trainer for one pass, or with fit=True for training; a pass is made on the CPU, as by the engines."""
    try:
        return _trainer(config, update, fit, logger)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer.accelerator={config['trainer']['accelerator']}: {error}") from None


def _trainer(config: dict[str, Any], update: terminal.Update, fit: bool, logger: Any, **more: Any) -> pl.Trainer:
    section = config["trainer"]
    where = {name: section[name] for name in ("accelerator", "devices", "precision", "threads")}
    options = {
        "max_epochs": section["epochs"],
        **(where if fit else {"accelerator": "cpu"}),
        "logger": logger,
        "deterministic": True,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [TellProgress(update)],
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(options | more))


def finetuning_trainer(
    config: dict[str, Any], epochs: int, update: terminal.Update, callbacks: list[pl.Callback], logger: Any
) -> pl.Trainer:
    """A Lightning trainer for fine-tuning, with these callbacks, of which one keeps checkpoints."""
    told = [TellProgress(update), *callbacks]
    return _trainer(config, update, True, logger, max_epochs=epochs, callbacks=told, enable_checkpointing=True)


def train_(net: nn.Module, settings: Settings, data: pl.LightningDataModule, cache: TensorCache, logger: Any) -> None:
    """Give the network its trained weights; where `trains_head_alone`, the head's, from embeddings that are kept.

    Errors: ValueError if weights are not finite or training diverges, StoreError for a damaged cache.
    """
    head_alone = getattr(net, "trains_head_alone", False)
    learner = net.head if head_alone else net
    with cache.lock():
        state = cache.load()
        if state is None:
            section = settings.config["trainer"]
            _require_finite(dict(net.named_parameters()))
            pl.seed_everything(settings.seed, workers=True, verbose=False)
            loader = data.train_dataloader()
            if head_alone:
                with evaluating(net):
                    loader = embedded(net, loader, cache)
            task = Float32Task(learner, data.num_classes, section["lr"], section["weight_decay"])
            what = f"the {'head of the ' * head_alone}float network"
            epochs = f"{section['epochs']} epoch{'s' * (section['epochs'] > 1)}"
            with terminal.stage(f"training {what}, {epochs}") as update:
                trainer(settings.config, update, fit=True, logger=logger).fit(task, loader)
            state = {name: tensor.detach().cpu() for name, tensor in learner.state_dict().items()}
            _require_finite(_learned(net))
            cache.save(state)
        else:
            terminal.console.print("[dim]       -[/dim]  float network from the cache")
    try:
        learner.load_state_dict(state)
    except RuntimeError:
        raise StoreError(f"float cache {cache.folder}: holds another network; delete it to train again") from None
    net.cpu().eval()
    _require_finite(_learned(net))


def require_spreadable(net: nn.Module, flow: Dataflow, settings: Settings) -> None:
    """Refuse to spread a network that has no channels for it. Errors: ConfigError."""
    most = settings.config["channel_spread"]
    try:
        if most:
            spread.require_pairs(net, flow)
    except ValueError as error:
        raise ConfigError(f"channel_spread={most}: {error}; choose 0") from None


def spread_(net: nn.Module, flow: Dataflow, settings: Settings) -> None:
    """Give channels unequal sizes after training, by the seed; the network computes the same. Errors: ConfigError."""
    require_spreadable(net, flow, settings)
    spread.spread_channels_(net, flow, settings.config["channel_spread"], settings.seed)


def _learned(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics; other buffers, such as a mask, may hold what they like."""
    running = {name: buffer for name, buffer in net.named_buffers() if "running_" in name}
    return dict(net.named_parameters()) | running


def _require_finite(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: the float network holds NaN or infinite values")
