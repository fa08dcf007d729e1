"""The figure of outliers: how far each channel of each site lies out, and which channels those far out are.

Importing this file needs matplotlib, the optional extra `plots`; `qexp.report.figures.save` writes what it draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from qexp.metrics.outliers import SIGMAS, Outliers
from qexp.report.figures import BLUE, GREY, PALE, RED, STYLE

LEAST = 0.5  # sigmas at which the axis begins; a channel below stands there


@matplotlib.rc_context(STYLE)
def outliers_figure(sites: Sequence[Outliers], title: str = "") -> Figure:
    """A row for each site, a tick for each channel: its max|x| in sigmas on the left, and on the right which ones they
    are that exceed 6 sigma. A channel that is an outlier in many layers stands out there as a column, so that only
    sites of the usual width have ticks, and the others are told in numbers.
    """
    figure = Figure(figsize=(10, 1.6 + 0.15 * len(sites)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    width = Counter(len(site.peaks) for site in sites).most_common(1)[0][0]
    for row, site in enumerate(sites):
        if row % 2:
            for axes in left, right:
                axes.axhspan(row - 0.5, row + 0.5, color=PALE, linewidth=0, alpha=0.6, zorder=0)
        peaks = np.maximum(site.peaks.numpy(), LEAST)
        far = peaks > SIGMAS
        for chosen, color in (~far, BLUE), (far, RED):
            left.vlines(peaks[chosen], row - 0.36, row + 0.36, color=color, linewidth=0.9)
        if len(peaks) == width:
            right.vlines(np.flatnonzero(far), row - 0.36, row + 0.36, color=RED, linewidth=0.9)
        elif far.any():
            right.text(0, row, f"{far.sum():,} of {len(far):,}", fontsize=6, color="#666666", va="center")
    left.axvline(SIGMAS, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    left.set(xscale="log", xlim=(LEAST, 1.15 * max(2 * SIGMAS, *(site.sigmas for site in sites))))
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set(ylim=(len(sites) - 0.5, -0.5), xlabel="max|x| of a channel, in sigmas", title="all channels")
    left.set_yticks(range(len(sites)), [_name(site) for site in sites], fontsize=6.5)
    left.tick_params(axis="y", length=0)
    right.tick_params(axis="y", length=0, labelleft=False)
    right.set(xlim=(-0.02 * width, 1.02 * width), xlabel=f"index of the channel, of {width:,}")
    right.set_title(f"channels above {SIGMAS:g} sigma")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _name(site: Outliers) -> str:
    return f"{site.site} (+{len(site.also)})" if site.also else site.site
