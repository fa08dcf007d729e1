"""What a paper found (qexp/papers) beside what a sweep found: the paper's table, with rows of ours on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qexp import papers
from qexp.compare.differences import at, brief, same_word
from qexp.compare.groups import ACC, Group, has
from qexp.compare.records import Sweep

MOST_COLUMNS = 7  # choices beside each other; more are below each other


@dataclass(frozen=True)
class Beside:
    """The table of a paper that the experiment of a sweep repeats."""

    experiment: str
    paper: papers.Paper

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Its choices, each once, in its order."""
        found: list[dict[str, Any]] = []
        for row in self.paper.rows:
            if row.choice not in found:
                found.append(row.choice)
        return found

    def metric(self, groups: Sequence[Group]) -> str:
        """The figure of ours that compares; the usual accuracy where ours has none of that name."""
        known = any(has(run, self.paper.metric) for group in groups for run in group.runs)
        return self.paper.metric if known else ACC

    def table(self, groups: Sequence[Group], text: Callable[[Group, str], str]) -> tuple[list[str], list[list[str]]]:
        """Heading and rows, where `text` writes a figure of ours: fp32 and each choice, first ours, then the networks.

        Nothing of the paper's is left out, whether ours has a like or not.
        """
        choices, lines = self.choices, self._ours(groups, text) | self._theirs()
        heading = ["", "fp32", *(" ".join(_word(key, value) for key, value in choice.items()) for choice in choices)]
        rows = [[name, *cells] for name, cells in lines.items()]
        if not any(row[1] for row in rows):
            heading, rows = [heading[0], *heading[2:]], [[row[0], *row[2:]] for row in rows]
        if len(choices) > MOST_COLUMNS:
            heading, *rows = [list(line) for line in zip(heading, *rows, strict=True)]
        return heading, rows

    def _ours(self, groups: Sequence[Group], text: Callable[[Group, str], str]) -> dict[str, list[str]]:
        """Groups that agree with a choice, by their other settings."""
        choices, metric = self.choices, self.metric(groups)
        keys = {key for choice in choices for key in choice}
        lines: dict[str, list[str]] = {}
        for group in groups:
            for place, choice in enumerate(choices, 1):
                if agree(choice, group):
                    others = {key: word for key, word in group.settings.items() if not _is_of(key, keys)}
                    name = f"ours, {Group(others, []).name}" if others else "ours"
                    line = lines.setdefault(name, [text(group, "acc/fp32"), *[""] * len(choices)])
                    line[place] = "; ".join(filter(None, [line[place], text(group, metric)]))
        return lines

    def _theirs(self) -> dict[str, list[str]]:
        choices = self.choices
        lines: dict[str, list[str]] = {}
        for row in self.paper.rows:
            line = lines.setdefault(row.network, [""] * (1 + len(choices)))
            line[1 + choices.index(row.choice)] = f"{row.value:g}"
            if row.fp32 is not None:
                line[0] = f"{row.fp32:g}"
        return lines


def agree(choice: dict[str, Any], group: Group) -> bool:
    """Whether all runs of a group have these values, in the words of their sweep or in those of their configs.

    >>> agree({"calibration": "mse"}, Group({"calibration": "MSE"}, []))
    True
    """
    return all(
        any(same_word(said, brief(value)) for said in _said(key, group)) for key, value in choice.items()
    )  # fmt: skip


def _is_of(key: str, sections: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _said(key: str, group: Group) -> set[str]:
    if key in group.settings:
        return {group.settings[key]}
    if key in group.choice:
        return {group.choice[key]}
    values = {brief(at(run.config, key)) for run in group.runs}
    return values if len(values) == 1 else set()


def _word(key: str, value: Any) -> str:
    """A value; what it is of where it does not say so."""
    text = brief(value)
    return text if isinstance(value, str) else f"{key.rpartition('.')[2]} {text}"


def paper_of(sweep: Sweep) -> Beside | None:
    """The table that the experiment of a sweep repeats, where there is one. Errors: ValueError for a damaged one."""
    paper = papers.load(sweep.experiment) if sweep.experiment else None
    return Beside(sweep.experiment, paper) if paper else None
