"""qexp outliers: how far activations of a network lie out, and in which channels, as a table, a file and a picture."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qexp.composing import VerbParser
from qexp.jobs import Job, compose_one, require_places, silence_libraries
from qexp.levels_cli import require_drawable, require_matplotlib
from qexp.settings import Settings
from qexp.store import StoreError

if TYPE_CHECKING:
    from qexp.metrics.outliers import Outliers

USAGE = """\
qexp outliers: how far activations of a network lie out, and in which channels

usage: qexp outliers [--output FILE] [--config-dir DIR] [KEY=VALUE ...]

  qexp outliers model=minilm data=stdlib_docs
  qexp outliers model=minilm data=stdlib_docs smoothing=smoothquant
  qexp outliers model=mobilenet

KEY=VALUE is as in a run, and refused alike (qexp --help). The float network is that of a run, trained or from the
cache, with BatchNorm folded and smoothed as asked for; the calibration data pass through it, and whatever arrives at a
layer that a run quantizes is a site. A channel is an outlier where its max|x| exceeds 6 standard deviations of the
site.

  --output FILE      FILE.png or FILE.svg: the channels of each site; the figures of all sites go to FILE.csv beside it
                     (without it: <paths.outputs>/outliers/<model>-<data>/outliers.png)
  --config-dir DIR   configs of your own
"""


def main(arguments: list[str]) -> int:
    """Measure and draw. Errors: those of a run."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    parser = VerbParser("outliers")
    parser.add_argument("--output")
    given = parser.parse_intermixed_args(arguments)
    is_given = any(override.partition("=")[0] == "engine" for override in given.overrides)
    overrides = given.overrides if is_given else [*given.overrides, "engine=none"]
    job = compose_one(overrides, given.config_dir, "qexp outliers looks at")
    path = Path(given.output) if given.output else _default_path(job)
    require_drawable(path, f"--output={path}" if given.output else "paths.outputs")
    require_places([job])
    require_matplotlib()
    _show(_measured(job), path, _title(job.settings))
    return 0


def _names(settings: Settings) -> tuple[str, str]:
    model, data = (settings.config[group]["_target_"].rpartition(".")[2] for group in ("model", "data"))
    return model, data


def _default_path(job: Job) -> Path:
    words = filter(None, [*_names(job.settings), job.settings.smoothed])
    return job.outputs / "outliers" / re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(words)) / "outliers.png"


def _title(settings: Settings) -> str:
    model, data = _names(settings)
    told = f"{model}: activations on calibration data of {data}"
    return ", ".join(filter(None, [told, settings.smoothed, f"seed {settings.seed}"]))


def _measured(job: Job) -> list[Outliers]:
    """The statistics of the network as it would be quantized."""
    import torch

    from qexp import caches, passes, prepare, smoothing
    from qexp.metrics.outliers import outliers
    from qexp.quant.convert import fold_batchnorm_, targets
    from qexp.report import terminal
    from qexp.run import trained

    silence_libraries()
    settings = job.settings
    terminal.show_progress(settings.config["progress"])
    torch.set_num_threads(settings.config["trainer"]["threads"])
    found = trained(settings, job.outputs, logger=False)
    model = copy.deepcopy(found.net)
    if settings.config["fold_batchnorm"]:
        fold_batchnorm_(model, found.flow)
    smoothing.smooth_(model, settings, found.data, found.flow, caches.sketch_cache(found.cache, settings))
    in_float = found.flow.normalized_additions() + found.flow.uncalled()
    quantized = {name for name, _ in targets(model, settings.recipe)}.difference(in_float)
    with terminal.stage("two passes over the calibration data") as update:
        loader = prepare.calibration_loader(found.data, settings.seed)
        with prepare.evaluating(model):
            inputs = lambda: (x for x, _ in passes.counted(loader, update))  # noqa: E731
            return outliers(model, found.flow.example, inputs, quantized)


def _show(sites: list[Outliers], path: Path, title: str) -> None:
    from qexp.report import figures
    from qexp.report.outliers import outliers_table, write
    from qexp.report.outliers_figure import outliers_figure
    from qexp.report.terminal import output

    output.print(outliers_table(sites, title))
    table = path.with_suffix(".csv")
    try:
        write(table, sites)
        figures.save(outliers_figure(sites, title), path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from None
    output.print(f"all sites in {table}, the picture in {path}", markup=False)
