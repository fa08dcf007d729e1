"""How far an engine is from the simulation: the certificate of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from qexp.engines.base import Engine, Session, start
from qexp.engines.export import numbered
from qexp.engines.place import Artefact
from qexp.metrics.sqnr import sqnr_db
from qexp.quant.convert import quantizers
from qexp.quant.quantizer import Mode, Quantizer


@dataclass
class Certificate:
    """Counts over every evaluated sample and every code of every activation site.

    `steps[k]` counts codes that are k steps apart. Of `local_steps` the simulation was given the engine's own codes at
    every site before: so it counts what one layer does, while in `steps` a difference grows from layer to layer; it is
    taken over the first batch. `faithful` says whether the graph that also returns its codes gave the same outputs, to
    the bit, as the graph that is timed. An engine that fuses less where a tensor is returned sums in another order;
    `echo_noise`, the squares of the differences, says whether that is all, so that the codes speak for both.
    """

    samples: int = 0
    correct: int = 0
    flips: int = 0
    faithful: bool = True
    steps: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    local_steps: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    outputs: list[np.ndarray] = field(default_factory=list)
    signal: float = 0.0  # sums of squares: of the simulation's outputs, and of their differences from the engine's
    noise: float = 0.0
    echoed: float = 0.0  # the same of the timed graph's outputs, and of their differences from those beside the codes
    echo_noise: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The figures by the names of the record."""
        total = int(self.steps.sum())
        figures = {}
        if total:  # an engine that computes ranges inside of its layers shows no codes
            figures = {
                "parity/identical": float(self.steps[0] / total),
                "parity/off_by_one": float(self.steps[1] / total),
                "parity/larger": float(self.steps[2:].sum() / total),
                "parity/max_step": int(self.steps.nonzero()[0].max()),
                "parity/local_identical": float(self.local_steps[0] / self.local_steps.sum()),
                "parity/local_max_step": int(self.local_steps.nonzero()[0].max()),
                "parity/faithful": self.faithful,
                "parity/faithful_sqnr_db": sqnr_db(self.echoed, self.echo_noise),
            }
        return {
            **figures,
            "parity/codes": total,
            "parity/output_sqnr_db": sqnr_db(self.signal, self.noise),
            "parity/argmax_flips": self.flips,
            "acc/engine": self.correct / self.samples,
        }


def certify(
    engine: Engine, artefact: Artefact, simulation: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], threads: int
) -> Certificate:
    """Run engine and simulation on the same batches of (images, labels) and compare codes and decisions.

    Errors: EngineRefused.
    """
    certificate = Certificate()
    sessions: tuple[Session, Session] | None = None
    for images, labels in batches:
        if sessions is None:
            shape = tuple(images.shape)
            plain = start(engine, artefact.model, shape, threads)
            sessions = plain, start(engine, artefact.with_code_outputs(), shape, threads)
        _compare(certificate, sessions, artefact, simulation, _padded(images, shape[0]), labels)
    return certificate


@torch.no_grad()
def sqnr_of_batch(engine: Engine, model: onnx.ModelProto, simulation: nn.Module, inputs: Tensor, threads: int) -> float:
    """SQNR of the engine's outputs against the simulation's on one batch, whose size decides what an engine compiles.

    Errors: EngineRefused.
    """
    (found,) = start(engine, model, tuple(inputs.shape), threads).run(np.ascontiguousarray(inputs.numpy()))
    expected = simulation(inputs).double()
    return sqnr_db(expected.square().sum(), (expected - torch.from_numpy(found)).square().sum())


def _compare(certificate, sessions, artefact: Artefact, simulation: nn.Module, images: Tensor, labels: Tensor) -> None:
    batch, n = np.ascontiguousarray(images.numpy()), len(labels)
    (logits,) = sessions[0].run(batch)
    echoed, *engine_codes = sessions[1].run(batch)
    certificate.faithful &= bool(np.array_equal(logits, echoed))
    certificate.echoed += float(np.square(logits[:n].astype(np.float64)).sum())
    certificate.echo_noise += float(np.square(logits[:n].astype(np.float64) - echoed[:n]).sum())
    simulated, expected = _simulate(simulation, images)
    by_tensor = {artefact.codes[site]: codes for site, codes in expected.items() if site in artefact.codes}
    found = {
        tensor: codes.astype(np.uint8, copy=False) ^ np.uint8(128 if tensor in artefact.signed else 0)
        for tensor, codes in zip(artefact.code_tensors, engine_codes, strict=True)
    }
    for tensor, codes in found.items():
        certificate.steps += _steps(codes[:n], by_tensor[tensor][:n].numpy())
    if not certificate.samples:
        _, local = _simulate(simulation, images, {site: found[tensor] for site, tensor in artefact.codes.items()})
        for tensor, codes in {artefact.codes[site]: c for site, c in local.items() if site in artefact.codes}.items():
            certificate.local_steps += _steps(found[tensor][:n], codes[:n].numpy())
    decisions = logits[:n].argmax(1)
    certificate.samples += n
    certificate.correct += int((decisions == labels.numpy()).sum())
    certificate.flips += int((decisions != simulated[:n].argmax(1).numpy()).sum())
    expected_logits = simulated[:n].double().numpy()
    certificate.signal += float(np.square(expected_logits).sum())
    certificate.noise += float(np.square(expected_logits - logits[:n]).sum())
    certificate.outputs.append(logits[:n].copy())


def _steps(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of two times as many codes, both uint8, are 0, 1, ... 255 steps apart."""
    differ = codes != others  # rarely, so that steps are counted of few
    apart = np.abs(codes[differ].astype(np.int16) - others[differ].astype(np.int16))
    steps = np.bincount(apart, minlength=256)
    steps[0] += differ.size - len(apart)
    return steps


def _padded(images: Tensor, size: int) -> Tensor:
    """Sessions are compiled for one batch size; the last batch repeats its first image up to it."""
    missing = size - len(images)
    return torch.cat([images, images[:1].expand(missing, *images.shape[1:])]) if missing else images


@torch.no_grad()
def _simulate(
    simulation: nn.Module, images: Tensor, given: dict[str, np.ndarray] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the simulation and the codes of each of its active activation sites, stored as uint8.

    A layer that runs twice has its sites twice, the second as "name.input#2", as in the graph. Codes that are `given`
    are what each site passes on, whatever it computed.
    """
    codes: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def record(quantizer: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        calls[quantizer.site] += 1
        site = numbered(quantizer.site, calls[quantizer.site])
        codes[site] = quantizer.stored_codes(inputs[0])
        if given is None or site not in given:
            return None
        return quantizer.of_stored(torch.from_numpy(given[site]).view(output.shape), inputs[0])

    sites = [q for q in quantizers(simulation) if q.mode is Mode.QUANTIZE and not q.is_weight]
    hooks = [quantizer.register_forward_hook(record) for quantizer in sites]
    try:
        return simulation(images), codes
    finally:
        for hook in hooks:
            hook.remove()
