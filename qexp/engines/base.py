"""What an engine is: it builds a session from an ONNX graph, runs it, and says what it runs in int8."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx

from qexp.quant.dataflow import Dataflow


class EngineRefused(ValueError):
    """An engine cannot build or run a graph; the message is one sentence."""

    def __init__(self, engine: Engine, why: str) -> None:
        super().__init__(f"{engine.name} refuses the graph: {why}")
        self.engine = engine


class Session(Protocol):
    """A compiled graph for one batch size."""

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """All outputs of one batch, float32 (N, C, H, W) in."""
        ...

    def layers(self) -> dict[str, str]:
        """Layer -> the operator that runs it, read from the engine's own optimized graph; int8 ones end in "int8"."""
        ...


class Engine(Protocol):
    """An inference engine."""

    name: str

    def version(self) -> str:
        """Version of the library."""
        ...

    def float_sites(self, flow: Dataflow, sites: set[str]) -> set[str]:
        """Which activation sites this engine wants, or treats, as float."""
        ...

    def session(self, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool = False) -> Session:
        """Compile for inputs of exactly this shape; `traced` keeps what `Session.layers` reads."""
        ...


def start(
    engine: Engine, model: onnx.ModelProto, shape: tuple[int, ...], threads: int, traced: bool = False
) -> Session:
    """A session that has run once, on zeros. Errors: EngineRefused."""
    try:
        session = engine.session(model, shape, threads, traced)
        session.run(np.zeros(shape, np.float32))
    except Exception as error:  # each library raises its own types, and whatever its kernels meet
        raise EngineRefused(engine, _reason(error)) from error
    return session


def _reason(error: Exception) -> str:
    """The line of a long message that says most: OpenVINO sums up at the end, after where in its code it failed."""
    text = str(error)
    lines = [line.strip(" -") for line in (text.partition("Summary:")[2] or text).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (telling or lines or [type(error).__name__])[0]
