"""qexp's quantizers against those of other tools: where they differ, why, and who is right.

Each row compares a million float32 values: ties and their neighbours, range ends, denormals, zeros, huge and random
ones. The other tool's formula is computed as well and must give its results bit for bit, and each differing input
must belong to a named class; a row where that fails says UNEXPLAINED and the command ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from conformance_ import floats, ov, own, peers
from conformance_.compare import Tally, Tool, compare, ours
from conformance_.definition import DEFINITION, against_definition, refuses_what_is_not_finite
from conformance_.inputs import GRANULARITIES, Case, cases
from conformance_.table import Cell, section, unexplained

from qexp.quant.grid import CONVENTIONS, Grid, IntegerGrid

SAMPLE = 1008  # differing inputs of one format, granularity and tool that rational arithmetic judges
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}
BEGIN, END = "<!-- begin: scripts/conformance -->", "<!-- end: scripts/conformance -->"


def all_tools() -> list[Tool]:
    """In the order of the table; integers before floats."""
    return [*own.tools(), *ov.tools(), *peers.tools(), *floats.tools()]


def installed(tools: list[Tool]) -> list[Tool]:
    return [tool for tool in tools if find_spec(tool.package)]


def formats(bits: list[int]) -> list[Grid]:
    """All integer formats of these bits, and all floats."""
    return [*(IntegerGrid(b, name) for name in CONVENTIONS for b in bits), *floats.FORMATS]


def is_for(tool: Tool, grid: Grid) -> bool:
    """Whether a tool is about integers or floats, as the format is."""
    return ("codes" in tool.aspects) == isinstance(grid, IntegerGrid)


def measure(tools: list[Tool], grids: list[Grid], count: int) -> Iterator[Cell]:
    """All cells."""
    for grid in grids:
        asked = [tool for tool in tools if is_for(tool, grid)]
        for granularity in GRANULARITIES if asked else ():
            yield from _cells(asked, grid, granularity, count)


def _cells(tools: list[Tool], grid: Grid, granularity: str, count: int) -> Iterator[Cell]:
    asked = [tool for tool in tools if not tool.refuses(grid)]
    tallies: dict[tuple[str, str], Tally] = {}
    parts = list(cases(grid, granularity, count))
    for case in parts:
        for key, tally in _compare_all(asked, case, SAMPLE // len(parts)):
            tallies[key] = tallies.get(key, Tally()) + tally
    for (name, aspect), tally in tallies.items():
        yield Cell(name, aspect, granularity, grid, tally)
    for tool in tools:
        if why := tool.refuses(grid):
            yield Cell(tool.name, tool.aspects[-1], granularity, grid, refused=why)


def _compare_all(tools: list[Tool], case: Case, sample: int) -> Iterator[tuple[tuple[str, str], Tally]]:
    mine = ours(case)
    for aspect, tally in against_definition(case, mine, sample).items():
        yield (DEFINITION.name, aspect), tally
    for tool in tools:
        for aspect, tally in compare(tool, case, mine, sample).items():
            yield (tool.name, aspect), tally


def report(tools: list[Tool], cells: list[Cell]) -> str:
    """The sections of all tools, and what was measured."""
    lines = []
    for tool in (DEFINITION, *tools):
        own_cells = [cell for cell in cells if cell.tool == tool.name]
        lines += section(tool, own_cells) if own_cells else []
    return "\n".join([*lines, _versions(tools)])


def _versions(tools: list[Tool]) -> str:
    packages = dict.fromkeys(["torch", *(tool.package for tool in tools)])
    names = [f"{name} {version(DISTRIBUTIONS.get(name, name)).split('+')[0]}" for name in packages]
    return f"Measured with {', '.join(names)}."


def write(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _numbers(text: str) -> list[int]:
    """2-4,8 -> 2, 3, 4, 8."""
    parts = [part.split("-") for part in text.split(",")]
    return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=__doc__)
    parser.add_argument("--values", type=int, default=1_000_000, help="inputs of one format and granularity")
    parser.add_argument("--bits", type=_numbers, default=list(range(2, 9)), help="of integers, such as 2-8 or 4,8")
    parser.add_argument("--only", type=lambda text: text.split(","), help="packages, such as torch,onnxruntime")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the markers of this page")
    options = parser.parse_args(words)
    known = dict.fromkeys(tool.package for tool in all_tools())
    if wrong := set(options.only or ()) - set(known):
        parser.error(f"--only {','.join(sorted(wrong))}: allowed are {', '.join(known)}")
    return options


def progress(cells: Iterator[Cell], start: float) -> list[Cell]:
    """The cells as a list, each new format told on stderr."""
    found: list[Cell] = []
    for cell in cells:
        if not found or (cell.grid, cell.granularity) != (found[-1].grid, found[-1].granularity):
            print(f"{time.perf_counter() - start:4.0f} s  {cell.grid} {cell.granularity}", file=sys.stderr)
        found.append(cell)
    return found


def main(words: list[str] | None = None, tools: list[Tool] | None = None) -> int:
    """Measure and print; the exit status is 1 where something is unexplained."""
    options, start = _arguments(words), time.perf_counter()
    warnings.filterwarnings("ignore")
    tools = all_tools() if tools is None else tools
    chosen = installed([tool for tool in tools if not options.only or tool.package in options.only])
    refuses_what_is_not_finite()
    cells = progress(measure(chosen, formats(options.bits), options.values), start)
    text = report(chosen, cells)
    print(text)
    if options.write:
        write(options.write, text)
    missing = sorted({tool.package for tool in tools} - {tool.package for tool in installed(tools)})
    wrong, inputs = unexplained(cells), sum(cell.tally.inputs for cell in cells if cell.tally)
    print(f"{inputs:,} comparisons, {wrong} UNEXPLAINED, {time.perf_counter() - start:.0f} s"
          f"{', not installed: ' + ', '.join(missing) if missing else ''}", file=sys.stderr)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
