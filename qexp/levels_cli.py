"""qexp levels: tables and figures of the formats that a config chooses; nothing is trained."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.composing import VerbParser
from qexp.jobs import compose_one
from qexp.quant.recipe import Recipe
from qexp.sections import ConfigError
from qexp.settings import Settings
from qexp.store import StoreError, writable

if TYPE_CHECKING:
    from qexp.report.formats import Fit, View

USAGE = """\
qexp levels: which numbers a format has, as tables and figures; nothing is trained

usage: qexp levels [--out FILE] [--config-dir DIR] [KEY=VALUE ...]

  qexp levels quantizer=nf4
  qexp levels quantizer=int4 quantizer.weight.convention=full_range rounding=floor
  qexp levels quantizer=levels quantizer.weight.file=my.txt --out my.svg

KEY=VALUE is as in a run, and refused alike (qexp --help). Two figures are drawn: the staircase of either format with
its error, and samples of weights and activations in symmetric and in affine codes of the chosen bits.

  --out FILE         FILE.png or FILE.svg; the samples go to FILE-histograms beside it
                     (without it: <paths.outputs>/levels/<formats>.png)
  --config-dir DIR   configs of your own
"""
SUFFIXES = ".png", ".svg"
MATPLOTLIB = "matplotlib>=3.10,<4"  # the extra `plots`


def main(arguments: list[str]) -> int:
    """Show the formats of a config. Errors: ConfigError, StoreError."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    parser = VerbParser("levels")
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(arguments)
    chosen = compose_one(given.overrides, given.config_dir, "qexp levels shows").settings
    path = Path(given.out) if given.out else _default_path(chosen)
    require_drawable(path, f"--out={path}" if given.out else "paths.outputs")
    views = _views(chosen)
    _print(chosen.recipe, views)
    _draw(chosen, views, path)
    return 0


def _default_path(chosen: Settings) -> Path:
    """A name that tells the formats and what is unusual about their rounding."""
    schemes = chosen.recipe.weight, chosen.recipe.activation
    words = [str(scheme.grid) for scheme in schemes] + [str(scheme.rounding) for scheme in schemes]
    name = "-".join(dict.fromkeys(word for word in words if word != "half_even"))
    return Path(chosen.config["paths"]["outputs"]) / "levels" / f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', name)}.png"


def require_drawable(path: Path, asked: str) -> None:
    """Refuse what matplotlib would refuse later, and folders that cannot be written."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{asked}: must end in {' or '.join(SUFFIXES)}")
    try:
        writable(path.parent)
    except StoreError as error:
        raise StoreError(str(error).replace("paths.outputs", asked, 1)) from None


def require_matplotlib() -> None:
    """Errors: ConfigError where it is not installed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its cache of fonts
    try:
        from qexp.report import figures  # noqa: F401
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        how = f"{sys.executable} -m pip install '{MATPLOTLIB}'"
        raise ConfigError(f"the figures need matplotlib, which is not installed: {how}") from None


def _views(chosen: Settings) -> dict[str, View]:
    from qexp.report.formats import view

    schemes = {"weights": chosen.recipe.weight, "activations": chosen.recipe.activation}
    return {name: view(scheme.grid, scheme.rounding, chosen.seed) for name, scheme in schemes.items()}


def _print(recipe: Recipe, views: dict[str, View]) -> None:
    from qexp.report.levels_table import formats_table, levels_table
    from qexp.report.terminal import output

    output.print(formats_table(recipe, views))
    for name, view in views.items():
        if table := levels_table(name, view):
            output.print(table)


def _draw(chosen: Settings, views: dict[str, View], path: Path) -> None:
    """Both figures; the last line says where they are. Errors: ConfigError without matplotlib, StoreError."""
    from qexp.report.terminal import output

    require_matplotlib()
    from qexp.report import figures

    beside = path.with_stem(f"{path.stem}-histograms")
    fits, caption = _fits(chosen)
    try:
        figures.save(figures.staircases(views), path)
        figures.save(figures.histograms(fits, caption), beside)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from None
    output.print(f"figures in {path} and {beside}", markup=False)


def _fits(chosen: Settings) -> tuple[dict[str, list[Fit]], str]:
    """A sample of either tensor in symmetric and in affine codes, and what the samples are."""
    from qexp.report.formats import SAMPLE, activation_sample, fit, symmetric_and_affine, weight_sample

    recipe, seed = chosen.recipe, chosen.seed
    samples = {
        "weight": (weight_sample(seed), recipe.weight),
        "activation": (activation_sample(seed), recipe.activation),
    }
    fits = {name: [fit(x, s) for s in symmetric_and_affine(scheme)] for name, (x, scheme) in samples.items()}
    calibrations = " and ".join(dict.fromkeys(str(scheme.calibration) for _, scheme in samples.values()))
    caption = (
        f"{SAMPLE:,} values each, seed {seed}: normal, and Student's t (3 degrees of freedom) after a ReLU; "
        f"one scale for all, calibration {calibrations}"
    )
    return fits, caption
