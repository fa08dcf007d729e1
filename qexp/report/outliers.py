"""The table of outliers, as rows for a file, and beside each other on the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from qexp.metrics.outliers import TOP, Outliers

OF_CHANNEL = "channel", "sigmas", "share_of_squares", "share_of_tokens"
COLUMNS = (
    "site", "also", "channels", "tokens", "largest", "sigma", "sigmas", "kurtosis", "outlier_channels",
    "share_of_tokens", "channels_of_magnitude_6", *(f"top{n}_{name}" for n in range(1, TOP + 1) for name in OF_CHANNEL),
)  # fmt: skip
MOST_ROWS = 40  # on a terminal; the file has all
MOST_CHANNELS = 3


def write(path: Path, sites: Sequence[Outliers]) -> None:
    """One row for each site, by the names of COLUMNS."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *map(_row, sites)])


def _row(site: Outliers) -> list[Any]:
    top = [x for c in site.top for x in (c.index, c.sigmas, c.share_of_squares, c.share_of_tokens)]
    return [
        site.site, ", ".join(site.also), len(site.peaks), site.tokens, site.largest, site.sigma, site.sigmas,
        site.kurtosis, len(site.outlying), site.share_of_tokens, site.large,
        *top, *[None] * (len(OF_CHANNEL) * (TOP - len(site.top))),
    ]  # fmt: skip


def outliers_table(sites: Sequence[Outliers], title: str) -> Table:
    """The sites that are furthest out, in the order of the network."""
    furthest = sorted(sites, key=lambda site: -site.sigmas)[:MOST_ROWS]
    shown = [site for site in sites if site in furthest]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", overflow="fold")
    for heading in "max |x|", "sigma", "max in sigmas", "kurtosis", "outlier channels", "in % of tokens":
        table.add_column(heading, justify="right")
    table.add_column("largest channels (sigmas, % of squares)")
    for site in shown:
        also = f" and {len(site.also)} more" if site.also else ""
        counted = f"{len(site.outlying)} of {len(site.peaks)}" if site.outlying else "none"
        tokens = f"{100 * site.share_of_tokens:.3g}" if site.outlying else ""
        kurtosis = "" if math.isnan(site.kurtosis) else f"{site.kurtosis:,.1f}"
        top = [f"{c.index} ({c.sigmas:.1f}, {100 * c.share_of_squares:.1f})" for c in site.top[:MOST_CHANNELS]]
        table.add_row(
            escape(site.site + also), f"{site.largest:.3g}", f"{site.sigma:.3g}", f"{site.sigmas:.1f}", kurtosis,
            counted, tokens, ", ".join(top),
        )  # fmt: skip
    if len(shown) < len(sites):
        table.caption, table.caption_justify = f"the {len(shown)} furthest of {len(sites)}; the file has all", "left"
    return table
