"""How far an engine is from the simulation: the certificate of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
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

    `steps[k]` counts codes that are k steps apart. `faithful` says whether the graph that also returns its codes
    gave the same outputs, to the bit, as the graph that is timed: only then do the codes speak for it.
    """

    samples: int = 0
    correct: int = 0
    flips: int = 0
    faithful: bool = True
    steps: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    outputs: list[np.ndarray] = field(default_factory=list)
    signal: float = 0.0  # sums of squares: of the simulation's outputs, and of their differences from the engine's
    noise: float = 0.0

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
            }
        return {
            **figures,
            "parity/codes": total,
            "parity/output_sqnr_db": sqnr_db(self.signal, self.noise),
            "parity/argmax_flips": self.flips,
            "parity/faithful": self.faithful,
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


def _compare(certificate, sessions, artefact: Artefact, simulation: nn.Module, images: Tensor, labels: Tensor) -> None:
    batch, n = np.ascontiguousarray(images.numpy()), len(labels)
    (logits,) = sessions[0].run(batch)
    echoed, *engine_codes = sessions[1].run(batch)
    certificate.faithful &= bool(np.array_equal(logits, echoed))
    simulated, expected = _simulate(simulation, images)
    by_tensor = {artefact.codes[site]: codes for site, codes in expected.items() if site in artefact.codes}
    for tensor, codes in zip(artefact.code_tensors, engine_codes, strict=True):
        unsigned = codes[:n].astype(np.uint8, copy=False) ^ np.uint8(128 if tensor in artefact.signed else 0)
        stored = by_tensor[tensor][:n].numpy()
        differ = unsigned != stored  # rarely, so that steps are counted of few
        apart = np.abs(unsigned[differ].astype(np.int16) - stored[differ].astype(np.int16))
        certificate.steps += np.bincount(apart, minlength=256)
        certificate.steps[0] += differ.size - len(apart)
    decisions = logits[:n].argmax(1)
    certificate.samples += n
    certificate.correct += int((decisions == labels.numpy()).sum())
    certificate.flips += int((decisions != simulated[:n].argmax(1).numpy()).sum())
    expected_logits = simulated[:n].double().numpy()
    certificate.signal += float(np.square(expected_logits).sum())
    certificate.noise += float(np.square(expected_logits - logits[:n]).sum())
    certificate.outputs.append(logits[:n].copy())


def _padded(images: Tensor, size: int) -> Tensor:
    """Sessions are compiled for one batch size; the last batch repeats its first image up to it."""
    missing = size - len(images)
    return torch.cat([images, images[:1].expand(missing, *images.shape[1:])]) if missing else images


@torch.no_grad()
def _simulate(simulation: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the simulation and the codes of each of its active activation sites, stored as uint8.

    A layer that runs twice has its sites twice, the second as "name.input#2", as in the graph.
    """
    codes: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def record(quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        calls[quantizer.site] += 1
        codes[numbered(quantizer.site, calls[quantizer.site])] = quantizer.stored_codes(inputs[0])

    sites = [q for q in quantizers(simulation) if q.mode is Mode.QUANTIZE and not q.is_weight]
    hooks = [quantizer.register_forward_pre_hook(record) for quantizer in sites]
    try:
        return simulation(images), codes
    finally:
        for hook in hooks:
            hook.remove()
