"""What a run writes: metrics.json, layers.csv, config.yaml, and the same to its logger."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from qexp.engines.deploy import Deployment, activation_schemes
from qexp.engines.latency import Timings
from qexp.machine import commit, processor, versions
from qexp.metrics.footprint import site_bits
from qexp.metrics.sqnr import QuantizationNoise
from qexp.quant.convert import layers
from qexp.quant.dataflow import Dataflow
from qexp.quant.quantizer import Mode, Quantizer
from qexp.store import write_json

LAYER_COLUMNS = (
    "site", "kind", "layer", "bits", "format", "convention", "granularity", "calibration",
    "sqnr_db", "mse", "clipped_share", "macs", "engine_int8", "rounding", "scale", "scales", "bytes",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Commit, versions and processor, for the record."""
    return {"commit": commit(), "versions": versions(), **processor()}


def layer_rows(
    model: nn.Module, noise: dict[str, QuantizationNoise], macs: dict[str, int], deployment: Deployment | None
) -> list[dict[str, Any]]:
    """One row for each active quantization site, by the names of LAYER_COLUMNS."""
    rows = []
    for name, layer in layers(model):
        for site in layer.children():
            if isinstance(site, Quantizer) and site.mode is Mode.QUANTIZE:
                scheme, is_weight = site.scheme, site.is_weight
                codes, qparams = site_bits(site)
                figures = noise[site.site].compute() if site.site in noise else {}
                rows.append({
                    "site": site.site, "kind": "weight" if is_weight else "activation", "layer": name,
                    "bits": scheme.grid.bits, "format": scheme.grid.format, "convention": scheme.grid.convention,
                    "granularity": str(scheme.granularity), "calibration": str(scheme.calibration), **figures,
                    "macs": macs.get(name, 0) if is_weight else 0,
                    "engine_int8": deployment.runs_int8(name) if deployment else False,
                    "rounding": str(scheme.rounding), "scale": scheme.grid.scale,
                    "scales": 0 if site.dynamic else site.scale.numel(), "bytes": -(-(codes + qparams) // 8),
                })  # fmt: skip
    return rows


def deployment_metrics(deployment: Deployment, flow: Dataflow) -> dict[str, Any]:
    """Certificate and coverage of one engine."""
    islands = deployment.islands(flow)
    formats = {str(scheme.grid) for scheme in activation_schemes(deployment.simulation).values()}
    return {
        **deployment.certificate.metrics(),
        "int8/formats": ", ".join(sorted(formats)),
        "int8/mac_coverage": deployment.mac_coverage,
        "int8/islands": len(islands),
        "int8/island_names": ", ".join(islands),
    }


def latency_metrics(timings: Timings, engine: str) -> dict[str, Any]:
    """Latency of one engine: its own fp32 as the rival, and the best fp32 of all beside it."""
    fp32, again, int8 = f"{engine}/fp32", f"{engine}/fp32 again", f"{engine}/int8"
    found: dict[str, Any] = {"latency/fp32_ms": timings.median_ms(fp32)}
    _, found["latency/aa_lo"], found["latency/aa_hi"] = timings.ratio(fp32, again)
    best = min((name for name in timings.names if name.endswith("/fp32")), key=timings.median_ms)
    found["latency/best_fp32_ms"] = timings.median_ms(best)
    found["latency/best_fp32_engine"] = best.split("/")[0]
    if int8 in timings.names:
        found["latency/int8_ms"] = timings.median_ms(int8)
        for name, rival in ("latency/speedup", fp32), ("latency/speedup_over_best_fp32", best):
            found[name], found[f"{name}_lo"], found[f"{name}_hi"] = timings.ratio(rival, int8)
    return found


def with_winner(metrics: dict[str, Any], by_engine: dict[str, dict[str, Any]], winner: str | None) -> None:
    """Add each engine's figures behind its name, and the winner's under the plain names."""
    for engine, figures in by_engine.items():
        metrics.update({f"{engine}/{name}": value for name, value in figures.items()})
    if winner is not None:
        metrics.update(by_engine[winner])
        metrics["engine/winner"] = winner


def write(
    folder: Path, config: dict, metrics: dict, rows: list[dict], in_float: list[tuple[str, str, str]],
    history: list[dict[str, float]],
) -> None:  # fmt: skip
    """Write config.yaml, environment.json, layers.csv, unquantized.csv, metrics.json and, after fine-tuning,
    finetune.csv.
    """
    if history:
        with (folder / "finetune.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in history for name in row)))
            writer.writeheader()
            writer.writerows(history)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    with (folder / "layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with (folder / "unquantized.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "kind", "reason"))
        writer.writerows(in_float)
    write_json(folder / "environment.json", environment())
    write_json(folder / "metrics.json", metrics)
