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
from qexp.quant.dataflow import NotExportable
from qexp.quant.onnx_form import DYNAMIC

GROUP = "qexp.dynamic_group"  # in the metadata of a graph: features that share a range of each call
TINY = 2.0**-126  # the least scale, a normal number


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


@dataclass
class _Rewriter:
    """One graph being rewritten."""

    model: onnx.ModelProto
    float_sites: set[str]
    signed_sites: set[str]

    signed: set[str] = field(default_factory=set)
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
        """The codes of a site are what its Clip returns; those of a dynamic one are yet to be computed."""
        for node in self.graph.node:
            if node.op_type == DYNAMIC:
                self.codes[node.name] = node.output[0]
            if node.op_type == "QuantizeLinear":
                (clip,) = self.readers(node.output[0])
                self.codes[node.name] = clip.output[0]

    def write_dynamic(self) -> None:
        """Ranges of each call in operators that engines have; OpenVINO computes those of groups by itself."""
        groups: set[int] = set()
        for marker in [node for node in self.graph.node if node.op_type == DYNAMIC]:
            how = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in marker.attribute}
            sites = [site for site, tensor in self.codes.items() if tensor == marker.output[0]]
            if how["form"] == b"none":
                raise NotExportable(f"{marker.name} has ranges of each call in a form that no engine computes")
            readers = self.readers(marker.output[0])
            if not all(map(self._has_codes, readers)):
                raise NotExportable(
                    f"{marker.name} has ranges of each call, which engines compute for linear layers with int8 weights"
                )
            if how["form"] == b"per_group":
                groups.add(how["size"])
                self.codes = {site: tensor for site, tensor in self.codes.items() if site not in sites}
                self.remove(marker, marker.input[0])
                continue
            codes, scale, *zero_point = self._dynamic_codes(marker, how["form"] == b"per_token")
            self.codes.update(dict.fromkeys(sites, codes))
            for layer in readers:
                self._multiply_integers(layer, marker, codes, scale, zero_point)
            self.graph.node.remove(marker)
        for node in [n for n in self.graph.node if n.op_type == "DequantizeLinear" and not self.readers(n.output[0])]:
            self.graph.node.remove(node)
        if len(groups) > 1:
            raise NotExportable(f"groups of several sizes ({', '.join(map(str, groups))}) have ranges of each call")
        if groups:
            onnx.helper.set_model_props(self.model, {GROUP: str(groups.pop())})
        opsets = [opset for opset in self.model.opset_import if opset.domain in ("", "ai.onnx")]
        del self.model.opset_import[:]
        self.model.opset_import.extend(opsets)

    def _dynamic_codes(self, marker: onnx.NodeProto, per_token: bool) -> list[str]:
        """Codes, scale and, where it is not 0, zero point."""
        x, name = marker.input[0], marker.name
        if not per_token:
            outputs = [f"{name}/{part}" for part in ("codes", "scale", "zero_point")]
            self._insert(marker, "DynamicQuantizeLinear", [x], outputs, name)
            return outputs
        # S = max|x| / 127 of each row, q = round(x / S); a row of zeros has codes of 0 with any scale.
        size = self._insert(marker, "Abs", [x])
        largest = self._insert(marker, "ReduceMax", [size, self._constant(f"{name}/axis", np.array([-1], np.int64))])
        largest = self._insert(marker, "Max", [largest, self._constant(f"{name}/least", np.float32(127 * TINY))])
        levels = self._constant(f"{name}/levels", np.float32(127))
        scale = self._insert(marker, "Div", [largest, levels], name=f"{name}/scale")
        codes = self._insert(marker, "Round", [self._insert(marker, "Div", [x, scale], name=f"{name}/quotient")])
        codes = self._insert(marker, "Cast", [codes], name=name, to=onnx.TensorProto.INT8)
        self.signed.add(codes)
        return [codes, scale]

    def _has_codes(self, layer: onnx.NodeProto) -> bool:
        """Whether this is a linear layer whose weights are codes."""
        if layer.op_type not in ("MatMul", "Gemm"):
            return False
        weight = next((node for node in self.graph.node if layer.input[1] in node.output), None)
        return weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in self.constants

    def _multiply_integers(
        self, layer: onnx.NodeProto, marker: onnx.NodeProto, codes: str, scale: str, zero_point: list[str]
    ) -> None:
        """x W + b = S_x S_w (q_x - Z_x) q_w + b, the product on integers; ONNX Runtime makes one operator of it."""
        weight = next(node for node in self.graph.node if layer.input[1] in node.output)
        stored, zeros = (self.constants[weight.input[i]] for i in (0, 2))
        if layer.op_type == "Gemm":
            stored = np.ascontiguousarray(stored.T)
        w = self._constant(f"{layer.name}/codes", stored)
        w_zero = self._constant(f"{layer.name}/zero_point", zeros if zeros.any() else np.int8(0))
        # MatMulInteger takes zero points by position, and one of x is needed before one of W.
        x_zero = zero_point or [self._constant(f"{marker.name}/zero_point", np.int8(0))]
        product = self._insert(layer, "MatMulInteger", [codes, w, *x_zero, w_zero], name=layer.name)
        product = self._insert(layer, "Cast", [product], name=f"{layer.name}/float", to=onnx.TensorProto.FLOAT)
        if zero_point:
            factor = self._insert(layer, "Mul", [scale, weight.input[1]], name=f"{layer.name}/scale")
        else:
            # Of a product of both scales ONNX Runtime would make an operator that reads the scale of the first token
            # for all of them.
            factor = scale
            product = self._insert(layer, "Mul", [product, weight.input[1]], name=f"{layer.name}/scaled_by_weight")
        has_bias = len(layer.input) > 2
        outputs = None if has_bias else list(layer.output)
        scaled = self._insert(layer, "Mul", [product, factor], outputs, f"{layer.name}/scaled")
        if has_bias:
            self._insert(layer, "Add", [scaled, layer.input[2]], list(layer.output), f"{layer.name}/bias")
        self.graph.node.remove(layer)

    def _insert(
        self, before: onnx.NodeProto, kind: str, inputs: list[str], outputs: list[str] | None = None,
        name: str | None = None, **attributes: int,
    ) -> str:  # fmt: skip
        """Put a node in front of another; the name of its first output."""
        name = name or f"{before.name}/{kind}"
        outputs = outputs or [f"{name}/{kind}_out"]
        node = onnx.helper.make_node(kind, inputs, outputs, name=name, **attributes)
        self.graph.node.insert(list(self.graph.node).index(before), node)
        return outputs[0]

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.constants[name] = np.asarray(value)
            self.graph.initializer.append(numpy_helper.from_array(self.constants[name], name))
        return name

    def store_signed(self) -> None:
        """Store codes of some sites as int8: code and zero point less 128 are the same values."""
        for quantize in [node for node in self.graph.node if node.op_type == "QuantizeLinear"]:
            if quantize.name not in self.signed_sites:
                continue
            chain = [quantize]
            while chain[-1].op_type != "DequantizeLinear":
                (following,) = self.readers(chain[-1].output[0])
                chain.append(following)
            for node in chain:
                for i, name in enumerate(node.input):
                    if i and name in self.constants and self.constants[name].dtype == np.uint8:
                        less = (self.constants[name].astype(np.int16) - 128).astype(np.int8)
                        node.input[i] = self._constant(f"{name}/int8", less)
            self.signed.add(self.codes[quantize.name])

    def merge_twins(self) -> None:
        first: dict[tuple, str] = {}
        for node in list(self.graph.node):
            if node.op_type in SITE_OPERATORS:
                values = (self.constants[i].tobytes() if i in self.constants else i for i in node.input[1:])
                attributes = tuple(attribute.SerializeToString() for attribute in node.attribute)
                twin = first.setdefault((node.op_type, node.input[0], *values, attributes), node.output[0])
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


def place(model: onnx.ModelProto, float_sites: set[str], signed_sites: set[str] = frozenset()) -> Artefact:
    """The graph with some activation sites in float, in the form that engines fuse; no value changes otherwise.

    Errors: NotExportable for ranges of each call at what is no linear layer.
    """
    rewriter = _Rewriter(_copy(model), float_sites, signed_sites)
    rewriter.drop_float_sites()
    rewriter.note_codes()
    rewriter.merge_twins()
    rewriter.write_dynamic()
    rewriter.pools_on_codes()
    rewriter.activations_to_bounds()
    rewriter.drop_idle_clips()
    rewriter.store_signed()
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
