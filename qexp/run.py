"""One run, from validated settings to a folder of results: read it from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qexp import caches, passes, prepare, record, smoothing
from qexp.engines.base import Engine, EngineRefused
from qexp.engines.deploy import activation_schemes, certify_deployment, deploy, measure, simulation_for
from qexp.engines.export import export_quantized
from qexp.engines.parity import sqnr_of_batch
from qexp.engines.saturation import saturates
from qexp.finetuning import finetune_, finished_
from qexp.flat import Landscape, landscape
from qexp.metrics.footprint import footprint
from qexp.metrics.sites import measuring_sites
from qexp.metrics.sqnr import QuantizationNoise, sqnr_db
from qexp.quant import compiled
from qexp.quant.convert import fit_biases_, set_mode_, unquantized
from qexp.quant.dataflow import Dataflow, NotExportable, additions_to_modules
from qexp.quant.quantizer import Mode
from qexp.quant.recipe import Recipe
from qexp.report import terminal
from qexp.sections import ConfigError, build
from qexp.settings import Settings
from qexp.store import TensorCache, group_id, replacing, run_id, writable
from qexp.tracking import RunInfo
from qexp.tracking.histograms import histograms
from qexp.tracking.metrics import DIFFERS_DB, timed_differs


@dataclass
class Run:
    """Everything one run knows; what it leaves in memory, so that a test can look inside."""

    settings: Settings
    data: pl.LightningDataModule
    net: nn.Module
    flow: Dataflow
    engines: list[Engine]  # those that have not refused the network
    reference: Tensor  # logits of the float network on the test set
    sketches: TensorCache  # what calibration passes over this network have seen
    recipe: Recipe  # of the quantized network
    metrics: dict[str, Any] = field(default_factory=dict)
    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)  # "fp32", and engine -> its int8 graph
    quantized: nn.Module | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    in_float: list[tuple[str, str, str]] = field(default_factory=list)
    folder: Path = Path()
    embeddings: Tensor | None = None  # of the float network, where it is an encoder
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each epoch of fine-tuning
    landscape: Landscape | None = None  # of flatness=true
    where: str = ""  # how to look at the logger's record
    float_network: Path = Path()  # the folder of the cache that holds it

    @property
    def engine(self) -> dict[str, Any]:
        """The engine section of the config."""
        return self.settings.config["engine"]

    def refused(self, what: str, engine: Engine | None = None) -> None:
        """Go on without an engine, or with none at all, and say so in the record and on the terminal.

        Errors: ConfigError where engines were asked for by name.
        """
        if self.engine["required"]:
            raise _unable(what, [engine] if engine else self.engines)
        self.engines = [other for other in self.engines if engine not in (None, other)]
        before = self.metrics.get("engine/refused")
        self.metrics["engine/refused"] = f"{before}; {what}" if before else what
        instead = "simulation only" if engine is None else f"without {engine.name}"
        terminal.output.print(f"{instead}: {what}", markup=False)


def run(settings: Settings) -> Run:
    """Run one experiment and leave outputs/runs/<run_id>.

    Errors: ConfigError, StoreError and ValueError, each one sentence.
    """
    start = time.perf_counter()
    config, identity = settings.config, run_id(settings.config)
    outputs = writable(Path(config["paths"]["outputs"]))
    writable(outputs / "runs")
    told = {**config, "machine": record.environment()}
    group = f"{settings.label.removesuffix(f' s{settings.seed}')} {group_id(config)}"
    info = RunInfo(identity, settings.label, settings.method, told, outputs, group)
    with build(config["logger"], "logger").open(info) as logger:
        terminal.show_progress(config["progress"])
        torch.set_num_threads(config["trainer"]["threads"])
        if config["compiled"]:
            with terminal.stage("compiling, or loading what was compiled before"):
                compiled.warm_up()
        job = _float_network(settings, outputs, logger)
        if settings.method == "fp32":
            _float_only(job)
        else:
            _quantize(job)
            if settings.finetune is not None:
                _finetune(job, outputs / ".unfinished" / f"{identity}.finetune", logger.lightning)
            _deploy_all(job)
        if settings.flatness:
            _flatness(job)
        job.metrics |= {"status": "finished", "time/total_s": time.perf_counter() - start}
        job.folder = outputs / "runs" / identity
        _write(job, logger)
        finished_(outputs / ".unfinished" / f"{identity}.finetune")
        job.where = logger.where
    return job


def _unable(why: str, engines: list[Engine]) -> ConfigError:
    return ConfigError(f"engine={', '.join(engine.name for engine in engines)}: {why}; engine=none simulates it")


class Trained(NamedTuple):
    """A float network with its weights, traced, and what it was made of; `cache` is where its weights are."""

    data: pl.LightningDataModule
    net: nn.Module
    flow: Dataflow
    engines: list[Engine]
    cache: TensorCache


def trained(settings: Settings, outputs: Path, logger: Any) -> Trained:
    """Data, and the float network trained, or from the cache, by its settings; `logger` is what Lightning logs to."""
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    with terminal.stage("data and network"):
        data, net, engines = prepare.ready(settings)
    example = prepare.example_images(data)
    prepare.require_logits(net, example, data)
    if told := getattr(data, "notice", None):
        terminal.output.print(told, markup=False)
    cache, flow = caches.float_cache(settings, net, data, outputs), None
    if not cache.folder.exists():
        with prepare.evaluating(net):
            flow = _trace(net, example)  # what cannot be need not be trained
            prepare.require_spreadable(net, flow, settings)
            smoothing.require_groups(net, flow, settings)
            _require_engines(engines, flow, settings)
    prepare.train_(net, settings, data, cache, logger)
    if settings.config["channel_spread"]:
        prepare.spread_(net, _trace(net, example), settings)
        flow = None
    ours = settings.config["model"]["_target_"].startswith("qexp.")  # others may branch on what training has changed
    if flow is None or not ours or not flow.holds(net):
        flow = _trace(net, example)
    ready, warning = additions_to_modules(net, flow)
    if ready is not net:
        net, flow = ready, _trace(ready, example)
    if warning:
        terminal.output.print(f"warning: {warning}", markup=False)
    return Trained(data, net, flow, engines, cache)


def _require_engines(engines: list[Engine], flow: Dataflow, settings: Settings) -> None:
    """Refuse what an engine that was asked for by name cannot run. Errors: ConfigError."""
    if settings.config["engine"]["required"] and settings.method != "fp32" and settings.simulation_only is None:
        for engine in engines:
            try:
                engine.recipe(settings.recipe, flow)
            except EngineRefused as error:
                raise _unable(str(error), [engine]) from None


def _float_network(settings: Settings, outputs: Path, logger: Any) -> Run:
    """The trained network evaluated and, where engines are to run it, in ONNX."""
    data, net, flow, engines, cache = trained(settings, outputs, logger.lightning)
    reference = passes.reference(settings, data, net, cache)
    sketches = caches.sketch_cache(cache, settings)
    metrics = {"acc/fp32": reference.accuracy, "data/test_samples": len(reference.logits)}
    if hasattr(data, "truncated"):
        metrics["data/truncated"] = data.truncated
    job = Run(settings, data, net, flow, engines, reference.logits, sketches, settings.recipe, metrics)
    job.embeddings = reference.embeddings
    job.float_network = cache.folder
    if engines:
        with terminal.stage("exporting the float network to ONNX"):
            try:
                job.graphs["fp32"] = caches.float_graph(flow, caches.graph_cache(cache, settings))
            except NotExportable as error:
                job.refused(str(error))
    return job


def _trace(net: nn.Module, example: Tensor) -> Dataflow:
    try:
        return Dataflow(net, example)
    except NotExportable as error:
        raise ConfigError(f"model: {error}") from None


def _float_only(job: Run) -> None:
    """Latency of the float network in each engine."""
    by_engine: dict[str, dict[str, Any]] = {}
    winner = _measure(job, by_engine)
    for figures in by_engine.values():
        figures["size/fp32_bytes"] = job.graphs["fp32"].ByteSize()
    record.with_winner(job.metrics, by_engine, winner)


def _quantize(job: Run) -> None:
    """Fold, swap, calibrate: the simulation with all its quantizers.

    Its formats are those of the first engine; what is to be trained, once and for all engines, has those of all.
    """
    if job.settings.simulation_only is None:
        for engine in job.engines[: None if job.settings.method == "qat" else 1]:
            job.recipe = _recipe_for(job, engine)
    start = time.perf_counter()
    recipe, model = job.recipe, _calibrated(job, job.recipe)
    job.metrics["time/calibrate_s"] = time.perf_counter() - start
    products = [(name, "product", "written as a function") for name in job.flow.functional_products()]
    sums = [(name, "addition", "written as a function") for name in job.flow.functional_additions()]
    in_float = unquantized(model, recipe, job.settings.config["fold_batchnorm"], job.flow.uncalled())
    sums += [(name, "Add", "feeds a normalisation, which works in float") for name in job.flow.normalized_additions()]
    job.quantized, job.in_float = model, in_float + products + sums
    job.metrics |= footprint(model).metrics() | smoothing.metrics(model.smoothed) | model.biases


def _calibrated(job: Run, recipe: Recipe) -> nn.Module:
    return passes.calibrated(job.net, replace(job.settings, recipe=recipe), job.data, job.flow, job.sketches)


def _recipe_for(job: Run, engine: Engine) -> Recipe:
    """The recipe with an engine's formats, or as it is for an engine that refuses it and is left out."""
    try:
        return engine.recipe(job.recipe, job.flow)
    except EngineRefused as error:
        job.refused(str(error), engine)
        return job.recipe


def _finetune(job: Run, folder: Path, logger: Any) -> None:
    """Train from the calibrated point, which is the result of method=ptq and is told beside that of the training."""
    model, plan = job.quantized, job.settings.finetune
    with terminal.stage("evaluating the network before fine-tuning") as update:
        figures, _ = _simulate(job, model, update)
    job.metrics |= {"acc/ptq": figures["acc/sim"], "sqnr/ptq_db": figures["sqnr/output_db"]}
    start = time.perf_counter()
    job.history = finetune_(model, job.net, job.flow, job.settings, job.data, folder, logger)
    if plan.is_float:
        set_mode_(model, Mode.OFF)
        with terminal.stage("evaluating the float network after as many steps") as update:
            job.metrics["acc/control"] = passes.accuracy_of(passes.evaluate(job.settings, job.data, model, update))
    if plan.after == "recalibrate":
        passes.recalibrate_(model, job.settings, job.data)
    else:
        fit_biases_(model)
    job.metrics |= {
        "finetune/epochs": plan.epochs,
        "finetune/loss": job.history[-1]["loss"],
        "finetune/weight_change": job.history[-1]["weight_change"],
        "time/finetune_s": time.perf_counter() - start,
    }


def _flatness(job: Run) -> None:
    """How flat the minimum is; a float network's cell is that of the quantizers which method=ptq would give it."""
    rounded, calibrated = job.quantized is not None, job.quantized or _calibrated(job, job.settings.recipe)
    job.landscape = landscape(calibrated, rounded, job.data, job.settings.seed)
    job.metrics |= job.landscape.metrics()


def _deploy_all(job: Run) -> None:
    """Simulate and, for each engine, deploy, certify and time; where no engine is left, only simulate."""
    by_engine, rows = {}, {}
    if job.engines and (why := job.settings.simulation_only):
        job.refused(why)
    models = _Models(job)
    for engine in list(job.engines):
        try:
            by_engine[engine.name], rows[engine.name] = _deploy(job, engine, *models.of(engine))
        except EngineRefused as error:
            job.refused(str(error), engine)
    winner = _measure(job, by_engine)
    if winner is not None:
        job.rows = rows[winner]
        record.with_winner(job.metrics, by_engine, winner)
        return
    with terminal.stage("evaluating the simulation") as update:
        figures, noise = _simulate(job, job.quantized, update)
    job.metrics |= figures
    job.rows = record.layer_rows(job.quantized, noise, job.flow.macs(), None)


class _Models:
    """The quantized network in the formats that an engine asks for, and its graph; each is made once."""

    def __init__(self, job: Run) -> None:
        self.job = job
        self.made: dict[Recipe, tuple[nn.Module, onnx.ModelProto]] = {}

    def of(self, engine: Engine) -> tuple[nn.Module, onnx.ModelProto]:
        """Errors: EngineRefused."""
        job = self.job
        trained = job.settings.method == "qat"
        recipe = job.recipe if trained else engine.recipe(job.settings.recipe, job.flow)
        if recipe not in self.made:
            model = job.quantized if recipe == job.recipe else self._calibrated(recipe, engine)
            with terminal.stage("exporting the int8 network to ONNX"):
                try:
                    self.made[recipe] = model, export_quantized(model, job.flow)
                except NotExportable as error:
                    raise EngineRefused(engine, str(error)) from None
        return self.made[recipe]

    def _calibrated(self, recipe: Recipe, engine: Engine) -> nn.Module:
        try:
            return _calibrated(self.job, recipe)
        except ConfigError as error:  # formats that the user did not ask for
            raise EngineRefused(engine, str(error)) from None


def _deploy(
    job: Run, engine: Engine, model: nn.Module, graph: onnx.ModelProto
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One engine's figures and rows of the table of layers."""
    threads = job.engine["threads"]
    with terminal.stage(f"{engine.name}: simulation, int8 run, certificate") as update:
        simulation = simulation_for(engine, model, job.flow)
        figures, noise = _simulate(job, simulation, update)
        deployment = deploy(engine, graph, simulation, job.flow, threads)
        if deployment.mac_coverage == 0:
            raise EngineRefused(engine, "it would run every layer in float, which is not timed as int8")
        batches = passes.counted(job.data.test_dataloader(), update)
        logits = certify_deployment(deployment, batches, threads)
        inputs = _timed_batch(job)
        figures["parity/timed_sqnr_db"] = sqnr_of_batch(engine, deployment.artefact.model, simulation, inputs, threads)
        figures |= record.deployment_metrics(deployment, job.flow)
        figures["acc/drop"] = job.metrics["acc/fp32"] - figures["acc/engine"]
        figures["agree/argmax"] = passes.agreement(torch.from_numpy(logits), job.reference)
        figures["int8/saturates"] = saturates(engine)
        figures["size/int8_bytes"] = deployment.artefact.model.ByteSize()
        figures["size/fp32_bytes"] = job.graphs["fp32"].ByteSize()
        job.graphs[engine.name] = deployment.artefact.model
    return figures, record.layer_rows(simulation, noise, job.flow.macs(), deployment)


def _simulate(
    job: Run, model: nn.Module, update: terminal.Update
) -> tuple[dict[str, Any], dict[str, QuantizationNoise]]:
    """Test pass of a simulation: its figures, and the noise of each site."""
    with measuring_sites(model) as noise:
        task = passes.evaluate(job.settings, job.data, model, update)
    signal, error = job.reference.double(), job.reference.double() - task.logits.double()
    accuracy = passes.accuracy_of(task)
    figures = {
        "acc/sim": accuracy,
        "acc/drop": job.metrics["acc/fp32"] - accuracy,
        "agree/argmax": passes.agreement(task.logits, job.reference),
        "sqnr/output_db": sqnr_db(signal.square().sum(), error.square().sum()),
    }
    if job.embeddings is not None:
        signal = job.embeddings.double()
        error = signal - task.embeddings.double()
        figures["sqnr/embedding_db"] = sqnr_db(signal.square().sum(), error.square().sum())
    if any(scheme.of_call for scheme in activation_schemes(model).values()):
        figures |= passes.batch_dependence(model, job.data)
    return figures, noise


def _timed_batch(job: Run) -> Tensor:
    """The first test samples, again and again if need be: as many as latency is measured with."""
    size, images = job.engine["batch_size"], next(iter(job.data.test_dataloader()))[0]
    return images.repeat(-(-size // len(images)), *[1] * (images.dim() - 1))[:size].contiguous()


def _measure(job: Run, by_engine: dict[str, dict[str, Any]]) -> str | None:
    """Latency of all engines, interleaved; the name of the one that is fastest in what the run is about."""
    section, batch = job.engine, _timed_batch(job)
    while job.engines:
        with terminal.stage(f"latency, batch {len(batch)}, {section['threads']} thread(s), interleaved", live=False):
            try:
                timings = measure(job.engines, job.graphs, job.net, batch, section["seconds"], section["threads"])
                break
            except EngineRefused as error:
                job.refused(str(error), error.engine)
                by_engine.pop(error.engine.name, None)
                job.graphs.pop(error.engine.name, None)
    for engine in job.engines:
        by_engine.setdefault(engine.name, {}).update(record.latency_metrics(timings, engine.name))
    timed = "latency/fp32_ms" if job.settings.method == "fp32" else "latency/int8_ms"
    return _winner(by_engine, timed)


def _winner(by_engine: dict[str, dict[str, Any]], timed: str) -> str | None:
    """The fastest engine; one that computes something else than the simulation wins only where all do."""

    def differs(figures: dict[str, Any]) -> bool:
        output_db, timed_db = (figures.get(f"parity/{key}_sqnr_db") for key in ("output", "timed"))
        return output_db is not None and output_db < DIFFERS_DB or timed_differs(timed_db, output_db)

    return min(by_engine, key=lambda name: (differs(by_engine[name]), by_engine[name][timed]), default=None)


def _write(job: Run, logger: Any) -> None:
    """The folder of the run, whole or not at all; then the logger."""
    smoothed = [] if job.quantized is None else job.quantized.smoothed
    with replacing(job.folder) as folder:
        for name, graph in job.graphs.items():
            int8 = "int8" if name == job.metrics.get("engine/winner") else f"int8_{name}"
            onnx.save(graph, folder / f"model_{name if name == 'fp32' else int8}.onnx")
        record.write(folder, job.settings.config, job.metrics, job.rows, job.in_float, job.history)
        if job.landscape is not None:
            job.landscape.write(folder)
        smoothing.write(folder, smoothed)
    logger.metrics(job.metrics)
    logger.curve("finetune/history", job.history)
    columns = list(record.LAYER_COLUMNS)
    logger.table("layers", columns, [[row.get(column) for column in columns] for row in job.rows])
    if smoothed:
        logger.table("smoothing", *smoothing.table(smoothed))
    logger.histograms(histograms(job.quantized, smoothing.sketches_of(job.sketches, smoothed, job.settings)))
    logger.models(sorted(job.folder.glob("*.onnx")), job.float_network)
