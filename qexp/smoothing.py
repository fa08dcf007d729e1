"""SmoothQuant in a run: what is seen of the float network and kept, what it is smoothed by, and what is told of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qexp import caches, prepare
from qexp.quant.dataflow import Dataflow, additions_to_modules
from qexp.quant.smooth_groups import Group, Smoothed, find_groups
from qexp.quant.smoothquant import Seen, observing_inputs
from qexp.quant.smoothquant import smooth_ as smooth_groups_
from qexp.report import terminal
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import TensorCache

ROWS = 1024  # tokens that a search compares on
SAME = 1e-3  # of the largest logit: float32 rounds otherwise, a scale that was missed is far more
COLUMNS = (
    "norm", "layers", "how", "alpha", "largest_scale", "outliers_before", "outliers_after", "sqnr_db", "reason",
)  # fmt: skip


def require_groups(net: nn.Module, flow: Dataflow, settings: Settings) -> None:
    """Refuse to smooth a network in which nothing can be, before it is trained. Errors: ConfigError."""
    if settings.alphas:
        ready, _ = additions_to_modules(net, flow)
        _groups(ready, flow if ready is net else Dataflow(ready, flow.example), settings)


def _groups(net: nn.Module, flow: Dataflow, settings: Settings) -> tuple[list[Group], list[Smoothed]]:
    groups, others = find_groups(net, flow, settings.smooths_all)
    if not groups:
        why = next((f" ({row.norm}: {row.reason})" for row in others if row.norm), "")
        lacking = (
            "linear layer of its own" if settings.smooths_all else "LayerNorm that feeds linear layers and nothing else"
        )
        raise ConfigError(
            f"smoothing={settings.config['smoothing']['name']}: {type(net).__name__} has no {lacking}{why}; choose none"
        )
    return groups, others


def smooth_(
    model: nn.Module, settings: Settings, data: pl.LightningDataModule, flow: Dataflow, sketches: TensorCache
) -> list[Smoothed]:
    """Smooth a float network in place, as its settings say; one row for each group and for what is in none.

    What a pass over the calibration data has seen is kept beside the sketches. Errors: ConfigError where nothing can be
    smoothed, ValueError for NaN or infinite activations.
    """
    if not settings.alphas:
        return []
    groups, others = _groups(model, flow, settings)
    searches = len(settings.alphas) > 1
    cache = caches.smoothing_cache(sketches, [group.layers[0] for group in groups], ROWS if searches else 0)
    seen = _seen(model, groups, settings, data, cache)
    with torch.no_grad(), prepare.evaluating(model):
        before = model(flow.example)
        with terminal.stage("smoothing: a search for alpha" if searches else "smoothing"):
            rows = smooth_groups_(model, groups, seen, settings.recipe, settings.alphas)
        moved = (model(flow.example) - before).abs().max() / before.abs().max()
    if moved > SAME:
        raise ConfigError(
            f"smoothing={settings.config['smoothing']['name']}: {type(model).__name__} computes something else with "
            f"scales folded in ({moved:.1e} of its largest logit), because it uses parameters past their layers; "
            "choose none"
        )
    return rows + others


@torch.no_grad()
def _seen(
    model: nn.Module, groups: list[Group], settings: Settings, data: pl.LightningDataModule, cache: TensorCache
) -> dict[str, Seen]:
    """What one pass over the calibration data shows, or has shown before."""
    rows = ROWS if len(settings.alphas) > 1 else 0
    with cache.lock(), prepare.evaluating(model), observing_inputs(model, groups, rows) as seen:
        buffers = {f"{layer}: {name}": b for layer, one in seen.items() for name, b in one.named_buffers()}
        if (state := cache.load()) is None:
            loader = prepare.calibration_loader(data, settings.seed)
            with terminal.stage("smoothing: a pass over the calibration data") as update:
                for number, (inputs, _) in enumerate(loader, 1):
                    model(inputs)
                    update(number, len(loader))
            cache.save(buffers)
        else:
            for name, buffer in buffers.items():
                buffer.copy_(state[name])
    return seen


def sketches_of(sketches: TensorCache, rows: list[Smoothed], settings: Settings) -> TensorCache:
    """Where sketches of a smoothed network are: others than those of the network before."""
    alphas = {row.layers[0]: row.alpha for row in rows if row.alpha is not None}
    return caches.smoothed_sketches(sketches, alphas, settings) if alphas else sketches


def metrics(rows: list[Smoothed]) -> dict[str, Any]:
    """Figures by their names in a run; none where nothing was to be smoothed."""
    if not rows:
        return {}
    alphas = [row.alpha for row in rows if row.alpha is not None]
    told = {"smoothing/groups": len(alphas), "smoothing/skipped": len(rows) - len(alphas)}
    return told | ({"smoothing/alpha": sum(alphas) / len(alphas)} if alphas else {})


def table(rows: list[Smoothed]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of smoothing.csv; each candidate of a search has a column with its SQNR."""
    candidates = list(dict.fromkeys(alpha for row in rows for alpha in row.sqnr_db))
    columns = [*COLUMNS, *(f"sqnr_db_alpha_{alpha:g}" for alpha in candidates)]
    return columns, [
        [
            row.norm, ", ".join(row.layers), row.how, row.alpha, row.largest, *(row.outliers or (None, None)),
            row.sqnr_db.get(row.alpha), row.reason, *(row.sqnr_db.get(alpha) for alpha in candidates),
        ]
        for row in rows
    ]  # fmt: skip


def write(folder: Path, rows: list[Smoothed]) -> None:
    """Write smoothing.csv, where anything was to be smoothed."""
    if rows:
        with (folder / "smoothing.csv").open("w", newline="") as file:
            columns, lines = table(rows)
            csv.writer(file).writerows([columns, *lines])
