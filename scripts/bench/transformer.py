"""A sentence encoder in int8, static and dynamic: latency, accuracy and SQNR against fp32 engines and other tools.

MiniLM classifies docstrings. Both of qexp's networks are those of a run; peers get the same float graph, the same
calibration texts and the same test texts. Sides of one configuration are timed in random interleaving in one process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import record
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from qexp.composing import Composer, start_hydra
from qexp.engines.latency import Timings, interleave
from qexp.engines.onnxruntime import OnnxRuntime
from qexp.engines.openvino import OpenVino
from qexp.metrics.sqnr import sqnr_db
from qexp.prepare import calibration_loader
from qexp.run import run, trained
from qexp.settings import settings
from qexp.store import run_id

Infer = Callable[[np.ndarray], list[np.ndarray]]  # tokens (N, T) to logits and, of some, embeddings
FLOAT, AGAIN = "OpenVINO fp32", "OpenVINO fp32 again (A/A)"
PEERS = ("nncf", "torchao")
EMBEDDING = "what the head reads"
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Side:
    """One way to run the encoder: how a call is made, and the graph or module to judge its answers by."""

    kind: str  # fp32 | bf16 | peer | ours
    make: Callable[[Subject, tuple[int, int], int], Infer]


@dataclass
class Subject:
    """The float network, the folders of qexp's int8 networks, and texts."""

    net: nn.Module
    runs: dict[str, Path]  # static, dynamic
    calibration: np.ndarray  # (N, T)
    tokens: np.ndarray
    labels: np.ndarray

    def metrics(self, job: str) -> dict[str, Any]:
        """The figures of a run."""
        return json.loads((self.runs[job] / "metrics.json").read_text())

    def graph(self, job: str, name: str) -> onnx.ModelProto:
        """A graph of a run, which also returns what its head reads."""
        files = {self.metrics(job)["engine/winner"]: "model_int8.onnx", "fp32": "model_fp32.onnx"}
        graph = onnx.load(self.runs[job] / files.get(name, f"model_int8_{name}.onnx"))
        head = next(node for node in graph.graph.node if node.name in ("head.input", "head"))
        makers = {output: node for node in graph.graph.node for output in node.output}
        read = head.input[0]
        while read in makers and makers[read].name in ("head.input/before", "head/Mul"):  # SmoothQuant's factor
            read = makers[read].input[0]
        graph.graph.node.append(onnx.helper.make_node("Identity", [read], [EMBEDDING]))
        graph.graph.output.append(onnx.helper.make_tensor_value_info(EMBEDDING, onnx.TensorProto.FLOAT, None))
        return graph


def subject(options: argparse.Namespace, outputs: Path) -> Subject:
    """Run both methods as a user would, and keep what they made."""
    common = [
        "model=minilm", "data=stdlib_docs", f"data.length={options.length}", "trainer.threads=2", "logger=none",
        f"data.most_per_class={options.most_per_class}", f"paths.outputs={outputs}", "engine.seconds=0.1",
    ]  # fmt: skip
    static = ["method=ptq", f"smoothing={options.smoothing}", f"bias_correction={options.bias_correction}"]
    asked = {"static": static, "dynamic": ["method=dynamic"]}
    start_hydra(None)
    runs, chosen = {}, None
    for name, more in asked.items():
        chosen = settings(Composer().compose(common + more))
        runs[name] = outputs / "runs" / run_id(chosen.config)
        if not runs[name].exists():
            run(chosen)
    float_network = trained(chosen, outputs, False)
    data = float_network.data
    batches = list(data.test_dataloader())
    calibration = torch.cat([tokens for tokens, _ in calibration_loader(data, 0)])
    tokens, labels = (torch.cat([batch[i] for batch in batches]).numpy() for i in (0, 1))
    return Subject(float_network.net, runs, calibration.numpy(), tokens, labels)


def _engine(engine: OnnxRuntime | OpenVino, job: str, name: str) -> Callable[..., Infer]:
    return lambda subject, shape, threads: engine.session(subject.graph(job, name), shape, threads).run


def _torch(subject: Subject, shape: tuple[int, int], threads: int) -> Infer:
    def call(batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [subject.net(torch.from_numpy(batch)).numpy()]

    return call


def _openvino_model(model: Any, shape: tuple[int, int], threads: int) -> Infer:
    import openvino as ov

    model.reshape(list(shape))
    options = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(batch: np.ndarray) -> list[np.ndarray]:
        # The shortest way through OpenVINO's Python, so that the peer pays no more than a session of qexp.
        request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        request.infer()
        return [tensor.data.copy() for tensor in request.output_tensors]

    return call


def _nncf(subject: Subject, shape: tuple[int, int], threads: int) -> Infer:
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    model = ov.Core().read_model(subject.graph("static", "fp32").SerializeToString())
    samples = nncf.Dataset([tokens[None] for tokens in subject.calibration])
    size = len(subject.calibration)
    quantized = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=size)
    return _openvino_model(quantized, shape, threads)


def _onnxruntime_dynamic(subject: Subject, shape: tuple[int, int], threads: int) -> Infer:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(subject.graph("static", "fp32"), source)
        quantize_dynamic(source, made, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"])
        return OnnxRuntime().session(onnx.load(made), shape, threads).run


def _torchao(subject: Subject, shape: tuple[int, int], threads: int) -> Infer:
    import torch._inductor.config as inductor
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    net = copy.deepcopy(subject.net)
    quantize_(net, Int8DynamicActivationInt8WeightConfig())
    torch.compiler.reset()
    with inductor.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(net, dynamic=False)
        compiled(torch.ones(shape, dtype=torch.int64))

    def call(batch: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [compiled(torch.from_numpy(batch)).numpy()]

    return call


# A new rival is one row here.
SIDES = {
    "torch eager": Side("fp32", _torch),
    "ONNX Runtime fp32": Side("fp32", _engine(OnnxRuntime(), "static", "fp32")),
    FLOAT: Side("fp32", _engine(OpenVino(), "static", "fp32")),
    AGAIN: Side("fp32", _engine(OpenVino(), "static", "fp32")),
    "OpenVINO bf16": Side("bf16", _engine(OpenVino("bf16"), "static", "fp32")),
    "NNCF + OpenVINO": Side("peer", _nncf),
    "ONNX Runtime quantize_dynamic": Side("peer", _onnxruntime_dynamic),
    "torchao dynamic, compiled": Side("peer", _torchao),
    "qexp static + ONNX Runtime": Side("ours", _engine(OnnxRuntime(), "static", "onnxruntime")),
    "qexp static + OpenVINO": Side("ours", _engine(OpenVino(), "static", "openvino")),
    "qexp dynamic + ONNX Runtime": Side("ours", _engine(OnnxRuntime(), "dynamic", "onnxruntime")),
    "qexp dynamic + OpenVINO": Side("ours", _engine(OpenVino(), "dynamic", "openvino")),
}
REQUIRES = {"NNCF + OpenVINO": "nncf", "torchao dynamic, compiled": "torchao"}


def calls(subject: Subject, shape: tuple[int, int], threads: int) -> tuple[dict[str, Infer], dict[str, str]]:
    """Side -> how it is called, and side -> why it cannot be."""
    found, missing = {}, {}
    for name, side in SIDES.items():
        package = REQUIRES.get(name)
        if package and not find_spec(package):
            missing[name] = "not installed"
            continue
        try:
            found[name] = side.make(subject, shape, threads)
            found[name](np.ascontiguousarray(subject.tokens[: shape[0]]))
        except Exception as error:  # a rival may fail in any way, which its row tells
            if side.kind == "ours":
                raise
            found.pop(name, None)
            missing[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    return found, missing


def quality(subject: Subject) -> dict[str, dict[str, float]]:
    """Accuracy over the test texts, and SQNR of logits and embeddings against fp32, of each side."""
    shape = (1, subject.tokens.shape[1])
    found, _ = calls(subject, shape, 2)
    answers: dict[str, list[np.ndarray]] = {}
    for number, (name, infer) in enumerate(found.items(), 1):
        console.print(f"[dim]answers, {number} of {len(found)}: {name}[/dim]")
        rows = [infer(np.ascontiguousarray(tokens[None])) for tokens in subject.tokens]
        answers[name] = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    told = {}
    for name, (logits, *embeddings) in answers.items():
        right = logits.argmax(1) == subject.labels
        told[name] = {"accuracy": float(right.mean()), "logits_db": _sqnr(answers[FLOAT][0], logits)}
        if embeddings:
            told[name]["embedding_db"] = _sqnr(answers[FLOAT][1], embeddings[0])
    return told


def _sqnr(signal: np.ndarray, other: np.ndarray) -> float:
    signal, other = signal.astype(np.float64), other.astype(np.float64)
    return sqnr_db(float((signal**2).sum()), float(((signal - other) ** 2).sum()))


def latencies(subject: Subject, batch: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """One configuration; one row a side, ratios against the fp32 side with the fastest call."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    tokens = np.ascontiguousarray(subject.tokens[:batch])
    try:
        found, missing = calls(subject, tokens.shape, threads)
        timings = interleave({name: lambda infer=infer: infer(tokens) for name, infer in found.items()}, seconds)
    finally:
        torch.set_num_threads(before)
    fastest = {name: timings.fastest_ms(name) for name in timings.names}
    best = min((name for name in fastest if SIDES[name].kind == "fp32" and name != AGAIN), key=fastest.__getitem__)
    return [_row(name, timings, fastest, best) | {"note": missing.get(name)} for name in SIDES]


def _row(name: str, timings: Timings, fastest: dict[str, float], best: str) -> dict[str, Any]:
    row: dict[str, Any] = {"side": name, "kind": SIDES[name].kind}
    if name not in fastest:
        return row
    median, low, high = timings.ratio(best, name)
    return row | {
        "fastest_ms": fastest[name], "median_ms": timings.median_ms(name), "against": best,
        "ratio_fastest": fastest[best] / fastest[name], "ratio_median": median, "ratio_interval": [low, high],
        "rounds": len(timings.rounds),
    }  # fmt: skip


def summary(results: list[dict[str, Any]], told: dict[str, dict[str, float]]) -> Table:
    """All configurations, fastest over fastest; Markdown, so that it can go into a page as it is."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("b: batch, t: threads")
    for case in results:
        shown.add_column(f"b{case['batch']} t{case['threads']}", justify="right")
    for column in ("accuracy", "SQNR of embeddings", "SQNR of logits"):
        shown.add_column(column, justify="right")
    for position, name in enumerate(SIDES):
        rows = [case["rows"][position] for case in results]
        of = told.get(name, {})
        cells = [row["note"] or f"{row['ratio_fastest']:.2f}x" for row in rows]
        cells.append(f"{100 * of['accuracy']:.2f} %" if of else "")
        for key in ("embedding_db", "logits_db"):
            # Float sides differ by the order of sums alone, more than 120 dB down.
            known = key in of and SIDES[name].kind != "fp32"
            cells.append(f"{of[key]:.1f} dB" if known else "")
        shown.add_row(name, *cells)
    return shown


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quality once, then latency of all configurations."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(options, subject(options, options.outputs or Path(folder)))


def _measure(options: argparse.Namespace, made: Subject) -> dict[str, Any]:
    told = quality(made)
    results: list[dict[str, Any]] = []
    cases = [(batch, threads) for batch in options.batch for threads in options.threads]
    start = time.perf_counter()
    for number, (batch, threads) in enumerate(cases, 1):
        left = (time.perf_counter() - start) / len(results) * (len(cases) - len(results)) if results else None
        to_go = f", about {left / 60:.0f} min to go" if left else ""
        console.print(f"[dim]{number} of {len(cases)}: batch {batch}, {threads} threads{to_go}[/dim]")
        rows = latencies(made, batch, threads, options.seconds)
        results.append({"batch": batch, "threads": threads, "rows": rows})
        gc.collect()  # sessions of the last case would keep their threads
    coverage = {
        f"{name} {engine}": made.metrics(name)[f"{engine}/int8/mac_coverage"]
        for name in made.runs
        for engine in ("onnxruntime", "openvino")
    }
    return {"quality": told, "latency": results, "test_texts": len(made.labels), "mac_coverage": coverage}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/transformer", description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="texts in one call")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, padding included")
    parser.add_argument("--most-per-class", type=int, default=50, help="texts of a class, half of them to test on")
    parser.add_argument("--smoothing", default="smoothquant_all", help="of the static network")
    parser.add_argument("--bias-correction", type=int, default=64, help="texts that correct its biases; 0: none do")
    parser.add_argument("--seconds", type=float, default=20, help="a configuration; at least 20 rounds")
    parser.add_argument("--outputs", type=Path, help="keep runs and caches here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    warnings.filterwarnings("ignore")
    measured = measure(options)
    Console(width=200).print(summary(measured["latency"], measured["quality"]))
    console.print(f"{measured['test_texts']} test texts; MACs in int8: {measured['mac_coverage']}")
    if options.json:
        record.write(options.json, measured, PEERS)


if __name__ == "__main__":
    main()
