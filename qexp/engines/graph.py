"""A graph being rewritten: who reads and who writes a tensor, nodes out and in, and where the codes of a site went."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass
class Graph:
    """A graph, changed in place, and the tensors that hold codes of its activation sites, as `Artefact` has them."""

    model: onnx.ModelProto
    codes: dict[str, str] = field(default_factory=dict)
    signed: set[str] = field(default_factory=set)
    pools: dict[str, onnx.NodeProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        known = (*self.graph.input, *self.graph.value_info)
        self.ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in known}  # of the exported tensors

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        """All nodes of these kinds, in order; the list stays as it is while the graph changes."""
        return [node for node in self.graph.node if node.op_type in kinds]

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """All nodes that read a tensor; the graph's own output counts as one that is no quantizer."""
        found = [node for node in self.graph.node if tensor in node.input]
        return found + [onnx.NodeProto() for output in self.graph.output if output.name == tensor]

    def writer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that writes a tensor; None for constants and inputs."""
        return next((node for node in self.graph.node if tensor in node.output), None)

    def remove(self, node: onnx.NodeProto, replacement: str | None = None) -> None:
        """Take a node out; what read its output or holds its codes gets `replacement`."""
        self.graph.node.remove(node)
        if replacement is None:
            return
        for reader in self.graph.node:
            for i, tensor in enumerate(reader.input):
                if tensor == node.output[0]:
                    reader.input[i] = replacement
        for site, tensor in self.codes.items():
            if tensor == node.output[0]:
                self.codes[site] = replacement
        if node.output[0] in self.pools:
            self.pools[replacement] = self.pools.pop(node.output[0])

    def insert(
        self, before: onnx.NodeProto, kind: str, inputs: list[str], outputs: list[str] | None = None,
        name: str | None = None, **attributes: int,
    ) -> str:  # fmt: skip
        """Put a node in front of another; the name of its first output."""
        name = name or f"{before.name}/{kind}"
        outputs = outputs or [f"{name}/{kind}_out"]
        node = onnx.helper.make_node(kind, inputs, outputs, name=name, **attributes)
        self.graph.node.insert(list(self.graph.node).index(before), node)
        return outputs[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        """Store a value under a name, unless one is there; the name."""
        if name not in self.constants:
            self.constants[name] = np.asarray(value)
            self.graph.initializer.append(numpy_helper.from_array(self.constants[name], name))
        return name
