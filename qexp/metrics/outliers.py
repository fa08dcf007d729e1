"""Outliers of activations: how far the largest values of each site lie out, and in which channels.

One scale for a tensor is decided by its largest value. In transformers these lie in few channels, the same for nearly
all tokens and in nearly all layers (Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 4).

What is counted: a token is a position with all its channels, one of a text (padding included, as quantizers see it)
or of an image. sigma is the standard deviation of all values of a site, around their mean. A channel is an outlier
where its max|x| exceeds 6 sigma, which knows no unit and so compares sites and networks; LLM.int8() counts features
with |x| >= 6 where x has passed a LayerNorm, and so these are counted beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.quant.convert import QUANTIZED
from qexp.quant.granularity import features_axis
from qexp.quant.layers import MatMul, ScaledLinear

SIGMAS = 6.0  # from where on a value counts as an outlier
MAGNITUDE = 6.0  # the same in LLM.int8(), which has no sigma in it
TOP = 5


@dataclass(frozen=True)
class Channel:
    """One channel: its max|x| in sigmas, its part of the sum of squares, and the tokens in which it exceeds 6 sigma."""

    index: int
    sigmas: float
    share_of_squares: float
    share_of_tokens: float


@dataclass(frozen=True, eq=False)
class Outliers:
    """One site; `also` are others that read the same tensor. `peaks` (C,) is max|x| of each channel in sigmas.

    `outlying` are the channels above 6 sigma, `share_of_tokens` is that of tokens in which any of them is, `large`
    counts the channels with some |x| >= 6. A site that is constant has sigma 0, no outliers, and no kurtosis (NaN).
    """

    site: str
    also: tuple[str, ...]
    tokens: int
    largest: float
    sigma: float
    kurtosis: float
    peaks: Tensor
    outlying: tuple[int, ...]
    share_of_tokens: float
    large: int
    top: tuple[Channel, ...]

    @property
    def sigmas(self) -> float:
        """max|x| in sigmas."""
        return float(self.peaks.max())


class Moments:
    """Sums over all values of a site, in float64, and per channel its max|x| and sum of squares.

    >>> moments = Moments(); moments.update(torch.tensor([[1.0, -1.0], [1.0, 3.0]]))
    >>> moments.sigma, moments.largest.tolist()
    (1.4142135623730951, [1.0, 3.0])
    """

    def __init__(self) -> None:
        self.powers = torch.zeros(4, dtype=torch.float64)  # sums of x, x^2, x^3, x^4
        self.largest = self.squares = torch.zeros(())
        self.tokens = 0

    def update(self, rows: Tensor) -> None:
        """Take in tokens (R, C)."""
        x = rows.detach().double()
        square = x.square()
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.squares = self.squares + square.sum(0)
        self.powers += torch.stack([x.sum(), square.sum(), (square * x).sum(), square.square().sum()])
        self.tokens += len(x)

    @property
    def count(self) -> int:
        """How many values there were."""
        return self.tokens * len(self.largest)

    @property
    def variance(self) -> float:
        """E[(x - E x)^2]; of a site whose values are all the same it is 0, whatever was rounded."""
        mean, square = (float(power) / self.count for power in self.powers[:2])
        variance = square - mean**2
        return variance if variance > 1e-12 * square else 0.0

    @property
    def sigma(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)

    @property
    def kurtosis(self) -> float:
        """E[(x - E x)^4] / sigma^4, which is 3 for a normal distribution; NaN where sigma is 0."""
        m1, m2, m3, m4 = (float(power) / self.count for power in self.powers)
        fourth = m4 - 4 * m3 * m1 + 6 * m2 * m1**2 - 3 * m1**4
        return fourth / self.variance**2 if self.variance else math.nan


class Occurrences:
    """Of tokens (R, C): in how many each channel exceeds a bound, and in how many any does."""

    def __init__(self, bound: float) -> None:
        self.bound, self.of_channel, self.of_any = bound, torch.zeros(()), 0

    def update(self, rows: Tensor) -> None:
        """Take in tokens (R, C)."""
        found = rows.detach().double().abs() > self.bound
        self.of_channel = self.of_channel + found.sum(0)
        self.of_any += int(found.any(1).sum())


def outliers(
    model: nn.Module, example: Tensor, batches: Callable[[], Iterable[Tensor]], layers: Collection[str] | None = None
) -> list[Outliers]:
    """Statistics of all sites where a float network would be quantized, in the order in which they are reached.

    `batches` gives the same inputs each time that it is called, which is twice: sigma is known after the first pass
    alone. `example` is a batch of any size. `layers` names those whose sites count, None: all that can be quantized.
    Errors: ValueError for a site that is never reached, has NaN or infinity.

    >>> net, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> [(site.site, site.largest, site.kurtosis) for site in outliers(net, x, lambda: [x])]
    [('0.input', 1.0, 2.0)]
    """
    found = (name for name, layer in model.named_modules() if type(layer) in QUANTIZED)
    names = [name for name in found if layers is None or name in layers]
    groups = _same_tensor(model, names, example)
    moments = {sites[0]: Moments() for sites in groups}
    _pass(model, names, batches, moments)
    for site, seen in moments.items():
        if not seen.tokens:
            raise ValueError(f"{site}: no value to take statistics from")
        if not bool(seen.powers.isfinite().all()):
            raise ValueError(f"{site}: holds NaN or infinite values")
    far = {site: Occurrences(SIGMAS * seen.sigma if seen.sigma else math.inf) for site, seen in moments.items()}
    _pass(model, names, batches, far)
    return [_told(sites, moments[sites[0]], far[sites[0]]) for sites in groups]


def _told(sites: list[str], seen: Moments, found: Occurrences) -> Outliers:
    sigma, total = seen.sigma, float(seen.squares.sum())
    peaks = seen.largest / sigma if sigma else torch.zeros_like(seen.largest)
    order = peaks.argsort(descending=True, stable=True)[:TOP].tolist()
    top = [
        Channel(c, float(peaks[c]), float(seen.squares[c]) / total, float(found.of_channel[c]) / seen.tokens)
        for c in order
        if peaks[c] > 0
    ]
    return Outliers(
        sites[0], tuple(sites[1:]), seen.tokens, float(seen.largest.max()), sigma, seen.kurtosis, peaks,
        tuple((peaks > SIGMAS).nonzero().flatten().tolist()), found.of_any / seen.tokens,
        int((seen.largest >= MAGNITUDE).sum()), tuple(top),
    )  # fmt: skip


@contextmanager
def _arriving(model: nn.Module, names: Iterable[str], look: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside the block, call look(site, layer, tensor) for each tensor that arrives at one of these layers."""

    def watch(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for site, x in zip(QUANTIZED[type(layer)][1], inputs, strict=False):
                if isinstance(layer, ScaledLinear):
                    x = x * layer.factor  # what is quantized
                look(f"{name}.{site}", layer, x)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _same_tensor(model: nn.Module, names: list[str], example: Tensor) -> list[list[str]]:
    """Sites that read one and the same tensor, in groups."""
    arrived: list[tuple[Tensor, list[str]]] = []  # tensors are kept, or another could take the place of one

    def look(site: str, layer: nn.Module, x: Tensor) -> None:
        sites = next((sites for tensor, sites in arrived if tensor is x), None)
        if sites is None:
            arrived.append((x, [site]))
        elif site not in sites:
            sites.append(site)

    with _arriving(model, names, look):
        model(example)
    return [sites for _, sites in arrived]


@torch.no_grad()
def _pass(
    model: nn.Module,
    names: list[str],
    batches: Callable[[], Iterable[Tensor]],
    seen: dict[str, Moments] | dict[str, Occurrences],
) -> None:
    def look(site: str, layer: nn.Module, x: Tensor) -> None:
        if site in seen:
            seen[site].update(x.movedim(channel_axis(site, layer, x), -1).flatten(0, -2))

    with _arriving(model, names, look):
        for inputs in batches():
            model(inputs)


def channel_axis(site: str, layer: nn.Module, x: Tensor) -> int:
    """The dimension that is summed over: of a product a b, the last of a and the last but one of b.

    In attention that is the channel of queries and keys, and of probabilities and values the position.

    >>> channel_axis("scores.b", MatMul(), torch.zeros(1, 2, 8, 16))
    2
    """
    if isinstance(layer, MatMul):
        return x.dim() - (2 if site.endswith(".b") else 1)
    return features_axis(tuple(x.shape))
