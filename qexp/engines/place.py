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

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from qexp.engines.dynamic import write_dynamic
from qexp.engines.export import SITE_OPERATORS, site_of
from qexp.engines.graph import Graph
from qexp.quant.onnx_form import DYNAMIC


@dataclass(frozen=True)
class Artefact:
    """A graph as one engine gets it, and the tensor that holds the codes of each active activation site.

    `signed` code tensors are int8, 128 less than the uint8 of the others. An engine that computes ranges of each call
    inside of a layer shows no codes.
    """

    model: onnx.ModelProto
    codes: dict[str, str]
    signed: frozenset[str] = frozenset()
    pools: dict[str, onnx.NodeProto] = field(default_factory=dict)  # code tensor -> the max pool that the site follows

    @property
    def code_tensors(self) -> list[str]:
        """The code tensors, each once."""
        return list(dict.fromkeys(self.codes.values()))

    def with_code_outputs(self) -> onnx.ModelProto:
        """A copy that returns, after its own output, the codes of every tensor in `code_tensors`."""
        copied = _copy(self.model)
        for tensor in self.code_tensors:
            kind = onnx.TensorProto.INT8 if tensor in self.signed else onnx.TensorProto.UINT8
            if tensor in self.pools:
                tensor = _pooled(copied.graph, tensor, self.pools[tensor])
            copied.graph.output.append(onnx.helper.make_tensor_value_info(tensor, kind, None))
        return copied


class _Rewriter(Graph):
    """The rewrites of one graph, all but those in `dynamic`."""

    def drop_float_sites(self, sites: set[str]) -> None:
        for node in self.nodes(*SITE_OPERATORS):
            if site_of(node) in sites:
                self.remove(node, node.input[0])

    def note_codes(self) -> None:
        """The codes of a site are what its Clip returns; those of a dynamic one are yet to be computed."""
        for site in self.nodes(DYNAMIC, "QuantizeLinear"):
            (writer,) = [site] if site.op_type == DYNAMIC else self.readers(site.output[0])
            self.codes[site.name] = writer.output[0]

    def store_signed(self, sites: set[str]) -> None:
        """Store codes of some sites as int8: code and zero point less 128 are the same values."""
        for quantize in self.nodes("QuantizeLinear"):
            if quantize.name not in sites:
                continue
            chain = [quantize]
            while chain[-1].op_type != "DequantizeLinear":
                (following,) = self.readers(chain[-1].output[0])
                chain.append(following)
            for node in chain:
                for i, name in enumerate(node.input):
                    if i and name in self.constants and self.constants[name].dtype == np.uint8:
                        less = (self.constants[name].astype(np.int16) - 128).astype(np.int8)
                        node.input[i] = self.constant(f"{name}/int8", less)
            self.signed.add(self.codes[quantize.name])

    def merge_twins(self) -> None:
        first: dict[tuple, str] = {}
        for node in self.nodes(*SITE_OPERATORS):
            values = (self.constants[i].tobytes() if i in self.constants else i for i in node.input[1:])
            attributes = tuple(attribute.SerializeToString() for attribute in node.attribute)
            twin = first.setdefault((node.op_type, node.input[0], *values, attributes), node.output[0])
            if twin != node.output[0]:
                self.remove(node, twin)

    def pools_on_codes(self) -> None:
        for pool in self.nodes("MaxPool"):
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
        for node in self.nodes("Relu", "Clip"):
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
        if any(v is None or v.dtype != np.float32 for v in limits) or len(limits) != 2:
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
        for node in self.nodes("Clip"):
            if all(n in self.constants for n in node.input[1:]):
                bounds = [self.constants[name] for name in node.input[1:]]
                if all(b.dtype == np.uint8 for b in bounds) and [int(b) for b in bounds] == [0, 255]:
                    self.remove(node, node.input[0])

    def drop_unused_constants(self) -> None:
        used = {name for node in self.graph.node for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def place(
    model: onnx.ModelProto,
    float_sites: set[str],
    signed_sites: set[str] = frozenset(),
    rewrite: Callable[[Graph], None] = lambda graph: None,
) -> Artefact:
    """The graph with some activation sites in float, in the form that engines fuse; no value changes otherwise.

    `rewrite` is what only one engine needs.

    Errors: NotExportable for ranges of each call at what is no linear layer.
    """
    rewriter = _Rewriter(_copy(model))
    rewriter.drop_float_sites(float_sites)
    rewriter.note_codes()
    rewriter.merge_twins()
    write_dynamic(rewriter)
    rewriter.pools_on_codes()
    rewriter.activations_to_bounds()
    rewriter.drop_idle_clips()
    rewriter.store_signed(signed_sites)
    rewrite(rewriter)
    rewriter.drop_unused_constants()
    del rewriter.graph.value_info[:]  # shapes before the rewrites; an engine infers its own
    onnx.checker.check_model(rewriter.model)
    return Artefact(rewriter.model, rewriter.codes, frozenset(rewriter.signed), rewriter.pools)


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
