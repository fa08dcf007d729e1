"""What `qexp compare` takes for many runs: seconds of reading, grouping and writing, and the size of the page.

The runs are made up: a grid of calibrations, formats, networks, fine-tunings and seeds in the form of real records,
with the tensors of a ResNet-8.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import yaml

from qexp.compare.groups import groups_of, metrics_of
from qexp.compare.records import read
from qexp.report.comparison import comparison_table
from qexp.report.comparison_page import page

CALIBRATIONS = "calibration.MinMax", "calibration.Percentile", "search.MSE", "entropy.Entropy"
NETWORKS = {"resnet8": 1.0, "mobilenet": 0.6, "resnet18": 4.0}
AXES = (2, 3, 4, 5, 6, 8), CALIBRATIONS, NETWORKS, ("PerTensor", "PerChannel"), ("none", "ste", "lsq"), (0, 1, 2)
TENSORS = [
    f"stage{i}.{j}.conv{k}.{kind}" for i in range(4) for j in range(2) for k in (1, 2) for kind in ("input", "weight")
]
EPOCHS = 20


def records(outputs: Path, number: int) -> None:
    """Write made-up runs."""
    draw = random.Random(0)
    for index, choice in zip(range(number), itertools.cycle(itertools.product(*AXES)), strict=False):
        folder = outputs / "runs" / f"{index:012x}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(_config(*choice, index)))
        (folder / "metrics.json").write_text(json.dumps(_metrics(*choice, draw)))
        environment = {"commit": "0" * 40, "cpu": "a CPU", "isa": "avx2", "versions": {"torch": "2.13.0"}}
        (folder / "environment.json").write_text(json.dumps(environment))
        sites = [
            (name, "weight" if "weight" in name else "activation", draw.gauss(6.0 * choice[0], 2)) for name in TENSORS
        ]
        _table(folder / "layers.csv", ("site", "kind", "sqnr_db"), sites)
        if choice[4] != "none":
            _table(folder / "finetune.csv", ("epoch", "loss"), [(e, draw.random() / (e + 1)) for e in range(EPOCHS)])


def _config(bits, calibration, network, granularity, finetune, seed, index) -> dict:
    grid = {"_target_": "qexp.quant.grid.IntegerGrid", "bits": bits, "convention": "restricted", "scale": "float32"}
    rule, share = {"_target_": f"qexp.quant.{calibration}"}, {"_target_": f"qexp.quant.granularity.{granularity}"}
    return {
        "seed": seed, "calibration": {"weight": dict(rule), "activation": dict(rule)},
        "quantizer": {"weight": dict(grid), "activation": dict(grid), "exclude": []},
        "granularity": {"weight": share}, "finetune": {"name": finetune, "lr": 3e-4, "epochs": EPOCHS},
        "model": {"_target_": f"qexp.models.{network}", "width": 16 + index // 1296},
        "data": {"_target_": "qexp.data.Digits", "batch_size": 64, "seed": seed},
    }  # fmt: skip


def _metrics(bits, calibration, network, granularity, finetune, seed, draw) -> dict:
    loss = 0.3 * 2**-bits * (1.5 if granularity == "PerTensor" else 1) * (1 if finetune == "none" else 0.4)
    accuracy = min(0.99 - loss + draw.gauss(0, 0.003), 1)
    return {
        "acc/fp32": 0.99, "acc/sim": accuracy, "acc/engine": accuracy, "acc/drop": 0.99 - accuracy,
        "sqnr/output_db": 6.0 * bits - 5 + draw.gauss(0, 1), "latency/speedup": 2 * draw.uniform(0.9, 1.1),
        "latency/int8_ms": NETWORKS[network] * (0.05 + 0.01 * bits) * draw.uniform(0.97, 1.03),
        "size/packed_bytes": int(78_000 * NETWORKS[network] * bits / 8), "status": "finished",
    }  # fmt: skip


def _table(path: Path, heading: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heading, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--keep", type=Path, help="leave the records and the page of the last size here")
    given = parser.parse_args()
    print(f"{'runs':>6} {'groups':>7} {'read s':>7} {'group s':>8} {'page s':>7} {'page MB':>8}")
    for number in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            outputs = given.keep if given.keep and number == given.runs[-1] else Path(folder)
            records(outputs, number)
            start = time.perf_counter()
            found = read([outputs])
            after_read = time.perf_counter()
            groups, metrics = groups_of(found.runs), metrics_of(found.runs)
            comparison_table(groups, metrics)
            after_groups = time.perf_counter()
            text = page(groups, metrics, [], found, f"{number} runs")
            end = time.perf_counter()
            (outputs / "compare.html").write_text(text, encoding="utf-8")
            took = after_read - start, after_groups - after_read, end - after_groups
            times = f"{took[0]:7.2f} {took[1]:8.2f} {took[2]:7.2f}"
            print(f"{number:6} {len(groups):7} {times} {len(text.encode()) / 1e6:8.2f}")


if __name__ == "__main__":
    main()
