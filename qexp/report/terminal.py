"""Tables and progress on the terminal."""

from __future__ import annotations

import csv
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from qexp.settings import Settings
from qexp.store import read_metrics
from qexp.tracking.metrics import DIFFERS_DB, timed_differs

WIDE = 200  # columns in a file or a pipe, where nothing is narrow


class _Console(Console):
    """What is printed here stands in the log of the run that is under way, too."""

    log: Console | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if _Console.log is not None:
            _Console.log.print(*objects, **options)


console = _Console(stderr=True, highlight=False)
output = _Console(highlight=False, soft_wrap=True)
if not output.is_terminal:
    output = _Console(highlight=False, soft_wrap=True, width=WIDE)

LOG_EVERY_S = 20
BEWARE = 0.01  # share of decisions in which engine and simulation may differ without a word
FEW = 4  # names of layers on one line
LAYERS_AGREE = 0.999  # share of codes that are the same when each layer is given what the engine gave it

Update = Callable[[int, int], None]  # called with what is done and what there is


class _Stages:
    """The stages of a run; on a terminal the current one shows its progress and the time to go."""

    bars: bool | str = "auto"  # true, false, or auto: only on a terminal


@contextmanager
def logging_to(path: Path, whole_process: bool = False) -> Iterator[None]:
    """Keep in a file what is printed here and what libraries log; or everything that this process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as file, _everything_to(file) if whole_process else _copies_to(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


@contextmanager
def _copies_to(file: TextIO) -> Iterator[None]:
    _Console.log = Console(file=file, highlight=False, soft_wrap=True, width=WIDE)
    try:
        yield
    finally:
        _Console.log = None


@contextmanager
def _everything_to(file: TextIO) -> Iterator[None]:
    """What C++ libraries and a crash write goes past Python: the descriptors themselves lead to the file."""
    before = {number: os.dup(number) for number in (1, 2)}
    for number in before:
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in before.items():
            os.dup2(old, number)
            os.close(old)


def to_log(text: str) -> None:
    """Lines for the log alone, such as where an error happened."""
    if _Console.log is not None:
        _Console.log.print(text, markup=False)
    elif not console.is_terminal:
        print(text, file=sys.stderr)


def draws() -> bool:
    """Whether there is a terminal to draw progress on."""
    return console.is_terminal if _Stages.bars == "auto" else bool(_Stages.bars)


def show_progress(wanted: bool | str) -> None:
    """Choose whether stages show bars: true, false or "auto"."""
    _Stages.bars = wanted


@contextmanager
def stage(what: str, live: bool = True) -> Iterator[Update]:
    """Say what is being done, and how long it took; yields what long loops report their progress to.

    A stage that measures time is not live: drawing would disturb it.
    """
    bars = live and draws()
    start = time.perf_counter()
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not bars) as progress:
        task = progress.add_task(what, total=None, count="")

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, count=f"{done}/{total}")
            if not bars:
                log(done, total)

        log = _logging(what)
        yield update
    console.print(f"[dim]{time.perf_counter() - start:6.1f} s[/dim]  {what}")


def _logging(what: str) -> Update:
    """Where there are no bars, as in the log of a cluster: a line every now and then."""
    start = said = time.perf_counter()

    def log(done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= LOG_EVERY_S and 0 < done < total:
            said = now
            to_go = datetime.timedelta(seconds=round((now - start) / done * (total - done)))
            console.print(f"[dim]         {what}: {done}/{total}, {to_go} to go[/dim]")

    return log


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _number(value: Any, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def run_table(metrics: dict[str, Any], engines: list[str], title: str) -> Table:
    """One run: a row a figure, a column an engine, the winner first."""
    engines = sorted(engines, key=lambda name: name != metrics.get("engine/winner"))
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    if not engines:
        table.add_column("simulation", justify="right")
    for name in engines:
        heading = f"{name} *" if name == metrics.get("engine/winner") else name
        table.add_column(heading, justify="right", overflow="fold")
    columns = [f"{name}/" for name in engines] or [""]

    def row(label: str, cell) -> None:
        cells = [cell(lambda key, prefix=prefix: metrics.get(prefix + key)) for prefix in columns]
        if any(cells):
            table.add_row(label, *cells)

    row("accuracy, fp32", lambda get: _share(metrics.get("acc/fp32")))
    row("accuracy, fp32 after as many steps", lambda get: _share(metrics.get("acc/control")))
    row("accuracy before fine-tuning", lambda get: _share(metrics.get("acc/ptq")))
    row("accuracy, simulated", lambda get: _share(get("acc/sim")))
    row("accuracy, int8 engine", lambda get: _share(get("acc/engine")))
    row("drop, points", lambda get: _number(_percent(get("acc/drop")), ".2f"))
    row("decided as fp32 does", lambda get: _share(get("agree/argmax")))
    row("SQNR of the logits", lambda get: _number(get("sqnr/output_db"), ".1f", " dB"))
    row("SQNR of the embeddings", lambda get: _number(get("sqnr/embedding_db"), ".1f", " dB"))
    row("codes equal to the simulation", lambda get: _number(_percent(get("parity/identical")), ".4f", " %"))
    row("the same, each layer by itself", lambda get: _number(_percent(get("parity/local_identical")), ".4f", " %"))
    row("largest step, flipped decisions", _parity_cell)
    row("formats of activations", lambda get: get("int8/formats"))
    row("multiply-accumulates in int8", lambda get: _share(get("int8/mac_coverage")))
    row("layers in float", _islands)
    row("latency fp32 -> int8" if "latency/int8_ms" in metrics else "latency fp32", _latency_cell)
    row("speed-up, 95 % interval", _speedup_cell)
    row("over the best fp32", lambda get: _number(get("latency/speedup_over_best_fp32"), ".2f", "x"))
    row("size fp32 -> int8", _size_cell)
    row("weights packed, of it scales", lambda get: _packed_cell(metrics.get))
    return table


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _parity_cell(get) -> str:
    step = get("parity/max_step")
    return "" if step is None else f"{step}, {get('parity/argmax_flips')}"


def _latency_cell(get) -> str:
    fp32, int8 = get("latency/fp32_ms"), get("latency/int8_ms")
    if fp32 is None:
        return ""
    return f"{fp32:.4g} ms" if int8 is None else f"{fp32:.4g} -> {int8:.4g} ms"


def _speedup_cell(get) -> str:
    if get("latency/speedup") is None:
        return ""
    return f"{get('latency/speedup'):.2f}x [{get('latency/speedup_lo'):.2f}, {get('latency/speedup_hi'):.2f}]"


def _size_cell(get) -> str:
    fp32, int8 = get("size/fp32_bytes"), get("size/int8_bytes")
    return "" if fp32 is None or int8 is None else f"{fp32 / 1024:.0f} -> {int8 / 1024:.0f} KiB"


def _packed_cell(get) -> str:
    packed, scales = get("size/packed_bytes"), get("size/qparams_bytes")
    return "" if packed is None else f"{packed / 1024:.1f}, {scales / 1024:.2f} KiB"


def report(folder: Path, settings: Settings, look: str = "") -> None:
    """All of one run from its record: what stayed in float, the table, where to look."""
    metrics = read_metrics(folder)
    with (folder / "unquantized.csv").open(newline="") as file:
        for line in _in_float(list(csv.reader(file))[1:]):
            output.print(line, markup=False)
    asked = settings.config["engine"]["engines"]
    engines = [name for name in asked if any(key.startswith(f"{name}/") for key in metrics)]
    samples = metrics["data/test_samples"]
    for name in engines:
        flips = metrics.get(f"{name}/parity/argmax_flips", 0)
        if flips > BEWARE * samples:
            text = f"beware: {name} decides {flips} of {samples} samples otherwise than the simulation"
            local = metrics.get(f"{name}/parity/local_identical", 0.0)
            why = "its figures are its own, the simulation does not explain them"
            if local > LAYERS_AGREE:
                why = (
                    f"layer by layer {100 * local:.4f} % of codes are the same, and what differs grows on the way "
                    "through the network"
                )
            output.print(f"{text}: {why}", markup=False)
        output_db, timed_db = (metrics.get(f"{name}/parity/{key}_sqnr_db") for key in ("output", "timed"))
        echo_db = metrics.get(f"{name}/parity/faithful_sqnr_db")
        if echo_db is not None and echo_db < DIFFERS_DB and (output_db is None or echo_db < output_db):
            text = f"beware: the graph in which {name} shows its codes computes something else than the timed one"
            output.print(f"{text} (SQNR {echo_db:.1f} dB), so that its codes say little", markup=False)
        if timed_differs(timed_db, output_db):
            batch = settings.config["engine"]["batch_size"]
            text = f"beware: {name} at engine.batch_size={batch} computes something else than the simulation"
            output.print(f"{text} (SQNR {timed_db:.1f} dB), so that its latency says nothing", markup=False)
    for name in engines or [""]:
        if told := _of_batch(name, metrics):
            output.print(told, markup=False)
    title = settings.label
    if settings.method != "fp32":
        title += f"\nweights {settings.recipe.weight}\nactivations {settings.recipe.activation}"
    output.print(run_table(metrics, engines, title))
    where(folder, look)


def _in_float(rows: list[list[str]]) -> list[str]:
    """One line for each kind of layer and reason; of many layers the first ones."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer, kind, reason in rows:
        found.setdefault((kind, reason), []).append(layer)
    return [f"in float: {_few(layers)} ({kind}): {reason}" for (kind, reason), layers in found.items()]


def _few(names: list[str]) -> str:
    more = len(names) - FEW
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:FEW])} and {more} more"


def _islands(get) -> str:
    """Layers that an engine runs in float, by name where they are few."""
    names = (get("int8/island_names") or "").split(", ")
    return ", ".join(names) if names[0] and len(names) <= FEW else _number(get("int8/islands"), "d")


def _of_batch(engine: str, metrics: dict[str, Any]) -> str | None:
    """What ranges of each call mean for a sample; None where there are none."""
    named, prefix = (f"{engine}: ", f"{engine}/dynamic/") if engine else ("", "dynamic/")
    if f"{prefix}within_sample" not in metrics:
        return None
    sqnr, samples, flips = (metrics.get(prefix + key) for key in ("batch_sqnr_db", "batch_samples", "batch_flips"))
    if metrics[f"{prefix}within_sample"]:
        rounding = "" if sqnr is None else f", but for the rounding of sums (SQNR {sqnr:.1f} dB)"
        return f"{named}the result of a sample does not depend on its batch{rounding}"
    differ = "the same" if sqnr is None else f"SQNR {sqnr:.1f} dB"
    text = f"beware: {named}the range of each call is one for the whole batch"
    return f"{text}: of {samples} samples {flips} are decided differently alone ({differ})"


def where(folder: Path, look: str = "") -> None:
    """The one line that says where to look; `look` is where the logger's record is, or how to see it."""
    how = "look at it with: " if " leet " in look else ""
    output.print(f"results in {folder}{f'; {how}{look}' if look else ''}", markup=False)


# Heading -> cell, in the order of the table.
SWEEP_COLUMNS = {
    "fp32 %": lambda get: _number(_percent(get("acc/fp32")), ".2f"),
    "fp32 tuned %": lambda get: _number(_percent(get("acc/control")), ".2f"),
    "PTQ %": lambda get: _number(_percent(get("acc/ptq")), ".2f"),
    "quant %": lambda get: _number(_percent(get("acc/sim") if get("acc/engine") is None else get("acc/engine")), ".2f"),
    "drop": lambda get: _number(_percent(get("acc/drop")), ".2f"),
    "SQNR dB": lambda get: _number(get("sqnr/output_db"), ".1f"),
    "codes = %": lambda get: _number(_percent(get("parity/identical")), ".3f"),
    "int8 MACs %": lambda get: _number(_percent(get("int8/mac_coverage")), ".0f"),
    "speed-up": lambda get: _number(get("latency/speedup"), ".2f", "x"),
    "KiB": lambda get: "" if get("size/packed_bytes") is None else f"{get('size/packed_bytes') / 1024:.1f}",
}
# What a narrow terminal goes without, the first first.
SPARED = ["KiB", "codes = %", "int8 MACs %", "SQNR dB", "fp32 %", "fp32 tuned %", "PTQ %"]


def sweep_table(rows: list[dict[str, Any]], console: Console = output, title: str | None = None) -> Table:
    """Several runs, one a row; columns are the choices that vary and the figures that matter most."""
    title = title or f"{len(rows)} runs"
    known = [row["metrics"].get for row in rows if row["metrics"] is not None]
    filled = [heading for heading, cell in SWEEP_COLUMNS.items() if any(map(cell, known))] or ["quant %"]
    spared = [heading for heading in SPARED if heading in filled]
    unbounded = console.options.update(max_width=10_000)
    for count in range(len(spared) + 1):
        table = _sweep_table(rows, filled, spared[:count], title)
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    return table


def _sweep_table(rows: list[dict[str, Any]], filled: list[str], spared: list[str], title: str) -> Table:
    varied = list(dict.fromkeys(key for row in rows for key in row["choice"]))
    shown = [heading for heading in filled if heading not in spared]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=f"a wider terminal also shows {', '.join(spared)}" if spared else None, collapse_padding=True,
    )  # fmt: skip
    for key in varied:
        table.add_column(key.removeprefix("quantizer."), overflow="fold")
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for row in rows:
        cells = ["[red]failed[/red]", *[""] * (len(shown) - 1)]
        if row["metrics"] is not None:
            cells = [SWEEP_COLUMNS[heading](row["metrics"].get) for heading in shown]
        table.add_row(*[escape(row["choice"].get(key, "")) for key in varied], *cells, row["run_id"])
    return table
