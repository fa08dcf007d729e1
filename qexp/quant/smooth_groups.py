"""Who reads what a LayerNorm writes: the groups of linear layers in which SmoothQuant can move outliers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from qexp.quant.dataflow import ADDITIONS, Dataflow, aten
from qexp.quant.layers import Add

# f(x / s) = f(x) / s, channel by channel; in evaluation all of them are the identity.
PASSED = (aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default)
NORMS = (aten.layer_norm.default,)
# What a report looks past, to say what computed the values that a layer reads.
SHAPED = (
    aten.flatten.using_ints, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
    aten.unflatten.int, aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip
BENT = (  # f(x / s) is no f(x) times anything
    aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.softmax.int,
    aten.hardtanh.default,
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A LayerNorm, all linear layers that read what it writes, and the sides ("add.a") of additions that do, too.

    Where `norm` is "", the one layer of the group multiplies what it reads by 1/s itself.
    """

    norm: str
    layers: tuple[str, ...]
    sides: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """Where 1/s has gone."""
        return f"folded into {self.norm}" if self.norm else "multiplied in front"


@dataclass(frozen=True)
class Smoothed:
    """What has become of a group, or of a layer that is in none: then `reason` says why, and figures are None.

    `how` is where 1/s has gone; `largest` is the largest s; `outliers` is max|X_j| over its median before and after;
    `sqnr_db` has the candidates.
    """

    norm: str
    layers: tuple[str, ...]
    how: str = ""
    alpha: float | None = None
    largest: float | None = None
    outliers: tuple[float, float] | None = None
    sqnr_db: dict[float, float] = field(default_factory=dict)
    reason: str = ""


def find_groups(model: nn.Module, flow: Dataflow, explicit: bool = False) -> tuple[list[Group], list[Smoothed]]:
    """The groups of a network, and everything else that has linear layers, each with the reason why it is in none.

    With `explicit` every `nn.Linear` that no LayerNorm can serve is a group of its own.

    >>> import torch
    >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    >>> groups, others = find_groups(net, Dataflow(net, torch.zeros(2, 4)))
    >>> groups
    [Group(norm='0', layers=('1',), sides=())]
    >>> [(row.layers, row.reason) for row in others]
    [(('3',), 'fed by gelu, which a scale cannot pass')]
    >>> find_groups(net, Dataflow(net, torch.zeros(2, 4)), explicit=True)[0][1].how
    'multiplied in front'
    """
    groups, refused = _behind_norms(model, flow)
    fed_by: dict[str, str] = {}  # each linear layer, and what feeds it
    for node in flow.nodes:
        name = flow.layer(node)
        if node.target is aten.linear.default and type(flow.modules.get(name)) is nn.Linear:
            fed_by.setdefault(name, _fed_by(flow, node))
    if explicit:
        grouped = {name for group in groups for name in group.layers}
        alone = [Group("", (name,)) for name in fed_by if name not in grouped]
        return groups + alone, [row for row in refused if not fed_by.keys() >= set(row.layers)]
    named = {name for row in (*groups, *refused) for name in row.layers}
    return groups, refused + [Smoothed("", (name,), reason=why) for name, why in fed_by.items() if name not in named]


def _behind_norms(model: nn.Module, flow: Dataflow) -> tuple[list[Group], list[Smoothed]]:
    """Groups whose 1/s a LayerNorm takes, and those where none can."""
    groups, refused = [], []
    for node in flow.nodes:
        if node.target in NORMS:
            norm, readers = flow.layer(node), _readers(node)
            layers = tuple(dict.fromkeys(flow.layer(reader) for reader, x in readers if _multiplies(reader, x)))
            if not layers:
                continue  # nothing that could be made easier
            if reason := _refusal(model, flow, norm, node, readers):
                refused.append(Smoothed(norm, layers, reason=reason))
            else:
                sides = tuple(side for reader, source in readers for side in _sides(flow, reader, source))
                groups.append(Group(norm, layers, sides))
    return groups, refused


def _readers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Who reads a tensor, each with the node that it has it from."""
    found = []
    for user in node.users:
        found += _readers(user) if user.target in PASSED else [(user, node)]
    return found


def _multiplies(reader: fx.Node, source: fx.Node) -> bool:
    return reader.target is aten.linear.default and reader.args[0] is source


def _sides(flow: Dataflow, reader: fx.Node, source: fx.Node) -> list[str]:
    """Which sides of an `Add` module this tensor is, as "name.a"; none where the reader is no such addition."""
    name = flow.layer(reader)
    if reader.target not in ADDITIONS or not isinstance(flow.modules.get(name), Add) or len(flow.calls[name]) != 1:
        return []
    return [f"{name}.{side}" for side, argument in zip("ab", reader.args, strict=False) if argument is source]


def _refusal(
    model: nn.Module, flow: Dataflow, norm: str, node: fx.Node, readers: list[tuple[fx.Node, fx.Node]]
) -> str | None:
    """Why the output of a norm cannot be scaled; None where it can."""
    module = model.get_submodule(norm) if norm in flow.modules else None
    if type(module) is not nn.LayerNorm:
        return "its norm is written as a function"
    if module.weight is None or len(module.normalized_shape) != 1:
        return "its norm has no gamma for each channel, into which a scale could be folded"
    if len(flow.calls[norm]) != 1:
        return "its norm is used more than once"
    for reader, source in readers:
        name = flow.layer(reader)
        if _multiplies(reader, source):
            if type(flow.modules.get(name)) is not nn.Linear:
                return f"also read by a product that is written as a function in {name or 'the model itself'}"
            if len(flow.calls[name]) != 1:
                return f"also read by {name}, which is used more than once"
        elif not _sides(flow, reader, source):
            return f"also read by {_told(flow, reader)}"
    return None


def _fed_by(flow: Dataflow, node: fx.Node) -> str:
    """What computes the values that a layer reads, where that is no LayerNorm."""
    source = node.args[0]
    while source.op == "call_function" and source.target in (*PASSED, *SHAPED):
        source = source.args[0]
    if source.target in BENT:
        return f"fed by {_operator(source)}, which a scale cannot pass"
    what = _told(flow, source) if source.op == "call_function" else "the input of the model"
    return f"fed by {what}, and not by a LayerNorm"


def _operator(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _told(flow: Dataflow, node: fx.Node) -> str:
    """An operator by its own name and that of the module that it is a part of."""
    if node.op == "output":
        return "whoever calls the model"
    name = flow.layer(node)
    return f"{_operator(node)}{f' in {name}' if name else ''}"
