"""What is made once and kept by the hash of all that determined it: float networks, sketches, float graphs."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qexp.engines.export import Graph, export_float
from qexp.heads import encoder_hash
from qexp.machine import versions
from qexp.models.spread import spread_channels_
from qexp.prepare import calibration_loader, target
from qexp.quant import smooth_groups, smoothquant
from qexp.quant.dataflow import Dataflow
from qexp.quant.granularity import Granularity
from qexp.quant.layers import QuantConv2d
from qexp.quant.observers import Observer
from qexp.quant.quantizer import Quantizer
from qexp.quant.sketch import Sketch
from qexp.schema import PREPARED
from qexp.settings import Settings
from qexp.store import TensorCache
from qexp.tasks.fp32 import Float32Task
from qexp.tasks.ptq import PTQTask

OF_CALIBRATION = ("calibration_size", "calibration_outlier")  # options of data that do not touch training


def float_cache(settings: Settings, net: nn.Module, data: pl.LightningDataModule, outputs: Path) -> TensorCache:
    """The place of this float network in the cache: the hash of all that determines its weights."""
    config = settings.config
    determined_by = {
        "model": config["model"],
        "data": {key: value for key, value in config["data"].items() if key not in OF_CALIBRATION},
        # What lies on disk may change while its path stays.
        "samples": data.fingerprint() if hasattr(data, "fingerprint") else None,
        "trainer": config["trainer"],
        "seed": settings.seed,
        "encoder": encoder_hash(net),
        "versions": versions(),
        "sources": _source_hashes(
            target(config["model"], "model"), target(config["data"], "data"), Float32Task, type(data),
            *{type(module) for module in net.modules()},
        ),
    }  # fmt: skip
    return TensorCache(outputs / "cache" / "float", determined_by, "train again")


def sketch_cache(float_network: TensorCache, settings: Settings) -> TensorCache:
    """The place of what the calibration pass saw: the hash of the float network and of the data that passed."""
    determined_by = {
        "float network": float_network.determined_by,
        **_made_of_it(settings),
        "calibration data": settings.config["data"],
        "sources": _source_hashes(
            Sketch, Observer, Granularity, Quantizer, QuantConv2d, Dataflow, calibration_loader, spread_channels_
        ),
    }
    return TensorCache(float_network.root.parent / "sketch", determined_by, "calibrate again")


def smoothing_cache(sketches: TensorCache, layers: list[str], rows: int) -> TensorCache:
    """The place of what SmoothQuant needs to know of these layers' inputs, in the float network of the sketches."""
    determined_by = {
        "sketches": sketches.determined_by,
        "layers": layers,
        "rows": rows,
        "sources": _source_hashes(smoothquant.smooth_),
    }
    return TensorCache(sketches.root.parent / "smoothing", determined_by, "look again")


def smoothed_sketches(sketches: TensorCache, alphas: dict[str, float], settings: Settings) -> TensorCache:
    """The place of the sketches of a network after SmoothQuant, by the alpha of each group (named by a layer)."""
    determined_by = {
        "sketches": sketches.determined_by,
        "alphas": alphas,
        "exclude": list(settings.recipe.exclude),  # layers that have no say in the scales
        "sources": _source_hashes(smoothquant.smooth_, smooth_groups.find_groups),
    }
    return TensorCache(sketches.root, determined_by, sketches.remedy)


def reference_cache(float_network: TensorCache, settings: Settings, data: pl.LightningDataModule) -> TensorCache:
    """The place of what the float network answers over the test set: the hash of both."""
    found = hashlib.sha256()
    for batch in data.test_dataloader():
        for tensor in batch:
            found.update(tensor.contiguous().numpy().tobytes())
    determined_by = {
        "float network": float_network.determined_by,
        **_made_of_it(settings),
        "test data": found.hexdigest(),
        "sources": _source_hashes(PTQTask, spread_channels_),
    }
    return TensorCache(float_network.root.parent / "reference", determined_by, "evaluate again")


def graph_cache(float_network: TensorCache, settings: Settings) -> TensorCache:
    """The place of the float network's ONNX form."""
    determined_by = {
        "float network": float_network.determined_by,
        **_made_of_it(settings),
        "sources": _source_hashes(export_float, spread_channels_, Dataflow),
    }
    return TensorCache(float_network.root.parent / "onnx", determined_by, "export again")


def _made_of_it(settings: Settings) -> dict[str, Any]:
    """What is done to the float network after training."""
    return {key: settings.config[key] for key in PREPARED}


def float_graph(flow: Dataflow, cache: TensorCache) -> Graph:
    """The float network as ONNX, which its weights decide: written once. Errors: NotExportable."""
    with cache.lock():
        state = cache.load()
        if state is None:
            state = {"graph": torch.frombuffer(bytearray(export_float(flow).SerializeToString()), dtype=torch.uint8)}
            cache.save(state)
    return Graph.FromString(state["graph"].numpy().tobytes())


def _source_hashes(*things: Any) -> list[str]:
    """Hash of each file that defines one of these functions, or one of these classes and its bases."""
    files = set()
    for thing in things:
        for kind in inspect.getmro(thing) if inspect.isclass(thing) else (thing,):
            try:
                files.add(inspect.getfile(kind))
            except (OSError, TypeError):  # built in
                continue
    return sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files)
