"""Quantization-aware training on the digits: what it reaches, what it reaches in brevitas, and what a step costs.

Accuracy is of the simulation, in percent: the mean over seeds and the half width of its 95 % t-interval; that of a
difference is of the differences within a seed. Float networks are trained once a seed and kept in --outputs. All sides
of the table of steps are timed in random interleaving in one process; a ratio is the fastest step over the fastest
step. Networks train on one thread, which takes a few minutes for five seeds.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import record
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from qexp import prepare
from qexp.engines.latency import interleave
from qexp.finetune.plan import FineTune
from qexp.finetuning import attach_
from qexp.jobs import compose_jobs
from qexp.quant import compiled
from qexp.quant.convert import fold_batchnorm_, quantizers
from qexp.quant.estimators import sync_
from qexp.run import Run, run
from qexp.sections import Target
from qexp.tasks.qat import QATTask

RECIPE = ("finetune=distill", "calibration=mse")
CASES = {"resnet8": (4, 3, 2), "mobilenet": (4, 3)}  # model -> bits of the weights; activations have 4
# The recipe's optimizer and steps on the float network, which needs labels: from its own logits it learns nothing.
CONTROL = ("finetune.weight=null", "finetune.activation=null", "finetune.after=recalibrate", "finetune.distill=0.0")
# brevitas does not normalise the gradient of a scale, so it is shown with another optimizer as well.
BREVITAS: dict[str, Target | None] = {
    "brevitas, the same optimizer": None,
    "brevitas, AdamW, lr 0.001": Target(
        {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.0}, "optimizer"
    ),
}
FLOAT, STE, STOCHASTIC, PEER = "float, with BatchNorm", "qexp ste", "qexp stochastic", "brevitas, learned scales"
# side -> (the fine-tuning, whether ranges follow the data, as they do in all epochs of ste but the last)
STEPS = {
    STE: ("ste", False),
    "qexp ste, ranges follow": ("ste", True),
    "qexp lsq": ("lsq", False),
    STOCHASTIC: ("stochastic", False),
}
console = Console(stderr=True, highlight=False)


def finished(outputs: Path, model: str, bits: int, seed: int, *chosen: str) -> Run:
    """One run of qexp, by the overrides of its command line, with activations of 4 bits."""
    widths = f"quantizer.weight.bits={bits}", "quantizer.activation.bits=4"
    usual = "engine=none", "logger=none", "progress=false", "data=digits", "data.train_share=0.5", "quantizer=int4"
    overrides = f"model={model}", f"seed={seed}", f"paths.outputs={outputs}", *usual, *widths, *chosen
    (job,) = compose_jobs(list(overrides), False)
    return run(job.settings)


# Accuracy


@dataclass(frozen=True)
class Estimate:
    """One value a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Of the 95 % t-interval of the mean; infinite for one seed."""
        count = len(self.values)
        if count < 2:
            return float("inf")
        return float(stats.t.ppf(0.975, count - 1) * stats.tstd(self.values) / count**0.5)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half_width:.2f}"

    def record(self) -> dict:
        """What goes into the JSON file."""
        return {"mean": self.mean, "half_width": self.half_width, "values": self.values}


def accuracies(outputs: Path, seeds: list[int]) -> list[dict]:
    """Every model at every width, and its float network after as many steps."""
    rows = []
    for model, widths in CASES.items():
        for bits in widths:
            console.print(f"[dim]{model} W{bits}A4[/dim]")
            found = [finished(outputs, model, bits, seed, *RECIPE).metrics for seed in seeds]
            rows.append({"model": model, "what": f"W{bits}A4"} | _estimates(found, "acc/sim"))
        console.print(f"[dim]{model}, control[/dim]")
        found = [finished(outputs, model, widths[0], seed, *RECIPE, *CONTROL).metrics for seed in seeds]
        rows.append({"model": model, "what": "float, as many steps"} | _estimates(found, "acc/control"))
    return rows


def _estimates(found: list[dict], result: str) -> dict[str, Estimate]:
    percent = {
        name: Estimate(tuple(100 * metrics[key] for metrics in found))
        for name, key in (("float", "acc/fp32"), ("ptq", "acc/ptq"), ("trained", result))
    }
    return percent | {"below": percent["float"] - percent["trained"]}


def accuracy_table(rows: list[dict]) -> Table:
    """One row a model and width; Markdown."""
    shown = Table(box=box.MARKDOWN)
    for heading in "model", "", "float %", "PTQ %", "trained %", "points below float":
        shown.add_column(heading, justify="right" if heading.endswith(("%", "float")) else "left")
    for row in rows:
        control = "W" not in row["what"]
        cells = [str(row[key]) for key in ("float", "ptq", "trained", "below")]
        shown.add_row(row["model"], row["what"], cells[0], "" if control else cells[1], *cells[2:])
    return shown


# The same training in brevitas


def brevitas_accuracies(outputs: Path, seeds: list[int]) -> list[dict]:
    """W2A4 of resnet8 from the same float networks, on the same batches in the same order, for as many steps."""
    jobs = [finished(outputs, "resnet8", 2, seed, *RECIPE) for seed in seeds]
    ours = Estimate(tuple(100 * job.metrics["acc/sim"] for job in jobs))
    rows = [{"what": "qexp", "trained": ours, "below": ours - ours, "note": None}]
    for name, optimizer in BREVITAS.items():
        console.print(f"[dim]{name}[/dim]")
        row = {"what": name, "trained": None, "below": None, "note": None}
        if not find_spec("brevitas"):
            row["note"] = "not installed"
        else:
            try:
                trained = Estimate(tuple(_trained_by_brevitas(job, optimizer) for job in jobs))
                row |= {"trained": trained, "below": ours - trained}
            except Exception as error:  # a rival may fail in any way, which its row tells
                row["note"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
        rows.append(row)
    return rows


def _trained_by_brevitas(job: Run, optimizer: Target | None) -> float:
    """Test accuracy in percent."""
    settings, data = job.settings, prepare.data_module(job.settings.config)
    plan = settings.finetune if optimizer is None else replace(settings.finetune, optimizer=optimizer)
    net = in_brevitas(job, 2, 4, [images for images, _ in prepare.calibration_loader(data, settings.seed)])
    pl.seed_everything(settings.seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=plan.epochs, accelerator="cpu", devices=1, logger=False, deterministic=True,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(QATTask(net.train(), data.num_classes, plan, copy.deepcopy(job.net).eval()), data.train_dataloader())
    with torch.no_grad():
        net.eval()
        right = torch.cat([net(images).argmax(1) == labels for images, labels in data.test_dataloader()])
    return 100 * float(right.double().mean())


def in_brevitas(job: Run, bits: int, activation_bits: int, batches: list[Tensor]) -> nn.Module:
    """The folded resnet8 with every tensor that a layer reads quantized once, learned scales, calibrated by MSE.

    Weights are narrow-range with a scale for each output channel; what comes from a ReLU is unsigned, any other tensor
    has a zero point. Biases stay in float.
    """
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
    from brevitas.quant import (
        Int8WeightPerChannelFloatMSE,
        ShiftedUint8ActPerTensorFloatMSE,
        Uint8ActPerTensorFloatMSE,
    )

    def layer(float_layer: nn.Module) -> nn.Module:
        weight = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}
        if isinstance(float_layer, nn.Linear):
            quantized = QuantLinear(float_layer.in_features, float_layer.out_features, bias=True, **weight)
        else:
            options = {name: getattr(float_layer, name) for name in ("kernel_size", "stride", "padding", "groups")}
            channels = float_layer.in_channels, float_layer.out_channels
            quantized = QuantConv2d(*channels, **options, bias=True, **weight)
        quantized.load_state_dict(float_layer.state_dict(), strict=False)
        return quantized

    def signed() -> nn.Module:
        return QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloatMSE, bit_width=activation_bits)

    net = copy.deepcopy(job.net)
    fold_batchnorm_(net, job.flow)
    for name, module in list(net.named_modules()):
        parent, _, child = name.rpartition(".")
        new = None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            new = layer(module)
        elif isinstance(module, nn.ReLU):
            new = QuantReLU(act_quant=Uint8ActPerTensorFloatMSE, bit_width=activation_bits)
        elif name.endswith(("bn2", "shortcut.bn")):  # what a sum reads; BatchNorm is folded, so this is an identity
            new = signed()
        elif isinstance(module, nn.Flatten):  # what comes from the pool is no less than zero
            pooled = QuantIdentity(act_quant=Uint8ActPerTensorFloatMSE, bit_width=activation_bits)
            new = nn.Sequential(module, pooled)
        if new is not None:
            setattr(net.get_submodule(parent), child, new)
    net.stem = nn.Sequential(signed(), net.stem)
    net.train()
    with torch.no_grad():
        net(batches[0])  # weights' scales
        with calibration_mode(net):
            for images in batches:
                net(images)
    return net


def brevitas_table(rows: list[dict]) -> Table:
    """One row a side; Markdown."""
    shown = Table(box=box.MARKDOWN)
    for heading in "resnet8, W2A4", "trained %", "points below qexp":
        shown.add_column(heading, justify="left" if "," in heading else "right")
    for row in rows:
        cells = [row["note"], ""] if row["note"] else [str(row["trained"]), str(row["below"])]
        shown.add_row(row["what"], cells[0], "" if row["what"] == "qexp" else cells[1])
    return shown


# What a step costs


def step_costs(outputs: Path, bits: int, seconds: float) -> list[dict]:
    """Forward, backward and optimizer on one batch of 64 digits, resnet8: one row a side."""
    job = finished(outputs, "resnet8", bits, 0, "method=ptq", "finetune=none")
    images, labels = next(iter(job.data.train_dataloader()))
    loaded, missing = {}, {}
    try:
        compiled.warm_up()
    except RuntimeError as error:
        missing = {f"{side}, compiled": str(error) for side in STEPS}
    calls = {FLOAT: _step(copy.deepcopy(job.net), images, labels)}
    for side, (name, follows) in STEPS.items():
        calls[side] = _uncompiled(_ours(job, name, follows, images, labels))
        if f"{side}, compiled" not in missing:
            loaded[f"{side}, compiled"] = _ours(job, name, follows, images, labels)
    calls |= loaded
    if not find_spec("brevitas"):
        missing[PEER] = "not installed"
    else:
        try:
            batches = [images for images, _ in prepare.calibration_loader(job.data, 0)]
            calls[PEER] = _step(in_brevitas(job, bits, 4, batches), images, labels)
            calls[PEER]()
        except Exception as error:  # a rival may fail in any way, which its row tells
            calls.pop(PEER, None)
            missing[PEER] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    timings = interleave(calls, seconds)
    fastest = {name: timings.fastest_ms(name) for name in calls}
    rows = [
        {"side": name, "fastest_ms": ms, "median_ms": timings.median_ms(name), "ratio": ms / fastest[FLOAT]}
        for name, ms in fastest.items()
    ]
    for row in rows:
        ending = ", compiled" if row["side"].endswith(", compiled") else ""
        row["over_peer"] = row["fastest_ms"] / fastest[PEER] if PEER in fastest else None
        row["over_nearest"] = row["fastest_ms"] / fastest[STE + ending] if row["side"].startswith(STOCHASTIC) else None
    return rows + [{"side": name, "note": why} for name, why in missing.items()]


def _plan(name: str) -> FineTune:
    return compose_jobs([f"finetune={name}", "method=qat", "quantizer=int4"], False)[0].settings.finetune


def _ours(job: Run, name: str, follows: bool, images: Tensor, labels: Tensor) -> Callable[[], None]:
    model, plan = copy.deepcopy(job.quantized), _plan(name)
    attach_(model, plan, images)
    for quantizer in quantizers(model):
        quantizer.follows = follows
    return _step(model, images, labels)


def _step(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step with the optimizer of the recipe, on all sides, and what fine-tuning does for a quantizer besides."""
    net.train()
    optimizer, sites = _plan("distill").optimizer([{"params": list(net.parameters())}]), list(quantizers(net))

    def call() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        if sites:
            loss = loss + sum(quantizer.estimator.penalty(quantizer) for quantizer in sites)
        loss.backward()
        optimizer.step()
        sync_(sites)

    return call


def _uncompiled(function: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with mock.patch.object(compiled, "is_loaded", lambda: False):
            function()

    return call


def step_table(rows: list[dict], bits: int) -> Table:
    """One row a side; Markdown."""
    shown = Table(box=box.MARKDOWN)
    for heading in f"a step of resnet8, W{bits}A4, batch 64", "ms", "over float", "over brevitas", "over the nearest":
        shown.add_column(heading, justify="left" if "batch" in heading else "right")
    for row in rows:
        if row.get("note"):
            shown.add_row(row["side"], row["note"])
            continue
        ratios = (row[key] for key in ("ratio", "over_peer", "over_nearest"))
        shown.add_row(row["side"], f"{row['fastest_ms']:.2f}", *("" if r is None else f"{r:.2f}x" for r in ratios))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/qat", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["accuracy", "brevitas", "steps"], help="not all three tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1, help="of the table of steps; networks train on one")
    parser.add_argument("--bits", type=int, default=4, help="of the weights in the table of steps")
    parser.add_argument("--seconds", type=float, default=60, help="of the table of steps; at least 20 rounds")
    parser.add_argument("--outputs", type=Path, help="keep the runs here; without it they are forgotten")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    wanted = options.only or ["accuracy", "brevitas", "steps"]
    warnings.filterwarnings("ignore")
    for name in "pytorch_lightning", "lightning.pytorch":
        logging.getLogger(name).setLevel(logging.ERROR)
    screen, results = Console(width=200), {}
    with tempfile.TemporaryDirectory() as temporary:
        outputs = (options.outputs or Path(temporary)).resolve()
        if "steps" in wanted:
            torch.set_num_threads(options.threads)
            results["steps"] = step_costs(outputs, options.bits, options.seconds)
            screen.print(step_table(results["steps"], options.bits))
        if "accuracy" in wanted:
            results["accuracy"] = accuracies(outputs, options.seeds)
            screen.print(accuracy_table(results["accuracy"]))
        if "brevitas" in wanted:
            results["brevitas"] = brevitas_accuracies(outputs, options.seeds)
            screen.print(brevitas_table(results["brevitas"]))
    if options.json:
        told = {"seeds": options.seeds, "threads": options.threads} | results
        record.write(options.json, told, default=Estimate.record)


if __name__ == "__main__":
    main()
