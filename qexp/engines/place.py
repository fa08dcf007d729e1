"""From the exported graph to the one that an engine gets: equal in value, written so that the engine can fuse it.

Four rewrites. Sites that the engine wants in float go. Twin quantizers of one tensor become one, because an engine
fuses a QuantizeLinear into the layer before it only where it is that layer's one reader. A max pool that only a
quantizer reads runs on its codes, and an activation function that only quantizers read becomes bounds on them:
quantization is monotone, so

    Q(max x) = max Q(x)
    Q(clamp(x, a, b)) = clamp(Q(x), Q(a), Q(b))

hold to the bit, and a convolution, its ReLU6 and a 4-bit quantizer run as one int8 operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from qexp.engines.export import SITE_OPERATORS, site_of


@dataclass(frozen=True)
class Artefact:
    """A graph as one engine gets it, and the tensor that holds the codes of each active activation site."""

    model: onnx.ModelProto
    codes: dict[str, str]
    pools: dict[str, onnx.NodeProto] = field(default_factory=dict)  # code tensor -> the max pool that the site follows

    @property
    def code_tensors(self) -> list[str]:
        """The code tensors, each once."""
        return list(dict.fromkeys(self.codes.values()))

    def with_code_outputs(self) -> onnx.ModelProto:
        """A copy that returns, after its own output, the codes of every tensor in `code_tensors`."""
        copied = _copy(self.model)
        for tensor in self.code_tensors:
            if tensor in self.pools:
                tensor = _pooled(copied.graph, tensor, self.pools[tensor])
            copied.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.UINT8, None))
        return copied


@dataclass
class _Rewriter:
    """One graph being rewritten."""

    model: onnx.ModelProto
    float_sites: set[str]

    codes: dict[str, str] = field(default_factory=dict)
    pools: dict[str, onnx.NodeProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.model.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}

    def remove(self, node: onnx.NodeProto, replacement: str) -> None:
        """Take a node out; its readers get `replacement`."""
        self.graph.node.remove(node)
        for reader in self.graph.node:
            for i, tensor in enumerate(reader.input):
                if tensor == node.output[0]:
                    reader.input[i] = replacement
        for site, tensor in self.codes.items():
            if tensor == node.output[0]:
                self.codes[site] = replacement
        if node.output[0] in self.pools:
            self.pools[replacement] = self.pools.pop(node.output[0])

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """All nodes that read a tensor; the graph's own output counts as one that is no quantizer."""
        found = [node for node in self.graph.node if tensor in node.input]
        return found + [onnx.NodeProto() for output in self.graph.output if output.name == tensor]

    def drop_float_sites(self) -> None:
        for node in list(self.graph.node):
            if node.op_type in SITE_OPERATORS and site_of(node) in self.float_sites:
                self.remove(node, node.input[0])

    def note_codes(self) -> None:
        """The codes of a site are what its Clip returns."""
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear":
                (clip,) = self.readers(node.output[0])
                self.codes[node.name] = clip.output[0]

    def merge_twins(self) -> None:
        first: dict[tuple, str] = {}
        for node in list(self.graph.node):
            if node.op_type in SITE_OPERATORS:
                values = (self.constants[i].tobytes() if i in self.constants else i for i in node.input[1:])
                twin = first.setdefault((node.op_type, node.input[0], *values), node.output[0])
                if twin != node.output[0]:
                    self.remove(node, twin)

    def pools_on_codes(self) -> None:
        for pool in [node for node in self.graph.node if node.op_type == "MaxPool"]:
            readers = self.readers(pool.output[0])
            if [reader.op_type for reader in readers] == ["QuantizeLinear"]:
                quantize = readers[0]
                (clip,) = self.readers(quantize.output[0])
                (dequantize,) = self.readers(clip.output[0])
                self._move_behind(pool, [quantize, clip, dequantize])
                self.pools[clip.output[0]] = pool

    def _move_behind(self, node: onnx.NodeProto, chain: list[onnx.NodeProto]) -> None:
        """x -> node -> chain becomes x -> chain -> node; names of tensors stay with the nodes that write them."""
        for reader in self.readers(chain[-1].output[0]):
            reader.input[:] = [node.output[0] if name == chain[-1].output[0] else name for name in reader.input]
        chain[0].input[0], node.input[0] = node.input[0], chain[-1].output[0]
        for link in chain:
            self.graph.node.remove(link)
        place = list(self.graph.node).index(node)
        for offset, link in enumerate(chain):
            self.graph.node.insert(place + offset, link)

    def activations_to_bounds(self) -> None:
        for node in list(self.graph.node):
            bounds = self._float_bounds(node)
            readers = self.readers(node.output[0]) if bounds else []
            if readers and all(reader.op_type == "QuantizeLinear" for reader in readers):
                for reader in readers:
                    (clip,) = self.readers(reader.output[0])
                    self._tighten(clip, [self._code(reader, bound) for bound in bounds])
                self.remove(node, node.input[0])

    def _float_bounds(self, node: onnx.NodeProto) -> tuple[float, float] | None:
        if node.op_type == "Relu":
            return 0.0, np.inf
        limits = [self.constants.get(name) for name in node.input[1:]]
        if node.op_type != "Clip" or any(v is None or v.dtype != np.float32 for v in limits) or len(limits) != 2:
            return None
        return float(limits[0]), float(limits[1])

    def _code(self, quantize: onnx.NodeProto, bound: float) -> int:
        scale, zero_point = (self.constants[name] for name in quantize.input[1:])
        with np.errstate(over="ignore"):
            code = np.rint(np.float32(bound) / scale) + zero_point.astype(np.float32)
        return int(np.clip(code, 0, 255))

    def _tighten(self, clip: onnx.NodeProto, bounds: list[int]) -> None:
        lowest, highest = (int(self.constants[name]) for name in clip.input[1:])
        # Bounds outside the grid are cut to it, lest the lowest code exceed the highest.
        for i, (kind, value) in enumerate(zip(("lowest", "highest"), np.clip(bounds, lowest, highest), strict=True)):
            name = f"{clip.name}.{kind}"
            self.constants[name] = np.array(value, np.uint8)
            clip.input[1 + i] = name
            self.graph.initializer.append(numpy_helper.from_array(self.constants[name], name))

    def drop_idle_clips(self) -> None:
        for node in list(self.graph.node):
            if node.op_type == "Clip" and all(n in self.constants for n in node.input[1:]):
                bounds = [self.constants[name] for name in node.input[1:]]
                if all(b.dtype == np.uint8 for b in bounds) and [int(b) for b in bounds] == [0, 255]:
                    self.remove(node, node.input[0])

    def drop_unused_constants(self) -> None:
        used = {name for node in self.graph.node for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def place(model: onnx.ModelProto, float_sites: set[str]) -> Artefact:
    """The graph with some activation sites in float, in the form that engines fuse; no value changes otherwise."""
    rewriter = _Rewriter(_copy(model), float_sites)
    rewriter.drop_float_sites()
    rewriter.note_codes()
    rewriter.merge_twins()
    rewriter.pools_on_codes()
    rewriter.activations_to_bounds()
    rewriter.drop_idle_clips()
    rewriter.drop_unused_constants()
    del rewriter.graph.value_info[:]  # shapes before the rewrites; an engine infers its own
    onnx.checker.check_model(rewriter.model)
    return Artefact(rewriter.model, rewriter.codes, rewriter.pools)


def _pooled(graph: onnx.GraphProto, codes: str, pool: onnx.NodeProto) -> str:
    """Add a copy of the pool that reads these codes; the site's own codes are what it returns."""
    copied = onnx.NodeProto()
    copied.CopyFrom(pool)
    copied.name, copied.input[0], copied.output[0] = f"{pool.name}/codes", codes, f"{codes}/pooled"
    graph.node.append(copied)
    return copied.output[0]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied
