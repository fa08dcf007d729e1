"""Texts and labels of the user's own, from one csv file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from qexp.data.options import TABLE, require_file
from qexp.data.text import TextDataModule


class TextCSV(TextDataModule):
    """The columns `text` and `label` of a csv file; in a file .tsv, tabs separate the columns.

    A row that repeats an earlier one, text and label, is left out, for it could be trained on and tested. Classes are
    numbered in the sorted order of their labels, which are read as words.
    Raises `FileNotFoundError` for a missing file, `ValueError`, naming file and line, for one that cannot be used.

    >>> TextCSV()
    Traceback (most recent call last):
    ValueError: data.path=null: must name a csv or tsv file in UTF-8 whose first line names the columns
    """

    def __init__(self, path: str | Path | None = None, text: str = "text", label: str = "label", **options: Any):
        super().__init__(**options)
        self.path = require_file(path, TABLE)
        self.source = f"data.path={path}"
        self.text, self.label = str(text), str(label)
        if text == label:
            raise ValueError(f"data.label={label}: must be another column than data.text")
        self.repeated = 0  # rows that were left out

    @property
    def notice(self) -> str | None:
        """One sentence on what was done to the texts; None where nothing was."""
        notice = super().notice
        if not self.repeated:
            return notice
        rows = "1 repeated row was" if self.repeated == 1 else f"{self.repeated:,} repeated rows were"
        more = "" if notice is None else f"; {notice.removeprefix('data: ')}"
        return f"data: {rows} left out{more}"

    def read(self) -> tuple[list[str], list[str]]:
        """The texts and their labels, in the order of the file."""
        (_, header), *rows = self._rows()
        places = [self._place(header, option) for option in ("text", "label")]
        for line, row in rows:
            if len(row) > len(header):
                raise ValueError(
                    f"{self.source}: line {line} has {len(row)} columns instead of {len(header)}; "
                    f"a text that holds the separator must be in quotes"
                )
        pairs = [[row[place].strip() if place < len(row) else "" for place in places] for _, row in rows]
        lacking = [line for (line, _), pair in zip(rows, pairs, strict=True) if not all(pair)]
        if lacking:
            lines = ", ".join(map(str, lacking[:3])) + (", ..." if len(lacking) > 3 else "")
            what, where = ("1 row has", "line") if len(lacking) == 1 else (f"{len(lacking):,} rows have", "lines")
            raise ValueError(f"{self.source}: {what} no {self.text} or no {self.label} ({where} {lines})")
        once = list(dict.fromkeys(map(tuple, pairs)))
        self.repeated = len(pairs) - len(once)
        return [text for text, _ in once], [label for _, label in once]

    def _rows(self) -> list[tuple[int, list[str]]]:
        """The line in which each row begins, and its columns; the first row is the header."""
        data = self.path.read_bytes()
        try:
            content = data.decode("utf-8-sig")  # spreadsheets put a mark in front
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{self.source}: line {line} is not UTF-8; save the file as UTF-8") from None
        # A quote that is never closed is refused, where the usual reader would swallow the rest of the file.
        dialect = csv.excel_tab if self.path.suffix.lower() == ".tsv" else csv.excel
        reader = csv.reader(io.StringIO(content, newline=""), dialect, strict=True)
        rows, line = [], 1
        try:
            for row in reader:
                if row:  # not an empty line
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{self.source}: the row in line {line} cannot be read ({error})") from None
        if not rows:
            raise ValueError(f"{self.source}: the file is empty; it must be {TABLE}")
        return rows

    def _place(self, header: list[str], option: str) -> int:
        name = getattr(self, option)
        if name not in header:
            raise ValueError(f"data.{option}={name}: {self.path} has no such column; there are {', '.join(header)}")
        return header.index(name)
