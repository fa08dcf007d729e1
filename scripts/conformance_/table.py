"""The table: cells with one verdict become one row, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from conformance_.compare import ASPECTS, Tally, Tool
from qexp.quant.grid import CONVENTIONS, Grid, IntegerGrid

HEAD = ("what", "scales", "format", "bits", "inputs that differ", "which ones, and why",
        "right by the definition: qexp, it", "right in real arithmetic: qexp, it")  # fmt: skip
NAMES = {"scale": "S itself"}


@dataclass(frozen=True)
class Cell:
    """One tool, aspect, granularity and format: counts, or why there are none."""

    tool: str
    aspect: str
    granularity: str
    grid: Grid
    tally: Tally | None = None
    refused: str = ""

    @property
    def verdict(self) -> str:
        if self.tally is None:
            return f"not offered: {self.refused}"
        if self.tally.unexplained:
            return "UNEXPLAINED"
        return "differs" if self.tally.differ else "identical"

    @property
    def format(self) -> str:
        """What stands in the column of formats; bits have their own."""
        if isinstance(self.grid, IntegerGrid):
            return self.grid.convention
        special = {"ieee": " with infinities", "fn": "", "none": ""}[self.grid.specials]
        return f"E{self.grid.exponent_bits}M{self.grid.mantissa_bits}{special}"


def unexplained(cells: Iterable[Cell]) -> int:
    """Number of cells with an input that nothing explains."""
    return sum(cell.verdict == "UNEXPLAINED" for cell in cells)


def section(tool: Tool, cells: list[Cell]) -> list[str]:
    """Heading, formula and table of one tool."""
    rows = [_row(*key, group) for key, group in _groups(cells)]
    lines = [f"### {tool.name}", "", f"It computes {tool.says}.", ""]
    return [*lines, _line(HEAD), "|" + " --- |" * len(HEAD), *map(_line, rows), ""]


def _line(columns: Iterable[str]) -> str:
    return "| " + " | ".join(column.replace("|", "\\|") for column in columns) + " |"


def _groups(cells: list[Cell]) -> list[tuple[tuple[str, str, str, str], list[Cell]]]:
    """(aspects, granularities, formats, bits) with the cells of one verdict, as few rows as possible."""
    found: dict = defaultdict(list)
    for cell in cells:
        found[cell.verdict, cell.aspect, cell.granularity, cell.format].append(cell)
    # The name of a float says how many bits it has.
    bits = {key: _range(c.grid.bits for c in group) if _integers(group) else "" for key, group in found.items()}
    merged = _merge({(*key, bits[key]): group for key, group in found.items()}, 3)
    merged = _merge(merged, 2, merge_differing=False)
    merged = _merge(merged, 1, merge_differing=False)
    return [((key[1], key[2], key[3], key[4]), group) for key, group in merged.items()]


def _merge(rows: dict[tuple, list[Cell]], column: int, merge_differing: bool = True) -> dict[tuple, list[Cell]]:
    """Rows that are equal but for one column, joined."""
    found: dict = defaultdict(list)
    for key, group in rows.items():
        # Counts of another aspect or granularity stay apart, and so do scales, of which there are few.
        differs = key[0] in ("differs", "UNEXPLAINED") or key[1] == "scale"
        apart = key[column] if not merge_differing and differs else None
        found[(*key[:column], apart, *key[column + 1 :])].append((key[column], group))
    return {
        (*key[:column], ", ".join(dict.fromkeys(name for name, _ in parts)), *key[column + 1 :]):
        [cell for _, group in parts for cell in group]
        for key, parts in found.items()
    }  # fmt: skip


def _integers(cells: list[Cell]) -> bool:
    return isinstance(cells[0].grid, IntegerGrid)


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(set(numbers))
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _row(aspects: str, granularities: str, formats: str, bits: str, cells: list[Cell]) -> list[str]:
    others = set(CONVENTIONS) - set(formats.split(", "))
    if len(others) < 2:
        formats = f"all but {others.pop()}" if others else "all six"
    aspects = ", ".join(NAMES.get(a, a) for a in ASPECTS if a in aspects.split(", "))
    start = [aspects, granularities, formats, bits or _range(cell.grid.bits for cell in cells)]
    tallies = [cell.tally for cell in cells if cell.tally is not None]
    if not tallies:
        return [*start, "", cells[0].verdict, "", ""]
    inputs = _span([tally.inputs for tally in tallies])
    if cells[0].verdict == "identical":
        return [*start, f"none of {inputs}", "identical", "", ""]
    differ = _span([tally.differ for tally in tallies])
    return [*start, f"{differ} of {inputs}", _why(tallies), *(_agreement(tallies, q) for q in ("definition", "real"))]


def _why(tallies: list[Tally]) -> str:
    texts = dict.fromkeys(text for tally in tallies for text, count in tally.reasons.items() if count)
    parts = [f"{text} ({_span([tally.reasons[text] for tally in tallies])})" for text in texts]
    left = sum(tally.unexplained for tally in tallies)
    return "; ".join(([f"UNEXPLAINED: {left:,} inputs"] if left else []) + parts)


def _agreement(tallies: list[Tally], question: str) -> str:
    checked = sum(tally.checked for tally in tallies)
    sides = [sum(tally.right[side, question] for tally in tallies) for side in ("qexp", "tool")]
    return f"{_percent(sides[0], checked)}, {_percent(sides[1], checked)} of {checked:,}" if checked else ""


def _percent(part: int, whole: int) -> str:
    if part in (0, whole):
        return f"{100 * part // whole} %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
