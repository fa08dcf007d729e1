"""What an engine is: it builds a session from an ONNX graph, runs it, and says what it runs in int8."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import onnx

from qexp.engines.graph import Graph
from qexp.quant.dataflow import Dataflow
from qexp.quant.grid import IntegerGrid
from qexp.quant.recipe import Recipe, Scheme


class EngineRefused(ValueError):
    """An engine cannot build or run a graph; the message is one sentence."""

    def __init__(self, engine: Engine, why: str) -> None:
        super().__init__(f"{engine.name} refuses the graph: {why}")
        self.engine = engine


class Session(Protocol):
    """A compiled graph for one batch size."""

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """All outputs of one batch; images are float32 (N, C, H, W), tokens int64 (N, T)."""
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

    def recipe(self, recipe: Recipe, flow: Dataflow) -> Recipe:
        """The recipe with those formats of single sites, of the same width, that this engine multiplies fastest.

        Errors: EngineRefused for ranges of each call in a form that it does not compute.
        """
        ...

    def float_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        """Which activation sites this engine wants, or treats, as float."""
        ...

    def signed_sites(self, flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
        """Which activation sites with zero point 0 this engine wants stored as int8; the others are uint8."""
        ...

    def rewrite(self, graph: Graph) -> None:
        """Change the graph to a form, equal in value, that this engine computes rightly."""
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
        session.run(np.zeros(shape, input_type(model)))
    except Exception as error:  # each library raises its own types, and whatever its kernels meet
        raise EngineRefused(engine, _reason(error)) from error
    return session


def input_type(model: onnx.ModelProto) -> np.dtype:
    """Type of the numbers that a graph reads: images are float32, tokens int64."""
    return onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)


def symmetric(scheme: Scheme) -> Scheme:
    """The same scheme with zero point 0 and all codes of its width, which need no bounds.

    >>> print(symmetric(Scheme(IntegerGrid(8, "affine"))))
    int8 wide_codes, per_tensor, minmax
    """
    grid = scheme.grid
    if not isinstance(grid, IntegerGrid) or grid.symmetric:
        return scheme
    return replace(scheme, grid=IntegerGrid(grid.bits, "wide_codes", grid.scale))


def beside_weights(flow: Dataflow, schemes: dict[str, Scheme]) -> set[str]:
    """Sites with ranges of each call that are no input of a layer with weights: they would cost more than they gain."""
    inputs = {f"{name}.input" for name, module in flow.modules.items() if hasattr(module, "weight")}
    return {site for site, scheme in schemes.items() if scheme.of_call and site not in inputs}


def _reason(error: Exception) -> str:
    """The line of a long message that says most: OpenVINO sums up at the end, after where in its code it failed."""
    text = str(error)
    lines = [line.strip(" -") for line in (text.partition("Summary:")[2] or text).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (telling or lines or [type(error).__name__])[0]
