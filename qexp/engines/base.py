"""What an engine is: it builds a session from an ONNX graph, runs it, and says what it runs in int8."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx

from qexp.quant.dataflow import Dataflow


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
